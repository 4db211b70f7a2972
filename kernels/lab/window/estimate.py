"""What measuring windows will take, in bytes and in seconds, from a model's sizes alone: nothing is allocated.

The bytes of a pass beside its weights and cache were measured on a CPU and are rounded up; a test holds the sum against
a process' real peak. Seconds are rough until a machine's ceilings are known.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ...model.cache import free_memory
from ...model.config import Config
from .. import bench
from .measure import Ceilings, floor_ms

FIXED = 64 << 20
COPIES = 2  # of what a layer makes of a window
GUESSED = {"cpu": Ceilings(10.0, 0.1), "cuda": Ceilings(2000.0, 400.0)}
OVER_FLOOR = 3  # a pass takes longer than its products alone
MADE_A_SECOND = {"cpu": 3e6, "cuda": 2e9}  # weights


def bytes_needed(config: Config, window: int, passes: int, dtype: torch.dtype) -> int:
    """Bytes of the weights and of this window's passes (curves times ops), each of which has a cache of its own."""
    qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
    of_a_token = 2 * config.intermediate_size + qkv + 4 * config.hidden_size
    cache = config.layers * 2 * config.kv_heads * config.head_dim
    logits = config.vocab_size * (4 + dtype.itemsize)
    rotary = config.context * config.head_dim * 4 * 4  # worked out in float64
    rows = window * passes * (cache + COPIES * of_a_token) * dtype.itemsize
    return FIXED + config.parameters * dtype.itemsize + rotary + logits + rows


def refuse_too_large(config: Config, windows: Sequence[int], passes: int, dtype: torch.dtype, device: torch.device, *,
                     beside: int = 0) -> int:
    """The bytes that the largest window needs and `beside`. Raises MemoryError that names them if they cannot fit."""
    needed = bytes_needed(config, max(windows), passes, dtype) + beside
    free = free_memory(device)
    if free is not None and needed > free:
        raise MemoryError(f"{config.name} and a window of {max(windows)} tokens need about {bench.gigabytes(needed)}, "
                          f"and {bench.gigabytes(free)} are free: choose a smaller model, or fewer tokens or curves")
    return needed


def seconds(config: Config, windows: Sequence[int], passes: int, dtype: torch.dtype, device: torch.device,
            ceilings: Ceilings | None = None, rounds: int = 1) -> float:
    """Seconds for so many rounds at each window, and for making the model."""
    known = ceilings or GUESSED.get(device.type, GUESSED["cpu"])
    floors = sum(floor_ms(config, window, dtype, known) for window in set(windows)) / 1e3
    return config.parameters / MADE_A_SECOND.get(device.type, 3e6) + OVER_FLOOR * rounds * passes * floors
