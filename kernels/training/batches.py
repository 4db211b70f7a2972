"""Which windows of the text a step reads: by an integer hash of the seed and the step, the same on every machine."""
from __future__ import annotations

import torch

from .. import bits


def drawn(text: torch.Tensor, step: torch.Tensor, batch: int, length: int, seed: int) -> torch.Tensor:
    """text (N,) uint8, step (1,) int64 -> (batch, length + 1) int64: windows that may begin anywhere.

    All on the text's device, so that a captured step draws anew. Raises ValueError for a text shorter than a window.
    """
    if len(text) <= length:
        raise ValueError(f"text must be longer than {length} bytes, got {len(text)}")
    row = step * batch + torch.arange(batch, dtype=torch.int64, device=text.device)
    begin = bits.hashed(row, seed) % (len(text) - length)
    return text[begin[:, None] + torch.arange(length + 1, dtype=torch.int64, device=text.device)].long()
