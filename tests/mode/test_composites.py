"""linear and attention in one step: what goes there, and what does not."""
from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from playing import BIAS, MAT, K, Q, Seen, X
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import call as call_module
from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, batch_invariant, composites, folded, kept, switch
from kernels.mode.names import op_of
from kernels.ops.matmul.op import matmul
from kernels.ops.mean import mean, sum

FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
WEIGHT, ROWS = MAT.t(), X.view(2, 3, 40)
FACTORS = {"three dimensions": (ROWS, WEIGHT), "two": (X, WEIGHT), "a bias": (ROWS, WEIGHT, BIAS),
           "two and a bias": (X, WEIGHT, BIAS)}


@pytest.fixture
def parts(monkeypatch):
    """-> the ops that rules were asked for."""
    names, ask = [], kept.form
    monkeypatch.setattr(kept, "form", lambda *tensors: (names.append(len(tensors)), ask(*tensors))[1])
    return names


@pytest.mark.parametrize("name", FACTORS)
def test_the_third_linear_of_a_form_is_one_step(gpu, parts, name):
    """The second launches the plan that the first one left."""
    x, *weights = FACTORS[name]
    with batch_invariant(strict=True), torch.no_grad():
        first, second = F.linear(x, *weights), F.linear(x, *weights)
        assert not _one_step(gpu)
        parts.clear()
        third = F.linear(x, *weights)
        assert not parts and len(gpu) == 3 and _one_step(gpu)
    assert third.shape == (*x.shape[:-1], 24) and same_bits(first, second) and same_bits(second, third)
    assert same_bits(first, matmul.python(x, *weights)) and third.is_contiguous()


def _one_step(gpu, weight=WEIGHT) -> bool:
    return type(gpu[-1][1]) is int and gpu[-1][1] == weight.data_ptr()


@pytest.mark.parametrize("name", ["gradient", "autocast", "negated", "vmap", "mode"])
def test_a_linear_with_something_between_takes_the_long_way(gpu, name):
    ways = {"gradient": lambda: F.linear(ROWS.clone().requires_grad_(), WEIGHT).detach(),
            "negated": lambda: -F.linear(torch._neg_view(ROWS), WEIGHT),
            "vmap": lambda: torch.func.vmap(lambda rows: F.linear(rows, WEIGHT))(ROWS)}

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(ROWS, WEIGHT)

    def mode():
        with Seen() as seen:
            y = F.linear(ROWS, WEIGHT)
        assert torch.ops.aten.mm.default in seen.ops
        return y
    with batch_invariant():
        for _ in range(3):
            F.linear(ROWS, WEIGHT)
        assert _one_step(gpu)
        y = (ways | {"autocast": autocast, "mode": mode})[name]()
        assert not _one_step(gpu)
    low = torch.bfloat16 if name == "autocast" else torch.float32
    assert y.dtype == low and same_bits(y, matmul.python(ROWS.to(low), WEIGHT.to(low)))


def test_a_gradient_and_a_trace_see_a_linear_that_was_one_step(gpu):
    weight = WEIGHT.clone().requires_grad_()
    with batch_invariant(strict=True):
        with torch.no_grad():
            for _ in range(3):
                F.linear(ROWS, weight)
            assert _one_step(gpu, weight)
            graph = str(torch.jit.trace(F.linear, (ROWS, weight), check_trace=False).graph)
            assert "aten::linear" in graph and "view" not in graph and "reshape" not in graph
            F.linear(ROWS, weight)
            assert _one_step(gpu, weight)
        assert F.linear(ROWS, weight).requires_grad and not _one_step(gpu, weight)


def test_forward_mode_derivatives_are_refused_after_a_linear_was_one_step(gpu):
    with batch_invariant(strict=True):
        for _ in range(3):
            F.linear(ROWS, WEIGHT)
        assert _one_step(gpu)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(Refused, match="forward-mode"):
            F.linear(torch.autograd.forward_ad.make_dual(ROWS, ROWS), WEIGHT)


MEANS = {"mean": (mean, {"keepdim": True}), "sum": (sum, {})}


@pytest.fixture
def reductions(gpu, monkeypatch):
    """-> the ops that were launched, with the specification's numbers."""
    launched = []
    for op, _ in MEANS.values():
        monkeypatch.setattr(type(op.call), "launch", lambda self, plan, x, *given, **named: (
            launched.append(self.name), mean.python(x, *given) if self.mean else sum.python(x, *given))[1])
    monkeypatch.setattr(call_module, "Launch", lambda step, index: step)
    return launched


@pytest.mark.parametrize("name", MEANS)
def test_the_second_reduction_of_a_form_is_one_step(reductions, parts, name):
    op, named = MEANS[name]
    with batch_invariant(strict=True):
        first = getattr(X, name)(-1, **named)
        parts.clear()
        second = getattr(X, name)(-1, **named)
        assert not parts and reductions == [name] * 2 and same_bits(first, second)
        assert same_bits(first, op.python(X, -1, *named.values()))
        for given in ((0,), (-1, True), ((-1, 0),)) if name == "sum" else ((0, True), (-1,), ((0, -1), True)):
            parts.clear()
            assert same_bits(getattr(X, name)(*given), op.python(X, *given)) and parts
        parts.clear()
        assert getattr(X, name)(-1, dtype=torch.float32, **named).dtype == torch.float32 and parts
        parts.clear()
        assert getattr(X.clone().requires_grad_(), name)(-1, **named).requires_grad and parts
        assert getattr(X, name)().dim() == 0 and not X.long().sum(-1).is_floating_point()


def test_rows_that_lie_apart_are_one_step_too(gpu):
    x = X.repeat_interleave(2, 1)[:, ::2].view(2, 3, 40)
    with batch_invariant(strict=True):
        ys = [F.linear(x, WEIGHT, BIAS) for _ in range(3)]
    assert _one_step(gpu) and all(same_bits(y, matmul.python(ROWS, WEIGHT, BIAS)) for y in ys)


@pytest.mark.parametrize("x, weight", [(ROWS[:, :0], WEIGHT), (ROWS, WEIGHT[0]), (ROWS, torch.zeros(0, 40))],
                         ids=["no rows", "a vector", "no columns"])
def test_another_linear_is_never_one_step(gpu, x, weight):
    with batch_invariant(strict=True):
        ys = [F.linear(x, weight) for _ in range(3)]
    assert not any(folded.LINEAR.values())
    assert all(same_bits(y, ys[0]) for y in ys) and ys[0].shape == F.linear(x, weight).shape


def test_a_form_that_leaves_nothing_is_asked_once(gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(folded, "can_keep", lambda found: asked.append(found))
    with batch_invariant(strict=True):
        for _ in range(3):
            F.linear(ROWS[:, :0], WEIGHT)
    assert len(asked) == 1


def test_a_refusal_leaves_no_plan_for_a_linear(gpu):
    with batch_invariant(strict=True):
        for _ in range(2):
            with pytest.raises(Refused, match="mm has an order for .*self is torch.float64"):
                F.linear(ROWS.double(), WEIGHT.double())
    with batch_invariant(), pytest.warns(MovesBits, match="mm has an order for .*self is torch.float64"):
        assert F.linear(ROWS.double(), WEIGHT.double()).dtype == torch.float64
    assert not any(folded.LINEAR.values())


def test_a_bias_that_lies_otherwise_is_another_form(gpu):
    apart = torch.stack([BIAS, BIAS], 1)[:, 0]
    with batch_invariant(strict=True):
        for _ in range(3):
            F.linear(ROWS, WEIGHT, BIAS)
        assert _one_step(gpu)
        ys = [F.linear(ROWS, WEIGHT, apart) for _ in range(3)]
    assert not _one_step(gpu) and all(same_bits(y, matmul.python(ROWS, WEIGHT, BIAS)) for y in ys)


def test_rows_that_must_be_copied_are_no_step(gpu):
    x = ROWS.transpose(0, 1)
    with batch_invariant(strict=True):
        ys = [F.linear(x, WEIGHT) for _ in range(3)]
    assert not _one_step(gpu) and all(same_bits(y, matmul.python(x, WEIGHT)) for y in ys)


def test_a_weight_whose_memory_was_freed_is_pytorchs_to_refuse(gpu):
    weight = WEIGHT.clone()
    with batch_invariant(strict=True):
        for _ in range(3):
            F.linear(ROWS, weight)
        assert _one_step(gpu, weight)
        gpu.clear()  # pytest would print what it holds
        weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="out of bounds"):
            F.linear(ROWS, weight)


def test_a_function_of_one_number_is_the_gpus_own(gpu, monkeypatch):
    """Whatever it writes and wherever gradients are; a version is counted."""
    asked = []
    monkeypatch.setattr(switch, "without_numbers", lambda arguments: asked.append(arguments))
    for inside in (nullcontext(), torch.no_grad(), torch.inference_mode()):
        z, out = X.clone(), torch.empty(0)
        with batch_invariant(strict=True), inside:
            assert F.silu(z, inplace=True) is z and torch.exp(X, out=out) is out
            square = X.pow(2)
        assert same_bits(z, F.silu(X)) and same_bits(out, X.exp()) and same_bits(square, X * X) and z._version == 1
    x = X.clone().requires_grad_()
    with batch_invariant(strict=True):
        F.silu(x).backward(torch.ones(6, 40))
    assert not asked and same_bits(x.grad, torch.ops.aten.silu_backward(torch.ones(6, 40), X))
    with batch_invariant(strict=True), torch.autograd.forward_ad.dual_level(), pytest.raises(Refused, match="silu has"):
        F.silu(torch.autograd.forward_ad.make_dual(X, X))


@pytest.mark.parametrize("name", ["silu", "silu_", "pow.Tensor_Scalar"])
def test_only_a_plain_tensor_of_a_gpu_passes_a_rule(gpu, name):
    went = []
    op = op_of(name)
    handle = SimpleNamespace(redispatch_boxed=lambda keys, *given: went.append(keys))
    kernel = composites.unless_on_gpu(SimpleNamespace(_handle=handle, _schema=op._schema))
    early, rule, cpu, autograd, versions = (torch._C.DispatchKeySet(torch._C._dispatch_key_parse(name)) for name in (
        "DeferredInit", "Fake", "CPU", "AutogradCPU", "ADInplaceOrView"))
    for rest in (cpu, cpu | autograd, cpu | versions, cpu | autograd | versions):
        with torch.no_grad():
            kernel(early | rule | rest, X)
        kernel(early | rule | rest, X)
        assert went == [rest if op._schema.is_mutable else cpu, rest]
        went.clear()
    for key in ("SparseCPU", "QuantizedCPU", "NestedTensorCPU", "Meta", "CUDA", "Python", "AutocastCPU", "Negative"):
        other = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key)) | rule | cpu
        kernel(other | early, X)
        assert went.pop() == other
    with torch.autograd.forward_ad.dual_level():
        kernel(early | rule | cpu, X)
    assert went == [rule | cpu]


def _attend(**named):
    return F.scaled_dot_product_attention(Q, K, K, **{"is_causal": True, "enable_gqa": True, **named})


def test_the_second_attention_of_a_form_is_one_step(attention, parts):
    with batch_invariant(strict=True):
        first = _attend()
        parts.clear()
        second = _attend()
    assert attention == [("looked at", (5, 4, 8), (1, 5, 2, 8), True),
                         ("launched", Q.data_ptr(), K.data_ptr(), K.data_ptr())]
    assert not parts and first.shape == second.shape == (1, 4, 5, 8) and first.stride() == second.stride()


@pytest.mark.parametrize("other", [
    {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(), "is_causal": False}, {"dropout_p": 0.5}, {"scale": 0.3},
    {"is_causal": False}, {"enable_gqa": False}], ids=lambda other: next(iter(other)))
def test_other_attention_is_no_step_of_a_known_one(attention, other):
    way = composites.COMPOSITES["scaled_dot_product_attention"]

    def one_step(*given, **named):
        key = way.key(*given, **named)
        step = way.steps.get(key)
        return step if step is None else step(*given, **named)
    known = {"is_causal": True, "enable_gqa": True}
    with batch_invariant(strict=True), torch.no_grad():
        _attend()
        assert one_step(Q, K, K, **known) is not None
        assert one_step(Q, K, K, **(known | other)) is None
        assert one_step(Q[:, :, :4], K, K, **known) is one_step(Q.float(), K.float(), K.float(), **known) is None
        every = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                 SDPBackend.CUDNN_ATTENTION]
        for setting in (sdpa_kernel(SDPBackend.MATH), sdpa_kernel(every, set_priority=True)):
            with setting:
                assert one_step(Q, K, K, **known) is None
    assert one_step(Q.clone().requires_grad_(), K, K, **known) is None


def test_attention_that_pytorch_multiplies_itself_pads_or_hides_by_a_mask_leaves_no_step(attention):
    way = composites.COMPOSITES["scaled_dot_product_attention"]

    def leaves(*given, **named):
        return way.leave(("a key",), *given, **named)
    with batch_invariant(strict=True), torch.no_grad():
        FLASH(Q, K, K, 0.0, True)
        FLASH(Q[..., :4], K[..., :4], K[..., :4], 0.0, True)
        with sdpa_kernel(SDPBackend.MATH):
            assert not leaves(Q, K, K, is_causal=True, enable_gqa=True)
        assert not leaves(Q[0], K[0], K[0], is_causal=True, enable_gqa=True)
        assert not leaves(Q[..., :4], K[..., :4], K[..., :4], is_causal=True, enable_gqa=True)
        assert not leaves(Q, K, K, is_causal=True, scale=0.3, enable_gqa=True)
        assert not leaves(Q, K, K, enable_gqa=True)  # the rule was asked for causal attention alone
        assert leaves(Q, K, K, is_causal=True, enable_gqa=True)


def test_dynamo_compiles_nothing_of_the_mode(gpu):
    """Where it gives a frame up, it takes those that the frame calls; settings that a kernel reads would be fixed."""
    def broken(x):
        for _ in range(2):
            torch._dynamo.graph_break()
            y = F.linear(x, WEIGHT, BIAS).pow(2)
        return y
    frames = []
    for mode in (nullcontext(), batch_invariant()):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.no_grad(), mode:
            torch.compile(broken, backend="eager")(ROWS)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[0] == frames[1] > 0


@pytest.mark.gpu
def test_on_a_gpu_one_step_has_the_bits_of_the_long_way():
    known = {"is_causal": True, "enable_gqa": True}
    for dtype in (torch.bfloat16, torch.float16):
        x = portable(6, 1024, dtype, "cuda").view(2, 3, 1024)
        weight, bias = portable(256, 1024, dtype, "cuda", 1), portable(1, 256, dtype, "cuda", 2)[0]
        q = portable(2 * 7 * 8, 64, dtype, "cuda", 3).view(2, 7, 8, 64).transpose(1, 2)
        k = portable(2 * 7 * 2, 64, dtype, "cuda", 4).view(2, 7, 2, 64).transpose(1, 2)
        calls = {"linear": (F.linear, (x, weight), {}), "linear ": (F.linear, (x, weight, bias), {}),
                 "scaled_dot_product_attention": (F.scaled_dot_product_attention, (q, k, k), known),
                 "mean.dim": (torch.mean, (x, [-1], True), {}), "sum.dim_IntList": (torch.sum, (x, [1]), {})}
        for name, (op, given, named) in calls.items():
            way = composites.COMPOSITES[name.strip()]
            with batch_invariant(strict=True), torch.inference_mode():
                first, *_ = [op(*given, **named) for _ in range(3)]  # at first PyTorch sets the order of its kernels
                again = way.steps[way.key(*given, **named)](*given, **named)
                assert same_bits(again, first) and again.stride() == first.stride()
                assert way.key(given[0][:1], *given[1:], **named) not in way.steps
        with batch_invariant(strict=True), torch.inference_mode():
            assert same_bits(F.linear(x[:1], weight), F.linear(x, weight)[:1])
