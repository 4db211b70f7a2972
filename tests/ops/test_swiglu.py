"""SwiGLU: what it alone has. Gates of every size, its gradient, and the code that a compiler makes of it.

What every op promises is in test_every_op.py.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import HERE, INF, NAN, both, every_dtype, needs_compiler, needs_triton, numbers, views, waits_first
from compiling import compile_ahead
from reference import sigmoid

from kernels import OPS
from kernels.bits import hashed, same_bits
from kernels.lab.proofs.generated_code import TARGETS, jobs
from kernels.op import DTYPES
from kernels.ops.swiglu import Schedule

OP = OPS["swiglu"]


def silu(gate, up=1.0, how="python"):
    """Of a list or a tensor of gates."""
    gate = torch.as_tensor(gate, dtype=torch.float32, device=HERE)
    return OP.implementation(how)(torch.stack([gate, torch.full_like(gate, up)], -1))[:, 0]


CORNERS = ((0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, NAN), (NAN, NAN), (1000.0, 1000.0), (-1000.0, -0.0),
           (3.4e38, 3.4e38), (-3.4e38, -0.0), (1e-45, 0.0), (2.0**-126, 2.0**-127), (104.5, 104.5), (-104.5, -0.0))


@both
def test_gates_at_the_corners(name):
    """1e-45 is the smallest float32; half of it rounds to even, zero."""
    given, wanted = torch.tensor(CORNERS, device=HERE).unbind(-1)
    assert same_bits(silu(given, how=name), wanted.clone())


@both
def test_no_finite_gate_gives_nan_or_infinity(name):
    largest = torch.finfo(torch.float32).max
    gate = torch.tensor([sign * 2.0**e for e in range(-149, 128, 6) for sign in (1, -1)] + [largest, -largest])
    y = silu(gate, how=name)
    assert y.isfinite().all() and (y.cpu().abs() <= gate.abs()).all() and (y.sign().cpu() * gate >= 0).all()


@both
def test_a_product_does_not_overflow_before_it_must(name):
    """silu is taken first: 100 * 1e37 is too large, silu(-100) * 1e37 is not."""
    y = silu([100.0, -100.0, 0.001], 1e37, name)
    assert y[0] == INF and -1e-4 < y[1] < 0 and 0 < y[2] < 1e37
    assert silu([INF], 0.0, name).isnan().all()


def gates(count, lowest, highest):
    """Gates spread over a range, the same on every machine."""
    share = hashed(torch.arange(count, dtype=torch.int64, device=HERE), 5).double() / 2.0**32
    return (lowest + (highest - lowest) * share).float()


@pytest.mark.parametrize(("lowest", "highest"), [(-87, 0), (-20, 20), (-1, 1), (-87, -80), (0, 100)])
def test_errors_are_as_small_as_the_docstring_says(lowest, highest):
    gate, up = gates(300_000, lowest, highest), numbers((300_000,)) + 2.0
    wanted = gate.double() * torch.sigmoid(gate.double()) * up.double()
    error = (OP.python(torch.stack([gate, up], -1))[:, 0].double() - wanted).abs()
    assert (error <= 5 * 2.0**-24 * wanted.abs()).all()
    assert (error > 2.0**-24 * wanted.abs()).any(), "a bound of one ulp would be too tight"


def test_errors_of_subnormal_exponentials():
    gate = gates(300_000, -105, -87)
    error = (silu(gate).double() - gate.double() * torch.sigmoid(gate.double())).abs()
    assert (error <= 2.0**-142).all() and (silu(gate) != 0).float().mean() > 0.9


# the gradient


def pencil_gradient(gate_up, dy):
    """As the docstring says, in NumPy."""
    gate, up = np.split(gate_up.float().numpy(), 2, axis=1)
    one, dy, share = np.float32(1), dy.float().numpy(), sigmoid(gate)
    d_gate = (dy * up) * (share + (gate * share) * (one - share))
    return torch.from_numpy(np.concatenate([d_gate, dy * (gate * share)], 1)).to(gate_up.dtype)


def gradient(gate_up, dy):
    given = gate_up.clone().requires_grad_()
    return torch.autograd.grad(OP.python(given), given, dy)[0]


@every_dtype
def test_the_gradient_is_the_pencils(dtype):
    gate_up, dy = OP.inputs(5, "F=70", dtype)[0], numbers((5, 70), dtype, 1, "cpu")
    assert same_bits(gradient(gate_up, dy), pencil_gradient(gate_up, dy))


def test_the_gradient_is_autograds_within_rounding():
    gate_up, dy = OP.inputs(20, "F=200", torch.float32, HERE)[0], numbers((20, 200), seed=1)
    wide = gate_up.double().requires_grad_()
    wanted, = torch.autograd.grad(OP.cuda(wide), wide, dy.double())
    assert ((gradient(gate_up, dy).double() - wanted).abs() <= 2.0**-21 * (wanted.abs() + 1)).all()


def test_the_gradient_of_a_row_ignores_its_batch():
    gate_up, dy = OP.inputs(9, "F=70", torch.bfloat16, HERE)[0], numbers((9, 70), torch.bfloat16)
    whole = gradient(gate_up, dy)
    for rows in ([0], [4, 4, 1], [8, 2]):
        assert same_bits(gradient(gate_up[rows], dy[rows]), whole[rows])


def test_the_gradient_of_no_tokens_is_empty():
    assert gradient(torch.zeros(0, 6, device=HERE), torch.zeros(0, 3, device=HERE)).shape == (0, 6)


def test_a_second_derivative_is_refused():
    given = OP.inputs(2, "F=3", torch.float32)[0].requires_grad_()
    dy = torch.ones(2, 3, requires_grad=True)
    first, = torch.autograd.grad(OP.python(given), given, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# the code that a compiler makes of it

CASES = (("F=14336", "bfloat16"), ("F=1000", "float32"), ("F=512", "float16"))
COMPILED = [job for shape, dtype in CASES
            for job in jobs("swiglu", shape, dtype, TARGETS if dtype == "bfloat16" else (90,))]


@pytest.fixture(scope="module")
def codes():
    """All of them, and the first again with the compiler free to fuse."""
    return compile_ahead([*COMPILED, replace(COMPILED[0], fusion=True)])


def held(code):
    """How many columns a thread holds."""
    schedule = {str(s): s for s in OP.schedules(code.job.shape, DTYPES[code.job.dtype])}[code.job.schedule]
    return schedule.columns // (32 * schedule.warps)


@needs_compiler
def test_each_column_has_nine_multiply_adds_two_additions_and_a_quotient(codes):
    """Those of the exponential, and 1 + e. sm_100 may do two at once, sometimes with one of the two places unused."""
    for code in codes[:-1]:
        packed = code.count(r"fma\.rn\.f32x2")
        assert code.fused <= 9 * held(code) <= code.fused + packed, code.job
        assert code.float_adds + code.packed_adds <= 2 * held(code) <= code.float_adds + 2 * code.packed_adds, code.job
        assert code.divisions == held(code) and not code.square_roots, code.job
        assert not packed and not code.packed_adds or code.job.target == 100
    assert {c.job.target for c in codes} == set(TARGETS)


@needs_compiler
def test_nothing_is_approximate_or_flushed(codes):
    assert [c.job for c in codes if c.approximate or c.flushes] == []


@needs_compiler
def test_rows_are_read_in_pieces_of_16_bytes_where_a_thread_holds_as_many(codes):
    for code in codes[:-1]:
        assert max(code.global_loads) == min(16, held(code) * DTYPES[code.job.dtype].itemsize), code.job


@needs_compiler
def test_a_kernel_waits_for_the_one_before_it(codes):
    assert [c.job for c in codes if not waits_first(c)] == []


@needs_compiler
def test_the_check_notices_fusion(codes):
    """Inverse test."""
    assert codes[-1].fused > codes[0].fused


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 3, 255, 512, 1000, 1025, 8192, 14336])
def test_triton_is_python_on_a_gpu(width):
    for dtype in DTYPES.values():
        given = OP.inputs(37, f"F={width}", dtype, HERE, width)
        assert same_bits(OP.triton(*given), OP.python(*given))


@pytest.mark.gpu
@needs_triton
def test_every_gate_of_16_bits_is_python_on_a_gpu():
    """All 65536 bfloat16 and float16 numbers as gates, and a million float32 ones."""
    for dtype in (torch.bfloat16, torch.float16):
        gate = torch.arange(-32768, 32768, dtype=torch.int64, device=HERE).to(torch.int16).view(dtype)
        gate_up = torch.cat([gate.view(16, 4096), numbers((16, 4096), dtype)], -1)
        assert same_bits(OP.triton(gate_up), OP.python(gate_up))
    bits = hashed(torch.arange(1 << 20, dtype=torch.int64, device=HERE), 3).to(torch.int32).view(torch.float32)
    gate_up = torch.cat([bits.view(256, 4096), numbers((256, 4096))], -1)
    assert same_bits(OP.triton(gate_up), OP.python(gate_up))
    assert same_bits(OP.python(gate_up).cpu(), OP.python(gate_up.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 999, 1000, 14336])
def test_strides_and_misaligned_rows_on_a_gpu(width):
    """One plan serves every alignment in turn."""
    x, = OP.inputs(37, f"F={width}", torch.bfloat16, HERE)
    wanted = OP.python(x)
    for how, view in views(x).items():
        for call in (OP.triton, lambda v: OP.run_schedule(Schedule(2048, 4), v)):
            assert same_bits(call(view), wanted), how
