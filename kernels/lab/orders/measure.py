"""Sums in many orders at once: the numbers, the orders, the ways to add, and how far from exact each sum ends.

Every addition here is one correctly rounded addition in the numbers' own format, so one order has one result on
every machine. Orders come from an integer hash, so that they too are the same everywhere.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import lru_cache, wraps

import numpy as np
import pandas as pd
import torch

from ... import bits
from ...arithmetic import sums
from ...op import DTYPES

QUANTUM = 2.0**-48  # fixed_point's grid
PARTS = 8  # of the kind "split"


# Numbers.

def numbers(n: int, dtype: torch.dtype = torch.float32, spread: int = 0, positive: bool = False,
            seed: int = 0) -> torch.Tensor:
    """(n,) numbers of this dtype in (-1, 1), or (0, 1), the same on every machine.

    Sizes lie over 4 powers of two, and `spread` more below them. ValueError for n < 1 or a spread outside 0..60.
    """
    _whole("n", n, 1)
    _whole("spread", spread, 0, 60)
    if dtype not in DTYPES.values():
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    x = bits.portable(1, n, dtype, seed=seed)[0].float()
    powers = torch.tensor([2.0**-k for k in range(spread + 1)], dtype=torch.float32, device="cpu")
    x = x * powers[bits.hashed(torch.arange(n, dtype=torch.int64, device="cpu"), seed + 1) % (spread + 1)]
    return (x.abs() if positive else x).to(dtype)


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between two neighbouring numbers of this dtype, at this size and above it.

    TypeError for a dtype without a fraction, ValueError for an infinite value or NaN.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value}")
    limits, size = torch.finfo(dtype), 2.0 ** (math.frexp(value)[1] - 1) if value else 0.0
    return max(size, limits.smallest_normal) * limits.eps


def exact(x: torch.Tensor) -> Fraction:
    """The sum of a vector without any rounding. TypeError or ValueError unless x is one, of finite numbers."""
    _vector(x)
    return sum(map(Fraction, x.double().tolist()), Fraction(0))


def unit(x: torch.Tensor) -> float:
    """One ulp at the exact sum of vector x, or at its largest number where that sum is 0."""
    return ulp(float(exact(x)) or x.abs().max().item(), x.dtype)


def errors(found: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """How far each of the sums `found` is from the exact sum of x, in units of `unit(x)`; float64.

    TypeError or ValueError unless x is a vector of finite numbers and `found` a tensor.
    """
    _tensor("found", found)
    return (found.double() - float(exact(x))) / unit(x)


# Orders, as rows of indices.

@lru_cache(maxsize=2)
def permutations(n: int) -> torch.Tensor:
    """(n!, n) int64: every order of n numbers, n at most 8."""
    _whole("n", n, 1, 8)
    return torch.tensor(list(itertools.permutations(range(n))), dtype=torch.int64, device="cpu")


@lru_cache(maxsize=2)
def shuffles(n: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, n) int64: `count` orders of n numbers drawn at random, the same on every machine."""
    _whole("n", n, 1)
    _whole("count", count, 1)
    step = max(1, (1 << 15) // n)  # rows whose keys stay in a CPU's cache
    keys = (bits.hashed(torch.arange(start * n, min(start + step, count) * n, dtype=torch.int64, device="cpu"),
                        seed + 1000) for start in range(0, count, step))
    return torch.from_numpy(np.concatenate([key.numpy().reshape(-1, n).argsort(-1) for key in keys]))


def arrivals(blocks: int, runs: int, jitter: float, workers: int = 16, seed: int = 0) -> torch.Tensor:
    """(runs, blocks) int64: in which order blocks of one size finish, a race simulated `runs` times.

    Blocks start in order, as soon as one of the `workers` is free. Each takes 1 unit of time and up to `jitter` more.
    """
    _whole("blocks", blocks, 1)
    _whole("runs", runs, 1)
    _whole("workers", workers, 1)
    if not 0 <= jitter <= 1000:
        raise ValueError(f"jitter must be 0 to 1000, got {jitter}")
    noise = bits.hashed(torch.arange(runs * blocks, dtype=torch.int64, device="cpu"), seed + 2000).view(runs, blocks)
    times = (1 << 20) + noise % (int(jitter * (1 << 20)) + 1)  # whole numbers: every machine counts alike
    free, ends = torch.zeros(runs, workers, dtype=torch.int64, device="cpu"), []
    for block in range(blocks):
        first, worker = free.min(-1, keepdim=True)
        ends.append(first + times[:, block, None])
        free = free.scatter(-1, worker, ends[-1])
    return torch.cat(ends, -1).argsort(stable=True)


# Ways to add: (..., n) -> (...), each addition rounded to x's dtype.

def _in_parts(add: Callable) -> Callable:
    """The same way to add for a row cut in `parts`: each part so, then the partial sums so."""
    @wraps(add)
    def added(x: torch.Tensor, parts: int = 1) -> torch.Tensor:
        _check(x, parts)
        return add(x if parts == 1 else torch.stack([add(part) for part in x.tensor_split(parts, -1)], -1))
    return added


@_in_parts
def sequential(x):
    """Left to right."""
    total, *rest = x.unbind(-1)
    for number in rest:
        total = total + number
    return total


@_in_parts
def pairwise(x):
    """Neighbours in pairs, then pairs of pairs; a row that is no power of two is padded with +0."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    return sums.add_neighbours(torch.nn.functional.pad(x, (0, width - x.shape[-1])))[..., 0]


@_in_parts
def kahan(x):
    """Left to right, carrying what each addition lost over to the next (Kahan, 1965)."""
    total, *rest = x.unbind(-1)
    lost = torch.zeros_like(total)
    for number in rest:
        number = number - lost
        after = total + number
        lost = (after - total) - number
        total = after
    return total


def fixed_point(x: torch.Tensor, parts: int = 1, quantum: float = QUANTUM) -> torch.Tensor:
    """Every number as a whole multiple of `quantum`, added as int64, and only the total rounded to x's dtype.

    Integers have no order, however the row is cut. ValueError where the sum could need more than 63 bits, or for a
    quantum that is not above 0.
    """
    _check(x, parts)
    if not 0 < quantum < math.inf:
        raise ValueError(f"quantum must be above 0 and finite, got {quantum}")
    n, largest = x.shape[-1], x.abs().max().item() if x.numel() else 0.0
    if not n * largest < quantum * 2.0**62:  # written so that a NaN is refused too
        raise ValueError(f"x holds {n} numbers up to {largest:.3g}, "
                         f"too large for steps of {quantum:.3g}")
    whole = (x.double() / quantum).round().to(torch.int64)
    total = sum(part.sum(-1) for part in whole.tensor_split(parts, -1))
    return (total.double() * quantum).to(x.dtype)


def split(x: torch.Tensor) -> torch.Tensor:
    """Left to right in each of PARTS parts (one a number, if there are fewer), then over the partial sums."""
    _check(x)
    return sequential(x, min(PARTS, x.shape[-1]))


KINDS: Mapping[str, Callable] = {"sequential": sequential, "split": split, "pairwise": pairwise, "Kahan": kahan,
                                 "fixed point": fixed_point}


def every_order(x: torch.Tensor) -> torch.Tensor:
    """(n,) -> (1 x 3 x 5 x ... x (2n - 3),): the sum in every order there is, brackets included; n at most 9.

    From the sums of all subsets: a set's last addition joins the part with its first number and the part without.
    """
    _tensor("x", x)
    n = x.numel()
    if x.dim() != 1 or not 1 <= n <= 9:
        raise ValueError(f"x must be a vector of 1 to 9 numbers, got shape {tuple(x.shape)}")
    found = {1 << i: x[i : i + 1] for i in range(n)}
    for members in range(1, 1 << n):
        others = members & (members - 1)  # without the first number
        joined, part = [], others
        while part:
            joined.append((found[members ^ part][:, None] + found[part]).flatten())
            part = (part - 1) & others
        found[members] = torch.cat(joined) if joined else found[members]
    return found[(1 << n) - 1]


# Many sums of the same numbers.

def distribution(x: torch.Tensor, orders: torch.Tensor, kinds=tuple(KINDS)) -> dict[str, torch.Tensor]:
    """The sums of vector x in each of these orders, by each kind of KINDS. ValueError for an unknown kind."""
    if isinstance(kinds, str) or not isinstance(kinds, Iterable):
        raise TypeError(f"kinds must be a list of some of {', '.join(KINDS)}, got {kinds!r}")
    kinds = tuple(kinds)
    unknown = [str(kind) for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
    _check(x)
    rows = x[orders]
    return {kind: KINDS[kind](rows) for kind in kinds}


def summary(found: Mapping[str, torch.Tensor], x: torch.Tensor) -> pd.DataFrame:
    """A line for each name: how many sums, how many different ones, and the worst distance from exact in ulps."""
    lines = [{"kind": name, "orders": y.numel(), "different results": len(np.unique(bits.bits(y).cpu())),
              "worst error (ulp)": errors(y, x).abs().max().item()} for name, y in found.items()]
    return pd.DataFrame(lines).set_index("kind")


def _tensor(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {x.dtype}")


def _vector(x):
    _tensor("x", x)
    if x.dim() != 1:
        raise ValueError(f"x must be a vector, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x must hold finite numbers, got an infinity or NaN")


def _check(x, parts=1):
    _tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    _whole("parts", parts, 1, x.shape[-1])


def _whole(name, value, least, most=None):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {f'{least} to {most}' if most else f'at least {least}'}, got {value}")
