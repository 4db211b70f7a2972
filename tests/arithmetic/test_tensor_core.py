"""The tensor core's addition against whole numbers, against MMA-Sim, against itself, and on a GPU against the GPU.

tests/tensor_core_mmasim.csv holds what Microsoft's MMA-Sim (package mmasim 2.1.1) gives for the inputs of
`recorded_cases`. To make it again, in an environment that has mmasim too (it builds a C++ extension):

    python tests/test_tensor_core.py
"""
import csv
import math
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.arithmetic import tensor_core
from kernels.arithmetic.tensor_core import (
    ADDERS,
    AMPERE,
    HOPPER,
    VOLTA,
    Adder,
    chain,
    compare,
    differences,
    explain,
    probe,
    tl_chain,
)
from kernels.bits import ADVERSARIAL, check_invariance, elements_differ, same_bits
from kernels.lab.proofs import tensor_core as check_tensor_core
from kernels.lab.proofs.tensor_core import EXPONENTS, LENGTHS, TENSOR_CORE, check, inputs, kinds
from kernels.lab.records import ROOT
from kernels.op import DTYPES
from kernels.runtime import tl, triton

RECORDED = Path(__file__).with_name("tensor_core_mmasim.csv")
ODD = (Adder(1, 10), Adder(3, 12), Adder(32, 30), Adder(64, 40))
dtypes = st.sampled_from(list(EXPONENTS))
every_dtype = pytest.mark.parametrize("dtype", list(EXPONENTS))
every_input = pytest.mark.parametrize(("dtype", "kind"), [(d, kind) for d in EXPONENTS for kind in kinds(d)])
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")


def same(a, b):
    """Stricter than same_bits: a NaN has bits too."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def numbers(*rows, dtype=torch.bfloat16):
    return torch.tensor(rows, dtype=dtype)


def one(a, b, adder=HOPPER, start=None, dtype=torch.bfloat16):
    """One output as a Python number."""
    start = None if start is None else torch.tensor([[start]])
    return chain(numbers(a, dtype=dtype), numbers(b, dtype=dtype), adder, start).item()


# against whole numbers


def decoded(stored, significand_bits, exponent_bits):
    """(exact value, exponent) of a finite number from its stored bits; exponent None for a zero."""
    field = stored >> significand_bits & (1 << exponent_bits) - 1
    significand = stored & (1 << significand_bits) - 1
    exponent = max(field, 1) - (1 << exponent_bits - 1) + 1
    whole = significand + (1 << significand_bits if field else 0)
    value = Fraction(whole) * Fraction(2) ** (exponent - significand_bits)
    sign = -1 if stored >> (significand_bits + exponent_bits) & 1 else 1
    return sign * value, exponent if whole else None


def cut(value, grid):
    return (abs(value) // grid) * grid * (1 if value > 0 else -1)


def pencil_step(products, accumulator, adder):
    """One step on (value, exponent) pairs and a Fraction, by the numbered list in arithmetic/tensor_core.py."""
    exponent = adder.zero_exponent
    if accumulator:
        exponent = -126
        while Fraction(2) ** (exponent + 1) <= abs(accumulator):
            exponent += 1
    largest = max([exponent, *(e for value, e in products if value)])
    grid = Fraction(2) ** (largest - adder.fraction_bits)
    total = cut(accumulator, grid) + sum(cut(value, grid) for value, _ in products)
    exponent = -126
    while Fraction(2) ** (exponent + 1) <= abs(total):
        exponent += 1
    return cut(total, Fraction(2) ** (exponent - 23))


def pencil(a, b, accumulator, adder):
    """One output from two rows of decoded numbers; None once it has overflowed."""
    for k in range(0, len(a), adder.block):
        products = [(x * y, e + f if x * y else None)
                    for (x, e), (y, f) in zip(a[k : k + adder.block], b[k : k + adder.block], strict=True)]
        accumulator = pencil_step(products, accumulator, adder)
        if abs(accumulator) >= 2**128:
            return None
    return accumulator


def pencil_chain(x, weight, adder, start):
    form = (7, 8) if x.dtype == torch.bfloat16 else (10, 5)
    rows, columns = ([[decoded(n & 0xFFFF, *form) for n in row] for row in m.view(torch.int16).tolist()]
                     for m in (x, weight))
    starts = [[decoded(n & 0xFFFFFFFF, 23, 8)[0] for n in row] for row in start.view(torch.int32).tolist()]
    return [[pencil(a, b, s, adder) for b, s in zip(columns, row, strict=True)]
            for a, row in zip(rows, starts, strict=True)]


def agree(y, expected):
    for number, exact in zip(y.flatten().tolist(), (e for row in expected for e in row), strict=True):
        if exact is None:
            assert number in (float("inf"), float("-inf"))
        else:
            assert Fraction(number) == exact
    assert not (torch.signbit(y) & (y == 0)).any()


@st.composite
def patterns(draw, rows, k, dtype):
    """Any finite numbers, and as often ones of nearly the same size, which cut and cancel."""
    width, top = (7, 254) if dtype == "bfloat16" else (10, 30)
    low = draw(st.integers(0, top))
    high = draw(st.integers(low, top) | st.just(min(low + 8, top)))
    size = {"min_size": rows * k, "max_size": rows * k}
    fields = draw(st.lists(st.integers(low, high), **size))
    rest = draw(st.lists(st.integers(0, (2 << width) - 1), **size))
    stored = [(r & 1) << 15 | f << width | r >> 1 for f, r in zip(fields, rest, strict=True)]
    return torch.tensor(stored).view(rows, k).to(torch.int16).view(DTYPES[dtype])


@settings(deadline=None)
@given(st.data(), dtypes, st.integers(1, 40), st.sampled_from([VOLTA, AMPERE, HOPPER, *ODD]))
def test_the_chain_is_the_pencil(data, dtype, k, adder):
    x, weight = data.draw(patterns(2, k, dtype)), data.draw(patterns(2, k, dtype))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    start = torch.tensor([data.draw(st.lists(finite | st.just(0.0), min_size=2, max_size=2)) for _ in range(2)])
    agree(chain(x, weight, adder, start), pencil_chain(x, weight, adder, start))


@every_input
def test_the_chain_is_the_pencil_for_every_input(dtype, kind):
    x, weight = (m[m.isfinite().all(1)] for m in inputs(kind, 3, 4, 50, dtype))
    assert len(x) and len(weight)
    agree(chain(x, weight), pencil_chain(x, weight, HOPPER, torch.zeros(len(x), len(weight))))


def test_the_pencil_notices_one_bit_of_the_grid():
    """Inverse test: another width, another block or rounding to nearest is another sum."""
    x, weight = inputs("uniform", 8, 8, 64)
    expected = pencil_chain(x, weight, HOPPER, torch.zeros(8, 8))
    for other in (chain(x, weight, Adder(16, 24)), chain(x, weight, Adder(16, 26)), chain(x, weight, Adder(8, 25)),
                  (x.double() @ weight.double().T).float()):
        with pytest.raises(AssertionError):
            agree(other, expected)


# against MMA-Sim


def recorded_cases():
    """(architecture, dtype, kind, k, x, weight, start): a short sum onto any float32, a long one from zero."""
    for architecture in ADDERS:
        for dtype in ("float16",) if architecture in ("Volta", "Turing") else EXPONENTS:
            for kind in kinds(dtype):
                for k in (7, 100):
                    start = check_tensor_core._hashed(4, 4, "cpu", k).to(torch.int32).view(torch.float32)
                    yield architecture, dtype, kind, k, *inputs(kind, 4, 4, k, dtype), start if k == 7 else None


def hexadecimal(y):
    return "".join(f"{n & 0xFFFFFFFF:08x}" for n in y.view(torch.int32).flatten().tolist())


def test_every_architecture_is_what_mmasim_says():
    recorded = {tuple(row[:4]): row[4] for row in csv.reader(RECORDED.open())}
    found = {(architecture, dtype, kind, str(k)): hexadecimal(chain(x, weight, ADDERS[architecture], start))
             for architecture, dtype, kind, k, x, weight, start in recorded_cases()}
    assert found.keys() == recorded.keys() and len(found) > 250
    assert {case for case in found if found[case] != recorded[case]} == set()


def test_the_recorded_bits_cover_every_case():
    words = [row[4][i : i + 8] for row in csv.reader(RECORDED.open()) for i in range(0, len(row[4]), 8)]
    y = torch.tensor([int(word, 16) for word in words]).to(torch.int32).view(torch.float32)
    assert len(y) > 4000 and set(words[i] for i in y.isnan().nonzero()) == {"7fffffff"}
    assert y.isnan().sum() > 100 and y.isinf().sum() > 100 and (y == 0).sum() > 20
    assert ((y != 0) & (y.abs() < torch.finfo(torch.float32).smallest_normal)).sum() > 50


# by hand


def test_products_are_exact_and_small_ones_are_cut():
    assert one([1.5], [1.5]) == 2.25
    for adder, kept in ((VOLTA, 23), (AMPERE, 24), (HOPPER, 25)):
        assert one([1, 2.0**-kept, -1], [1, 1, 1], adder) == 2.0**-kept
        assert one([1, 2.0 ** -(kept + 1), -1], [1, 1, 1], adder) == 0.0
        assert one([1] + 2 * [2.0 ** -(kept + 1)] + [-1], 4 * [1], adder) == 0.0, "cut one by one, then added"


def test_an_exponent_is_the_sum_of_the_factors_not_that_of_the_product():
    """1.5 x 1.5 = 2.25 = 1.125 x 2, but it counts as 2**0, so one bit more of the others is kept."""
    small = 2.0**-25
    assert one([1.5, small, -1.5], [1.5, 1, 1.5]) == small
    assert one([1.125, small, -1.125], [2, 1, 2]) == 0.0


def test_a_subnormal_factor_is_not_renormalised():
    """In float16 2**-24 x 2**14 counts as 2**(-14 + 14) and cuts what 2**-10 x 1, the same number, would keep."""
    assert one([2.0**-24, 2.0**-13, -(2.0**-24)], [2.0**14, 2.0**-13, 2.0**14], dtype=torch.float16) == 0
    assert one([2.0**-10, 2.0**-13, -(2.0**-10)], [1, 2.0**-13, 1], dtype=torch.float16) == 2.0**-26


def test_the_result_is_cut_toward_zero():
    assert one([1, 2.0**-24], [1, 1]) == 1.0
    assert one([1, 2.0**-24, 2.0**-25], [1, 1, 1]) == 1.0, "three quarters of the last bit do not round up"
    assert one([-1, -(2.0**-24), -(2.0**-25)], [1, 1, 1]) == -1.0
    assert one([2.0**-75] * 3, [2.0**-75] * 3) == 2.0**-149, "three halves of the smallest float32"


@pytest.mark.parametrize("adder, last", [(HOPPER, -158), (AMPERE, -156)], ids=str)
def test_a_zero_accumulator_has_an_exponent(adder, last):
    """1.5 x 2**-150 + 2**-152 + 2**-153 + ... + the last one twice is 2**-149, unless the last one is cut."""
    def halves(last):
        factors = [1.5 * 2.0**-75, *(2.0 ** (e + 75) for e in (*range(-152, last, -1), last, last))]
        return one(factors, [2.0**-75] * len(factors), adder)

    assert halves(last) == 2.0**-149
    assert halves(last - 1) == 0


def test_a_sum_of_zero_is_positive():
    assert not torch.signbit(chain(numbers([-1.0, 0.0]), numbers([0.0, -1.0])))
    assert not torch.signbit(chain(numbers([1.0, -1.0]), numbers([1.0, 1.0])))
    assert not torch.signbit(chain(numbers([-(2.0**-80)]), numbers([2.0**-80])))
    assert not torch.signbit(chain(numbers([0.0]), numbers([0.0]), start=torch.tensor([[-0.0]])))


@pytest.mark.parametrize("a, b, start, expected", [
    ([float("nan")], [1.0], 0.0, 0x7FFFFFFF),
    ([float("inf")], [0.0], 0.0, 0x7FFFFFFF),
    ([float("inf"), float("-inf")], [1.0, 1.0], 0.0, 0x7FFFFFFF),
    ([float("inf")], [-1.0], 0.0, 0xFF800000),
    ([1.0], [1.0], float("-inf"), 0xFF800000),
    ([1.0], [1.0], float("nan"), 0x7FFFFFFF),
    ([float("inf")], [1.0], float("-inf"), 0x7FFFFFFF),
    ([2.0**64], [2.0**64], 0.0, 0x7F800000),
    ([2.0**127, -(2.0**127)], [2.0**127, 2.0**127], 1.0, 0),
    ([2.0**64, 2.0**40], [2.0**63, 2.0**40], torch.finfo(torch.float32).max, 0x7F800000),
    ([2.0**51], [2.0**51], torch.finfo(torch.float32).max, 0x7F7FFFFF),
])
def test_infinities_nans_and_overflow(a, b, start, expected):
    y = chain(numbers(a), numbers(b), start=torch.tensor([[start]]))
    assert y.view(torch.int32).item() & 0xFFFFFFFF == expected


# properties


@settings(deadline=None, max_examples=25)
@given(dtypes, st.integers(1, 100), st.integers(0, 10**6), st.sampled_from([VOLTA, AMPERE, HOPPER]))
def test_inside_a_step_the_order_is_free(dtype, k, seed, adder):
    x, weight = inputs("uniform", 5, 6, k, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([i + torch.randperm(min(adder.block, k - i), generator=generator)
                       for i in range(0, k, adder.block)])
    assert same(chain(x[:, order], weight[:, order], adder), chain(x, weight, adder))


def test_across_steps_the_order_moves_bits():
    x, weight = inputs("uniform", 32, 32, 256)
    assert not same_bits(chain(x.flip(1), weight.flip(1)), chain(x, weight))


@settings(deadline=None, max_examples=25)
@given(dtypes, st.integers(0, 200), st.integers(0, 10**6), st.sampled_from([VOLTA, AMPERE, HOPPER]))
def test_a_sum_that_fits_is_exact(dtype, k, seed, adder):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-15, 16, (n, k), generator=generator).to(DTYPES[dtype]) for n in (3, 4))
    exact = x.double() @ weight.double().T + 0.0  # the adder has no -0: a product alone may be one in float64
    assert same(chain(x, weight, adder), exact.float())


@settings(deadline=None, max_examples=25)
@given(dtypes, st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([VOLTA, AMPERE, HOPPER]))
def test_positive_sums_lose_a_little_and_never_gain(dtype, k, seed, adder):
    """A step loses a grid for each term and the accumulator's last bit, all relative to the largest partial sum."""
    x, weight = (m.abs() for m in inputs("uniform", 4, 4, k, dtype, seed=seed))
    y, exact = chain(x, weight, adder).double(), x.double() @ weight.double().T
    steps = -(-k // adder.block)
    assert (y <= exact).all()
    assert (exact - y <= steps * ((adder.block + 1) * 2.0 ** (1 - adder.fraction_bits) + 2.0**-22) * exact).all()


@every_dtype
def test_a_row_ignores_its_batch(dtype):
    x, weight = inputs("uniform", 40, 300, 70, dtype)
    assert check_invariance(chain, (x, weight))
    assert check_invariance(lambda w, x: chain(x, w).T, (weight, x))


@every_dtype
@pytest.mark.parametrize("k", [1, 15, 16, 17, 33, 100, 250])
def test_zeros_that_pad_the_last_step_change_nothing(dtype, k):
    pad = partial(torch.nn.functional.pad, pad=(0, -k % 64 + 64))
    for kind in kinds(dtype):
        x, weight = inputs(kind, 8, 9, k, dtype)
        if x.isfinite().all() and weight.isfinite().all():
            assert same(chain(pad(x), pad(weight)), chain(x, weight)), kind


@settings(deadline=None, max_examples=20)
@given(dtypes, st.integers(0, 6), st.integers(0, 90), st.sampled_from([VOLTA, AMPERE, HOPPER]))
def test_a_chain_goes_on_from_where_it_stopped(dtype, steps, rest, adder):
    at = steps * adder.block
    x, weight = inputs("uniform", 5, 5, at + rest + 1, dtype, seed=rest)
    first = chain(x[:, :at], weight[:, :at], adder)
    assert same(chain(x[:, at:], weight[:, at:], adder, first), chain(x, weight, adder))


def test_sizes_of_nothing():
    x, weight, start = torch.zeros(3, 0).half(), torch.zeros(2, 0).half(), torch.full((3, 2), -0.0)
    assert same(chain(x, weight), torch.zeros(3, 2))
    assert same(chain(x, weight, start=start), start), "no step, no change: not even of -0"
    assert chain(x, weight, start=start).data_ptr() != start.data_ptr()
    assert chain(torch.zeros(0, 5).half(), torch.zeros(2, 5).half()).shape == (0, 2)
    assert chain(torch.zeros(3, 5).half(), torch.zeros(0, 5).half()).shape == (3, 0)


@every_dtype
def test_strides_do_not_matter(dtype):
    x, weight = inputs("uniform", 30, 40, 50, dtype)
    start = torch.linspace(-1, 1, 30 * 40).view(30, 40)
    expected = chain(x, weight, start=start)
    assert same(chain(x.T.contiguous().T, weight, start=start.T.contiguous().T), expected)
    wide = torch.full((60, 100), float("nan"), dtype=x.dtype)
    wide[::2, ::2] = x
    assert same(chain(wide[::2, ::2], weight, start=start), expected)
    assert same(chain(x[:1].expand(30, 50), weight), chain(x[:1], weight).expand(30, 40).contiguous())


@pytest.mark.parametrize("shape", [(1, 4000, 40), (4000, 1, 40), (300, 600, 40), (17, 513, 250)])
def test_tiles_and_threads_change_nothing(shape, monkeypatch):
    rows, columns, k = shape
    x, weight = inputs("uniform", rows, columns, k)
    expected = chain(x, weight)
    monkeypatch.setattr(tensor_core, "_CPU_PRODUCTS", 10_000)
    monkeypatch.setattr(tensor_core, "_PATCH", 2)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert same(chain(x, weight), expected)
    finally:
        torch.set_num_threads(before)


def test_inputs_are_left_alone_and_no_gradient_flows():
    x, weight = (m.float().requires_grad_().bfloat16() for m in inputs("uniform", 20, 600, 40))
    start = torch.ones(20, 600, requires_grad=True)
    before = x.detach().clone(), weight.detach().clone()
    y = chain(x, weight, start=start)
    assert not y.requires_grad
    assert same_bits((x, weight), before) and (start == 1).all()
    with torch.inference_mode():
        assert same(chain(x + 0, weight + 0, start=start + 0), y)


X, W = torch.zeros(3, 5).bfloat16(), torch.zeros(2, 5).bfloat16()


@pytest.mark.parametrize("arguments, error, says", [
    ((X.float(), W), TypeError, "x must be a bfloat16 or float16 tensor, got torch.float32"),
    ((X, [[1.0]]), TypeError, "weight must be a bfloat16 or float16 tensor, got <class 'list'>"),
    ((X, W.half()), TypeError, "weight must have x's dtype torch.bfloat16, got torch.float16"),
    ((X[0], W), ValueError, r"x must have two dimensions, got shape \(5,\)"),
    ((X, W[:, :4]), ValueError, r"weight must be \(N, 5\) for x \(3, 5\), got \(2, 4\)"),
    ((X, W.to("meta")), ValueError, "weight must be on x's device cpu, got meta"),
    ((X, W, 16), TypeError, "adder must be an Adder such as HOPPER, got 16"),
    ((X, W, HOPPER, torch.zeros(3, 2).double()), TypeError, "start must be a float32 tensor, got torch.float64"),
    ((X, W, HOPPER, torch.zeros(2, 3)), ValueError, r"start must be \(3, 2\) on cpu, got \(2, 3\) on cpu"),
])
def test_bad_input_is_named(arguments, error, says):
    with pytest.raises(error, match=says):
        chain(*arguments)


@pytest.mark.parametrize("block, fraction_bits, says", [
    (0, 25, "block must be a whole number from 1 to 64, got 0"), (65, 25, "block"), (16.0, 25, "block"),
    (16, 9, "fraction_bits must be a whole number from 10 to 40, got 9"), (16, 41, "fraction_bits")])
def test_a_bad_adder_is_named(block, fraction_bits, says):
    with pytest.raises(ValueError, match=says):
        Adder(block, fraction_bits)


def test_zero_exponents():
    assert [adder.zero_exponent for adder in (VOLTA, AMPERE, HOPPER)] == [-131, -132, -133]


# comparing, probing, explaining


def test_compare_counts_and_names_the_first_difference():
    x, weight = inputs("uniform", 6, 7, 40)
    assert compare(chain, x, weight) and str(compare(chain, x, weight)) == "same bits in all 42 outputs"

    def wrong(x, weight):
        y = chain(x, weight)
        y[2, 3] += 1
        y[5, 0] = -0.0
        return y

    found = compare(wrong, x, weight)
    assert not found and (found.outputs, found.mismatches) == (42, 2)
    right = chain(x, weight)[2, 3].item()
    assert found.first == (2, 3, right, wrong(x, weight)[2, 3].item())
    assert str(found).startswith("2 of 42 outputs differ; first at row 2, column 3: ")


def test_differences_sees_the_bits_of_a_nan_and_of_a_zero():
    nan = torch.tensor([[0x7FFFFFFF, 0x7FC00000]], dtype=torch.int32).view(torch.float32)
    assert differences(nan, nan.flip(1)).mismatches == 2 and differences(nan, nan)
    assert differences(torch.zeros(1, 2), -torch.zeros(1, 2)).mismatches == 2


def test_differences_refuses_what_would_hide_bits():
    with pytest.raises(TypeError, match="must be float32.*bfloat16"):
        differences(torch.zeros(2, 2), torch.zeros(2, 2).bfloat16())
    with pytest.raises(ValueError, match=r"shape \(2, 2\), got \(1, 2\)"):
        differences(torch.zeros(2, 2), torch.zeros(1, 2))


@every_dtype
@pytest.mark.parametrize("adder", [VOLTA, AMPERE, HOPPER, Adder(3, 10), Adder(5, 18), Adder(32, 30), Adder(64, 35)],
                         ids=str)
def test_probe_finds_the_adder(adder, dtype):
    assert probe(lambda x, weight: chain(x, weight, adder), DTYPES[dtype], "cpu") == adder


def split_in_two(x, weight):
    half = x.shape[1] // 2
    return chain(x[:, :half], weight[:, :half]) + chain(x[:, half:], weight[:, half:])


@pytest.mark.parametrize("matmul, says", [
    (lambda x, weight: (x.double() @ weight.double().T).float(), "does not add in steps of 3 to 64 products"),
    (lambda x, weight: chain(x, weight, Adder(2, 25)), "does not add in steps of 3 to 64 products"),
    (lambda x, weight: chain(x, weight, Adder(16, 36)), "does not add .* each cut 10 to 35 bits below the largest"),
    (lambda x, weight: chain(x.flip(1), weight.flip(1)), "does not add .* in the order of k"),
    (split_in_two, "adds differently: .* outputs differ"),
])
def test_probe_refuses_what_adds_in_another_way(matmul, says):
    with pytest.raises(ValueError, match=says):
        probe(matmul, device="cpu")


def test_probe_refuses_rounded_results():
    with pytest.raises(TypeError, match="must be float32"):
        probe(lambda x, weight: chain(x, weight).bfloat16(), device="cpu")


@settings(deadline=None, max_examples=60)
@given(st.data(), dtypes, st.integers(0, 16), st.sampled_from([VOLTA, AMPERE, HOPPER]))
def test_explain_is_the_chain_in_words(data, dtype, products, adder):
    products = min(products, adder.block)
    a, b = (data.draw(patterns(1, products, dtype))[0] for _ in range(2))
    start = data.draw(st.floats(width=32, allow_nan=False, allow_infinity=False))
    step = explain(a, b, start, adder)
    if products:  # no products, no step
        assert step["result"] == chain(a[None], b[None], adder, torch.tensor([[start]])).item()
    assert len(step["terms"]) == products + 1
    unit = Fraction(2) ** step["exponent"]
    assert Fraction(step["grid"]) == unit / 2**adder.fraction_bits
    for term in step["terms"]:
        digits = term["kept_bits"].replace(".", "")
        assert len(term["kept_bits"].split(".")[1]) == adder.fraction_bits
        assert Fraction(int(digits, 2)) * Fraction(step["grid"]) == Fraction(term["kept"])
        whole = int(digits + term["lost_bits"], 2) * Fraction(step["grid"]) / 2 ** len(term["lost_bits"])
        value = Fraction(term["a"]) * Fraction(term["b"]) if term["a"] is not None else Fraction(start)
        assert whole == value and Fraction(term["value"]) == value == Fraction(term["kept"]) + Fraction(term["lost"])
    assert Fraction(step["sum"]) == sum(Fraction(t["kept"]) for t in step["terms"])


def test_explain_shows_what_is_lost():
    step = explain(numbers(1.5, 2.0**-13, 0.0), numbers(1.5, -1.25 * 2.0**-12, 3.0), 3.0)
    accumulator, large, small, zero = step["terms"]
    assert step["exponent"] == 1 and step["grid"] == 2.0**-24
    assert accumulator["kept_bits"] == "+01.1" + 24 * "0" and accumulator["exponent"] == 1
    assert large["kept_bits"] == "+01.001" + 22 * "0" and large["exponent"] == 0 and large["value"] == 2.25
    assert small["kept_bits"] == "-00." + 25 * "0" and small["lost_bits"] == "101" and small["kept"] == 0
    assert zero["exponent"] is None and zero["lost_bits"] == ""
    assert (step["sum"], step["result"], step["lost"]) == (5.25, 5.25, small["value"])


@pytest.mark.parametrize("arguments, error, says", [
    ((numbers(*17 * [1.0]), numbers(*17 * [1.0])), ValueError, "a must be one row of at most 16 numbers"),
    ((numbers(1.0, 2.0), numbers(1.0)), ValueError, r"b must be one row .* got shape \(1,\)"),
    ((numbers(1.0), numbers(float("inf"))), ValueError, "b must be finite"),
    ((numbers(1.0), numbers(1.0), 0.1), ValueError, "accumulator must be a finite float32 number, got 0.1"),
    ((numbers(1.0), numbers(1.0), float("nan")), ValueError, "accumulator must be a finite"),
    ((numbers(1.0), numbers(1.0, dtype=torch.float16)), TypeError, "b must have a's dtype"),
    (([1.0], [1.0]), TypeError, "a must be a bfloat16 or float16 tensor, got <class 'list'>"),
])
def test_explain_names_bad_input(arguments, error, says):
    with pytest.raises(error, match=says):
        explain(*arguments)


# the check of a GPU


@every_input
def test_inputs_are_the_same_again_and_say_what_they_are(dtype, kind):
    x, weight = inputs(kind, 48, 40, 64, dtype)
    again = inputs(kind, 48, 40, 64, dtype)
    assert same_bits((x, weight), again) and not same_bits(x, inputs(kind, 48, 40, 64, dtype, seed=1)[0])
    assert (x.shape, weight.shape, x.dtype) == ((48, 64), (40, 64), DTYPES[dtype])
    y = chain(x, weight)
    if kind in ("any", "nan_neighbour"):
        assert y.isnan().any()
    if kind in ("overflow", "any"):
        assert y.isinf().any() and not y.isinf().all()
    if kind in ("finite", "uniform", "sparse", "underflow", "returns_to_zero"):
        assert y.isfinite().float().mean() > 0.9
    if kind == "underflow":
        tiny = y if dtype == "bfloat16" else x.float()
        assert ((tiny != 0) & (tiny.abs() < torch.finfo(tiny.dtype if tiny is y else x.dtype).smallest_normal)).any()
    if kind == "returns_to_zero":
        exact = (x.double() @ weight.double().T).float()
        assert not exact.any()
    if kind not in (*ADVERSARIAL, "portable", "overflow"):
        assert elements_differ(y, (x.double() @ weight.double().T).float()) > 0, "nothing is cut, so nothing is checked"


def test_inputs_refuse_what_they_are_not():
    with pytest.raises(ValueError, match="kind must be one of .* for float16, got 'overflow'"):
        inputs("overflow", 2, 2, 2, "float16")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, got 'float32'"):
        inputs("uniform", 2, 2, 2, "float32")


@every_dtype
def test_the_check_counts_mismatches(dtype):
    """Inverse test: one matmul is its probed adder, the other changes one output where k is 31."""
    def wrong(x, weight):
        y = chain(x, weight)
        y[3, 3] += float(x.shape[1] == 31)
        return y

    rows = list(check({"right": chain, "wrong": wrong}, dtype, (31, 64), 16, "cpu"))
    assert len(rows) == 2 * 2 * len(kinds(dtype))
    assert [tuple(row) for row in rows] == [TENSOR_CORE.columns] * len(rows)
    assert len({tuple(row[name] for name in TENSOR_CORE.key) for row in rows}) == len(rows)
    assert {row["outputs"] for row in rows} == {256} and {row["fraction_bits"] for row in rows} == {25}
    assert {row["mismatches"] for row in rows if row["instruction"] == "right" or row["k"] == 64} == {0}
    assert sum(row["mismatches"] for row in rows) > 5
    assert sum(row["not_nearest"] for row in rows) > 100 and sum(row["nan"] for row in rows) > 100


def test_the_check_counts_each_kind_of_result_once():
    y = torch.tensor([0.0, -0.0, 2.0**-126, 2.0**-127, -(2.0**-149), 1.0, math.inf, -math.inf, -math.inf, math.nan])
    assert check_tensor_core._counts(y) == {"nan": 1, "infinite": 3, "subnormal": 2, "zero": 2}


@pytest.mark.skipif(runtime.HAS_GPU, reason="there is a GPU here")
def test_the_check_asks_for_a_gpu(capsys, tmp_path):
    assert check_tensor_core.main(["--out", str(tmp_path)]) == 2
    assert "there is no GPU here" in capsys.readouterr().err and not list(tmp_path.iterdir())


@needs_triton
@pytest.mark.parametrize("tile", check_tensor_core.TILES)
@pytest.mark.parametrize("rows, columns, k", [(20, 70, 100), (64, 64, 64), (1, 1, 1), (17, 3, 0)])
def test_dot_multiplies(rows, columns, k, tile):
    x, weight = inputs("uniform", rows, columns, k, "float16", runtime.device())
    y = check_tensor_core.dot(x, weight, tile)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() @ weight.float().T, rtol=1e-5, atol=1e-5)


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.lab.proofs.tensor_core import TILES, _kernel
for tile in TILES:
    types = {name: "constexpr" if name.startswith("BLOCK") else "*fp32" if name == "y_ptr" else "*bf16"
             if name.endswith("_ptr") else "i32" for name in _kernel.arg_names}
    source = ASTSource(_kernel, types, {"BLOCK_M": tile, "BLOCK_N": 64, "BLOCK_K": 64},
                       {(i,): [["tt.divisibility", 16]] for i in range(6)})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(tile, *(len(re.findall(rf"\\b{name}", ptx)) for name in ("wgmma.mma_async", "mma.sync", r"add\\S*\\.f32")))
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiling ahead of time needs Triton")
def test_dot_becomes_both_instructions_and_no_float32_addition():
    """On sm_90; 64 deep: four wgmma, or in each of four warps two tiles eight wide by four mma.sync."""
    done = subprocess.run([sys.executable, "-c", f"import os; os.environ['TRITON_INTERPRET'] = '0'\n{COMPILE}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["16 0 8 0", "64 4 0 0"], done.stderr


# on a GPU


@pytest.mark.gpu
@every_input
@pytest.mark.parametrize("adder", [VOLTA, AMPERE, HOPPER], ids=str)
def test_the_chain_is_the_same_on_a_gpu(dtype, kind, adder):
    for k in (1, 31, 250):
        x, weight = inputs(kind, 70, 300, k, dtype)
        start = check_tensor_core._hashed(70, 300, "cpu", k).to(torch.int32).view(torch.float32)
        on_gpu = chain(x.cuda(), weight.cuda(), adder, start.cuda())
        assert on_gpu.is_cuda and same(on_gpu.cpu(), chain(x, weight, adder, start))
        assert same_bits(inputs(kind, 70, 300, k, dtype, "cuda"), (x, weight))


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("tile", check_tensor_core.TILES)
def test_probe_finds_this_gpus_adder(dtype, tile):
    adder = probe(partial(check_tensor_core.dot, tile=tile), DTYPES[dtype])
    assert adder in ADDERS.values()
    if torch.cuda.get_device_capability()[0] == 9:
        assert adder == HOPPER


@pytest.mark.gpu
def test_this_gpu_adds_as_the_chain_says():
    rows = []
    for dtype in EXPONENTS:
        matmuls = {check_tensor_core.instruction(DTYPES[dtype], tile): partial(check_tensor_core.dot, tile=tile)
                   for tile in check_tensor_core.TILES}
        rows += check(matmuls, dtype, LENGTHS[:-1], 256)
    assert [row for row in rows if row["mismatches"]] == []
    assert sum(row["outputs"] for row in rows) >= 10_000_000
    assert sum(row["not_nearest"] for row in rows) > 1_000_000


def record():
    """Write what mmasim gives for every recorded case."""
    from mmasim.nv_ptx import MMA

    shapes = {"Volta": "m8n8k4.f32.f16.f16.f32", "Turing": "m16n8k8.f32.f16.f16.f32"}
    with RECORDED.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for architecture, dtype, kind, k, x, weight, start in recorded_cases():
            name = {"bfloat16": "bf16", "float16": "f16"}[dtype]
            shape = shapes.get(architecture, f"m16n8k16.f32.{name}.{name}.f32")
            core = MMA({"Ada": "Ada Lovelace"}.get(architecture, architecture), shape)
            y = core(x, weight.T, torch.zeros(4, 4) if start is None else start)
            writer.writerow([architecture, dtype, kind, k, hexadecimal(y)])


if __name__ == "__main__":
    record()


# in Triton's interpreter


@triton.jit
def _chain_kernel(x_ptr, weight_ptr, start_ptr, y_ptr, ROWS: tl.constexpr, K: tl.constexpr, SMALLEST: tl.constexpr):
    row, k = tl.arange(0, ROWS), tl.arange(0, K)
    x = tl.load(x_ptr + row[:, None] * K + k[None, :])
    weight = tl.load(weight_ptr + row[:, None] * K + k[None, :])
    at = row[:, None] * ROWS + row[None, :]
    tl.store(y_ptr + at, tl_chain(x, weight, tl.load(start_ptr + at), SMALLEST))


def interpreted(x, weight, start):
    """tl_chain of square outputs: 16-bit numbers are held as float32."""
    y = torch.empty_like(start)
    _chain_kernel[(1,)](x.float(), weight.float(), start, y, len(x), x.shape[1],
                        2.0**-14 if x.dtype == torch.float16 else 2.0**-126)
    return y


@pytest.mark.skipif(bool(runtime.WHY_NOT) or runtime.HAS_GPU, reason=runtime.WHY_NOT or "there is a GPU")
@every_input
def test_the_interpreters_chain_is_the_chain(dtype, kind):
    x, weight = inputs(kind, 16, 16, 64, dtype, seed=5)
    start = chain(weight, x)
    assert same_bits(interpreted(x, weight, start), chain(x, weight, HOPPER, start))


@pytest.mark.skipif(bool(runtime.WHY_NOT) or runtime.HAS_GPU, reason=runtime.WHY_NOT or "there is a GPU")
def test_the_interpreters_chain_cuts_where_a_tensor_core_does():
    """One row for each place of a small product: in the step of two large ones that cancel, or after it; and one for
    each of its sizes, kept or cut."""
    x = torch.zeros(64, 64, dtype=torch.float32)
    x[:, 0], x[:, 1] = 2.0**12, -(2.0**12)
    for row in range(32):
        x[row, 2 + row] = 2.0**-24
        x[32 + row, 1], x[32 + row, 2] = 2.0 ** (12 - row), -(2.0**12)
    x, ones = x.bfloat16(), torch.ones(64, 64, dtype=torch.bfloat16)
    zero = torch.zeros(64, 64, dtype=torch.float32)
    found = interpreted(x, ones, zero)
    assert same_bits(found, chain(x, ones))
    assert found[:14, 0].count_nonzero() == 0 and found[14:32, 0].all(), "steps of sixteen"
    assert found[32:58, 0].all() and found[58:, 0].count_nonzero() == 0, "25 bits below the largest are kept"
