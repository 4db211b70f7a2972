"""linear and matmul of rows in several dimensions: the same bits wherever a row lies and whoever is beside it."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, batch_invariant
from kernels.ops.matmul.order import order

DEVICE = runtime.device()
N, K = 64, 2304  # a sum of several segments: other bits than one chain has
H = portable(6, K, torch.float32, DEVICE).view(2, 3, K)
W, B = portable(N, K, torch.float32, DEVICE, 1), portable(1, N, torch.float32, DEVICE, 2)[0]
CALLS = {"linear": lambda x, w, b: F.linear(x, w), "linear with a bias": F.linear, "matmul": lambda x, w, b: x @ w.t(),
         "matmul from the left": lambda x, w, b: (w @ x.transpose(-1, -2)).transpose(-1, -2),
         "matmul with a vector": lambda x, w, b: x @ w[0],
         "a vector from the left": lambda x, w, b: w[0] @ x.transpose(-1, -2)}
ROWS = {  # views of x (2, 3, K), and which rows of all results they are
    "a batch of one": (lambda h: h[:1], lambda y: y[:1]),
    "the last of each": (lambda h: h[:, -1:], lambda y: y[:, -1:]),
    "the last of one": (lambda h: h[:1, -1:], lambda y: y[:1, -1:]),
    "odd strides": (lambda h: h[:, -1].contiguous()[None].transpose(0, 1), lambda y: y[:, -1]),
    "columns apart": (lambda h: h.repeat_interleave(2, -1)[..., ::2], lambda y: y),
    "four dimensions": (lambda h: h.view(2, 1, 3, K), lambda y: y),
    "sequences first": (lambda h: h.transpose(0, 1), lambda y: y.transpose(0, 1))}


def test_the_order_here_is_no_single_chain():
    assert order(N, K)[0] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_rows_bits_are_the_same_wherever_it_lies(call, learns, dtype):
    weight, bias = (t.detach().to(dtype, copy=True).requires_grad_(learns) for t in (W, B))
    x, function = H.to(dtype), CALLS[call]
    with batch_invariant(strict=True):
        every = function(x.view(6, K), weight, bias).detach().view(2, 3, -1)
        for name, (of, places) in ROWS.items():
            y = function(of(x), weight, bias).detach()
            assert same_bits(y.reshape(-1), places(every).reshape(-1)), name


@pytest.mark.parametrize("call", CALLS)
def test_shapes_strides_and_errors_are_pytorchs(call):
    function = CALLS[call]
    for of, _ in ROWS.values():
        plain = function(of(H), W, B)
        with batch_invariant(strict=True):
            assert function(of(H), W, B).shape == plain.shape
    for wrong in ((H, W[:, :-1], B), (H, W, B[:-1]) if "bias" in call else (H[..., :-1], W, B)):
        with pytest.raises(RuntimeError) as ours, batch_invariant(strict=True):
            function(*wrong)
        with pytest.raises(RuntimeError) as theirs:
            function(*wrong)
        assert str(ours.value).split()[0] == str(theirs.value).split()[0]


@pytest.mark.parametrize("call", ["linear with a bias", "matmul", "matmul from the left"])
def test_gradients_are_those_of_rows_in_two_dimensions(call):
    def gradients(x):
        given = x.detach().requires_grad_(), W.clone().requires_grad_(), B.clone().requires_grad_()
        CALLS[call](*given).square().sum().backward()
        return [t.grad for t in given if t.grad is not None]
    with batch_invariant():
        flat, apart = gradients(H.view(6, K)), gradients(H.repeat_interleave(2, -1)[..., ::2])
    assert len(flat) == len(apart) >= 2
    assert all(same_bits(a.reshape(b.shape), b) for a, b in zip(apart, flat, strict=True))


def test_out_and_empty_ones():
    out = torch.empty(0, device=DEVICE)
    with batch_invariant(strict=True):
        y = torch.matmul(H[:, -1:], W.t())
        assert torch.matmul(H[:, -1:], W.t(), out=out) is out and same_bits(out, y)
        assert same_bits(torch._C._nn.linear(H[:, -1:], W, B, out=out), F.linear(H[:, -1:], W, B))
        assert F.linear(H[:, :0], W).shape == (2, 0, N) and (H[:0] @ W.t()).shape == (0, 3, N)
        assert same_bits(H[..., :0] @ W.t()[:0], torch.zeros(2, 3, N, device=DEVICE))
        with pytest.raises(RuntimeError, match="dtype|Double"):
            torch.matmul(H, W.t(), out=out.double())


def test_a_bias_or_a_weight_that_does_not_fit_is_pytorchs_to_refuse():
    for given in ((H, W, B[:-1]), (H[0], W, B[:-1]), (H[0], W, B.to("meta")), (H[0], W.to("meta"), None)):
        said = []
        for mode in (nullcontext(), batch_invariant(strict=True)):
            with mode:
                try:
                    said.append(F.linear(*given).device.type)
                except RuntimeError as error:
                    said.append(str(error).splitlines()[0])
        assert said[0] == said[1]


def test_a_warning_names_the_readers_line():
    with batch_invariant(), pytest.warns(MovesBits) as caught:
        F.linear(H.double(), W.double())
        torch.nn.Linear(K, 2, dtype=torch.float64, device=DEVICE)(H.double())
        H.double().softmax(-1)
    assert {warning.filename for warning in caught} == {__file__}
