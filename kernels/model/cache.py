"""What a model holds on its device: the KV cache, and the check that something will fit before it is made."""
from __future__ import annotations

import re
from pathlib import Path

import torch


class KVCache:
    """Keys and values of every layer, allocated once: no address and no shape changes while a model runs.

    kv is (layers, requests, capacity, 2 * kv_heads, head_dim): at each position a token's keys, then its values.
    Positions not written yet hold 0, so that a masked value is 0 x 0 and never 0 x NaN.

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
