"""linear and attention in one step: what goes there, and what does not."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from playing import BIAS, MAT, K, Q, Seen, X
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, batch_invariant, composites, folded, kept, kept_attention
from kernels.ops.matmul.call import CALL
from kernels.ops.matmul.op import matmul

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
def test_the_second_linear_of_a_form_is_one_step(gpu, parts, name):
    x, *weights = FACTORS[name]
    with batch_invariant(strict=True), torch.no_grad():
        first = F.linear(x, *weights)
        parts.clear()
        second = F.linear(x, *weights)
        assert not parts and len(gpu) == 2 and gpu[-1][0] is WEIGHT
    assert second.shape == (*x.shape[:-1], 24) and same_bits(first, second)
    assert same_bits(first, matmul.python(x, *weights))


def _one_step(gpu) -> bool:
    return gpu[-1][0] is WEIGHT


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
        for _ in range(2):
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
            for _ in range(2):
                F.linear(ROWS, weight)
            assert gpu[-1][0] is weight
            graph = str(torch.jit.trace(F.linear, (ROWS, weight), check_trace=False).graph)
            assert "aten::linear" in graph and "view" not in graph and "reshape" not in graph
            F.linear(ROWS, weight)
            assert gpu[-1][0] is weight
        assert F.linear(ROWS, weight).requires_grad and gpu[-1][0] is not weight


def test_forward_mode_derivatives_are_refused_after_a_linear_was_one_step(gpu):
    with batch_invariant(strict=True):
        for _ in range(2):
            F.linear(ROWS, WEIGHT)
        assert _one_step(gpu)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(Refused, match="forward-mode"):
            F.linear(torch.autograd.forward_ad.make_dual(ROWS, ROWS), WEIGHT)


def test_rows_that_lie_apart_are_one_step_too(gpu):
    x = X.repeat_interleave(2, 1)[:, ::2].view(2, 3, 40)
    with batch_invariant(strict=True):
        ys = [F.linear(x, WEIGHT, BIAS) for _ in range(3)]
    assert gpu[-1][0] is WEIGHT and all(same_bits(y, matmul.python(ROWS, WEIGHT, BIAS)) for y in ys)


@pytest.mark.parametrize("x, weight", [(ROWS[:, :0], WEIGHT), (ROWS, WEIGHT[0]), (ROWS, torch.zeros(0, 40))],
                         ids=["no rows", "a vector", "no columns"])
def test_another_linear_is_never_one_step(gpu, x, weight):
    with batch_invariant(strict=True):
        ys = [F.linear(x, weight) for _ in range(3)]
    assert not any(key[0] == "linear" for key in CALL.plans)
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
    assert not any(key[0] == "linear" for key in CALL.plans)


def test_a_bias_that_lies_otherwise_is_another_form(gpu):
    apart = torch.stack([BIAS, BIAS], 1)[:, 0]
    with batch_invariant(strict=True):
        for _ in range(2):
            F.linear(ROWS, WEIGHT, BIAS)
        assert gpu[-1][0] is WEIGHT
        F.linear(ROWS, WEIGHT, apart)
    assert gpu[-1][0] is not WEIGHT


def test_a_weight_whose_memory_was_freed_is_pytorchs_to_refuse(gpu):
    weight = WEIGHT.clone()
    with batch_invariant(strict=True):
        for _ in range(2):
            F.linear(ROWS, weight)
        assert gpu[-1][0] is weight
        gpu.clear()  # pytest would print what it holds
        weight.untyped_storage().resize_(0)
        key = composites.COMPOSITES["linear"].key(ROWS, weight)
        assert key is None
        with pytest.raises(RuntimeError, match="out of bounds"):
            F.linear(ROWS, weight)


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
        return None if key is None else way.at_once(key, *given, **named)
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
        assert not kept_attention.WHOLE and leaves(Q, K, K, is_causal=True, enable_gqa=True)
        assert len(kept_attention.WHOLE) == 1


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
        calls = {"linear": ((x, weight), {}), "linear ": ((x, weight, bias), {}),
                 "scaled_dot_product_attention": ((q, k, k), known)}
        for name, (given, named) in calls.items():
            way, op = composites.COMPOSITES[name.strip()], getattr(F, name.strip())
            with batch_invariant(strict=True), torch.inference_mode():
                _, first = op(*given, **named), op(*given, **named)  # PyTorch's first one sets the order of its kernels
                step = way.at_once(way.key(*given, **named), *given, **named)
                assert step is not None and same_bits(step, first) and step.stride() == first.stride()
                other = given[0][:1], *given[1:]
                assert way.at_once(way.key(*other, **named), *other, **named) is None
        with batch_invariant(strict=True), torch.inference_mode():
            assert same_bits(F.linear(x[:1], weight), F.linear(x, weight)[:1])
