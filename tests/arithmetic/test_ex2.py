"""arithmetic/ex2.py: the special-function unit's exponential, its rule, its table, its kernel, its explanation."""
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.arithmetic import ex2 as unit
from kernels.arithmetic.ex2 import PLACES, compare, ex2, explain, probe, sample, tl_ex2
from kernels.bits import digest, same_bits, ulp_distance
from kernels.lab.closure import bare, closure
from kernels.runtime import tl, triton

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HERE = runtime.device()
INF, NAN, TINY, HUGE = math.inf, math.nan, 2.0**-149, 2.0**128 - 2.0**104
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")


def float32(*values):
    return torch.tensor(values, dtype=torch.float32)


def slow_place(place: int) -> Fraction:
    """Steps 4 to 6 for one place, partial product by partial product."""
    c0, c1, c2 = unit.COEFFICIENTS[place // 2**17]
    low = [place >> i & 1 for i in range(17)]
    columns = {}
    for i in range(17):
        for j in range(i + 1):
            column = i + j + (i != j)
            columns[column] = columns.get(column, 0) + low[i] * low[j]
    assert sum(n * 2**column for column, n in columns.items()) == (place % 2**17) ** 2
    square = sum(n * 2**column for column, n in columns.items() if column >= 19)
    steps = Fraction(c0, 4) + Fraction(c1 * (place % 2**17), 2**15) + Fraction(c2 * square, 2**34)
    return 1 + Fraction(math.floor(steps + Fraction(6114, 2**15)), 2**23)


def slow(x: float) -> float:
    """The unit in Python's integers and fractions."""
    if math.isnan(x):
        return x
    if abs(x) >= 256:
        return INF if x > 0 else 0.0
    numerator, denominator = Fraction(x).as_integer_ratio()
    fixed = abs(numerator) * 2**23 // denominator
    if x >= 0:
        index = fixed
    elif fixed % 2**23 == 0:
        index = -fixed
    else:
        index = ~fixed
    value = slow_place(index % 2**23) * Fraction(2) ** (index // 2**23)
    return 0.0 if value < Fraction(2) ** -126 else INF if value >= 2**128 else float(value)


@pytest.fixture(scope="module")
def table():
    """P as float32 numbers."""
    return unit.places(CPU).view(torch.float32)


# the places

def test_the_places_are_those_that_a_gpu_gave(table):
    """The digest was taken of an H200's readings, before there was a formula."""
    assert digest(table) == "770a8d00d2f1ec8afcbb328d245e9383ffaf9850f29aee088b9174710c3bf67a"
    assert table[0] == 1 and table[-1] < 2 and (table[1:] >= table[:-1]).all()


def test_how_far_the_places_lie_from_the_nearest_numbers(table):
    exact = torch.exp2(torch.arange(PLACES, dtype=torch.float64) / PLACES)
    ulps = table.view(torch.int32) - exact.float().view(torch.int32) + 1
    assert ulps.bincount().tolist() == [3_093, 5_125_875, 3_259_640]
    # no place is so near to a tie that a library's exponential decides, which is off by a unit or two of float64
    below = exact.view(torch.int64) & (1 << 29) - 1  # what rounding takes away, in such units
    assert (below - (1 << 28)).abs().min() > 25


def test_the_coefficients_have_few_bits():
    assert len(unit.COEFFICIENTS) == 64
    assert [max(c).bit_length() for c in zip(*unit.COEFFICIENTS, strict=True)] == [25, 16, 10]


def fits(segment, c0, c1, c2, constant=6114):
    """Whether these numbers give all places of a segment."""
    low = torch.arange(1 << 17)
    steps = 8192 * c0 + c1 * low + c2 * unit.kept_square(low) + constant >> 15
    return torch.equal(steps, unit.places(CPU)[segment << 17 : segment + 1 << 17] - unit.ONE)


@pytest.mark.parametrize("segment", [0, 31, 63])
def test_every_coefficient_counts(segment):
    c0, c1, c2 = unit.COEFFICIENTS[segment]
    assert fits(segment, c0, c1, c2)
    for d in (-1, 1):
        assert not fits(segment, c0 + d, c1, c2)
        assert not fits(segment, c0, c1 + d, c2)
        assert not fits(segment, c0, c1, c2 + d)


def test_the_constant_is_the_only_one():
    numbers = unit.COEFFICIENTS[0]
    assert [c for c in range(6104, 6125) if fits(0, *numbers, constant=c)] == [6114]


@pytest.mark.parametrize("step, start", [(20011, 0), (1, PLACES - 40), (1, 0), (1, (1 << 17) - 20)])
def test_places_bit_by_bit(step, start, table):
    numbers = range(start, min(start + 420 * step, PLACES), step)[:420]
    assert table[list(numbers)].tolist() == [float(slow_place(place)) for place in numbers]


# the rule

ARGUMENTS = st.one_of(st.floats(width=32), st.floats(-130, 130, width=32), st.floats(-1, 1, width=32),
                      st.floats(-127, -125, width=32), st.floats(127, 129, width=32),
                      st.builds(math.ldexp, st.integers(-(2**24), 2**24).map(float), st.integers(-30, -16)))


@settings(deadline=None, max_examples=100)
@given(st.lists(ARGUMENTS, min_size=1, max_size=50))
@example([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 126.0, -126.0, 127.0, -127.0, 128.0, -128.0, 129.0, HUGE, -HUGE, INF, -INF])
@example([NAN, TINY, -TINY, 2.0**-127, -(2.0**-127), 2.0**-24, -(2.0**-24), 2.0**-23, -(2.0**-23)])
@example([1 - 2.0**-24, 2.0**-24 - 1, 1 - 2.0**-23, 2.0**-23 - 1, -1 - 2.0**-23, 2 - 2.0**-23, 2.0**-23 - 2])
def test_the_rule_in_whole_numbers(numbers):
    expected = float32(*map(slow, numbers))
    assert same_bits(ex2(float32(*numbers).to(HERE)).cpu(), expected)


def test_the_rule_at_many_arguments():
    x = sample(CPU)[::9973]
    assert x.isnan().any() and (x == 0).any() and (x.abs() < 2.0**-126).any() and (x < -(2.0**100)).any()
    assert same_bits(ex2(x), float32(*map(slow, x.tolist())))


def test_special_arguments():
    x = float32(0.0, -0.0, INF, -INF, 128.0, 3e38, -3e38, TINY, -TINY, 1e-40, -1e-40, -126.0, -127.0, -149.0, 127.0)
    expected = float32(1, 1, INF, 0, INF, INF, 0, 1, 1, 1, 1, 2.0**-126, 0, 0, 2.0**127)
    assert same_bits(ex2(x), expected)
    assert ex2(float32(127.99999)).isfinite().all()


def test_every_nan_gives_the_units_nan():
    x = torch.tensor([0x7FC00000, 0x7F800001, -1, -0x400000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert x.isnan().all() and (ex2(x).view(torch.int32) == 0x7FFFFFFF).all()


def test_results_below_the_smallest_normal_number_are_zero():
    x = torch.nextafter(float32(-126.0), float32(-INF, INF))
    below, above = ex2(x).tolist()
    assert below == 0 and above == float32(above).item() > 2.0**-126
    assert (ex2(torch.linspace(-150, -126.00001, 10_000)) == 0).all()
    assert (ex2(torch.linspace(-126, -125, 10_000)) >= 2.0**-126).all()


def test_a_negative_argument_takes_the_complement(table):
    """ex2(-i / 2**23) is P[2**23 - 1 - i] / 2, one place too low, and not P[2**23 - i] / 2; a whole number is exact."""
    i = torch.arange(1, PLACES, dtype=torch.int32)
    found = ex2(-i.float() / PLACES)
    assert same_bits(found, table[PLACES - 1 - i] / 2)
    assert (found != table[PLACES - i] / 2).sum() > 1_000_000
    whole = torch.arange(-126, 128)
    assert same_bits(ex2(whole.float()), torch.ldexp(torch.ones(len(whole)), whole))


def test_digits_below_two_to_the_minus_23_are_cut_toward_zero():
    x = torch.arange(1 << 20, 1 << 21, 7).float() / PLACES
    for sign in (1, -1):
        for part in (0.25, 0.5, 0.75):
            between = (x.double() + part / PLACES).float()
            assert (between > x).all() and same_bits(ex2(sign * between), ex2(sign * x))


def test_it_never_falls_as_its_argument_rises():
    x = sample(CPU)[::13]
    y = ex2(x[~x.isnan()].sort().values)
    assert (y[1:] >= y[:-1]).all()


# the call

@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4), (unit._SLICE + 3,), (3, unit._SLICE)])
def test_shapes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(HERE)
    kept = x.clone()
    y = ex2(x)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.device == x.device and same_bits(x, kept)
    assert same_bits(y.flatten(), torch.stack([ex2(v) for v in x.flatten()[:50]]) if 0 < x.numel() <= 50
                     else torch.cat([ex2(x.flatten()[:1000]), ex2(x.flatten()[1000:])]))


def test_strides():
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(2)).to(HERE)
    for view in (x.T, x[::3, 1::2], x[:, :1].expand(300, 5)):
        assert same_bits(ex2(view), ex2(view.clone(memory_format=torch.contiguous_format)))


def test_settings_of_the_process_move_no_bit():
    x = sample(CPU)[::101]
    expected = ex2(x)
    torch.set_default_dtype(torch.float64)
    torch.set_flush_denormal(True)
    try:
        found = ex2(x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
    assert same_bits(found, expected)


@pytest.mark.parametrize("x, error, words", [
    (1.0, TypeError, "x must be a tensor, got float"), (np.ones(3, np.float32), TypeError, "got ndarray"),
    (torch.ones(3, dtype=torch.float64), TypeError, "x must be float32, got torch.float64"),
    (torch.ones(3, dtype=torch.bfloat16), TypeError, "x must be float32, got torch.bfloat16"),
    (torch.ones(3, requires_grad=True), RuntimeError, "x requires a gradient")])
def test_bad_arguments_are_named(x, error, words):
    with pytest.raises(error, match=words):
        ex2(x)


def test_no_gradient_is_asked_for_under_no_grad():
    with torch.no_grad():
        assert ex2(torch.ones(3, requires_grad=True)).tolist() == [2.0, 2.0, 2.0]


# in a kernel

@triton.jit
def _inside(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.reshape(tl_ex2(tl.reshape(x, [N // 4, 4])), [N]))
    tl.store(y_ptr + N, tl_ex2(tl.load(x_ptr + 5)))  # one number
    tl.store(y_ptr + N + 1 + i, _twice(x))


@runtime.device_function
def _twice(x):
    return tl_ex2(tl_ex2(x) - 2.0)


@needs_triton
def test_a_kernel_has_the_same_bits():
    x = torch.cat([sample(CPU)[::9973], torch.linspace(-30, 3, 4096)])[-4096:].to(HERE)
    y = torch.empty(2 * len(x) + 1, device=HERE)
    _inside[(1,)](x, y, len(x))
    assert same_bits(y[: len(x)], ex2(x)) and same_bits(y[len(x)], ex2(x[5]))
    assert same_bits(y[len(x) + 1 :], ex2(ex2(x) - 2.0))
    assert not same_bits(ex2(x), torch.exp2(x))


@needs_triton
def test_a_kernel_over_specials():
    x = sample(CPU)[2 * PLACES :: 73].to(HERE)
    assert x.isnan().any() and compare(x, unit._launch(x))


@pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="a compiler refuses other dtypes in its own words")
def test_the_interpreter_refuses_other_dtypes():
    with pytest.raises(Exception, match="x must be float32, got fp64"):
        unit._kernel[(1,)](torch.ones(4, dtype=torch.float64), torch.ones(4), 4, BLOCK=4)


def test_provenance_sees_the_instruction_alone():
    """What stands for it in the interpreter decides no row that a GPU records."""
    assert {name.split()[0] for name in closure(bare(tl_ex2))} == {"kernels.arithmetic.ex2.tl_ex2"}


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.arithmetic.ex2 import _kernel
for target in (80, 90, 100):
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "numbers": "i32", "BLOCK": "constexpr"}
    made = triton.compile(ASTSource(_kernel, types, {"BLOCK": 128}), target=GPUTarget("cuda", target, 32))
    print(target, *re.findall(r"[a-z]\\w*(?:[.]\\w+)*[.]f(?:16|32|64)\\b", made.asm["ptx"]))
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiling ahead of time needs Triton")
def test_it_becomes_one_instruction():
    done = subprocess.run([sys.executable, "-c", COMPILE], env={**os.environ, "TRITON_INTERPRET": "0"},
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{target} ex2.approx.ftz.f32" for target in (80, 90, 100)], done.stderr


# explain, probe

@settings(deadline=None, max_examples=50)
@given(st.one_of(st.floats(-200, 200, width=32), st.floats(-1, 1, width=32)))
@example(0.0)
@example(-126.0)
@example(128.0)
@example(-(2.0**-23))
def test_explain_says_what_ex2_does(x):
    said = explain(x)
    assert said["result"] == ex2(float32(x)).item()
    assert said["cut"] == math.trunc(x * 2**23) / 2**23
    assert said["complement"] == (said["cut"] < 0 and said["cut"] != int(said["cut"]))
    assert said["whole"] + (said["place"] + said["complement"]) / PLACES == said["cut"]
    far = ulp_distance(float32(said["nearest"]), float32(said["result"])).item()
    assert abs(said["ulps"]) == far and (far <= 2 or x < -125.9)


def test_explain_shows_the_bias_of_negative_arguments():
    def mean(sign):
        ulps = [explain(sign * (k + 0.5) / 512)["ulps"] for k in range(512)]
        return sum(ulps) / len(ulps)

    assert mean(1) > 0.3 > -0.3 > mean(-1)
    place = ex2(float32((2**21 - 1) / PLACES)).item()  # 0.25 and not quite
    place = 2**21 - 1  # 0.25 and not quite
    steps = (slow_place(place) - 1) * 2**23
    assert explain(-0.75) == {
        "cut": -0.75, "complement": True, "whole": -1, "place": place, "segment": 15, "low": 2**17 - 1,
        "square": unit.kept_square(2**17 - 1), "steps": steps, "result": float(slow_place(place) / 2),
        "nearest": float32(0.5**0.75).item(), "ulps": 0}


@pytest.mark.parametrize("x", [INF, NAN, 0.1, 2.0**-160, 1e39])
def test_explain_asks_for_a_float32_number(x):
    with pytest.raises(ValueError, match="x must be a finite float32 number, got"):
        explain(x)


def test_the_sample_reaches_every_place_and_exponent():
    x = sample(CPU)
    assert x.shape == (18_874_368,)
    exponents = (x.view(torch.int32) >> 23) + 256  # and the sign
    assert (exponents.bincount() >= 4096).sum() == 512
    for part in (x[:PLACES], -x[PLACES : 2 * PLACES]):
        assert torch.equal(part * PLACES, torch.arange(PLACES).float())
    for edge in (0.0, TINY, 2.0**-126 - TINY, 2.0**-126, HUGE, INF):
        assert (x == edge).any() and (x == -edge).any()


def test_one_bit_makes_a_comparison_false():
    x = float32(-1.5, 0.25, NAN, -3.0)
    found = ex2(x)
    assert compare(x, found) and str(compare(x, found)) == "same bits for all 4 numbers"
    found[3] = torch.nextafter(found[3], float32(1.0)[0])
    found[2] = torch.tensor(0x7FC00000, dtype=torch.int32).view(torch.float32)
    report = compare(x, found)
    assert not report and report.mismatches == 2 and math.isnan(report.first[0])
    assert str(compare(x[3:], found[3:])) == ("1 of 1 numbers differ; first at x = -3.0: 0.125 expected, "
                                              "0.1250000149011612 found")


@pytest.mark.skipif(runtime.HAS_GPU, reason="there is a GPU here")
def test_probe_asks_for_a_gpu():
    with pytest.raises(runtime.Unavailable, match="probe runs the instruction itself: there is no CUDA GPU here"):
        probe()


@pytest.mark.gpu
def test_the_gpu_here_has_these_bits():
    report = probe()
    assert report and report.numbers == 18_874_368, str(report)
    with pytest.raises(ValueError, match="device must be a CUDA GPU, got cpu"):
        probe("cpu")
