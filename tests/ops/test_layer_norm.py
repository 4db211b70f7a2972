"""LayerNorm and the product over batches, which the mode calls: order, accuracy, schedules, code, bad input."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from common import HERE, both, every_dtype, needs_compiler, needs_triton

from kernels import bits
from kernels.bits import ADVERSARIAL, adversarial, portable, same_bits
from kernels.lab.proofs.generated_code import WITHOUT_LINES, Code, Job
from kernels.lab.records import ROOT
from kernels.ops.bmm import bmm
from kernels.ops.layer_norm import Schedule, layer_norm
from kernels.ops.matmul.op import matmul
from kernels.ops.matmul.order import Order
from kernels.ops.rms_norm import rms_norm

WIDTHS = (1, 7, 96, 1000, 2500)


def by_pencil(row, weight, bias, eps):
    """The order in the docstring, number by number, float32 in NumPy's scalars."""
    import numpy as np

    def total(numbers):
        width = min(1024, 1 << max(len(numbers) - 1, 0).bit_length())
        numbers = numbers + [np.float32(0)] * (-len(numbers) % width)
        columns = numbers[:width]
        for start in range(width, len(numbers), width):
            columns = [a + b for a, b in zip(columns, numbers[start : start + width], strict=True)]
        while len(columns) > 1:
            columns = [a + b for a, b in zip(columns[0::2], columns[1::2], strict=True)]
        return columns[0]
    x, share = [np.float32(v) for v in row.tolist()], np.float32(1 / len(row))
    middle = total(x) * share
    d = [v - middle for v in x]
    rstd = np.float32(1) / np.sqrt(total([v * v for v in d]) * share + np.float32(eps))
    y = [v * rstd * np.float32(w) + np.float32(b) for v, w, b in zip(d, weight.tolist(), bias.tolist(), strict=True)]
    return torch.tensor([float(v) for v in y]), float(middle), float(rstd)


@pytest.mark.parametrize("width", (1, 5, 1500))
@both
def test_the_order_is_the_one_in_the_docstring(width, name):
    x, weight, bias = layer_norm.inputs(2, f"D={width}", torch.float32, HERE)
    y, middle, rstd = layer_norm.implementation(name)(x, weight, bias, 1e-5)
    for row in range(2):
        expected, m, r = by_pencil(x[row].cpu(), weight.cpu(), bias.cpu(), 1e-5)
        assert same_bits(y[row].cpu(), expected) and middle[row].item() == m and rstd[row].item() == r


@pytest.mark.parametrize("width", WIDTHS)
@every_dtype
def test_it_is_near_float64(width, dtype):
    x, weight, bias = layer_norm.inputs(5, f"D={width}", dtype, HERE, 1)
    y, _, _ = layer_norm.python(x, weight, bias)
    exact = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double())
    error = (y.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * (exact.abs() + 4 * weight.double().abs() + 1e-4)).all()


@needs_triton
@pytest.mark.parametrize("width", WIDTHS)
@every_dtype
def test_every_schedule_has_the_specifications_bits(width, dtype):
    shape = f"D={width}"
    given = layer_norm.inputs(3, shape, dtype, HERE, 2)
    expected = layer_norm.python(*given)
    schedules = layer_norm.schedules(shape, dtype)
    for schedule in [schedules[0], schedules[len(schedules) // 2], Schedule(streaming=True)]:
        assert same_bits(layer_norm.run_schedule(schedule, *given), expected), schedule
    bare = given[0].t().contiguous().t()  # without weight and bias, and columns apart
    assert same_bits(layer_norm.triton(bare), layer_norm.python(given[0]))


@both
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_no_batch_moves_a_row(name, kind):
    x = adversarial(kind, 9, 70, torch.float32, HERE)
    weight = portable(1, 70, torch.float32, HERE)[0]
    report = bits.check_invariance(lambda x: layer_norm.implementation(name)(x, weight), (x,),
                                   batches=[slice(0, 1), slice(2, 3), slice(3, 9)])
    assert report, report


@both
def test_no_rows_give_no_rows(name):
    y, middle, rstd = layer_norm.implementation(name)(torch.empty(0, 8, device=HERE))
    assert y.shape == (0, 8) and middle.shape == rstd.shape == (0, 1)


@pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("arguments, error, says", [
    ((torch.ones(2, 4, dtype=torch.float64),), TypeError, "x must be one of"),
    ((torch.ones(()),), ValueError, "x must have a last dimension of at least 1"),
    ((torch.ones(2, 4), torch.ones(3)), ValueError, r"weight must have shape \(4,\)"),
    ((torch.ones(2, 4), None, torch.ones(4).half()), TypeError, "bias must have x's dtype"),
    ((torch.ones(2, 4), None, None, -1.0), ValueError, "eps must be a number of at least 0, got -1.0"),
    ((torch.ones(2, 4), None, None, "1"), TypeError, "eps must be a number, got str")])
def test_bad_input_is_named(name, arguments, error, says):
    arguments = [a.to(HERE) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(error, match=says):
        layer_norm.implementation(name)(*arguments)


AHEAD = """
import json, sys
from triton.runtime import driver
from kernels.lab.proofs.generated_code import Absent, bare_ptx
from kernels.ops.layer_norm import Schedule, layer_norm
from kernels.op import DTYPES
found = []
for width, streaming, target in json.load(sys.stdin):
    driver.set_active(Absent(target))
    given = layer_norm.inputs(8, f"D={width}", DTYPES["bfloat16"], "meta")
    step, = layer_norm.call.launches(Schedule(warps=4, streaming=streaming), *given)
    kernel = step.kernel.warmup(*step.examples("cpu"), *step.arguments(target >= 90), grid=(1,),
                                **step.compile_options(target >= 90))
    found.append(bare_ptx(kernel.asm["ptx"]))
json.dump(found, sys.stdout)
"""


@needs_compiler
def test_the_compiled_code_fuses_nothing_and_divides_and_roots_correctly():
    work = [(width, streaming, target) for target in (80, 90) for width, streaming in ((1000, False), (5000, True))]
    environment = {**os.environ, "TRITON_INTERPRET": "0", **WITHOUT_LINES}
    done = subprocess.run([sys.executable, "-c", AHEAD], input=json.dumps(work), cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [Code(Job("layer_norm", f"D={w}", "bfloat16", "", target), ptx)
             for (w, _, target), ptx in zip(work, json.loads(done.stdout), strict=True)]
    for code in codes:
        assert f".target sm_{code.job.target}" in code.ptx
        assert code.fused == code.flushes == len(code.approximate) == 0
        assert code.divisions == code.square_roots == 1


# The product over batches.

@every_dtype
def test_each_matrix_of_a_batch_is_a_product_of_its_own(dtype):
    x, weight = (portable(n, 40, dtype, HERE, seed).view(3, -1, 40) for n, seed in ((6, 0), (15, 1)))
    expected = torch.stack([matmul.python(a, b) for a, b in zip(x, weight, strict=True)])
    assert same_bits(bmm.python(x, weight), expected)
    assert same_bits(bmm.python(x[1:2], weight[1:2]), expected[1:2])


@pytest.mark.parametrize("order", [None, Order(1, 600), Order(2, 512)])
def test_a_long_product_is_cut_as_the_order_says(order):
    x, weight = (portable(4, 600, torch.float32, HERE, seed).view(2, 2, 600) for seed in (0, 1))
    expected = torch.stack([matmul.python(a, b, None, order) for a, b in zip(x, weight, strict=True)])
    assert same_bits(bmm.python(x, weight, order), expected)


@needs_triton
def test_its_schedule_has_the_same_bits():
    x, weight = (portable(4, 32, torch.bfloat16, HERE, seed).view(2, 2, 32) for seed in (0, 1))
    assert same_bits(bmm.triton(x, weight), bmm.python(x, weight))


@pytest.mark.parametrize("x, weight, says", [
    (torch.ones(2, 3), torch.ones(2, 3), r"x must have three dimensions \(B, M, K\)"),
    (torch.ones(2, 3, 4), torch.ones(2, 5, 3), r"weight must have shape \(2, N, 4\)"),
    (torch.ones(2, 3, 4), torch.ones(1, 5, 4), r"weight must have shape \(2, N, 4\)")])
def test_what_makes_no_product_is_named(x, weight, says):
    for call in (bmm.python, bmm.triton):
        with pytest.raises(ValueError, match=says):
            call(x.to(HERE), weight.to(HERE))


def test_the_mean_is_taken_off_before_squares_are_summed():
    """Unlike RMSNorm's: a row far from zero has a spread all the same."""
    x = portable(3, 64, torch.float32, HERE) + 1000
    y = layer_norm.python(x)[0]
    assert (y.mean(-1).abs() < 1e-2).all() and (y.std(-1) - 1).abs().max() < 2e-2
    assert (rms_norm.python(x, torch.ones(64, device=HERE)) > 0.9).all()
