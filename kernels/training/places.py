"""Where the tokens of a batch of equal sequences stand: made once, used by every layer of every step."""
from __future__ import annotations

import torch

from ..model.config import Config
from ..model.rotary_table import rotary_table
from ..ops.attention.sequences import Sequences


class Places:
    """`batch` sequences of `length` tokens each, one after another, from position 0.

    sequences    what attention is told
    positions    (batch * length,) int64
    table        the rotary table of the model, and turned_back: the same with the sines' signs turned

    Raises ValueError for a batch or a length below 1, or a length beyond the model's context.
    """

    def __init__(self, config: Config, batch: int, length: int, device: torch.device):
        if batch < 1 or not 1 <= length <= config.context:
            raise ValueError(f"batch must be at least 1 and length from 1 to {config.name}'s context of "
                             f"{config.context}, got {batch} and {length}")
        self.length = length
        self.sequences = Sequences([length] * batch, [length] * batch, device)
        self.positions = torch.arange(length, dtype=torch.int64, device=device).repeat(batch)
        self.table = rotary_table(config, device)
        cos, sin = self.table.chunk(2, -1)
        self.turned_back = torch.cat([cos, -sin], -1)
