"""What a model holds on its device: the KV cache, and the check that something will fit before it is made."""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ..ops.attention.sequences import Sequences
from .batch import Batch


class KVCache:
    """Keys and values of every layer, allocated once: no address and no shape changes while a model runs.

    kv is (layers, requests, capacity, 2 * kv_heads, head_dim): at each position a token's keys, then its values.
    Positions not written yet hold 0, so that a masked value is 0 x 0 and never 0 x NaN.

    A model asks a cache for no more than `kv`, and a batch for slots and Sequences: pages can take rows' place.

    Raises ValueError for sizes below 1 or a capacity beyond config.context, MemoryError if it cannot fit.
    """

    def __init__(self, config, requests: int, capacity: int, dtype: torch.dtype, device):
        if requests < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least 1 request and 1 token, got {requests} and {capacity}")
        if capacity > config.context:
            raise ValueError(f"a cache of {capacity} tokens is longer than {config.name}'s context of {config.context}")
        shape = (config.layers, requests, capacity, 2 * config.kv_heads, config.head_dim)
        size = torch.Size(shape).numel() * dtype.itemsize
        check_fits(f"a KV cache of {requests} x {capacity} tokens for {config.name}", size, device)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.requests, self.capacity = requests, capacity

    def batch(self, tokens: Iterable[int], prefixes: Iterable[int], rows: Iterable[int] | None = None) -> Batch:
        """The batch in which request i adds tokens[i] tokens behind the prefixes[i] that its row of the cache holds.

        rows[i] is its row, by default row i. What a row holds beyond the prefix is written over, or not seen.
        Raises TypeError or ValueError that names the argument.
        """
        tokens, prefixes = list(tokens), list(prefixes)
        rows = list(range(len(tokens)) if rows is None else rows)
        if not tokens or len(prefixes) != len(tokens) or len(rows) != len(tokens):
            raise ValueError("tokens, prefixes and rows must have one entry for each of at least one request, got "
                             f"{len(tokens)}, {len(prefixes)} and {len(rows)}")
        _check_integers("tokens", tokens, 1, self.capacity)
        _check_integers("prefixes", prefixes, 0, self.capacity)
        _check_integers("rows", rows, 0, self.requests - 1)
        self._check_room(tokens, prefixes, rows)
        counts = np.array(tokens)
        keys, row = counts + prefixes, np.array(rows)
        every = rows == list(range(self.requests))
        sequences = Sequences(counts, keys, self.kv.device, slots=None if every else row)
        begin = row * self.capacity + prefixes - sequences.starts
        return Batch(sequences, np.repeat(begin, counts) + np.arange(sequences.tokens), (self.requests, self.capacity))

    def _check_room(self, tokens, prefixes, rows):
        for i, (new, held) in enumerate(zip(tokens, prefixes, strict=True)):
            if new + held > self.capacity:
                raise ValueError(f"request {i} has {new} tokens behind {held}, which is more than the {self.capacity} "
                                 "that the cache holds")
        if len(set(rows)) < len(rows):
            raise ValueError(f"rows must differ, for two requests cannot write to one, got {rows}")


def _check_integers(name: str, values: list, least: int, most: int) -> None:
    for i, value in enumerate(values):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name} must be integers, got {value!r} at {i}")
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in {least}..{most}, got {value} at {i}")


def check_fits(what: str, size: int, device) -> None:
    """Raise MemoryError naming `what`, its size and the memory free, if `size` bytes are more than is free."""
    free = free_memory(torch.device(device))
    if free is not None and size > free:
        raise MemoryError(f"{what} takes {size / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: "
                          "choose a smaller one, or free memory first")


def free_memory(device: torch.device) -> int | None:
    """Bytes a new tensor can have on this device, or None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    try:
        return int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None
