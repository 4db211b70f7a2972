"""Random padded batches: whether every token's logits are those its prompt has alone.

There are PROMPTS prompts of four lengths, the longest of `tokens` tokens. A batch takes some of them in any order, one
may come twice, and pads them to `tokens` with zeros that its mask hides, on the left or on the right. So all batches
have one shape and prompts alone have four, which is as many as compiled layers are compiled for.
"""
from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from ...bits import elements_differ, hashed
from .examples import own, padded

PROMPTS = 8


def pool(vocabulary: int, tokens: int, device: torch.device) -> list[torch.Tensor]:
    """The prompts: a quarter, a half, three quarters and all of `tokens` long, at least one."""
    lengths = [max(1, tokens * (i % 4 + 1) // 4) for i in range(PROMPTS)]
    return [(hashed(torch.arange(n, dtype=torch.int64, device="cpu"), i) % vocabulary).to(device)
            for i, n in enumerate(lengths)]


@torch.no_grad()
def random_batches(forward: Callable, prompts: list[torch.Tensor], batches: int, rows: int,
                   seed: int = 0) -> tuple[list[float], int]:
    """(microseconds of each padded forward, how many logits differ from those of the prompts alone).

    forward(input_ids=, attention_mask=, position_ids=) gives logits (rows, tokens, vocabulary).
    """
    alone = [forward(**padded([prompt]))[0].clone() for prompt in prompts]  # its graph writes there again
    length, draw, us, differ = max(map(len, prompts)), random.Random(seed), [], 0
    for left in (True, False):  # what is compiled is compiled now
        forward(**padded(prompts[:rows], left, length))
    for _ in range(batches):
        chosen, left = draw.choices(range(len(prompts)), k=rows), draw.random() < 0.5
        given = padded([prompts[i] for i in chosen], left, length)
        start = time.perf_counter()
        found = forward(**given)
        found[0, 0, 0].item()  # waits for it
        us.append(1e6 * (time.perf_counter() - start))
        differ += sum(elements_differ(found[row, own(prompts[i], length, left)], alone[i])
                      for row, i in enumerate(chosen))
    return us, differ
