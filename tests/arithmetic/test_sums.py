"""The order of arithmetic/sums.py, redone with a pencil."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.arithmetic.sums import CHUNK, add_chunks, add_neighbours, ordered_sum, tree, tree_width
from kernels.bits import adversarial, check_invariance, portable, same_bits
from kernels.runtime import tl, triton

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")


def pencil_sum(row):
    """One row, one addition at a time, as the docstring of arithmetic/sums.py says; nothing shared with the code."""
    numbers = [np.float32(v) for v in row]
    while len(numbers) % 1024:
        numbers.append(np.float32(0.0))
    columns = numbers[:1024]
    for start in range(1024, len(numbers), 1024):
        for j in range(1024):
            columns[j] = columns[j] + numbers[start + j]
    with np.errstate(over="ignore", invalid="ignore"):
        while len(columns) > 1:
            columns = [columns[i] + columns[i + 1] for i in range(0, len(columns), 2)]
    assert isinstance(columns[0], np.float32)
    return columns[0]


def same_as_pencil(x):
    return same_bits(ordered_sum(x), torch.from_numpy(np.array([[pencil_sum(row)] for row in x.numpy()])))


@settings(deadline=None)
@given(width=st.integers(1, 5000), seed=st.integers(0, 10**6), scale=st.integers(-4, 4))
def test_ordered_sum_is_the_pencil_sum(width, seed, scale):
    assert same_as_pencil(portable(1, width, seed=seed, scale=scale))


@settings(deadline=None)
@given(st.lists(st.floats(2.0**-60, 2.0**60, width=32) | st.floats(-(2.0**60), -(2.0**-60), width=32),
                min_size=1, max_size=300))
def test_ordered_sum_is_the_pencil_sum_for_any_numbers(values):
    assert same_as_pencil(torch.tensor([values]))


@pytest.mark.parametrize("width", [1, 2, 3, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 5000])
@pytest.mark.parametrize("kind", ["cancellation", "wide", "subnormal", "huge"])
def test_ordered_sum_is_the_pencil_sum_for_adversarial_rows(kind, width):
    assert same_as_pencil(adversarial(kind, 2, width, seed=1))


def test_another_order_has_other_bits():
    """Inverse test: the pencil would notice rows read backwards, or halves added instead of neighbours."""
    x = portable(64, 3000)
    padded = torch.nn.functional.pad(x, (0, 72))
    halves = add_chunks(x)
    while halves.shape[-1] > 1:
        halves = halves[..., : halves.shape[-1] // 2] + halves[..., halves.shape[-1] // 2 :]
    assert not same_bits(ordered_sum(padded.flip(-1)), ordered_sum(padded))
    assert not same_bits(halves, ordered_sum(x))


@settings(deadline=None)
@given(width=st.integers(1, 9000), seed=st.integers(0, 10**6), signed=st.booleans())
def test_the_error_stays_within_the_depth_of_the_tree(width, seed, signed):
    """Each addition errs by half an ulp at most, and a number passes through no more than `depth` of them."""
    row = portable(1, width, seed=seed)
    row = row if signed else row.abs()
    depth = math.ceil(width / 1024) - 1 + 10
    exact, size = math.fsum(row[0].tolist()), math.fsum(row[0].abs().tolist())
    assert abs(ordered_sum(row).item() - exact) <= 1.01 * depth * 2.0**-24 * size


@settings(deadline=None)
@given(width=st.integers(1, 3000), zeros=st.integers(0, 3000), seed=st.integers(0, 10**6))
def test_positive_zeros_at_the_end_change_nothing(width, zeros, seed):
    x = portable(2, width, seed=seed) + 1.5  # nothing is -0 and no column cancels to it
    assert same_bits(ordered_sum(torch.nn.functional.pad(x, (0, zeros))), ordered_sum(x))


def test_only_a_row_of_negative_zeros_notices_the_padding():
    assert same_bits(ordered_sum(torch.full((1, 4), -0.0)), torch.tensor([[-0.0]]))
    assert same_bits(ordered_sum(torch.full((1, 3), -0.0)), torch.tensor([[0.0]]))


def test_tree_width_is_the_power_of_two_that_holds_the_row():
    assert [tree_width(w) for w in (1, 2, 3, 4, 5, 512, 513, 1024, 1025, 70000)] == [
        1, 2, 4, 4, 8, 512, 1024, 1024, 1024, 1024]
    for width in range(1, CHUNK + 1):
        assert width <= tree_width(width) < 2 * width or width == tree_width(width) == 1


@pytest.mark.parametrize("width", [1, 7, 1000, 1024, 3000])
def test_chunks_keep_the_leading_dimensions(width):
    x = portable(30, width).view(2, 3, 5, width)
    assert add_chunks(x).shape == (2, 3, 5, tree_width(width))
    assert ordered_sum(x).shape == (2, 3, 5, 1)
    assert same_bits(ordered_sum(x).view(30, 1), ordered_sum(x.view(30, width)))


@pytest.mark.parametrize("width", [1, 63, 1000, 4096])
def test_the_sum_of_a_row_ignores_its_batch(width):
    assert check_invariance(ordered_sum, (portable(50, width),))
    assert ordered_sum(portable(0, width)).shape == (0, 1)


@triton.jit
def _tree_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    tl.store(y_ptr + row, tree(tl.load(x_ptr + row * WIDTH + column)))


def run_tree(x, warps):
    y = torch.empty(len(x), 1, device=x.device)
    options = {"num_warps": warps, "enable_fp_fusion": False} if x.is_cuda else {}
    _tree_kernel[(1,)](x, y, *x.shape, **options)
    return y


@needs_triton
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("width", [1, 2, 8, 256, 1024])
def test_the_triton_tree_is_the_python_tree(rows, width):
    x = portable(rows, width, seed=2, device=runtime.device())
    assert same_bits(run_tree(x, 4), add_neighbours(x))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["portable", "cancellation", "wide", "subnormal", "huge"])
@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
def test_the_triton_tree_is_the_python_tree_for_any_number_of_warps(kind, warps):
    for rows, width in ((1, 1024), (4, 1024), (16, 64), (2, 2), (128, 8), (1, 1)):
        x = portable(rows, width, seed=3) if kind == "portable" else adversarial(kind, rows, width, seed=3)
        assert same_bits(run_tree(x.cuda(), warps), add_neighbours(x)), (rows, width)


@pytest.mark.gpu
@settings(deadline=None)
@given(width=st.integers(1, 70000), seed=st.integers(0, 10**6))
def test_ordered_sum_is_the_same_on_a_gpu(width, seed):
    x = portable(3, width, seed=seed)
    assert same_bits(ordered_sum(x), ordered_sum(x.cuda()))
