"""2**x as a GPU's special-function unit has it: the instruction ex2.approx.ftz.f32, bit for bit, on any machine.

    1. |x| is cut toward zero to 23 fraction bits: fixed = |x| * 2**23, a whole number.
    2. The index is fixed for x > 0, its complement -fixed - 1 for x < 0, and -fixed for a negative whole number.
    3. The low 23 bits of the index are a place, the bits above them a whole number n (rounded down).
    4. The upper 6 bits of the place choose one of 64 segments, with whole numbers c0, c1, c2; its lower 17 are `low`.
    5. low * low is added up bit by bit: the product of bits i and j belongs into column i + j (i + j + 1 if i and j
       differ, once for both). The unit has no columns below 2**19: square is the sum of the others, over 2**19.
    6. steps = (8192 c0 + c1 low + c2 square + 6114) >> 15, and the result is (1 + steps / 2**23) * 2**n, exact; but 0
       if that is below 2**-126, infinity from 2**128 on.

So 2**n is exact for a whole number n, |x| < 2**-23 gives 1 (a subnormal x too), and a NaN gives the NaN 0x7fffffff.
Because of the complement, a negative x counts as 2**-23 less than it was cut to. Of the 2**23 places 5 125 875 have
the float32 number nearest to 2**(place / 2**23), 3 259 640 the one above and 3 093 the one below.

Steps 1 to 3 were compared with an H200 at 446 million arguments from -130 to 0, and all places but the last were read
from it; an H100 has the same. Steps 4 to 6 were then found from those readings: a regression on products of two bits
shows which columns are there, a linear program for each segment its three numbers, and no others fit. They give every
place that was read. `probe` compares 18 874 368 numbers, with the last place and NaN among them; on an H200 none
differs (triton 3.6).

Such units are described by Oberman and Siu, A high-performance area-efficient multifunction interpolator, ARITH 2005.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cache, wraps

import torch

from .. import bits, runtime
from ..runtime import device_function, tl, triton, where

FRACTION_BITS = 23
PLACES = 1 << FRACTION_BITS
LOW_BITS = 17  # of a place, within its segment
ONE, NAN = 0x3F800000, 0x7FFFFFFF  # as stored; the unit gives no other NaN
COEFFICIENTS = (  # (c0, c1, c2) of each segment: 25, 16 and 10 bits
    (3, 22713, 494), (365386, 22960, 501), (734750, 23210, 506), (1108133, 23463, 511),
    (1485586, 23718, 518), (1867145, 23977, 521), (2252860, 24238, 527), (2642777, 24502, 532),
    (3036940, 24768, 541), (3435393, 25038, 546), (3838184, 25311, 551), (4245365, 25586, 559),
    (4656977, 25865, 564), (5073072, 26147, 568), (5493699, 26431, 577), (5918905, 26719, 583),
    (6348741, 27010, 589), (6783258, 27304, 596), (7222505, 27602, 600), (7666538, 27902, 609),
    (8115404, 28206, 615), (8569160, 28513, 622), (9027854, 28824, 627), (9491545, 29138, 633),
    (9960285, 29455, 641), (10434129, 29776, 647), (10913133, 30100, 655), (11397354, 30428, 661),
    (11886846, 30759, 670), (12381669, 31094, 677), (12881882, 31432, 686), (13387539, 31775, 691),
    (13898703, 32121, 699), (14415435, 32471, 705), (14937793, 32824, 715), (15465837, 33182, 721),
    (15999633, 33543, 730), (16539242, 33908, 739), (17084727, 34277, 748), (17636150, 34651, 753),
    (18193579, 35028, 763), (18757078, 35409, 773), (19326714, 35795, 779), (19902551, 36185, 787),
    (20484659, 36579, 796), (21073106, 36977, 806), (21667961, 37380, 813), (22269293, 37787, 822),
    (22877175, 38198, 833), (23491674, 38614, 842), (24112865, 39035, 849), (24740822, 39460, 858),
    (25375616, 39889, 870), (26017322, 40324, 877), (26666015, 40763, 887), (27321773, 41207, 896),
    (27984672, 41655, 909), (28654788, 42109, 917), (29332202, 42568, 925), (30016992, 43031, 938),
    (30709240, 43500, 946), (31409026, 43973, 959), (32116431, 44452, 969), (32831540, 44936, 980),
)
_SLICE = 1 << 15  # numbers: all temporaries of so many stay in a CPU's cache


def ex2(x: torch.Tensor) -> torch.Tensor:
    """2**x of a float32 tensor of any shape and device, with the bits of a GPU's ex2.approx.ftz.f32.

    Raises TypeError for anything else, RuntimeError where a gradient is asked for.
    """
    _check(x)
    table = places(x.device)
    flat = x.detach().contiguous().view(-1)
    if x.device.type != "cpu" or flat.numel() <= _SLICE:
        return _ex2(flat, table).view(x.shape)
    result = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
    for start in range(0, flat.numel(), _SLICE):
        result[start : start + _SLICE] = _ex2(flat[start : start + _SLICE], table)
    return result.view(x.shape)


def _ex2(x, table):
    """One dimension of numbers. A result as stored: its place's number, and n added to the exponent."""
    index = x.clamp(-128.0, 128.0).mul_(float(PLACES)).to(torch.int32)  # cut toward zero
    place = index & (PLACES - 1)
    index -= (place + (PLACES - 1) >> FRACTION_BITS) & (index >> 31)  # the complement: 1 less, but for whole numbers
    torch.bitwise_and(index, PLACES - 1, out=place)
    result = table.index_select(0, place).add_(index & -PLACES)
    result.masked_fill_(result < PLACES, 0)  # below the smallest normal number
    return result.masked_fill_(x.isnan(), NAN).view(torch.float32)


@cache
def places(device: torch.device) -> torch.Tensor:
    """1 + steps / 2**23 of every place as float32 numbers are stored, int32 (2**23,), 32 MB. Not to be changed."""
    low = torch.arange(1 << LOW_BITS, dtype=torch.int64, device=device)
    square = kept_square(low)
    return torch.cat([ONE + _steps(segment, low, square).to(torch.int32) for segment in range(len(COEFFICIENTS))])


def _steps(segment, low, square):
    c0, c1, c2 = COEFFICIENTS[segment]
    return 8192 * c0 + c1 * low + c2 * square + 6114 >> 15


def kept_square(low):
    """low * low without the columns below 2**19, in units of 2**19; `low` is an integer of 17 bits, or many as int64.

    Bit i beside the bits j < i: only j >= 18 - i reach column 19; alone it belongs into column 2i.
    """
    total = 0
    for i in range(10, LOW_BITS):
        smaller = low & ((1 << i) - (1 << (18 - i)))
        total = total + (low >> i & 1) * ((1 << 2 * i) + (smaller << (i + 1)))
    return total >> 19


@device_function
def tl_ex2(x):
    """`ex2` in a kernel: the instruction on a GPU, `ex2` in Triton's interpreter. x is float32, of any shape."""
    tl.static_assert(x.dtype == tl.float32, "x must be float32")
    return tl.exp2(x)


def _in_interpreter(instruction):
    """What stands for `tl_ex2` in Triton's interpreter, which holds numbers in arrays and has NumPy's exponential."""
    from triton.runtime.interpreter import TensorHandle

    @wraps(instruction)
    def call(x):
        if x.dtype != tl.float32:
            raise TypeError(f"x must be float32, got {x.dtype}")
        result = ex2(torch.from_numpy(x.handle.data.copy())).numpy()
        return tl.tensor(TensorHandle(result, tl.float32), x.type)
    return call


if where() == "INTERPRETER":
    tl_ex2 = _in_interpreter(tl_ex2)


@dataclass(frozen=True)
class Probe:
    """Numbers compared, how many differ in a bit, and the first of those: (x, ex2's result, the unit's)."""

    numbers: int
    mismatches: int
    first: tuple[float, float, float] | None

    def __bool__(self):
        return self.mismatches == 0

    def __str__(self):
        if self:
            return f"same bits for all {self.numbers:,} numbers"
        x, expected, got = self.first
        return (f"{self.mismatches:,} of {self.numbers:,} numbers differ; first at x = {x!r}: {expected!r} expected, "
                f"{got!r} found")


def probe(device=None) -> Probe:
    """Run the instruction on this machine's GPU for every number of `sample`, and compare. Falsy if one bit differs.

    Raises Unavailable without a GPU or Triton, ValueError for a device that is no GPU.
    """
    if not runtime.HAS_GPU or runtime.WHY_NOT:
        raise runtime.Unavailable("probe runs the instruction itself: "
                                  + (runtime.WHY_NOT or "there is no CUDA GPU here. ex2 has a GPU's bits without one."))
    device = torch.device(device or runtime.device())
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA GPU, got {device}")
    with torch.cuda.device(device):
        x = sample(device)
        return compare(x, _launch(x))


def sample(device: torch.device) -> torch.Tensor:
    """18 874 368 float32 numbers: all places with both signs, and of each sign and exponent 4096 numbers, among them
    the least and the greatest; so zeros, subnormals, infinities and NaN too.
    """
    place = torch.arange(PLACES, dtype=torch.float32, device=device) / PLACES
    digits = torch.arange(4096, dtype=torch.int64, device=device)
    digits = torch.where(digits < 2, digits, bits.hashed(digits, 1) & (PLACES - 1))
    digits[-1] = PLACES - 1
    exponent = torch.arange(256, dtype=torch.int64, device=device)[:, None] << FRACTION_BITS
    some = (exponent | digits).flatten().to(torch.int32).view(torch.float32)
    return torch.cat([place, -place, some, -some])


def compare(x: torch.Tensor, found: torch.Tensor) -> Probe:
    """`ex2(x)` beside what an instruction gave for x, both float32 of one shape; a NaN's bits count."""
    expected = ex2(x)
    moved = (expected.view(torch.int32) != found.view(torch.int32)).flatten().nonzero()[:, 0]
    if not len(moved):
        return Probe(x.numel(), 0, None)
    return Probe(x.numel(), len(moved), tuple(v.flatten()[moved[0]].item() for v in (x, expected, found)))


def _launch(x):
    x = x.contiguous()
    y = torch.empty_like(x)
    _kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


@triton.jit
def _kernel(x_ptr, y_ptr, numbers, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numbers, other=0.0)
    tl.store(y_ptr + i, tl_ex2(x), mask=i < numbers)


def explain(x: float) -> dict:
    """One finite float32 number's way through the unit, worked out in whole numbers, apart from `ex2`.

    -> `cut` (x as the unit sees it), `complement` (whether the index is one), `whole` (n), `place`, `segment`, `low`,
    `square` (step 5), `steps` (step 6), `result`, `nearest` (2**x rounded once) and `ulps` (float32 numbers from
    nearest to result). Raises ValueError for a number that is not finite or not float32.
    """
    x = float(x)
    if not math.isfinite(x) or torch.tensor(x, dtype=torch.float32, device="cpu").item() != x:
        raise ValueError(f"x must be a finite float32 number, got {x!r}")
    fixed = int(Fraction(x) * PLACES)  # toward zero
    complement = fixed < 0 and fixed % PLACES != 0
    n, place = divmod(fixed - complement, PLACES)
    segment, low = divmod(place, 1 << LOW_BITS)
    square = kept_square(low)
    steps = _steps(segment, low, square)
    result = math.ldexp(PLACES + steps, n - FRACTION_BITS) if -126 <= n < 128 else math.inf if n > 0 else 0.0
    nearest = _nearest(x)
    distance = bits.ulp_distance(*torch.tensor([[nearest], [result]], dtype=torch.float32, device="cpu")).item()
    return {"cut": fixed / PLACES, "complement": complement, "whole": n, "place": place, "segment": segment,
            "low": low, "square": square, "steps": steps, "result": result, "nearest": nearest,
            "ulps": distance if result > nearest else -distance}


def _nearest(x: float) -> float:
    """2**x rounded to float32, from 60 decimal digits."""
    if not -160 < x < 128:
        return math.inf if x > 0 else 0.0
    exact = Fraction(Context(prec=60).power(Decimal(2), Decimal(x)))
    unit = Fraction(2) ** max(math.floor(x) - FRACTION_BITS, -149)
    return float(round(exact / unit) * unit)


def _check(x) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x requires a gradient, which ex2 does not have: call it under torch.no_grad()")
