"""RMSNorm: what it alone has. Square roots, leading dimensions, and a split that moves bits, for teaching.

What every op promises is in test_every_op.py.
"""
import math

import numpy as np
import pytest
import torch
from common import HERE, both, every_dtype

from kernels import OPS, runtime
from kernels.bits import check_invariance, elements_differ, portable, same_bits
from kernels.op import DTYPES
from kernels.ops.rms_norm import Schedule

OP = OPS["rms_norm"]
SPLIT = OP.extras["split"]
with_residual = pytest.mark.parametrize("residual", ["", ",residual"], ids=["plain", "residual"])


def inputs(tokens, shape, dtype=torch.bfloat16, seed=0, device=HERE):
    return OP.inputs(tokens, shape, dtype, device, seed)


def test_square_roots_are_correctly_rounded():
    """A CPU's float32 square root may be one ulp off; 20 000 rows of one number each would show it."""
    x = portable(20_000, 1, seed=9)
    root = torch.from_numpy(np.sqrt((x * x + torch.tensor(1e-6)).numpy()))
    assert same_bits(OP.python(x, torch.ones(1)), x * (1.0 / root))


@both
@every_dtype
def test_a_row_keeps_its_bits_at_every_position(name, dtype):
    x, weight, residual = inputs(6, "D=1100,residual", dtype)
    alone = OP.implementation(name)(x[:1], weight, residual[:1])
    for position in range(6):
        order = torch.tensor([1, 2, 3, 4, 5])
        order = torch.cat([order[:position], torch.tensor([0]), order[position:]])
        together = OP.implementation(name)(x[order], weight, residual[order])
        assert same_bits(tuple(t[position : position + 1] for t in together), alone)


@both
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 6, 1), (2, 1, 3)])
def test_leading_dimensions_are_rows(name, leading):
    call = OP.implementation(name)
    x, weight, residual = inputs(math.prod(leading), "D=130,residual")
    wanted = call(x, weight, residual)
    folded = call(x.view(*leading, 130), weight, residual.view(*leading, 130))
    assert all(t.shape == (*leading, 130) and t.is_contiguous() for t in folded)
    assert same_bits(tuple(t.view(-1, 130) for t in folded), wanted)
    assert same_bits(call(x.view(*leading, 130), weight).view(-1, 130), call(x, weight))


@both
def test_leading_dimensions_may_be_strided(name):
    call = OP.implementation(name)
    x, weight, residual = inputs(24, "D=130,residual")
    x, residual = x.view(4, 6, 130), residual.view(4, 6, 130)
    for cut in (lambda t: t[:, ::2], lambda t: t.transpose(0, 1), lambda t: t[..., ::2], lambda t: t[1:3, 2:5, :66]):
        part = (cut(x), weight[: cut(x).shape[-1]], cut(residual))
        assert same_bits(call(*part), call(*(t.contiguous() for t in part)))
    row = x[0, :1]
    assert same_bits(call(row.expand(5, 130), weight), call(row.repeat(5, 1), weight))


@both
@every_dtype
@with_residual
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_zero_tokens_give_an_empty_result(name, dtype, residual, leading):
    weight = portable(1, 40, dtype, HERE)[0]
    x = torch.zeros(*leading, 40, dtype=dtype, device=HERE)
    result = OP.implementation(name)(x, weight, x.clone() if residual else None)
    assert isinstance(result, tuple) == bool(residual)
    for tensor in result if residual else (result,):
        assert (tensor.shape, tensor.dtype, tensor.device) == (x.shape, dtype, x.device)


def test_the_specification_has_gradients():
    tensors = [t.requires_grad_() for t in inputs(3, "D=16,residual", torch.float32)]
    y, stream = OP.python(*tensors)
    (y.sum() + stream.sum()).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in tensors)


# the split schedule, which moves bits


def test_the_split_schedule_moves_bits():
    """Inverse test: the check fails on a sum whose parts depend on the batch."""
    report = check_invariance(SPLIT, inputs(64, "D=4096", torch.float32), OP.per_token)
    assert not report
    assert (report.first.batch, report.first.row, report.first.output) == ("rows 0:1", 0, 0)
    assert report.elements_differ > report.elements / 100 and report.largest_ulp >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_split_schedule_moves_few_bits_of_16(dtype):
    """Rounding to 16 bits hides nearly all of it: why a digest covers thousands of rows."""
    report = check_invariance(SPLIT, inputs(64, "D=4096", dtype), OP.per_token)
    assert 0 < report.elements_differ < report.elements / 1000


def test_the_split_schedule_cuts_fewer_parts_for_more_rows():
    given_ = inputs(128, "D=4096", torch.float32)
    assert same_bits(SPLIT(*given_), SPLIT(*given_, parts=1))
    assert same_bits(SPLIT(*OP.take(given_, slice(0, 4))), SPLIT(*OP.take(given_, slice(0, 4)), parts=32))
    assert elements_differ(SPLIT(*given_, parts=1), SPLIT(*given_, parts=32)) > 0


# on a GPU


GPU_WIDTHS = (1, 2, 3, 33, 96, 127, 128, 500, 1000, 1023, 1024, 1025, 1536, 2048, 4096, 5000, 5120, 7168, 8191, 8192,
              12288, 16384, 16385, 20000, 28672, 65535, 65536, 131072)
GPU_ROWS = 37  # one number throughout, so that a schedule compiled once serves every input


@pytest.mark.gpu
@with_residual
@pytest.mark.parametrize("width", GPU_WIDTHS)
def test_triton_is_python_at_every_width_on_a_gpu(width, residual):
    dtype = list(DTYPES.values())[width % 3]
    given_ = inputs(GPU_ROWS, f"D={width}{residual}", dtype, width)
    assert same_bits(OP.triton(*given_), OP.python(*given_))


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "dtype"), [(1, "bfloat16"), (33, "bfloat16"), (999, "float32"), (4095, "bfloat16"),
                                              (4096, "bfloat16"), (8192, "float32"), (20001, "float16")])
def test_misaligned_pointers_on_a_gpu(width, dtype):
    """Rows of odd widths and tensors that begin anywhere: one plan must serve every alignment in turn."""
    x, weight, residual = inputs(GPU_ROWS, f"D={width},residual", DTYPES[dtype])
    wanted = OP.python(x, weight, residual)

    def shifted(tensor, by):
        flat = torch.full((tensor.numel() + by,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        flat[by:] = tensor.reshape(-1)
        return flat[by:].view(tensor.shape)

    for by in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 1, 2), (8, 1, 0), (0, 0, 0)):
        moved = tuple(shifted(tensor, n) for tensor, n in zip((x, weight, residual), by, strict=True))
        assert same_bits(OP.triton(*moved), wanted), by
        assert same_bits(OP.run_schedule(Schedule(1, 16, 4), *moved), wanted), by


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 4095, 4096, 20000])
def test_slices_that_begin_at_the_second_row_on_a_gpu(width):
    x, weight, residual = inputs(40, f"D={width},residual")
    y, stream = OP.python(x, weight, residual)
    for start in range(1, 9):
        assert same_bits(OP.triton(x[start:], weight, residual[start:]), (y[start:], stream[start:]))
        assert same_bits(OP.triton(x[start:], weight, residual[:-start]),
                         OP.python(x[start:], weight, residual[:-start]))


@pytest.mark.gpu
def test_more_than_two_billion_elements_on_a_gpu():
    rows, width = 2**31 // 8192 + 70, 8192
    if torch.cuda.mem_get_info()[0] < 5 * rows * width:
        pytest.skip("needs 11 GB of free GPU memory")
    tail, weight, _ = inputs(64, f"D={width}")
    x = torch.zeros(rows, width, dtype=tail.dtype, device=tail.device)
    x[-64:] = tail
    y = OP.triton(x, weight)
    assert same_bits(y[-64:], OP.python(tail, weight))
    assert not y[:-64].any()


@pytest.mark.gpu
def test_the_split_schedule_moves_bits_on_a_gpu():
    assert not check_invariance(SPLIT, inputs(64, "D=4096,residual", torch.float32), OP.per_token)


@pytest.mark.gpu
@pytest.mark.parametrize("eps", [1, 2, 1.0, 1e-6, 1e-30])
def test_any_positive_eps_on_a_gpu(eps):
    given_ = inputs(5, "D=1000,residual")
    for _ in range(2):
        assert same_bits(OP.triton(*given_, eps), OP.python(*given_, eps))
        assert same_bits(OP.triton(*given_, float(eps)), OP.python(*given_, eps))


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_mixed_devices_are_named_on_a_gpu(which):
    arguments = list(inputs(3, "D=16,residual", torch.float32))
    arguments[which] = arguments[which].cpu()
    for call in (OP.triton, OP.python):
        with pytest.raises(ValueError, match=r"(weight|residual).*device.*c(uda|pu)"):
            call(*arguments)


@pytest.mark.parametrize("name", ["eager", "two_pass", "split"])
def test_contenders_take_strided_arguments(name):
    if name == "two_pass" and runtime.WHY_NOT:
        pytest.skip(runtime.WHY_NOT)
    x, weight = portable(5, 40), portable(1, 80, seed=1)[0, ::2]
    y = OP.extras[name](x.t().contiguous().t(), weight)
    torch.testing.assert_close(y, OP.cuda(x, weight.contiguous()))
