"""Comparing bits, hashing them, counting how far apart they are, and inputs that are the same everywhere."""
import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.bits import (
    ADVERSARIAL,
    adversarial,
    bits,
    check_invariance,
    digest,
    elements_differ,
    portable,
    same_bits,
    ulp_distance,
)
from kernels.op import DTYPES

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def from_bits(*words, dtype=torch.float32):
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(dtype)


# same_bits


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_two_zeros_differ(dtype):
    plus, minus = torch.zeros(3, dtype=dtype), -torch.zeros(3, dtype=dtype)
    assert torch.equal(plus, minus)
    assert not same_bits(plus, minus)
    assert same_bits(minus, minus.clone())


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_nan_is_the_same_nan(dtype):
    nan = torch.tensor([1.0, float("nan")], dtype=dtype)
    assert not torch.equal(nan, nan)
    assert same_bits(nan, nan.clone())
    assert same_bits(nan, torch.tensor([1.0, -float("nan")], dtype=dtype))
    assert not same_bits(nan, torch.tensor([1.0, float("inf")], dtype=dtype))


def test_nan_payloads_and_signs_do_not_count():
    odd = from_bits(0x7FC00000, 0x7F800001, -0x400000, -1)  # quiet, signalling, negative, all ones
    assert odd.isnan().all() and len(set(odd.view(torch.int32).tolist())) == 4
    assert same_bits(odd, torch.full((4,), float("nan")))
    assert len(set(bits(odd).tolist())) == 1
    assert digest(odd) == digest(torch.full((4,), float("nan")))


def test_shape_dtype_and_number_of_outputs_count():
    x = torch.ones(6)
    assert not same_bits(x, x.view(2, 3))
    assert not same_bits(x, x.double())
    assert not same_bits(torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16))
    assert same_bits((x, x), (x, x.clone()))
    assert not same_bits((x, x), (x,))
    assert not same_bits((x, x), (x, x + 1))


def test_strides_do_not_count():
    x = torch.arange(12.0).view(3, 4)
    assert same_bits(x.t(), x.t().contiguous())
    assert digest(x[:, ::2]) == digest(x[:, ::2].contiguous())


@pytest.mark.parametrize("x", [torch.arange(4), torch.arange(4.0), torch.complex(torch.arange(4.0), torch.ones(4))],
                         ids=["integers", "floats", "complex"])
def test_a_lazily_negated_tensor_has_the_bits_of_its_numbers(x):
    lazy = torch._neg_view(x)
    assert lazy.is_neg() and bits(lazy).tolist() == bits(torch.neg(x).clone()).tolist() != bits(x).tolist()
    assert digest(lazy) == digest(torch.neg(x)) and same_bits(lazy, torch.neg(x))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 31))
def test_one_flipped_bit_is_noticed(word, flipped):
    other = word ^ (1 << flipped)
    a, b = (torch.from_numpy(np.array([1, w], dtype=np.uint32).view(np.float32)) for w in (word, other))
    assume(not (a[1].isnan() and b[1].isnan()))
    assert not same_bits(a, b)
    assert digest(a) != digest(b)
    assert elements_differ(a, b) == 1


# digest


def test_digest_is_sha256_over_dtype_shape_and_bytes():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    wanted = hashlib.sha256(b"torch.float32 (1, 3);" + np.array([1, -2, 0.5], dtype="<f4").tobytes()).hexdigest()
    assert digest(x) == wanted
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    assert digest(half) == hashlib.sha256(b"torch.bfloat16 (1,);\x80\x3f").hexdigest()


def test_digest_of_a_tuple_covers_every_tensor_in_order():
    a, b = torch.zeros(2), torch.ones(2)
    assert len({digest(v) for v in (a, b, (a, b), (b, a), (a, a), (a, b, a))}) == 6
    assert digest((a,)) == digest(a)


def test_digest_counts_shape_and_dtype():
    x = torch.zeros(6)
    assert len({digest(v) for v in (x, x.view(2, 3), x.view(3, 2), x.half(), x.bfloat16(), x.double(), -x)}) == 7


KNOWN = {
    ("portable", "float32"): "b3511f0773ec711215a8c271734aaaccc43851da4af9464e8076fd9568507772",
    ("portable", "float16"): "36a416f7d6d6081e7f964ab153074fe53d7f4ad775b76ca8879a90269ab7876d",
    ("portable", "bfloat16"): "3c639fb2ecbb02dade79054748be3c5df1ae27dd241ae2ad48bf1e807f944da8",
    ("cancellation", "bfloat16"): "4c8f1c0ba6033ce0bbf4d11a370c18b7e84f5370b1695da35ef33371a6d4ef12",
    ("wide", "float32"): "2d08cf2438c8aa312190020d3f602ea778a7432decef892688723e6dd588ca43",
    ("subnormal", "float16"): "3f01d6dc52eb44be83aa6c543c8b5653a43b9a45efe0951ac8ea5057f4922728",
    ("signed_zero", "float32"): "684b4b49f65f3897551d42e36d842051f767a45b5c9729a2379486f1eb3e52d3",
    ("huge", "bfloat16"): "f47aa869926b7861a0487d248ca058c61319693da6fba320b0f4499e6b894b2a",
    ("nan_neighbour", "float32"): "b7d07ecbb809a7e2df8b0049c14cad867f250aaef1fe3f9be5df2c0dbd48c75b",
}


@pytest.mark.parametrize(("kind", "dtype"), KNOWN)
def test_inputs_keep_their_known_digests(kind, dtype):
    """Recorded results rest on these inputs: whoever changes one must record every machine again."""
    made = portable(2100, 130, DTYPES[dtype], seed=7) if kind == "portable" else adversarial(
        kind, 2100, 130, DTYPES[dtype], seed=7)
    assert digest(made) == KNOWN[kind, dtype]


# ulp_distance and elements_differ


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ulp_distance_is_the_difference_of_ranks(dtype):
    """All 16-bit numbers, sorted: neighbours are one apart, and the two zeros share a place."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    values = np.unique(every.double().numpy())  # -0.0 == +0.0: one place
    rank = torch.from_numpy(np.searchsorted(values, every.double().numpy()))
    start = torch.tensor(-float("inf"), dtype=dtype).expand_as(every)
    assert torch.equal(ulp_distance(every, start), rank)
    shuffled = (torch.arange(len(every)) * 7919) % len(every)
    assert torch.equal(ulp_distance(every, every[shuffled]), (rank - rank[shuffled]).abs())


@settings(deadline=None)
@given(floats32, st.integers(0, 40), st.booleans())
def test_ulp_distance_counts_nextafter_steps_in_float32(start, steps, up):
    a = np.float32(start)
    b = a
    for _ in range(steps):
        b = np.nextafter(b, np.float32(np.inf if up else -np.inf))
    assume(np.isfinite(b))
    assert ulp_distance(torch.tensor([a]), torch.tensor([b])).item() == steps


@settings(deadline=None)
@given(st.floats(-1e300, 1e300), st.integers(0, 100))
def test_ulp_distance_counts_nextafter_steps_in_float64(start, steps):
    end = start
    for _ in range(steps):
        end = math.nextafter(end, math.inf)
    a, b = torch.tensor([start], dtype=torch.float64), torch.tensor([end], dtype=torch.float64)
    assert ulp_distance(a, b).item() == ulp_distance(b, a).item() == steps


def test_ulp_distance_across_zero():
    tiny = torch.tensor([2.0**-149])
    assert ulp_distance(tiny, -tiny).item() == 2
    assert ulp_distance(torch.tensor([0.0]), torch.tensor([-0.0])).item() == 0
    assert ulp_distance(torch.tensor([-0.0]), tiny).item() == 1


def test_ulp_distance_refuses_two_dtypes():
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        ulp_distance(torch.ones(1), torch.ones(1, dtype=torch.bfloat16))


@settings(deadline=None)
@given(st.sets(st.integers(0, 59)))
def test_elements_differ_counts_the_changed_ones(changed):
    x = portable(5, 12)
    y = x.clone()
    y.view(-1)[list(changed)] += 1.0
    assert elements_differ(x, y) == elements_differ((x,), (y,)) == len(changed)
    assert elements_differ((x, y), (y, y)) == len(changed)
    assert elements_differ(torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, float("nan")])) == 1


# check_invariance


def split_sum(x):
    """A row's sum in as many parts as there are idle cores: the batch decides the order."""
    parts = max(1, 16 // len(x))
    return sum(piece.sum(-1, keepdim=True) for piece in x.tensor_split(parts, dim=-1))


def test_an_invariant_function_passes():
    x = portable(33, 100)
    report = check_invariance(lambda a: a * 2 + 1, (x,))
    assert report
    assert (report.elements_differ, report.largest_ulp, report.first) == (0, 0, None)
    assert report.elements == sum(len(torch.arange(33)[b]) for b in expected_batches(33)) * 100
    assert report.trials == len(expected_batches(33))
    assert "same bits" in str(report)


def expected_batches(tokens):
    """The batches the docstring promises: powers of two from either end, rows alone, the reverse, one repeated."""
    sizes = [2**i for i in range(20) if 2**i < tokens]
    slices = [slice(0, n) for n in sizes] + [slice(i, i + 1) for i in sorted({0, tokens // 3, tokens - 1})]
    slices += [slice(tokens - n, tokens) for n in sizes[1:]]
    return slices + [torch.arange(tokens).flip(0), torch.zeros(tokens, dtype=torch.int64)]


def test_a_split_sum_is_caught():
    """Inverse test: what serves a few rows by cutting each into parts moves bits, and the report says where."""
    x = portable(64, 1000, seed=3)
    report = check_invariance(split_sum, (x,))
    assert not report
    full = split_sum(x)
    wrong = [i for i in range(64) if not same_bits(split_sum(x[:1]), full[:1])]
    assert wrong, "this input does not move on this machine"
    assert (report.first.batch, report.first.row, report.first.element) == ("rows 0:1", 0, 0)
    assert report.first.alone == split_sum(x[:1]).item()
    assert report.first.together == full[0].item()
    assert 0 < report.elements_differ <= report.elements
    assert report.largest_ulp >= 1
    assert "bits moved" in str(report) and repr(report.first.alone) in str(report)


def moves(row, element, when, by=1.0, output=0):
    """A function that adds `by` to one element, known by its value, when the batch has `when` rows."""
    def function(x, untouched=None):
        y = x.clone()
        if len(x) == when:
            y[x[:, 0] == row, element] += by
        return (y, x * 1) if output == 0 else (x * 1, y)
    return function


@settings(deadline=None)
@given(tokens=st.integers(4, 40), width=st.integers(2, 9), data=st.data())
def test_the_first_difference_is_named_exactly(tokens, width, data):
    x = torch.zeros(tokens, width)
    x[:, 0] = torch.arange(tokens)
    row, element = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(1, width - 1))
    start = data.draw(st.integers(0, row))
    stop = data.draw(st.integers(row + 1, tokens))
    assume(stop - start < tokens)
    output = data.draw(st.integers(0, 1))
    report = check_invariance(moves(row, element, stop - start, 1.0, output), (x,), batches=[slice(start, stop)])
    first = report.first
    assert (first.output, first.batch, first.row, first.element) == (output, f"rows {start}:{stop}", row, element)
    assert (first.together, first.alone) == (0.0, 1.0)
    assert (report.trials, report.elements_differ, report.elements) == (1, 1, 2 * (stop - start) * width)
    assert report.largest_ulp == 127 << 23


def test_rows_of_permuted_and_repeated_batches_are_named_by_their_place_in_the_full_batch():
    x = torch.arange(8.0)[:, None].repeat(1, 3)
    report = check_invariance(moves(5, 2, 4), (x,), batches=[slice(0, 3), torch.tensor([7, 5, 5, 1])])
    assert (report.first.batch, report.first.row, report.first.element) == ("of 4 chosen rows", 5, 2)
    assert (report.elements_differ, report.trials) == (2, 2)


def test_only_per_token_arguments_are_cut():
    x, weight, other = portable(9, 4), portable(1, 4)[0], portable(9, 4, seed=1)
    seen = []

    def function(a, w, b):
        seen.append((a.shape[0], w.shape, None if b is None else b.shape[0]))
        return a * w if b is None else a * w + b

    assert check_invariance(function, (x, weight, other), per_token=(0, 2), batches=[slice(2, 5)])
    assert check_invariance(function, (x, weight, None), per_token=(0, 2), batches=[slice(2, 5)])
    assert seen == [(9, (4,), 9), (3, (4,), 3), (9, (4,), None), (3, (4,), None)]


def test_the_largest_of_several_distances_is_named():
    """1, 3 and 2 units in the last place."""
    x = torch.ones(4, 3)
    far = 1.0 + torch.tensor([1.0, 3.0, 2.0]) * 2.0**-23
    assert check_invariance(lambda a: a * far if len(a) == 1 else a, (x,), batches=[slice(0, 1)]).largest_ulp == 3


def test_a_nan_or_a_signed_zero_that_moves_is_caught():
    x = torch.zeros(4, 2)
    zero = check_invariance(lambda a: -a if len(a) == 1 else a, (x,), batches=[slice(0, 1)])
    assert not zero and zero.largest_ulp == 0 and zero.elements_differ == 2
    nan = check_invariance(lambda a: a / a if len(a) == 1 else a, (x,), batches=[slice(0, 1)])
    assert not nan and math.isnan(nan.first.alone) and nan.first.together == 0.0


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens_are_enough(tokens):
    assert check_invariance(lambda a: a + 1, (portable(tokens, 5),))


# portable


def pencil_portable(rows, width, precision, seed, scale):
    """The docstring redone in whole numbers: a hashed integer times a power of two, as float64."""
    x = (np.arange(rows * width, dtype=np.uint64) + np.uint64(seed * 0x9E3779B1)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(15)
    integer = (x % np.uint64(2**precision)).astype(np.int64) - 2 ** (precision - 1)
    binade = (x >> np.uint64(28)).astype(np.int64) % 4
    return (integer * 2.0 ** (scale + 1 - precision - binade.astype(np.float64))).reshape(rows, width)


@settings(deadline=None)
@given(rows=st.integers(0, 20), width=st.integers(1, 300), dtype=st.sampled_from(sorted(SIGNIFICANT, key=str)),
       seed=st.integers(0, 10**6), scale=st.integers(-3, 10))
def test_portable_is_an_integer_times_a_power_of_two(rows, width, dtype, seed, scale):
    made = portable(rows, width, dtype, seed=seed, scale=scale)
    wanted = pencil_portable(rows, width, SIGNIFICANT[dtype], seed, scale)
    assert (made.shape, made.dtype) == ((rows, width), dtype)
    assert np.array_equal(made.double().numpy(), wanted)  # so the conversion to dtype rounded nothing
    assert np.all((wanted >= -(2.0**scale)) & (wanted < 2.0**scale))


@settings(deadline=None)
@given(rows=st.integers(1, 40), more=st.integers(0, 40), width=st.integers(1, 200), seed=st.integers(0, 1000))
def test_a_portable_row_does_not_depend_on_how_many_there_are(rows, more, width, seed):
    assert same_bits(portable(rows, width, seed=seed), portable(rows + more, width, seed=seed)[:rows])


def test_portable_is_the_same_in_pieces():
    """Long inputs are made piece by piece; the borders must not show."""
    made = portable(700, 1000, seed=5)
    assert np.array_equal(made.double().numpy(), pencil_portable(700, 1000, 24, 5, 0))


def test_portable_values_fill_the_significand_over_four_binades():
    made = portable(500, 100).abs()
    exponent = torch.frexp(made).exponent
    assert ((exponent <= -2).float().mean() > 0.3) and ((exponent == 0).float().mean() > 0.1)
    last_but_one = torch.ldexp(torch.frexp(made).mantissa.double(), torch.tensor(23)) % 2
    assert 0.2 < last_but_one.mean() < 0.3  # half of the numbers reach it, and half of those set it
    assert 0.45 < (portable(500, 100) < 0).float().mean() < 0.55


def test_seeds_give_other_numbers():
    made = [portable(20, 50, seed=s) for s in range(20)]
    assert len({digest(m) for m in made}) == 20
    assert len(portable(100, 100).unique()) > 9000


def test_thread_count_does_not_matter():
    before = torch.get_num_threads()
    try:
        seen = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.add(digest((portable(300, 1000), *(adversarial(k, 300, 200) for k in ADVERSARIAL))))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


# adversarial


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_adversarial_row_does_not_depend_on_how_many_there_are(kind, dtype):
    made = adversarial(kind, 31, 77, dtype, seed=2)
    assert (made.shape, made.dtype) == ((31, 77), dtype)
    assert same_bits(made[:10], adversarial(kind, 10, 77, dtype, seed=2))
    assert not same_bits(made, adversarial(kind, 31, 77, dtype, seed=3))
    assert adversarial(kind, 0, 77, dtype).shape == (0, 77)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


def test_cancellation_puts_nearly_equal_neighbours_of_opposite_sign(dtype):
    x = adversarial("cancellation", 20, 400, dtype).double()
    assert (x[:, 0::2] > 0).all() and (x[:, 1::2] < 0).all()
    pairs = x[:, 0::2] + x[:, 1::2]
    assert pairs.abs().max() <= 0.13
    assert len(x.abs().unique()) >= 16 and (pairs != 0).double().mean() > 0.5


def test_wide_spans_most_exponents(dtype):
    exponent = torch.frexp(adversarial("wide", 20, 400, dtype).double()).exponent
    assert exponent.max() - exponent.min() >= (18 if dtype == torch.float16 else 120)


def test_subnormal_numbers_are_subnormal_and_survive(dtype):
    x = adversarial("subnormal", 20, 400, dtype)
    small = (x != 0) & (x.abs() < torch.finfo(dtype).smallest_normal)
    assert small.float().mean() > 0.5
    assert (x.abs() >= torch.finfo(dtype).smallest_normal).float().mean() > 0.05


def test_signed_zero_has_both_zeros(dtype):
    x = adversarial("signed_zero", 20, 400, dtype)
    zero = x == 0
    assert zero.float().mean() > 0.6 and not zero.all()
    assert 0.3 < torch.signbit(x[zero]).float().mean() < 0.7


def test_huge_squares_overflow(dtype):
    x = adversarial("huge", 20, 400, dtype)
    assert x.isfinite().all()
    assert (x * x).isinf().float().mean() > 0.9


def test_nan_neighbours_stay_in_every_third_row(dtype):
    x = adversarial("nan_neighbour", 30, 400, dtype)
    assert x[2::3].isnan().any(-1).all() and x[2::3].isinf().any(-1).all()
    assert x[0::3].isfinite().all() and x[1::3].isfinite().all()


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match="'odd'.*") as caught:
        adversarial("odd", 1, 1)
    assert all(kind in str(caught.value) for kind in ADVERSARIAL)


# on a GPU


@pytest.mark.gpu
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 300), width=st.integers(1, 3000), seed=st.integers(0, 10**6), scale=st.integers(-3, 10),
       dtype=st.sampled_from(list(DTYPES.values())))
def test_portable_is_the_same_on_a_gpu(rows, width, seed, scale, dtype):
    here, there = (portable(rows, width, dtype, d, seed, scale) for d in ("cpu", runtime.device()))
    assert there.is_cuda and same_bits(here, there) and digest(here) == digest(there)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_is_the_same_on_a_gpu(kind, dtype):
    here, there = (adversarial(kind, 65, 1500, dtype, d, seed=4) for d in ("cpu", runtime.device()))
    assert there.is_cuda and same_bits(here, there) and digest(here) == digest(there)
    assert elements_differ(here, there) == 0


@pytest.mark.gpu
def test_a_split_sum_is_caught_on_a_gpu():
    x = portable(64, 1000, seed=3, device=runtime.device())
    report = check_invariance(split_sum, (x,))
    assert not report and report.first.batch == "rows 0:1"
    assert check_invariance(lambda a: a * 2, (x,))
