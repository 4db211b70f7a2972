"""What a tensor core does when it adds, exactly, in plain PyTorch on a CPU or a GPU.

One output of x @ weight.T in bfloat16 or float16 with a float32 accumulator is a chain over k. The chain's
step, for the next `block` products (16 on Hopper) and the accumulator:

    1. Every product is exact. Its exponent is the sum of its factors' exponents, not renormalised:
       1.5 x 1.5 = 2.25 has exponent 0. A subnormal factor has the exponent of the smallest normal number.
    2. The largest exponent, of the products and the accumulator, decides a grid: 2**(largest - fraction_bits),
       where fraction_bits is 25 on Hopper. A zero has the exponent -108 - fraction_bits, -133 on Hopper.
    3. Each product and the accumulator are cut toward zero to that grid, one by one, then added exactly.
    4. The sum is cut toward zero to float32: the new accumulator. 2**128 and beyond is infinity.

Inside a step the products may come in any order, since exact sums have none; the steps come in the order of k.
The number of rows, the neighbours and the tiles of a kernel appear nowhere. No accumulator has a smaller exponent
than a zero, so zeros that pad the last step change nothing. A sum of zero is +0; infinities and NaN propagate, and
every NaN is 0x7fffffff.

Sources: Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science
2021; Xie, Wang, Yang and Yang, MMA-Sim, arXiv 2511.10909, whose package `mmasim` gave the bits in the tests.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from .. import bits, runtime
from ..runtime import device_function, tl

_SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}  # of a normal number
_SIGNIFICAND_BITS = {torch.bfloat16: 7, torch.float16: 10}  # stored ones
_UNIT = 149  # the chain counts in units of 2**-149, the smallest float32, so that trunc() cuts to whole ones
_CPU_PRODUCTS, _GPU_PRODUCTS = 28672, 1 << 24  # at once: PyTorch keeps so short an operation on one core of a CPU
_PATCH = 16  # tiles, one below the other, that share unpacked weights


@dataclass(frozen=True)
class Adder:
    """How an architecture adds: products a step, and bits kept below the largest exponent.

    Raises ValueError for a block outside 1..64 or fraction bits outside 10..40.
    """

    block: int
    fraction_bits: int

    def __post_init__(self):
        for name, low, high in (("block", 1, 64), ("fraction_bits", 10, 40)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")

    @property
    def zero_exponent(self) -> int:
        """The exponent of a zero accumulator."""
        return -108 - self.fraction_bits


VOLTA = Adder(4, 23)  # float16 alone
AMPERE = Adder(8, 24)
HOPPER = Adder(16, 25)
ADDERS = {"Volta": VOLTA, "Turing": AMPERE, "Ampere": AMPERE, "Ada": AMPERE, "Hopper": HOPPER, "Blackwell": HOPPER}


def chain(x, weight, adder: Adder = HOPPER, start=None) -> torch.Tensor:
    """x (M, K), weight (N, K), bfloat16 or float16 -> x @ weight.T as float32 (M, N), one chain over k.

    `start` (M, N) float32 is the accumulator before the first step; zeros by default. Any M, N and K from 0, any
    strides. On a CPU it takes one core and a few megabytes beyond the result, on a GPU some hundred megabytes. No
    gradient flows. Raises TypeError or ValueError for anything else.
    """
    _check(x, weight, adder, start)
    x, weight = x.detach(), weight.detach()
    rows, columns = x.shape[0], weight.shape[0]
    out = torch.zeros(rows, columns, dtype=torch.float32, device=x.device) if start is None else start.detach().clone()
    limit = _GPU_PRODUCTS if x.is_cuda else _CPU_PRODUCTS
    high, wide = _tile(rows, columns, limit // adder.block)
    length = adder.block * max(1, limit // (adder.block * max(_PATCH * high, wide)))  # of k, unpacked at once
    for j in range(0, columns, wide):
        for i in range(0, rows, _PATCH * high):
            patch = slice(i, i + _PATCH * high), slice(j, j + wide)
            out[patch] = _patch(x[patch[0]], weight[patch[1]], out[patch], adder, high, length)
    return out


def _tile(rows: int, columns: int, area: int) -> tuple[int, int]:
    """How many rows and columns of outputs at once; at least 256 columns, so that they share unpacked rows."""
    wide = min(max(area // max(rows, 1), 256), max(columns, 1))
    return area // wide, wide


def _patch(x, weight, start, adder: Adder, high: int, length: int) -> torch.Tensor:
    """`start` and all products, float32: one patch of outputs, `high` rows and a `length` of k at a time."""
    total = start.double().mul_(2.0**_UNIT)
    room = torch.empty(2, adder.block, min(high, len(x)), len(weight), dtype=torch.float64, device=x.device)
    for k in range(0, x.shape[1], length):
        rows, columns = _unpack(x[:, k : k + length], _UNIT), _unpack(weight[:, k : k + length], 0)
        for i in range(0, len(x), high):
            sums = total[i : i + high]
            _add([m[:, i : i + high] for m in rows], columns, sums, room[:, :, : len(sums)], adder)
    result = total.mul_(2.0**-_UNIT).float().add_(0.0)  # -0 becomes +0
    result.view(torch.int32).masked_fill_(result.isnan(), 0x7FFFFFFF)
    return result if x.shape[1] else start


def _unpack(matrix, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, K) -> numbers and what their exponents stand for (0 for a zero), (K, rows) float64, times 2**unit."""
    matrix = matrix.t().contiguous()
    stored = matrix.view(torch.int16)
    smallest = 1 << _SIGNIFICAND_BITS[matrix.dtype]  # as stored, an exponent of 1
    powers = (stored & -smallest & 0x7FFF).clamp_(smallest, 0x7FFF & -2 * smallest)
    powers = powers.masked_fill_(matrix == 0, 0).view(matrix.dtype)
    return tuple(m.double().mul_(2.0**unit) for m in (matrix, powers))


def _add(x, weight, total, room, adder: Adder) -> None:
    """Add all products of two unpacked matrices to total (rows, columns), step by step, in place."""
    for a, a_power, b, b_power in zip(*(m.split(adder.block) for m in (*x, *weight)), strict=True):
        products, powers = room[:, : len(a)]
        torch.mul(a[:, :, None], b[:, None, :], out=products)
        torch.mul(a_power[:, :, None], b_power[:, None, :], out=powers)
        _step(products, powers.amax(0), total, adder)


def _step(products, power, total, adder: Adder) -> None:
    """Add products (block, rows, columns), the largest of power (rows, columns), to total in place."""
    grid = torch.maximum(power, _power(total, adder)).mul_(2.0**-adder.fraction_bits)
    products.div_(grid, rounding_mode="trunc")  # on a CPU trunc_() would start all cores, for however few numbers
    total.div_(grid, rounding_mode="trunc").add_(products.sum(0)).mul_(grid)
    total.div_(1, rounding_mode="trunc").view(torch.int64).bitwise_and_(-1 << 29)  # whole units, then 24 bits
    total.mul_(2.0 ** (896 - _UNIT)).mul_(2.0 ** (_UNIT - 896))  # 2**128 and beyond become infinity


def _power(total, adder: Adder) -> torch.Tensor:
    """The power of two that an accumulator's exponent stands for, read from the bits of float64."""
    power = (total.view(torch.int64) & 2047 << 52).view(torch.float64)
    power.clamp_(2.0 ** (_UNIT - 126), 2.0 ** (_UNIT + 127))
    return power.masked_fill_(total == 0, 2.0 ** (_UNIT + adder.zero_exponent))


@device_function
def tl_chain(x, weight, total, SMALLEST: tl.constexpr):
    """`chain` on Hopper in Triton's interpreter, which holds 16-bit numbers as float32.

    x [A, K], weight [B, K], total [A, B] float32; SMALLEST is the dtype's smallest normal number. In float64, where
    every step but the cuts is exact, so that no sum here has an order.
    """
    BLOCKS: tl.constexpr = x.shape[1] // 16
    xs = tl.reshape(x, [x.shape[0], BLOCKS, 16])
    weights = tl.reshape(weight, [weight.shape[0], BLOCKS, 16])
    for block in range(BLOCKS):
        a = tl.gather(xs, tl.full([x.shape[0], 1, 16], block, tl.int32), axis=1)
        b = tl.gather(weights, tl.full([weight.shape[0], 1, 16], block, tl.int32), axis=1)
        b = tl.permute(b, [1, 0, 2])
        products = a.to(tl.float64) * b.to(tl.float64)
        powers = _tl_power(a, SMALLEST, 0.0) * _tl_power(b, SMALLEST, 0.0)
        grid = tl.maximum(tl.max(powers, axis=2), _tl_power(total, 2.0**-126, 2.0**-133)) * 2.0**-25
        cut = tl.sum(_tl_trunc(products / grid[:, :, None]), axis=2) + _tl_trunc(total.to(tl.float64) / grid)
        exact = _tl_trunc(cut * grid * 2.0**149) * 2.0**-149  # whole units of the smallest float32
        kept = (exact.to(tl.int64, bitcast=True) & -536870912).to(tl.float64, bitcast=True)  # 24 bits of float64's 53
        total = kept.to(tl.float32) + 0.0
    return total


@device_function
def _tl_power(x, SMALLEST: tl.constexpr, ZERO: tl.constexpr):
    """The power of two that a float32's exponent stands for, as float64: at least SMALLEST, but ZERO for a zero."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.minimum(tl.maximum(power.to(tl.float64), SMALLEST), 2.0**127)
    return tl.where(x == 0.0, ZERO, power)


@device_function
def _tl_trunc(x):
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


def _check(x, weight, adder, start) -> None:
    if not isinstance(adder, Adder):
        raise TypeError(f"adder must be an Adder such as HOPPER, got {adder!r}")
    for name, matrix in (("x", x), ("weight", weight)):
        _check_dtype(name, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(matrix.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be (N, {x.shape[1]}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if start is None:
        return
    shape = (x.shape[0], weight.shape[0])
    if not isinstance(start, torch.Tensor) or start.dtype != torch.float32:
        raise TypeError(f"start must be a float32 tensor, got {getattr(start, 'dtype', type(start))}")
    if start.shape != shape or start.device != x.device:
        raise ValueError(f"start must be {shape} on {x.device}, got {tuple(start.shape)} on {start.device}")


def _check_dtype(name, tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _SMALLEST_EXPONENT:
        raise TypeError(f"{name} must be a bfloat16 or float16 tensor, got {getattr(tensor, 'dtype', type(tensor))}")


@dataclass(frozen=True)
class Comparison:
    """Outputs compared, how many differ in a bit (of a NaN too), and the first: (row, column, expected, got)."""

    outputs: int
    mismatches: int
    first: tuple[int, int, float, float] | None

    def __bool__(self):
        return self.mismatches == 0

    def __str__(self):
        if self:
            return f"same bits in all {self.outputs:,} outputs"
        row, column, expected, got = self.first
        return (f"{self.mismatches:,} of {self.outputs:,} outputs differ; first at row {row}, column {column}: "
                f"{expected!r} expected, {got!r} found")


def differences(expected, got) -> Comparison:
    """Compare two float32 matrices bit for bit. TypeError or ValueError unless both are float32 of one shape."""
    if got.dtype != torch.float32:
        raise TypeError(f"a product to compare must be float32, or its last bits are lost, got {got.dtype}")
    if got.shape != expected.shape:
        raise ValueError(f"a product to compare must have shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    moved = expected.contiguous().view(torch.int32) != got.contiguous().view(torch.int32)
    if not moved.any():
        return Comparison(moved.numel(), 0, None)
    row, column = (int(i) for i in moved.nonzero()[0])
    return Comparison(moved.numel(), int(moved.sum()), (row, column, expected[row, column].item(),
                                                        got[row, column].item()))


def compare(matmul: Callable, x, weight, adder: Adder = HOPPER) -> Comparison:
    """Compare matmul(x, weight), float32 (M, N), with the chain. Falsy if one bit differs."""
    return differences(chain(x, weight, adder), matmul(x, weight))


def probe(matmul: Callable, dtype=torch.bfloat16, device=None) -> Adder:
    """Find out how `matmul` adds, from one product, and check the answer on some hundred others.

    matmul(x (M, K), weight (N, K)) -> float32 (M, N) on `device` (by default where examples run). Block: big - big
    + small is small only if the small product comes a step later. Fraction bits: in one step, one - one + 2**-f is
    2**-f only if it was kept. Raises ValueError if matmul adds in no such way, or in steps of fewer than three.
    """
    device = device or runtime.device()
    blocks, fractions = range(2, 66), range(1, 37)
    x = torch.zeros(len(blocks) + len(fractions), 128, dtype=torch.float32, device="cpu")
    x[:, 0], x[:, 1] = 2.0**12, -(2.0**12)
    for row, place in enumerate(blocks):
        x[row, place] = 2.0**-24
    for row, f in enumerate(fractions, start=len(blocks)):
        x[row, 1], x[row, 2] = 2.0 ** (12 - f), -(2.0**12)
    survived = matmul(x.to(dtype).to(device), torch.ones(64, 128, dtype=dtype, device=device))[:, 0] != 0
    lost_small, kept_small = (~survived[: len(blocks)]).tolist(), survived[len(blocks) :].tolist()
    block, fraction_bits = 2 + sum(lost_small), sum(kept_small)
    clear = all(found == sorted(found, reverse=True) for found in (lost_small, kept_small))
    if not (clear and 3 <= block <= 64 and 10 <= fraction_bits < len(fractions)):
        raise ValueError("matmul does not add in steps of 3 to 64 products, in the order of k, each cut 10 to 35 bits "
                         "below the largest")
    adder = Adder(block, fraction_bits)
    inputs = (bits.adversarial("wide", 64, 5 * block, dtype, device, seed) for seed in (1, 2))
    found = compare(matmul, *inputs, adder)
    if not found:
        raise ValueError(f"matmul looks like {adder} but adds differently: {found}")
    return adder


def explain(a, b, accumulator: float = 0.0, adder: Adder = HOPPER) -> dict:
    """One step as a table: a, b (products,) of one dtype, at most adder.block, and a float32 accumulator.

    -> `exponent` (the largest), `grid`, `terms`, `sum` (exact sum of what was kept), `lost` (what the whole step
    threw away: exact minus result) and `result`. Each term: its name, factors, exact `value`, `exponent` (None for
    a zero product), `kept_bits` (sign and binary digits in units of 2**exponent), `lost_bits` (the digits after
    them), `kept` and `lost`. Worked out in whole numbers, apart from the chain. Raises TypeError or ValueError for
    other dtypes, infinities, NaN, and more products than a step has.
    """
    for name, factors in (("a", a), ("b", b)):
        _check_dtype(name, factors)
        if factors.dim() != 1 or len(factors) != len(a) or len(factors) > adder.block:
            raise ValueError(f"{name} must be one row of at most {adder.block} numbers, as many as the other, "
                             f"got shape {tuple(factors.shape)}")
        if not factors.isfinite().all():
            raise ValueError(f"{name} must be finite, got {factors.tolist()}")
    if b.dtype != a.dtype:
        raise TypeError(f"b must have a's dtype {a.dtype}, got {b.dtype}")
    start = torch.tensor(accumulator, dtype=torch.float32, device="cpu").item()
    if not math.isfinite(accumulator) or start != accumulator:
        raise ValueError(f"accumulator must be a finite float32 number, got {accumulator!r}")
    low = _SMALLEST_EXPONENT[a.dtype]
    terms = [("accumulator", None, None, Fraction(accumulator),
              _exponent(accumulator, -126) if accumulator else adder.zero_exponent)]
    for k, (p, q) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        terms.append((f"product {k}", p, q, Fraction(p) * Fraction(q),
                      _exponent(p, low) + _exponent(q, low) if p * q else None))
    largest = max(exponent for *_, exponent in terms if exponent is not None)
    grid = Fraction(2) ** (largest - adder.fraction_bits)
    kept = [int(value / grid) * grid for *_, value, _ in terms]
    exact, total = sum(value for *_, value, _ in terms), sum(kept)
    result = _cut_to_float32(total)
    rows = [{"term": name, "a": p, "b": q, "value": float(value), "exponent": exponent,
             **_digits(value, grid, adder.fraction_bits), "kept": float(some), "lost": float(value - some)}
            for (name, p, q, value, exponent), some in zip(terms, kept, strict=True)]
    return {"exponent": largest, "grid": float(grid), "terms": rows, "sum": float(total), "result": result,
            "lost": float(exact - Fraction(result)) if math.isfinite(result) else math.nan}


def _exponent(number: float, smallest: int) -> int:
    return max(math.frexp(number)[1] - 1, smallest)


def _digits(value: Fraction, grid: Fraction, fraction_bits: int) -> dict[str, str]:
    """Binary digits of a term down to the grid, two of them before the point, and those below it."""
    units, rest = divmod(abs(value) / grid, 1)
    digits = f"{units:0{fraction_bits + 2}b}"
    return {"kept_bits": f"{'-' if value < 0 else '+'}{digits[:-fraction_bits]}.{digits[-fraction_bits:]}",
            "lost_bits": f"{rest.numerator:0{rest.denominator.bit_length() - 1}b}" if rest else ""}


def _cut_to_float32(total: Fraction) -> float:
    size = abs(total)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()  # a power of two below
    unit = Fraction(2) ** max(exponent - 23, -149)
    return math.copysign(math.inf, total) if size >= 2**128 else float(int(total / unit) * unit)
