"""Which piece of each weight a rank has, and whether every rank cuts the same weights.

qkv, gate_up, head   by rows: a rank's heads, its columns of the MLP, its tokens of the vocabulary
output, down         along k: the columns that meet those rows
embedding, norms     whole on every rank

Where there are more ranks than heads of keys and values, neighbours share one, and each of them has it.
"""
from __future__ import annotations

import dataclasses

import torch

from ... import bits
from ...ops.all_reduce import ranks as words
from ...ops.matmul.order import LEAVES, shared_order
from ...ops.matmul.shared import SHARES
from ..config import Config
from ..weights import Weights
from .join import Ranks

ALONG_K = ("output", "down")
_CHUNK = 1 << 24


def check(config: Config, size: int, ops: str = "invariant") -> None:
    """Raise ValueError that names the number that ranks cannot share out."""
    if size not in SHARES:
        raise ValueError(f"the number of ranks must be 1, 2, 4 or 8, which divide the eight leaves of k, got {size!r}")
    if size == 1:
        return
    if ops not in ("default", "invariant"):
        raise ValueError(f"ops must be default or invariant on several ranks, got {ops!r}")
    for field in ("heads", "intermediate_size", "vocab_size"):
        if getattr(config, field) % size:
            raise ValueError(f"{field} of {config.name} must be a multiple of the {size} ranks, got "
                             f"{getattr(config, field)}")
    if config.kv_heads % size and size % config.kv_heads:
        raise ValueError(f"kv_heads of {config.name} must be a multiple or a divisor of the {size} ranks, got "
                         f"{config.kv_heads}")
    if ops == "invariant":
        _check_leaves(config)


def _check_leaves(config: Config) -> None:
    if config.shared != LEAVES:
        raise ValueError(f"shared of {config.name} must be {LEAVES}, the order that several ranks can carry out, got "
                         f"{config.shared}")
    for name in ALONG_K:
        k = config.layer_shapes[name][1]
        if LEAVES * shared_order(*config.layer_shapes[name]).length != k:
            raise ValueError(f"the k of {name} in {config.name} must be a multiple of 256 and at least 512, so that "
                             f"eight leaves end where ranks' shares do, got {k}")


def local(config: Config, size: int) -> Config:
    """The sizes that one of `size` ranks has; the vocabulary and the context are whole."""
    if size == 1:
        return config
    return dataclasses.replace(config, heads=config.heads // size, kv_heads=max(1, config.kv_heads // size),
                               intermediate_size=config.intermediate_size // size, shared=1)


def piece(config: Config, name: str, weight: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """A rank's piece of the whole weight `name`, contiguous."""
    part = name.rpartition(".")[2]
    if size == 1 or part not in ("qkv", "gate_up", "head", *ALONG_K):
        return weight
    if part in ALONG_K:
        return weight[:, _share(weight.shape[1], size, rank)].contiguous()
    return torch.cat([weight[rows] for rows in _rows(config, part, size, rank)])


def _rows(config: Config, part: str, size: int, rank: int) -> list[slice]:
    if part == "head":
        return [_share(config.vocab_size, size, rank)]
    if part == "gate_up":
        mine, f = _share(config.intermediate_size, size, rank), config.intermediate_size
        return [mine, slice(f + mine.start, f + mine.stop)]
    width = config.head_dim
    q, kv = config.heads * width, config.kv_heads * width
    first = rank * config.kv_heads // size * width  # with more ranks than heads, neighbours begin at the same one
    last = first + max(1, config.kv_heads // size) * width
    return [_share(q, size, rank), slice(q + first, q + last), slice(q + kv + first, q + kv + last)]


def _share(whole: int, size: int, rank: int) -> slice:
    return slice(rank * whole // size, (rank + 1) * whole // size)


class Cut:
    """Weights for one rank, (name, shape) -> its piece; remembers a fingerprint of each whole weight."""

    def __init__(self, config: Config, weights: Weights, ranks: Ranks, dtype: torch.dtype):
        self.config, self.whole, self.ranks, self.dtype = config, weights, ranks, dtype
        self.shapes, self.seen = config.shapes, {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        weight = self.whole(name, self.shapes[name]).to(self.ranks.device)
        self.seen[name] = f"{weight.dtype} {tuple(weight.shape)} {fingerprint(weight):016x}"
        return piece(self.config, name, weight, self.ranks.size, self.ranks.rank)

    def agree(self, ops: str) -> None:
        """Raise ValueError on every rank if one of them has another model, other ops, another dtype or weight."""
        mine = {"sizes": repr(self.config), "ops": ops, "dtype": str(self.dtype), **self.seen}
        every = words.told_objects(mine, self.ranks.group)
        for rank, theirs in enumerate(every):
            other = next((name for name in {**every[0], **theirs} if every[0].get(name) != theirs.get(name)), None)
            if other is not None:
                kind = other if other in ("sizes", "ops", "dtype") else f"weight {other}"
                raise ValueError(f"all ranks must have the same model: {kind} is {theirs.get(other)} on rank {rank} "
                                 f"and {every[0].get(other)} on rank 0")


def fingerprint(weight: torch.Tensor) -> int:
    """64 bits of a tensor's own bits: a sum of hashed integers, which has no order, made where the tensor is."""
    numbers, total = bits.bits(weight).flatten(), 0
    for start in range(0, len(numbers), _CHUNK):
        some = numbers[start : start + _CHUNK].long() & 0xFFFFFFFF
        place = torch.arange(start, start + len(some), dtype=torch.int64, device=weight.device)
        total += int(bits.hashed(some ^ bits.hashed(place, 1), 2).sum())
    return total & (1 << 64) - 1
