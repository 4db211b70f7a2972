"""What PyTorch refuses, the mode refuses with PyTorch's own error; what PyTorch lays out, lies so in the mode too."""
from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, batch_invariant
from kernels.mode.reductions import _PYTORCHS

DEVICE = runtime.device()
X = portable(3, 4, device=DEVICE)
ONE, V, LONG = torch.tensor(1.0, device=DEVICE), X[0], torch.zeros(7, device=DEVICE)
STACK, ROW, SQUARE = X[None], torch.zeros(2, 3, device=DEVICE), torch.zeros(5, 3, 3, device=DEVICE)
MANY = torch.zeros([1] * 65, device=DEVICE)
KEPT = torch.zeros(3, 1, device=DEVICE)

WRONG = {
    "sum of no such dimension": lambda: V.sum(5),
    "sum of no such dimension from behind": lambda: X.sum(-3),
    "sum of a number's second dimension": lambda: ONE.sum(1),
    "sum of a dimension twice": lambda: X.sum((0, 0)),
    "sum of a dimension by two names": lambda: X.sum((0, -2)),
    "sum of 65 dimensions": lambda: MANY.sum(0),
    "mean of no such dimension": lambda: X.mean(5),
    "mean of a dimension twice": lambda: X.mean((0, 0), keepdim=True),
    "mean of 65 dimensions": lambda: MANY.mean((0, 3)),
    "mean of integers": lambda: X.long().mean(0),
    "mm of a vector": lambda: torch.mm(X, V),
    "mm that does not fit": lambda: torch.mm(X, X),
    "mv of a number": lambda: torch.mv(X, ONE),
    "mv of a matrix": lambda: torch.mv(X, X.t()),
    "mv that does not fit": lambda: torch.mv(X, LONG),
    "mv of integers and others": lambda: torch.mv(X.long(), V),
    "addmv of a number": lambda: torch.addmv(LONG[:3], X, ONE),
    "addmv to what does not fit": lambda: torch.addmv(LONG, X, V),
    "addmv to what does not fit and does not count": lambda: torch.addmv(LONG, X, V, beta=0),
    "addmv to a matrix": lambda: torch.addmv(ROW, X, V),
    "dot of matrices": lambda: torch.dot(X, X),
    "dot of numbers": lambda: torch.dot(ONE, ONE),
    "dot that does not fit": lambda: torch.dot(V, LONG),
    "vdot of matrices": lambda: torch.vdot(X, X),
    "addmm to what does not fit": lambda: torch.addmm(LONG, X, X.t()),
    "bmm of matrices": lambda: torch.bmm(X, X.t()),
    "baddbmm to what does not fit": lambda: torch.baddbmm(LONG, STACK, STACK.mT),
    "baddbmm to more matrices": lambda: torch.baddbmm(SQUARE, STACK, STACK.mT),
    "baddbmm to more dimensions": lambda: torch.baddbmm(SQUARE[:, None], STACK, STACK.mT),
    "layer_norm of no dimension": lambda: F.layer_norm(X, ()),
    "layer_norm of another width": lambda: F.layer_norm(X, (3,)),
    "layer_norm of more dimensions": lambda: F.layer_norm(X, (2, 3, 4)),
    "layer_norm with another weight": lambda: F.layer_norm(X, (4,), LONG),
    "layer_norm's gradient of no dimension": lambda: torch.ops.aten.native_layer_norm_backward(
        X, X, (), KEPT, KEPT, None, None, [True] * 3),
}


def _error(call) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011 - of whichever class PyTorch has
        call()
    return found.value


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_the_error_is_pytorchs(name, strict):
    expected = _error(WRONG[name])
    with batch_invariant(strict=strict):
        found = _error(WRONG[name])
    assert type(found) is type(expected) and str(found) == str(expected)


@pytest.mark.parametrize("call", [lambda: MANY.sum(), lambda: X.sum(()), lambda: ONE.sum(0), lambda: ONE.mean(-1),
                                  lambda: torch.addmv(ONE, X, V), lambda: torch.baddbmm(ONE, STACK, STACK.mT)])
def test_what_pytorch_takes_passes(call):
    with batch_invariant(strict=True):
        assert torch.allclose(call(), call()) and call().shape == batch_invariant()(call)().shape


@pytest.mark.parametrize("eps", [-0.5, float("inf"), float("nan")])
def test_an_eps_without_an_order_is_refused_by_name(eps):
    def call():
        return F.layer_norm(X, (4,), eps=eps)
    with batch_invariant(strict=True), pytest.raises(Refused, match="layer_norm has an order for an eps of at least 0"):
        call()
    with batch_invariant(), pytest.warns(MovesBits, match="layer_norm has an order for an eps"):
        found = call()
    assert same_bits(found, call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_layer_norm_keeps_is_of_pytorchs_dtype(dtype):
    x = portable(3, 40, dtype, DEVICE)
    for given in ((x[0], x[1]), (None, None)):
        expected = torch.native_layer_norm(x, (40,), *given, 1e-5)
        with batch_invariant(strict=True):
            found = torch.native_layer_norm(x, (40,), *given, 1e-5)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert all(torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02)
                   for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norms_gradient_reads_what_was_kept_in_float32(dtype):
    """Its means are float32(1 / D) of a sum, and 1 / 40 is no number of sixteen bits."""
    x = portable(3, 40, dtype, DEVICE)
    _, middle, rstd = torch.native_layer_norm(x, (40,), None, None, 1e-5)
    with batch_invariant(strict=True):
        found = [torch.ops.aten.native_layer_norm_backward(x, x, (40,), *kept, None, None, [True, False, False])[0]
                 for kept in ((middle, rstd), (middle.float(), rstd.float()))]
    assert same_bits(*found)


def _lies(t: torch.Tensor) -> list[int]:
    return [stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1]


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_a_reduction_lies_as_pytorchs(op):
    x = portable(24, 5, device=DEVICE).view(2, 3, 4, 5)
    for order in itertools.permutations(range(4)):
        for base in (x, x[..., 1:4], x[:, :1].expand(-1, 3, -1, -1)):
            for dim, keepdim in ((-1, False), ((0, 2), True), ((1,), False), ((0, 1), False)):
                call = getattr(base.permute(order), op)
                expected = call(dim, keepdim)
                with batch_invariant(strict=True):
                    found, again = call(dim, keepdim), call(dim, keepdim)
                assert _lies(found) == _lies(again) == _lies(expected)
                assert torch.allclose(found, expected, atol=1e-5) and same_bits(found, again)


def test_a_view_of_a_reduction_is_possible_where_it_is_in_pytorch():
    x = portable(24, 8, device=DEVICE).view(2, 4, 3, 8)
    with batch_invariant(strict=True):
        found = x.transpose(1, 2).sum(-1).view(2, -1)
        assert same_bits(found, x.transpose(1, 2).contiguous().sum(-1).view(2, -1))


def test_a_contiguous_tensors_result_is_not_asked_for(monkeypatch):
    monkeypatch.setitem(_PYTORCHS, "sum", None)
    with batch_invariant(strict=True):
        assert same_bits(X.sum(0, keepdim=True), X.sum((0,), True)) and X.sum(-1).stride() == (1,)
