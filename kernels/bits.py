"""Bits: comparing them, hashing them, counting how far apart they are, and inputs that are the same everywhere."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .runtime import require_subnormals

_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its width, every NaN made the one canonical NaN first."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.view(_VIEWS[tensor.element_size()])


def as_tuple(value) -> tuple[torch.Tensor, ...]:
    """The tensors of a result: of a tensor, a NumPy array, or a tuple, list or dict of them, however deep.

    Raises TypeError for anything else.
    """
    return tuple(tensor for _, tensor in _leaves(value))


def _leaves(value, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """Each tensor with the keys that lead to it; a place in a tuple or list has no name."""
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    if isinstance(value, np.ndarray):
        return [(path, torch.from_numpy(value))]
    if isinstance(value, Mapping):
        return [leaf for key in sorted(value, key=str) for leaf in _leaves(value[key], f"{path}/{key}")]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item, path)]
    raise TypeError("bits are those of a tensor, a NumPy array, or a tuple, list or dict of them, got "
                    f"{type(value).__name__}")


def same_bits(a, b) -> bool:
    """Whether two tensors (or NumPy arrays, or tuples, lists or dicts of them) are the same bit for bit.

    -0.0 and +0.0 differ; every NaN equals every NaN. Unlike torch.equal, which has both the other way.
    """
    a, b = _leaves(a), _leaves(b)
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and there == here and torch.equal(bits(x), bits(y.to(x.device)))
        for (there, x), (here, y) in zip(a, b, strict=True)
    )


def digest(value) -> str:
    """SHA-256 over dtype, shape and bits of what `same_bits` takes: 64 hex digits, the same on any machine."""
    total = hashlib.sha256()
    for path, tensor in _leaves(value):
        total.update(f"{path}{tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(bits(tensor).cpu().numpy().tobytes())
    return total.hexdigest()


def elements_differ(a, b) -> int:
    """How many elements differ in their bits, over a tensor or a tuple of them."""
    return sum(int(moved(x, y).sum()) for x, y in zip(as_tuple(a), as_tuple(b), strict=True))


def moved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors' bits differ. ValueError unless they have one shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare bits of {a.dtype} {tuple(a.shape)} with {b.dtype} {tuple(b.shape)}")
    return bits(a) != bits(b.to(a.device))


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many floating-point numbers lie between a and b, element by element (int64; -0.0 and +0.0 are 0 apart)."""
    if a.dtype != b.dtype:
        raise TypeError(f"ulp_distance needs two tensors of one dtype, got {a.dtype} and {b.dtype}")

    def ordered(x):
        i = bits(x).to(torch.int64)
        return torch.where(i < 0, torch.iinfo(_VIEWS[x.element_size()]).min - i, i)

    return (ordered(a) - ordered(b.to(a.device))).abs()


@dataclass(frozen=True)
class Difference:
    """The first element found to differ: in which output, batch, row and column, and both values."""

    output: int
    batch: str
    row: int
    element: int
    alone: float
    together: float

    def __str__(self):
        return (f"output {self.output}, batch {self.batch}, row {self.row}, element {self.element}: "
                f"{self.alone!r} became {self.together!r}")


@dataclass(frozen=True)
class Report:
    """What check_invariance found. True when nothing differed."""

    trials: int
    elements: int
    elements_differ: int
    largest_ulp: int
    first: Difference | None

    def __bool__(self):
        return self.first is None

    def __str__(self):
        if self:
            return f"same bits in {self.trials} batches ({self.elements:,} elements compared)"
        share = 100 * self.elements_differ / self.elements
        return (f"bits moved: {self.elements_differ:,} of {self.elements:,} elements ({share:.2g} %), "
                f"up to {self.largest_ulp} ulp; first at {self.first}")


def check_invariance(function: Callable, arguments: tuple, per_token: Sequence[int] = (0,),
                     batches: Iterable[torch.Tensor | slice] | None = None) -> Report:
    """Compare every row computed in one full batch with the same row computed in other batches.

    `per_token` says which arguments hold one row a token. `batches` are row selections (slices or index
    tensors, so rows may be permuted or repeated); by default each power of two from the front, a few rows
    alone, the reverse, and one row repeated. `function` must not overwrite its arguments.
    """
    tokens = arguments[per_token[0]].shape[0]
    full = as_tuple(function(*arguments))
    batches = list(_default_batches(tokens) if batches is None else batches)
    elements = differ = largest = 0
    first = None
    for batch in batches:
        some = tuple(a[batch] if i in per_token and a is not None else a for i, a in enumerate(arguments))
        for output, (whole, part) in enumerate(zip(full, as_tuple(function(*some)), strict=True)):
            expected = whole[batch].to(part.device)
            where = moved(expected, part)
            elements += where.numel()
            if not where.any():
                continue
            differ += int(where.sum())
            finite = where & expected.isfinite() & part.isfinite()
            if finite.any():
                largest = max(largest, int(ulp_distance(expected, part)[finite].max()))
            if first is None:
                at = tuple(int(i) for i in where.nonzero()[0])
                rows = torch.arange(tokens, dtype=torch.int64, device=part.device)[batch]
                width = part[0].numel()
                element = int(where[at[0]].flatten().nonzero()[0]) if width > 1 else 0
                first = Difference(output, _describe(batch), int(rows[at[0]]), element,
                                   part[at].item(), expected[at].item())
    return Report(len(batches), elements, differ, largest, first)


def _default_batches(tokens: int) -> list:
    sizes = [1 << i for i in range(tokens.bit_length()) if 1 << i < tokens]
    alone = sorted({0, tokens // 3, tokens - 1} - {-1})
    whole = torch.arange(tokens, dtype=torch.int64, device="cpu")
    return ([slice(0, n) for n in sizes] + [slice(i, i + 1) for i in alone]
            + [slice(tokens - n, tokens) for n in sizes[1:]] + [whole.flip(0), whole[:1].repeat(tokens)])


def _describe(batch) -> str:
    if isinstance(batch, slice):
        return f"rows {batch.start}:{batch.stop}"
    return f"of {len(batch)} chosen rows"


def hashed(index: torch.Tensor, seed: int) -> torch.Tensor:
    """32 well mixed bits from an int64 index, by multiplications that never overflow 63 bits."""
    x = (index + seed * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def portable(rows: int, width: int, dtype: torch.dtype = torch.float32, device="cpu", seed: int = 0,
             scale: int = 0) -> torch.Tensor:
    """A (rows, width) input with the same bits on every machine: a hashed integer times a power of two.

    Row i depends on i, the width and the seed, never on `rows`. Values fill the significand up to its last
    bit and lie in [-1, 1) times 2**scale, spread over four binades so that additions round.
    """
    require_subnormals()
    precision = SIGNIFICANT_BITS[dtype]
    out = torch.empty(rows, width, dtype=dtype, device=device)
    if out.is_meta:  # no numbers, and each operation on one would take a millisecond
        return out
    step = max(1, (1 << (18 if out.is_cpu else 26)) // max(width, 1))  # a CPU's cache holds a slice
    column = torch.arange(width, dtype=torch.int64, device=device)
    binades = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float32, device=device)
    for start in range(0, rows, step):
        row = torch.arange(start, min(start + step, rows), dtype=torch.int64, device=device)[:, None]
        h = hashed(row * width + column, seed)
        integer = (h & ((1 << min(precision, 24)) - 1)) - (1 << (min(precision, 24) - 1))
        binade = binades[(h >> 28) & 3]
        out[start : start + step] = (integer.float() * (binade * 2.0 ** (scale + 1 - min(precision, 24)))).to(dtype)
    return out


ADVERSARIAL = ("cancellation", "wide", "subnormal", "signed_zero", "huge", "nan_neighbour")


def adversarial(kind: str, rows: int, width: int, dtype: torch.dtype = torch.float32, device="cpu",
                seed: int = 0) -> torch.Tensor:
    """A (rows, width) input made to hurt, the same on every machine.

    cancellation  neighbours of opposite sign and nearly the same size
    wide          magnitudes over most of the dtype's exponents
    subnormal     subnormal numbers among a few normal ones
    signed_zero   mostly +0.0 and -0.0
    huge          values whose squares overflow
    nan_neighbour every third row holds a NaN and infinities; the others must not notice
    """
    x = portable(rows, width, torch.float32, device, seed)
    h = hashed(torch.arange(rows * width, dtype=torch.int64, device=device).view(rows, width), seed + 1)
    limits = torch.finfo(dtype)
    low, high = (-24, 15) if dtype == torch.float16 else (-140, 120)
    if kind == "cancellation":
        flip = 1.0 - 2.0 * (torch.arange(width, dtype=torch.int64, device=device) % 2).float()
        x = flip * (1.0 + x * max(2.0**-10, 2.0 ** (4 - SIGNIFICANT_BITS[dtype])))  # bfloat16 needs the wider spread
    elif kind == "wide":
        exponent = low // 2 + h % (high // 2 - low // 2)
        x = x * ((exponent + 127) << 23).int().view(torch.float32)  # an exact power of two, built from its bits
    elif kind == "subnormal":
        x = torch.where(h % 7 == 0, x, x * limits.smallest_normal)
    elif kind == "signed_zero":
        x = torch.where(h % 5 == 0, x, torch.copysign(torch.zeros_like(x), x))
    elif kind == "huge":
        x = x * (limits.max / 4)
    elif kind == "nan_neighbour":
        third = torch.arange(rows, dtype=torch.int64, device=device)[:, None] % 3 == 2
        x = torch.where(third & (h % 11 == 0), torch.full_like(x, float("inf")), x)
        x = torch.where(third & (h % 13 == 0), torch.full_like(x, float("nan")), x)
    else:
        raise ValueError(f"adversarial kind must be one of {', '.join(ADVERSARIAL)}, got {kind!r}")
    return x.to(dtype)
