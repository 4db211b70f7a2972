"""linear and attention in one step: what goes there, and what does not."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from playing import BIAS, MAT, K, Q, Seen, X

from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, batch_invariant, composites, kept
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
            assert "aten::linear" in str(torch.jit.trace(F.linear, (ROWS, weight), check_trace=False).graph)
        assert F.linear(ROWS, weight).requires_grad


@pytest.mark.parametrize("x, weight", [
    (X.repeat(1, 2)[:, ::2].view(2, 3, 40), WEIGHT), (X[0], WEIGHT), (ROWS[:, :0], WEIGHT), (ROWS, WEIGHT[0]),
    (ROWS, torch.zeros(0, 40))], ids=["strides", "one row", "no rows", "a vector", "no columns"])
def test_another_linear_is_never_one_step(gpu, x, weight):
    with batch_invariant(strict=True):
        ys = [F.linear(x, weight) for _ in range(3)]
    assert not any(key[0] == "linear" for key in CALL.plans)
    assert all(same_bits(y, ys[0]) for y in ys) and ys[0].shape == F.linear(x, weight).shape


def test_a_refusal_leaves_no_plan_for_a_linear(gpu):
    with batch_invariant(strict=True):
        for _ in range(2):
            with pytest.raises(Refused, match="mm has an order for .*self is torch.float64"):
                F.linear(ROWS.double(), WEIGHT.double())
    with batch_invariant(), pytest.warns(MovesBits, match="mm has an order for .*self is torch.float64"):
        assert F.linear(ROWS.double(), WEIGHT.double()).dtype == torch.float64
    assert not any(key[0] == "linear" for key in CALL.plans)


def test_forward_mode_derivatives_are_refused_after_a_linear_was_one_step(gpu):
    with batch_invariant(strict=True), torch.autograd.forward_ad.dual_level():
        with pytest.raises(Refused, match="forward-mode"):
            F.linear(torch.autograd.forward_ad.make_dual(ROWS, ROWS), WEIGHT)
    with batch_invariant(strict=True):
        for _ in range(2):
            F.linear(ROWS, WEIGHT)
        assert _one_step(gpu)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(Refused, match="forward-mode"):
            F.linear(torch.autograd.forward_ad.make_dual(ROWS, ROWS), WEIGHT)


def test_a_bias_that_lies_otherwise_is_another_form(gpu):
    apart = torch.stack([BIAS, BIAS], 1)[:, 0]
    with batch_invariant(strict=True):
        for _ in range(2):
            F.linear(ROWS, WEIGHT, BIAS)
        assert gpu[-1][0] is WEIGHT
        F.linear(ROWS, WEIGHT, apart)
    assert gpu[-1][0] is not WEIGHT


def _attend(**named):
    return F.scaled_dot_product_attention(Q, K, K, **{"is_causal": True, "enable_gqa": True, **named})


def test_the_third_attention_of_a_form_is_one_step(attention, parts):
    """The first leaves a plan of the rule's and one for the whole, the second makes that ready."""
    with batch_invariant(strict=True):
        ys = [_attend() for _ in range(2)]
        parts.clear()
        ys.append(_attend())
    assert [(kind, *what) for kind, *what in attention] == [
        ("looked at", (5, 4, 8), (1, 5, 2, 8), True), ("looked at", (5, 4, 8), (1, 5, 2, 8), False),
        ("launched", Q.data_ptr(), K.data_ptr(), K.data_ptr())]
    assert not parts and same_bits(ys[0], ys[1])
    assert all(y.shape == (1, 4, 5, 8) and y.stride() == ys[0].stride() for y in ys)


@pytest.mark.parametrize("other", [
    {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(), "is_causal": False}, {"dropout_p": 0.5}, {"scale": 0.3},
    {"is_causal": False}, {"enable_gqa": False}], ids=lambda other: next(iter(other)))
def test_other_attention_is_no_step_of_a_known_one(attention, other):
    one_step, _ = composites.COMPOSITES["scaled_dot_product_attention"]
    known = {"is_causal": True, "enable_gqa": True}
    with batch_invariant(strict=True), torch.no_grad():
        for _ in range(2):
            _attend()
        assert one_step(Q, K, K, **known) is not None
        assert one_step(Q, K, K, **(known | other)) is None
        assert one_step(Q[:, :, :4], K, K, **known) is one_step(Q.float(), K.float(), K.float(), **known) is None
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert one_step(Q, K, K, **known) is None
    assert one_step(Q.clone().requires_grad_(), K, K, **known) is None


def test_attention_that_pytorch_multiplies_itself_or_that_a_mask_hides_leaves_no_step(attention):
    leave = composites.COMPOSITES["scaled_dot_product_attention"][1]
    with batch_invariant(strict=True), torch.no_grad():
        FLASH(Q, K, K, 0.0, True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            leave(Q, K, K, is_causal=True, enable_gqa=True)
        leave(Q, K, K, torch.ones(5, 5, dtype=torch.bool).tril(), enable_gqa=True)
        leave(Q[0], K[0], K[0], is_causal=True, enable_gqa=True)
        leave(Q, K, K, is_causal=True, scale=0.3, enable_gqa=True)
        leave(Q, K, K, enable_gqa=True)  # the rule was asked for causal attention alone
        assert not composites.WHOLE
        leave(Q, K, K, is_causal=True, enable_gqa=True)
        assert len(composites.WHOLE) == 1


@pytest.mark.gpu
def test_on_a_gpu_one_step_has_the_bits_of_the_long_way():
    linear, attend = (composites.COMPOSITES[name][0] for name in ("linear", "scaled_dot_product_attention"))
    known = {"is_causal": True, "enable_gqa": True}
    for dtype in (torch.bfloat16, torch.float16):
        x = portable(6, 1024, dtype, "cuda").view(2, 3, 1024)
        weight, bias = portable(256, 1024, dtype, "cuda", 1), portable(1, 256, dtype, "cuda", 2)[0]
        q = portable(2 * 7 * 8, 64, dtype, "cuda", 3).view(2, 7, 8, 64).transpose(1, 2)
        k = portable(2 * 7 * 2, 64, dtype, "cuda", 4).view(2, 7, 2, 64).transpose(1, 2)
        with batch_invariant(strict=True), torch.inference_mode():
            first = F.linear(x, weight), F.linear(x, weight, bias), F.scaled_dot_product_attention(q, k, k, **known)
            then = linear(x, weight), linear(x, weight, bias), attend(q, k, k, **known)
            assert all(y is not None and same_bits(y, long) and y.stride() == long.stride()
                       for y, long in zip(then, first, strict=True))
            assert linear(x[:1], weight) is attend(q[:1], k[:1], k[:1], **known) is None
            assert same_bits(F.linear(x[:1], weight), first[0][:1])
