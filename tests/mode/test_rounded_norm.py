"""Norms that models write as operations which each round: one op of their bits in compiled code under the mode."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits, ulp_distance
from kernels.lab.proofs.generated_code import WITHOUT_LINES, Code, Job
from kernels.lab.provenance import ROOT
from kernels.mode import batch_invariant, norm_fusion, rounded_norm
from kernels.op import DTYPES
from kernels.ops.mean import mean
from kernels.ops.rms_norm import RESIDENT_WIDTH, Schedule

DEVICE, D, EPS = runtime.device(), 72, 1e-6
CALL, FUSE = rounded_norm._CALL, norm_fusion.fuse
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
needs_compiler = pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiling ahead of time needs Triton")
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def norm(x, weight, eps=EPS):
    """As transformers writes it."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def numbers(rows, width=D, dtype=torch.bfloat16, seed=0):
    return portable(rows, width, dtype, DEVICE, seed)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that Inductor gets, norms on a CPU fused too."""
    torch._dynamo.reset()
    found = []

    def fuse_everywhere(module):
        FUSE(module, ("cpu", "cuda"))
        module.graph.lint()
        found.append(module)
    monkeypatch.setattr(norm_fusion, "fuse", fuse_everywhere)
    return found


def ops(graphs):
    """How many fused norms, fused norms with an addition, and means these graphs have."""
    names = [getattr(node.target, "name", str)() for module in graphs for node in module.graph.nodes]
    return tuple(names.count(f"same_bits_mode::{name}")
                 for name in ("rounded_rms_norm", "add_rounded_rms_norm", "aten_mean_dim"))


def compiled_as_eager(function, *given, dynamic=False):
    with torch.no_grad(), batch_invariant(strict=True):
        found, eager = torch.compile(function, dynamic=dynamic)(*given), function(*given)
    assert same_bits(found, eager)
    assert [t.stride() for t in found] == [t.stride() for t in eager]


def layers(x, residual, weight, other, matrix):
    """A norm alone, and two behind additions to the stream, as in a transformer's layers."""
    x = x + F.linear(norm(x, weight), matrix)
    middle = norm(x, other)
    x = x + (F.linear(middle, matrix) + residual)
    return norm(x, weight), x


@pytest.mark.serial  # it compiles
@every_dtype
def test_a_models_norms_are_one_op_with_the_bits_of_eager(graphs, dtype):
    x, residual, matrix = (numbers(n, D, dtype, i).view(-1, n, D) for i, n in enumerate((5, 5, D)))
    compiled_as_eager(layers, x, residual, *numbers(2, D, dtype, 3), matrix[0])
    assert ops(graphs) == (1, 2, 0)


@pytest.mark.serial  # it compiles
def test_rows_that_vary_in_number_are_fused_and_an_empty_batch_stays_empty(graphs):
    weight, matrix = numbers(1)[0], numbers(D)
    for rows in (5, 8):
        compiled_as_eager(lambda x, r: layers(x, r, weight, weight, matrix), numbers(rows), numbers(rows, seed=1),
                          dynamic=None)
    assert ops(graphs) == (2, 4, 0)
    y, stream = rounded_norm.ADDED(numbers(5)[:0], numbers(5)[:0], weight, EPS)
    assert y.shape == stream.shape == (0, D)


@pytest.mark.serial  # it compiles
def test_the_number_of_rows_is_no_weight(graphs):
    for rows in (5, 8):
        compiled_as_eager(lambda x: (x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * x.shape[0],),
                          numbers(rows, dtype=torch.float32), dynamic=None)
    assert ops(graphs) == (0, 0, 2)


def _of_square(x, w):
    return w * (x * torch.rsqrt((x * x).mean(1, True) + 1e-5))


FUSED = {  # name -> a function of x (5, D) and weight (D,), both float32, and how many norms it has
    "float32 squared by a product, the factors turned": (lambda x, w: (_of_square(x, w) * 2, _of_square(x * 2, w)), 2),
    "heads of wider rows": (lambda x, w: (norm(x.view(5, 8, 9)[:, 2:5], w[:9]),), 1),
    "rows that share memory": (lambda x, w: (norm(w.expand(3, 2, D), w),), 1),
    "a stream that is one row added to itself": (lambda x, w: (y := x + x, norm(y, w), y.cos()), 1),
    "a stream that two norms read": (lambda x, w: (y := x + x.sin(), norm(y, w), norm(y, w * 2)), 2),
    "a stream read before the weight is there": (lambda x, w: (y := x + x.sin(), norm(y, y[0].cos())), 1),
    "a weight that is the row": (lambda x, w: (y := x[0] + w, norm(y, y)), 1),
    "an addition that broadcasts": (lambda x, w: (norm(x + w, w),), 1),
    "an addition times alpha": (lambda x, w: (norm(torch.add(x, x.sin(), alpha=2), w),), 1),
    # of two casts in a row torch 2.11 leaves the rounding out, whatever the batch
    "a float32 stream that was 16 bits": (lambda x, w: (norm((x.bfloat16() + 1).float(), w), ), 1),
}


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("name", FUSED)
def test_unusual_norms_are_fused_and_right(graphs, name):
    function, norms = FUSED[name]
    compiled_as_eager(function, numbers(5, dtype=torch.float32), numbers(1, dtype=torch.float32, seed=1)[0])
    assert sum(ops(graphs)[:2]) == norms and ops(graphs)[2] == 0
    assert ops(graphs)[1] == name.startswith(("a stream that two", "a stream that is one"))


def _kept(x, w, part):
    """A norm whose intermediate number `part` is a result too."""
    h = x.float()
    squares = h.pow(2)
    scale = torch.rsqrt(squares.mean(-1, keepdim=True) + EPS)
    normed = (h * scale).to(x.dtype)
    return w * normed, (h, squares, scale, normed)[part]


def _over(x, w, dim, keepdim=True, eps=EPS, power=2):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(power).mean(dim, keepdim) + eps)).to(x.dtype),


def _squared(x):
    h = x.float()
    normed = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return normed * normed


LEFT = {  # name -> a function of x (D, D) and weight (D,) of bfloat16
    **{f"intermediate {i} is read": partial(_kept, part=i) for i in range(4)},
    "another power": lambda x, w: _over(x, w, -1, power=4), "another dim": lambda x, w: _over(x, w, 0),
    "two dims": lambda x, w: _over(x, w, (0, 1)), "no dim kept": lambda x, w: _over(x, w, -1, keepdim=False),
    "eps is a tensor": lambda x, w: _over(x, w, -1, eps=w[:1].float().abs()),
    "eps is too small": lambda x, w: _over(x, w, -1, eps=1e-40),
    "a weight of another dtype": lambda x, w: (norm(x, w.float()),),
    "a weight for each row": lambda x, w: (norm(x, w[:, None] + w),), "one number as weight": lambda x, w: (
        norm(x, w[:1]),),
    "a square of something else": lambda x, w: (w * (x.float() * torch.rsqrt(
        x.float().sin().pow(2).mean(-1, True) + EPS)).to(x.dtype),),
    "no rounding before the weight": lambda x, w: ((w.float() * (x.float() * torch.rsqrt(
        x.float().pow(2).mean(-1, True) + EPS))).to(x.dtype),),
    "all in 16 bits": lambda x, w: (w * (x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS)),),
    "a row times itself": lambda x, w: (_squared(x[0]),),
    "a transpose": lambda x, w: (norm(x.view(9, 8, D).transpose(0, 1), w),),
    "a sum of transposes": lambda x, w: (y := x.t() + x.t(), norm(y, w)),
    "a row too long": lambda x, w: (norm(x.repeat(1, 300)[:2], w.repeat(300)),),
}


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("name", LEFT)
def test_other_norms_are_left_alone_and_right(graphs, name):
    compiled_as_eager(LEFT[name], numbers(D), numbers(1, seed=1)[0])
    assert ops(graphs) == (0, 0, 1)


@pytest.mark.serial  # it compiles
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU they are fused")
def test_on_a_cpu_norms_are_left_alone_unless_asked_for(graphs, monkeypatch):
    monkeypatch.setattr(norm_fusion, "fuse", lambda module: (FUSE(module), graphs.append(module)))
    compiled_as_eager(lambda x, w: (norm(x, w),), numbers(5), numbers(1, seed=1)[0])
    assert ops(graphs) == (0, 0, 1)


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_graph_is_left_alone_and_its_gradient_is_eagers(graphs, dtype):
    x, residual, weight = (numbers(5, D, dtype, seed).requires_grad_() for seed in range(3))
    found, eager = [], []
    with batch_invariant(strict=True):
        for function, kept in ((torch.compile(norm, dynamic=False), found), (norm, eager)):
            y = function(x + residual, weight[0])
            kept += [y, *torch.autograd.grad(y.float().square().sum(), (x, residual, weight))]
    assert ops(graphs) == (0, 0, 1) and same_bits(found[0], eager[0])
    for one, other in zip(found, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-2)


# the schedules


@needs_triton
@every_dtype
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (700, 7), (9, 1000), (2, 1024), (3, 4096), (2, 5000), (1, 16384)])
def test_the_kernel_has_the_bits_of_the_operations_and_is_near_the_exact_root(rows, width, dtype):
    x, residual, weight = (numbers(rows, width, dtype, seed) for seed in range(3))
    for added in (None, residual):
        found = CALL.triton(x, weight[0], added, EPS)
        y, stream = found if added is not None else (found, x)
        assert same_bits(stream, x if added is None else x + residual)
        h = stream.float()
        shifted = mean.python(h * h, -1, True) + EPS
        scale = shifted.rsqrt() if x.is_cuda else torch.from_numpy(1 / np.sqrt(shifted.numpy()))
        assert same_bits(y, weight[0] * (h * scale).to(dtype))
        exact = weight[0] * (h * shifted.double().rsqrt().float()).to(dtype)
        assert ulp_distance(y, exact).max() <= (4 if dtype == torch.float32 else 2)


@needs_triton
def test_what_the_op_cannot_do_is_named():
    x, weight = numbers(2), numbers(1)[0]
    with pytest.raises(ValueError, match="eps must be between 1e-30 and 1e"):
        CALL.triton(x, weight, None, 1e-40)
    with pytest.raises(ValueError, match=f"rows of at most {RESIDENT_WIDTH} numbers"):
        CALL.triton(x.repeat(1, 300), weight.repeat(300), None, EPS)
    with pytest.raises(ValueError, match="stream=1 warps=4 reads rows twice"):
        CALL.run_schedule(Schedule(1, 4, 1), x, weight, None, EPS)


AHEAD = """
import json, sys, torch
from triton.runtime import driver
from kernels.lab.proofs.generated_code import Absent, bare_ptx
from kernels.mode.rounded_norm import _CALL
driver.set_active(Absent(90))
found = []
for width, residual in json.load(sys.stdin):
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((8, width), (width,)))
    given = x, weight, x if residual else None, 1e-6
    step, = _CALL.launches(_CALL.schedule(*given), *given)
    kernel = step.kernel.warmup(*step.examples("cpu"), *step.arguments(True), grid=(1,), **step.compile_options(True))
    found.append(bare_ptx(kernel.asm["ptx"]))
json.dump(found, sys.stdout)
"""


@needs_compiler
def test_the_compiled_code_fuses_nothing_and_takes_the_gpus_rsqrt_once():
    work, environment = [(1000, False), (4096, True)], {**os.environ, "TRITON_INTERPRET": "0", **WITHOUT_LINES}
    done = subprocess.run([sys.executable, "-c", AHEAD], input=json.dumps(work), cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (width, _), ptx in zip(work, json.loads(done.stdout), strict=True):
        code = Code(Job("rms_norm", f"D={width}", "bfloat16", "", 90), ptx)
        assert ".target sm_90" in ptx and code.approximate == ["rsqrt.approx.ftz.f32"]
        assert code.fused == code.divisions == code.square_roots == 0 and code.flushes == 1
        # LLVM multiplies in 16 bits what was rounded to them: it is the same bits, and shows that it was
        assert code.count(r"mul\.rn\.bf16x2") == code.count(r"cvt\.rn\.bf16x2\.f32") > 0
