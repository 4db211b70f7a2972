"""Gradients of RMSNorm, SwiGLU and cross-entropy: near float64's, in one order, and the same bits from both names."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backward_cases import BF16, F32, HERE, farthest, float64, needs_triton, numbers

from kernels.bits import check_invariance, same_bits
from kernels.ops.softmax import log_softmax
from kernels.training.cross_entropy import cross_entropy_backward
from kernels.training.rms_norm import Schedule, rms_norm_backward
from kernels.training.swiglu import swiglu_backward

WIDTHS = (1, 3, 64, 100, 1024, 1500)


def norm_case(tokens, width, dtype=BF16, stream=True, device=HERE):
    """h, weight, dy, dstream"""
    return (numbers((tokens, width), dtype, 1, device=device), numbers((width,), dtype, 2, device=device),
            numbers((tokens, width), dtype, 3, device=device),
            numbers((tokens, width), dtype, 4, device=device) if stream else None)


def entropy_case(tokens, width, device=HERE):
    """logp, targets, dloss"""
    logp = log_softmax.python(numbers((tokens, width), F32, 1, 2, device), -1)
    targets = torch.arange(tokens, dtype=torch.int64, device=device) * 7 % width
    return logp, targets, torch.ones((), dtype=F32, device=device)


# near float64's


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_gradient_of_rms_norm(width, stream, dtype):
    h, weight, dy, dstream = norm_case(9, width, dtype, stream)
    x, w = float64(h, weight)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    wanted = torch.autograd.grad([y, x * 1], [x, w], [dy.double(), (dstream if stream else 0 * dy).double()])
    for found, exact in zip(rms_norm_backward.python(h, weight, dy, dstream), wanted, strict=True):
        assert found.dtype == dtype and farthest(found, exact, more=2 if width == 1 else 1) <= 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_gradient_of_swiglu(dtype):
    gate_up, dy = numbers((20, 64), dtype, 1, 4), numbers((20, 32), dtype, 2)
    x, = float64(gate_up)
    gate, up = x.chunk(2, -1)
    wanted, = torch.autograd.grad(F.silu(gate) * up, x, dy.double())
    assert farthest(swiglu_backward.python(gate_up, dy), wanted) <= 1


@pytest.mark.parametrize("width", [1, 40, 256])
def test_the_gradient_of_cross_entropy(width):
    x = numbers((12, width), F32, 1, 2)
    _, targets, dloss = entropy_case(12, width)
    exact, = float64(x)
    wanted, = torch.autograd.grad(F.cross_entropy(exact, targets), exact)
    found = cross_entropy_backward.python(log_softmax.python(x, -1), targets, dloss)
    assert found.dtype == BF16 and (width == 1 or farthest(found, wanted) <= 1)
    assert width > 1 or not found.any()
    assert same_bits(cross_entropy_backward.python(log_softmax.python(x, -1), targets, 2 * dloss), 2 * found)


# in one order


def pencil(column):
    """Numbers added as ops/mean/order.py says: chunks of 1024 in sequence, then neighbours in pairs."""
    width = min(1024, 1 << max(len(column) - 1, 0).bit_length())
    padded = np.concatenate([column, np.zeros(-len(column) % width, np.float32)]).reshape(-1, width)
    total = padded[0]
    for chunk in padded[1:]:
        total = total + chunk
    while len(total) > 1:
        total = total[0::2] + total[1::2]
    return total[0]


@pytest.mark.parametrize("tokens", [1, 5, 1500])
def test_a_weights_gradient_adds_over_the_tokens_in_the_stated_order(tokens):
    h, weight, dy, _ = norm_case(tokens, 16, F32)
    x = h.cpu().numpy()
    squares = x * x
    while squares.shape[1] > 1:
        squares = squares[:, 0::2] + squares[:, 1::2]
    root = np.sqrt(squares * np.float32(1 / 16) + np.float32(1e-6))
    terms = dy.cpu().numpy() * (x * (np.float32(1) / root))
    wanted = torch.from_numpy(np.array([pencil(terms[:, j]) for j in range(16)]))
    assert same_bits(rms_norm_backward.python(h, weight, dy)[1].cpu(), wanted)


@pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
def test_a_tokens_gradient_knows_no_other_token(name):
    h, weight, dy, dstream = norm_case(5, 100)
    assert check_invariance(lambda *a: rms_norm_backward.implementation(name)(*a)[0], (h, weight, dy, dstream),
                            (0, 2, 3))
    assert check_invariance(swiglu_backward.implementation(name), (numbers((5, 20), seed=1), numbers((5, 10))),
                            (0, 1))


# the same bits from both names


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_schedule_has_the_specifications_bits(width, dtype):
    for stream in (False, True):
        given = norm_case(5, width, dtype, stream)
        assert same_bits(rms_norm_backward.triton(*given), rms_norm_backward.python(*given))
    given = numbers((3, 2 * width), dtype, 1, 4), numbers((3, width), dtype, 2)
    assert same_bits(swiglu_backward.triton(*given), swiglu_backward.python(*given))
    given = entropy_case(3, width)
    assert same_bits(cross_entropy_backward.triton(*given), cross_entropy_backward.python(*given))


@needs_triton
@pytest.mark.parametrize("schedule", [Schedule(1, 4), Schedule(4, 1), Schedule(8, 8)], ids=str)
def test_rows_a_program_move_no_bit(schedule):
    h, weight, dy, dstream = norm_case(11, 70)
    call = rms_norm_backward.call
    assert same_bits(call.run_schedule(schedule, h, weight, dy, dstream), call.triton(h, weight, dy, dstream))


@needs_triton
def test_strides_are_followed():
    h, weight, dy, dstream = norm_case(6, 40)
    turned = [t.t().contiguous().t() for t in (h, dy, dstream)]
    given = turned[0], weight, *turned[1:]
    assert same_bits(rms_norm_backward.triton(*given), rms_norm_backward.python(h, weight, dy, dstream))
    gate_up, dy = numbers((6, 40)), numbers((6, 20), seed=1)
    wide = torch.cat([gate_up, gate_up], 1)[:, :40]
    assert same_bits(swiglu_backward.triton(wide, dy.t().contiguous().t()), swiglu_backward.python(gate_up, dy))


@needs_triton
def test_no_tokens_give_no_rows_and_a_weight_no_gradient():
    h, weight, dy, _ = norm_case(0, 8)
    dx, dweight = rms_norm_backward.triton(h, weight, dy)
    assert dx.shape == (0, 8) and same_bits(dweight, torch.zeros(8, dtype=BF16, device=HERE))
    assert swiglu_backward.triton(numbers((0, 8)), numbers((0, 4))).shape == (0, 8)


# what the calls refuse

NORM = dict(zip(("h", "weight", "dy", "dstream"), norm_case(3, 8), strict=True))
BAD_NORM = {
    "h a list": (dict(h=[1.0]), TypeError, "h .*list"),
    "h of one dimension": (dict(h=numbers((8,))), ValueError, r"h .*\(T, D\).*\(8,\)"),
    "h too wide": (dict(h=numbers((1, 8193))), ValueError, "h .*8192.*8193"),
    "dy of another dtype": (dict(dy=numbers((3, 8), F32)), TypeError, "dy .*bfloat16.*float32"),
    "dy of fewer rows": (dict(dy=numbers((2, 8))), ValueError, r"dy .*\(3, 8\), got \(2, 8\)"),
    "weight too long": (dict(weight=numbers((9,))), ValueError, r"weight .*\(8,\), got \(9,\)"),
    "dstream of another width": (dict(dstream=numbers((3, 7))), ValueError, r"dstream .*\(3, 8\), got \(3, 7\)"),
    "eps zero": (dict(eps=0.0), ValueError, "eps .*0.0"), "eps a text": (dict(eps="1"), ValueError, "eps .*'1'")}


@pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("change, error, says", BAD_NORM.values(), ids=BAD_NORM)
def test_bad_arguments_of_rms_norms_gradient_are_named(change, error, says, name):
    with pytest.raises(error, match=says):
        rms_norm_backward.implementation(name)(**NORM | change)


@pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
def test_bad_arguments_of_the_others_are_named(name):
    swiglu, entropy = (p.implementation(name) for p in (swiglu_backward, cross_entropy_backward))
    logp, targets, dloss = entropy_case(4, 9)
    for call, error, says in (
            (lambda: swiglu(numbers((3, 9)), numbers((3, 4))), ValueError, r"gate_up .*\(T, 2F\).*\(3, 9\)"),
            (lambda: swiglu(numbers((3, 8)), numbers((3, 5))), ValueError, r"dy .*\(3, 4\), got \(3, 5\)"),
            (lambda: entropy(logp.to(BF16), targets, dloss), ValueError, "logp .*float32.*bfloat16"),
            (lambda: entropy(logp, targets.int(), dloss), TypeError, "targets .*int64.*int32"),
            (lambda: entropy(logp, targets[:3], dloss), ValueError, r"targets .*\(4,\), got \(3,\)"),
            (lambda: entropy(logp, targets, dloss[None]), ValueError, r"dloss .*\(\), got \(1,\)")):
        with pytest.raises(error, match=says):
            call()


def test_a_pass_has_two_names():
    with pytest.raises(ValueError, match="swiglu_backward has python and triton, got 'cuda'"):
        swiglu_backward.implementation("cuda")


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, width", [(1, 256), (1000, 256), (32768, 256), (4096, 1000), (300, 8192)])
def test_a_gpus_kernels_have_a_cpus_bits(tokens, width):
    some = min(tokens, 300)
    given = norm_case(tokens, width)
    assert same_bits(rms_norm_backward.triton(*given), rms_norm_backward.python(*given))
    alone = [None if t is None else t[:some].cpu() if t.dim() == 2 else t.cpu() for t in given]
    assert same_bits(rms_norm_backward.triton(*given)[0][:some].cpu(), rms_norm_backward.python(*alone)[0])
    given = numbers((tokens, 2 * width), BF16, 1, 4), numbers((tokens, width), BF16, 2)
    assert same_bits(swiglu_backward.triton(*given)[:some].cpu(),
                     swiglu_backward.python(*(t[:some].cpu() for t in given)))
    given = entropy_case(some, width)
    assert same_bits(cross_entropy_backward.triton(*given).cpu(),
                     cross_entropy_backward.python(*(t.cpu() for t in given)))
