"""The short way: the second call of a kind on a GPU goes to its plan, and whatever is unusual goes to the rule.

A CPU plays the GPU here. What would be launched is written down, and the specification gives the numbers.
"""
from __future__ import annotations

import pytest
import torch
from playing import BIAS, MAT, K, Q, Seen, X

from kernels import call as call_module
from kernels.bits import same_bits
from kernels.mode import Refused, batch_invariant, kept, kept_attention
from kernels.mode import attention as rules
from kernels.mode import seen as said_by_masks
from kernels.ops.layer_norm import layer_norm
from kernels.ops.matmul.call import CALL
from kernels.ops.matmul.op import matmul
from kernels.ops.mean import mean, sum
from kernels.ops.softmax import log_softmax, softmax

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU plays the GPU: test_mode.py runs the real one")
PRODUCT = matmul.python(X, MAT.t())


def test_no_two_results_share_memory():
    """torch.compile refuses such results of an op."""
    q = torch.zeros(1, 2, 3, 4)
    for make in (kept_attention.as_flash, kept_attention.as_efficient):
        tensors = [t for t in make(q, q, (q, q[..., 0].clone())) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in tensors}
        assert len(tensors) > 3 and len(storages) == len(tensors)


def test_the_second_product_of_a_form_goes_to_its_plan(gpu):
    with batch_invariant(strict=True):
        ys = [X @ MAT for _ in range(3)]
    assert [weight.shape for weight, _ in gpu] == [(24, 40), (40, 24), (40, 24)]  # the rule's view of it, then its own
    assert all(y.shape == (6, 24) and same_bits(y, PRODUCT) for y in ys)


def test_a_bias_goes_along_and_other_factors_to_the_rule(gpu):
    with batch_invariant(strict=True):
        ys = [torch.addmm(BIAS, X, MAT) for _ in range(2)]
        scaled = torch.addmm(BIAS, X, MAT, beta=2.0)
    assert [weight.shape for weight, _ in gpu] == [(24, 40), (40, 24), (24, 40)]
    assert gpu[1][1].data_ptr() == BIAS.data_ptr() and gpu[2][1] is None
    assert all(same_bits(y, matmul.python(X, MAT.t(), BIAS)) for y in ys)
    assert same_bits(scaled, PRODUCT + BIAS * 2.0)


@pytest.mark.parametrize("other", [
    lambda: (X[:5], MAT), lambda: (X, MAT.contiguous()), lambda: (X.repeat(1, 2)[:, ::2], MAT),
    lambda: (X.bfloat16(), MAT.bfloat16())], ids=["rows", "strides", "columns", "dtype"])
def test_another_form_is_the_rules(gpu, other):
    with batch_invariant(strict=True):
        X @ MAT
        x, mat = other()
        y = x @ mat
    assert gpu[-1][0].shape == (24, 40) and same_bits(y, matmul.python(x, mat.t()))


class Other(torch.Tensor):
    pass


def test_what_is_unusual_is_the_rules_though_a_plan_was_kept(gpu):
    with batch_invariant(strict=True):
        X @ MAT
        count = len(gpu)
        with Seen() as seen:
            kept.SHORT["mm"](X, MAT)
        assert kept.SHORT["mm"](X.as_subclass(Other), MAT) is None
        assert torch.func.vmap(lambda row: [kept.SHORT["mm"](X, MAT) is None, row][1])(X) is not None
        assert len(gpu) == count and seen.ops == []
        with pytest.raises(Refused, match="forward-mode"):
            torch.func.jvp(lambda a: a @ MAT, (X,), (X,))
        with pytest.raises(Refused, match="mm has an order for .*self is torch.float64"):
            X.double() @ MAT.double()
        with pytest.raises(Refused, match="mm has no order for sparse tensors, and self"):
            torch.mm(X.to_sparse(), MAT)
        assert kept.SHORT["mm"](X, MAT) is not None
        nested = torch.nested.nested_tensor([X])
        assert kept.form(X.to_sparse()) is kept.form(X.to_sparse_csr()) is kept.form(nested) is None


def test_a_lazily_negated_tensor_is_made_before(gpu):
    with batch_invariant(strict=True):
        X @ MAT
        assert same_bits(torch._neg_view(X) @ MAT, matmul.python(-X, MAT.t()))
    assert gpu[-1][0].shape == (40, 24)


def test_a_plan_whose_schedules_are_tried_is_the_rules(gpu, monkeypatch):
    with batch_invariant(strict=True):
        X @ MAT
        left, = (plan for key, plan in CALL.plans.items() if key[0] == "mm" and key[-1] == kept.form(X, MAT))
        monkeypatch.setattr(left, "launch", lambda *call: pytest.fail("a view was not made for it"))
        assert same_bits(X @ MAT, PRODUCT) and gpu[-1][0].shape == (24, 40)


def test_nothing_is_kept_of_products_without_numbers_or_on_a_cpu(gpu, monkeypatch):
    with batch_invariant(strict=True):
        assert same_bits(X[:, :0] @ MAT[:0], torch.zeros(6, 24)) and (X[:0] @ MAT).shape == (0, 24)
        monkeypatch.undo()
        X @ MAT
    assert not any(key[0] == "mm" for key in CALL.plans)


REDUCED = {"mean": (mean, lambda x: x.mean(-1, keepdim=True), ((-1,), True)),
           "sum": (sum, lambda x: x.sum((0, 1)), ((0, 1), False)),
           "softmax": (softmax, lambda x: x.softmax(-1), (-1, None)),
           "softmax to float32": (softmax, lambda x: torch.ops.aten._softmax(x.bfloat16(), 0, True),
                                  (0, torch.float32)),
           "log_softmax": (log_softmax, lambda x: x.log_softmax(0), (0, None))}


@pytest.mark.parametrize("name", REDUCED)
def test_the_second_reduction_of_a_form_goes_to_its_plan(gpu, monkeypatch, name):
    op, call, given = REDUCED[name]
    plans = []

    def launch(plan, x, *arguments):
        plans.append(plan)
        return op.python(x, *arguments)
    monkeypatch.setattr(type(op.call), "launch", lambda self, *arguments: launch(*arguments))
    monkeypatch.setattr(call_module, "Launch", lambda step, index: step)
    x = X.bfloat16() if "float32" in name else X
    with batch_invariant(strict=True):
        ys = [call(X) for _ in range(3)]
        looked_up = op.triton(x, *given)
    assert plans[0] is plans[3] and plans[1] is plans[2] is not plans[0]  # by the op's key, and by the mode's
    assert all(same_bits(y, looked_up) for y in ys)
    with batch_invariant(strict=True):
        y = call(X[:5])
    assert plans[4] not in plans[:4] and same_bits(y, op.python(x[:5], *given))


def test_the_second_layer_norm_of_a_form_goes_to_its_plan(gpu, monkeypatch):
    plans = []

    def launch(self, plan, *arguments):
        plans.append(plan)
        return layer_norm.python(*arguments)
    monkeypatch.setattr(type(layer_norm.call), "launch", launch)
    monkeypatch.setattr(call_module, "Launch", lambda step, index: step)
    x, weight, bias = X.view(2, 3, 40), MAT[:, 0].contiguous(), MAT[:, 1].contiguous()
    with batch_invariant(strict=True):
        ys = [torch.native_layer_norm(x, (40,), weight, bias, 1e-5) for _ in range(3)]
        others = [torch.native_layer_norm(x, (40,), weight, None, 1e-5),
                  torch.native_layer_norm(x, (40,), weight, bias, 1e-3), torch.native_layer_norm(
                      x, (3, 40), weight.expand(3, 40), bias.expand(3, 40), 1e-5)]
        with pytest.raises(RuntimeError, match="normalized_shape|weight"):
            torch.native_layer_norm(x, (3, 40), weight, bias, 1e-5)
    assert plans[1] is plans[2] is not plans[0] and not set(plans[3:6]) & set(plans[:3])
    assert all(same_bits(y, layer_norm.python(x, weight, bias, 1e-5)) for y in ys)
    assert [t.shape for t in others[2]] == [(2, 3, 40), (2, 1, 1), (2, 1, 1)]


def test_a_sum_to_another_dtype_is_the_rules(gpu, monkeypatch):
    monkeypatch.setattr(type(sum.call), "launch", lambda self, plan, x, *arguments: sum.python(x, *arguments))
    monkeypatch.setattr(call_module, "Launch", lambda step, index: step)
    x = X.bfloat16()
    with batch_invariant(strict=True):
        short, long = x.sum(-1), [x.sum(-1, dtype=torch.float32) for _ in range(2)]
    assert short.dtype == torch.bfloat16 and all(same_bits(y, sum.python(x.float(), -1)) for y in long)


FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default


CALLS = {"flash": lambda q, k, **named: FLASH(q, k, k, 0.0, True, **named),
         "cudnn": lambda q, k, **named: CUDNN(q, k, k, None, True, 0.0, True, **named),
         "efficient": lambda q, k, **named: EFFICIENT(q, k, k, None, True, 0.0, True, **named)}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_attention_of_a_form_is_launched_by_addresses(attention, name):
    call = CALLS[name]
    with batch_invariant(strict=True):
        first, second = call(Q, K), call(Q, K)
    assert attention == [("looked at", (5, 4, 8), (1, 5, 2, 8), True),
                         ("launched", Q.data_ptr(), K.data_ptr(), K.data_ptr())]
    for t in (first[0], second[0]):
        assert t.shape == (1, 4, 5, 8) and t.dtype == torch.bfloat16 and t.transpose(1, 2).is_contiguous()
    rows = torch.arange(160, dtype=torch.int16).view(torch.bfloat16).view(1, 5, 4, 8)  # as the op writes them
    assert same_bits(second[0].transpose(1, 2), rows)
    assert second[1].shape == first[1].shape == (1, 4, 5)
    assert same_bits(second[1].transpose(1, 2).flatten(), torch.arange(20, dtype=torch.float32))
    assert len(first) == len(second) == (4 if name == "efficient" else 9)
    assert [type(value) for value in first] == [type(value) for value in second]


def test_attention_keeps_what_a_call_says_apart(attention, monkeypatch):
    with batch_invariant(strict=True):
        CALLS["flash"](Q, K)
        attention.clear()
        assert EFFICIENT(Q, K, K, None, False, 0.0, True)[1].numel() == 0  # no sums
        FLASH(Q, K, K, 0.0, False)  # not causal
        CALLS["flash"](Q[:, :, :4], K)  # another form
        assert [kind for kind, *_ in attention] == ["looked at"] * 3
        assert EFFICIENT(Q, K, K, None, False, 0.0, True)[1].numel() == 0
        assert [kind for kind, *_ in attention] == ["looked at"] * 3 + ["launched"]
        monkeypatch.setattr(kept_attention, "current_device", lambda: 1)
        CALLS["flash"](Q, K)  # another GPU is the current one
        assert attention[-1][0] == "looked at"
        monkeypatch.setattr(kept_attention, "current_device", lambda: 0)
        monkeypatch.setattr(kept_attention, "current_stream", lambda index: 8)
        CALLS["flash"](Q, K)  # another stream
        assert attention[-1][0] == "looked at"


def test_attention_that_has_no_order_or_must_be_copied_is_the_rules(attention, monkeypatch):
    apart = []

    def one(q, *given):
        apart.append(q.dtype)
        return q, None, q.new_empty(q.shape[:2])
    monkeypatch.setattr(rules, "_one", one)
    with batch_invariant(strict=True):
        CALLS["flash"](Q, K)
        for call in (lambda: FLASH(Q, K, K, 0.5, True), lambda: EFFICIENT(Q, K, K, None, True, 0.5, True),
                     lambda: CUDNN(Q, K, K, None, True, 0.5, True)):
            with pytest.raises(Refused, match="dropout_p is 0.5"):
                call()
        count = len(kept_attention.ATTENTION)
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        for start in (0, 1):
            seen[:, :start] = False
            EFFICIENT(Q, K, K, torch.zeros(1, 1, 5, 5, dtype=Q.dtype).masked_fill(~seen, -torch.inf).expand(1, 4, 5, 5),
                      True, 0.0)
        count += 2
        assert [type(said) for (*_, said), _ in kept_attention.ATTENTION].count(said_by_masks.Seen) == 2
        two = (t.expand(2, -1, -1, -1).contiguous() for t in (Q, K, K))
        FLASH(*two, 0.0, True)  # rows that do not lie as the op wants them
        CALLS["flash"](Q.float(), K.float())  # float32 is computed otherwise
        CALLS["flash"](Q, K, scale=0.3)
        assert len(kept_attention.ATTENTION) == count and apart == [torch.float32, torch.bfloat16]
