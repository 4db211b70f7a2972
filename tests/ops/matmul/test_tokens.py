"""The order of a product does not follow its tokens: many rows and gradients over many of them, on a CPU too.

Sums that nearly cancel leave the last bits of their chains, so that another order shows in 16-bit results.
"""
from dataclasses import replace

import pytest
import torch
from common import HERE, both, every_dtype, needs_triton, whole_inputs
from reference import exact_product

from kernels import OPS
from kernels.bits import check_invariance, elements_differ, portable, same_bits
from kernels.launch import Step
from kernels.ops.matmul import contenders
from kernels.ops.matmul import plan as matmul_plan
from kernels.ops.matmul.order import Order, chain, order
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import Schedule, Unsuitable
from kernels.ops.matmul.steps import memory, steps

OP = OPS["matmul"]
TOKENS = (3, 17, 65)  # the schedules of choice are others
SIZES = {2: ((16, 1024), (16, 128)), 4: ((2, 514), (3, 128))}  # itemsize -> (N, K) of two segments, and of one chain


def differs(a, b):
    return elements_differ(a, b) > 0


@both
@every_dtype
@pytest.mark.parametrize("cut", [True, False], ids=["two segments", "one chain"])
def test_the_order_does_not_follow_the_tokens(name, dtype, cut):
    """Three rows, repeated; the bias takes away the first one's rounded sum."""
    n, k = SIZES[dtype.itemsize][not cut]
    x, weight, _ = OP.inputs(3, f"N={n},K={k}", dtype, HERE)
    bias = -OP.python(x, weight)[0]
    wanted = OP.python(x, weight, bias)
    assert (order(n, k) != (1, k)) == cut
    assert differs(wanted, OP.python(x, weight, bias, (1, k) if cut else (2, 64)))
    for tokens in TOKENS[dtype.itemsize // 4 :]:
        rows = torch.arange(tokens) % 3
        assert same_bits(OP.implementation(name)(x[rows], weight, bias), wanted[rows]), tokens


# gradients


def cancelling(tokens, width, dtype, seed):
    """Numbers of many sizes over the tokens, the second half of which are the first half."""
    size = 2.0 ** ((torch.arange(tokens // 2, device=HERE) * 7 % 17) - 8)
    half = portable(tokens // 2, width, torch.float32, HERE, seed) * size[:, None]
    return half.repeat(2, 1).to(dtype)


def custom(x, weight, bias):
    """The product that torch.compile sees, with the gradient registered for it."""
    return torch.ops.same_bits.matmul(x, weight, bias, None)[0]


@pytest.mark.parametrize("name, tokens, dtype", [
    ("python", 600, torch.float32), ("python", 600, torch.bfloat16), ("python", 1100, torch.float16),
    pytest.param("triton", 600, torch.float32, marks=needs_triton),
    pytest.param("triton", 1100, torch.float16, marks=needs_triton),
    pytest.param("custom", 600, torch.bfloat16, marks=needs_triton)])
def test_gradients_over_many_tokens_are_one_chain(name, tokens, dtype):
    call = custom if name == "custom" else OP.implementation(name)
    x, dy = cancelling(tokens, 4, dtype, 1), cancelling(tokens, 3, dtype, 2)
    dy[tokens // 2:] *= -1
    weight, bias = portable(3, 4, dtype, HERE, 3).requires_grad_(), portable(1, 3, dtype, HERE, 4)[0].requires_grad_()
    call(x, weight, bias).backward(dy)
    ones = torch.ones(1, tokens, dtype=dtype, device=HERE)
    for found, b, of in ((weight.grad, x.t(), slice(None)), (bias.grad, ones, (slice(None), 0))):
        assert same_bits(found, (chain(dy.t(), b) + 0)[of].to(dtype))
        assert order(len(b), tokens).segments > 1 and differs(found, OP.python(dy.t(), b)[of])


@pytest.mark.parametrize("name, dtype", [("python", torch.float32), ("python", torch.bfloat16),
                                         pytest.param("triton", torch.float32, marks=needs_triton)])
def test_the_gradient_of_x_has_the_order_of_the_turned_weight(name, dtype):
    weight, dy = cancelling(600, 4, dtype, 1), cancelling(600, 2, dtype, 2).t().contiguous()
    dy[:, 300:] *= -1
    x = portable(2, 4, dtype, HERE, 3).requires_grad_()
    OP.implementation(name)(x, weight).backward(dy)
    parts = chain(dy[:, :512], weight[:512].t()) + chain(dy[:, 512:], weight[512:].t())
    assert same_bits(x.grad, parts.to(dtype)) and differs(x.grad, chain(dy, weight.t()).to(dtype))


# schedules that give way, on a GPU that is played


BULK, PLAIN = Schedule("tma", 64, 32, 64), Schedule("pointer", 16, 16, 64)


def product(given, **changes):
    return replace(Product(300, 512, 4096, torch.bfloat16, (4096, 1), (4096, 1), Order(*given), False), **changes)


@needs_triton
def test_a_pointer_that_bulk_copies_cannot_read_gets_the_next_schedule(monkeypatch, recwarn):
    """Each alignment keeps its own schedule, and is not asked again."""
    made, launched = [], []

    class Chosen:
        def __init__(self, product, schedule, index):
            made.append(schedule)
            self.schedule = schedule

        def __call__(self, low, *pointers):
            if low and self.schedule == BULK:
                raise Unsuitable("bulk copies need tensors aligned to 16 bytes")
            launched.append(self.schedule)

    monkeypatch.setattr(matmul_plan, "Chosen", Chosen)
    monkeypatch.setattr(matmul_plan, "current_device", lambda: 0)
    aligned = [t.cpu() for t in whole_inputs(3, 8, 64)]
    plan = matmul_plan.Plan(*aligned, (1, 64))
    plan.index, plan.wanted = 0, [BULK, PLAIN]
    odd = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in aligned]
    for i in (None, 0, None, 1, 2):
        given = [odd[j] if i == j else t for j, t in enumerate(aligned)]
        assert plan.on_gpu(*given, (1, 64)).shape == (3, 8)
    assert launched == [BULK, PLAIN, BULK, PLAIN, PLAIN] and made == [BULK, BULK, PLAIN]
    assert not recwarn.list


@needs_triton
@pytest.mark.parametrize("schedule, changes, said", [
    (replace(PLAIN, split=True), {"m": 16 * 200}, "6400 tiles are too many to split"),
    (BULK, {}, "this GPU cannot run schedules of kind tma"),
    (BULK, {"x_strides": (4100, 1)}, r"contiguous rows aligned to 16 bytes, got strides \(4100, 1\)"),
    (BULK, {"weight_strides": (4096, 2)}, r"contiguous rows aligned to 16 bytes, got strides \(4096, 2\)"),
    (BULK, {"x_strides": (0, 1)}, r"contiguous rows aligned to 16 bytes, got strides \(0, 1\)"),
    (replace(BULK, split=True, store=True), {}, "walk segments in sequence"),
    (replace(BULK, swap=True, store=True), {}, "a swapped tile has no bulk store"),
    (replace(PLAIN, split=True, reduce=True), {"m": 2**20}, "too many sums for a second kernel")], ids=str)
def test_a_schedule_that_a_gpu_cannot_run_is_unsuitable(schedule, changes, said, monkeypatch):
    monkeypatch.setattr(matmul_plan, "has_pdl", lambda index: False)
    with pytest.raises(Unsuitable, match=said):
        matmul_plan.Chosen(product((4, 1024), **changes), schedule, 0)


@needs_triton
def test_kind_hopper_is_for_hopper_alone(monkeypatch):
    monkeypatch.setattr(matmul_plan, "has_pdl", lambda index: True)
    monkeypatch.setattr(Step, "compiled", lambda step, index: "compiled")
    schedule = Schedule("hopper", 64, 32, 64, 4, 3, persistent=True)
    for capability, runs in (((9, 0), True), ((10, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert matmul_plan.Chosen(product((1, 4096)), BULK, 0).launch == "compiled"
        if runs:
            assert matmul_plan.Chosen(product((1, 4096)), schedule, 0).launch == "compiled"
        else:
            with pytest.raises(Unsuitable, match="cannot run schedules of kind hopper"):
                matmul_plan.Chosen(product((1, 4096)), schedule, 0)


def test_a_split_has_memory_for_each_segment_and_a_counter_for_each_tile():
    split = replace(PLAIN, split=True)
    p = product((4, 1024))
    tiles = 19 * 32
    assert memory(PLAIN, p) == (0, 0) and memory(split, p) == (4 * tiles * 16 * 16, tiles)
    assert memory(replace(split, reduce=True), p) == (4 * 300 * 512, 0)
    for m, adders in ((300, 150), (301, 151)):
        assert [step.programs for step in steps(replace(split, reduce=True), replace(p, m=m))] == [4 * tiles, adders]
    assert [step.programs for step in steps(PLAIN, p)] == [tiles]


# the contenders


def test_tiled_calls_the_library_with_one_shape(monkeypatch):
    """Inverse test: with a library whose bits follow the number of rows."""
    linear, seen = contenders.F.linear, []

    def by_rows(x, weight, bias=None):
        seen.append(len(x))
        return linear(x, weight, bias) + len(x)

    x, weight, bias = whole_inputs(300, 5, 40, torch.float32)
    assert same_bits(contenders.tiled(x, weight, bias), exact_product(x, weight, bias).float())
    monkeypatch.setattr(contenders.F, "linear", by_rows)
    batches = [slice(0, n) for n in (1, 127, 128, 129, 256)] + [slice(40, 300)]
    assert check_invariance(contenders.tiled, (x, weight, bias), OP.per_token, batches) and set(seen) == {128}
    assert not check_invariance(by_rows, (x, weight, bias), OP.per_token, batches)


@pytest.mark.parametrize("dtype, schedule", [
    (torch.bfloat16, "pointer 128x128x64 warps=8 stages=3 group=8"),
    (torch.float16, "pointer 128x128x64 warps=8 stages=3 group=8"),
    (torch.float32, "pointer 128x128x16 warps=8 stages=3 group=8")], ids=str)
def test_frozen_is_one_schedule_for_all_token_counts(dtype, schedule, monkeypatch):
    """Written out: a slower one would make ours look fast."""
    ran = []
    monkeypatch.setattr(contenders.CALL, "run_schedule", lambda s, x, weight, bias: ran.append((str(s), len(x), bias)))
    for tokens in (1, 16, 200, 5000):
        contenders.frozen(*whole_inputs(tokens, 3, 4, dtype, bias=False)[:2])
    assert ran == [(schedule, tokens, None) for tokens in (1, 16, 200, 5000)]
