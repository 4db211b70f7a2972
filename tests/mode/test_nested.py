"""Nested tensors: refused by name, or right where their parts are dense tensors that have rules."""
from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, batch_invariant

DEVICE = runtime.device()
PARTS = [portable(rows, 40, device=DEVICE, seed=rows) for rows in (3, 5, 70)]
W, B = portable(24, 40, device=DEVICE, seed=1), portable(1, 40, device=DEVICE, seed=2)[0]
UP, DOWN = portable(500, 40, device=DEVICE, seed=3), portable(24, 500, device=DEVICE, seed=4)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def nested(*parts, layout=torch.strided):
    return torch.nested.nested_tensor(list(parts or PARTS), layout=layout)


def attention(x):
    q = x.unflatten(-1, (4, 10)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


STRIDED = {
    "softmax": lambda x: x.softmax(-1), "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "cos": torch.cos,
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)), "layer_norm": lambda x: F.layer_norm(x, (40,), B, B),
    "sum": lambda x: x.sum(-1, keepdim=True),
}
REFUSED = {name: (call, torch.strided, name) for name, call in STRIDED.items()}
REFUSED["attention"] = attention, torch.jagged, "scaled_dot_product_attention"


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name, grad):
    call, layout, said = REFUSED[name]
    x = nested(layout=layout).requires_grad_(grad)
    with batch_invariant(strict=True), pytest.raises(Refused, match=f"{said}.* has no order for nested tensors"):
        call(x)


@pytest.mark.parametrize("name", REFUSED)
def test_or_passed_through_with_a_warning(name):
    call, layout, said = REFUSED[name]
    x = nested(layout=layout)
    try:
        call(x)
    except NotImplementedError:  # of this PyTorch, on this device
        with batch_invariant(), pytest.warns(MovesBits), pytest.raises(NotImplementedError):
            call(x)
        return
    with batch_invariant(), pytest.warns(MovesBits, match=f"{said}.* has no order for nested tensors"):
        y = call(x)
    for part, expected in zip(y.unbind(), call(x).unbind(), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    if layout is torch.strided:
        assert all(map(same_bits, y.unbind(), call(x).unbind()))  # PyTorch's own


RIGHT = {  # the layout, and whether a part is what the op makes of it as a dense tensor
    "linear": (lambda x: F.linear(x, W), torch.strided, True),
    "matmul": (lambda x: x @ x.transpose(-1, -2), torch.strided, True),
    "jagged linear": (lambda x: F.linear(x, W), torch.jagged, True),
    "two jagged linears": (lambda x: F.linear(F.linear(x, UP), DOWN), torch.jagged, True),
    "jagged matmul": (lambda x: x @ UP.t() @ DOWN.t(), torch.jagged, True),
    "jagged softmax": (lambda x: x.softmax(-1), torch.jagged, True),
    "jagged silu": (F.silu, torch.jagged, True),
    "jagged layer_norm": (lambda x: F.layer_norm(x, (40,), B, B), torch.jagged, True),
    "jagged mean": (lambda x: x.mean(-1, keepdim=True), torch.jagged, True),
    "jagged sum of tokens": (lambda x: x.sum(1), torch.jagged, False),
    "jagged softmax of tokens": (lambda x: x.softmax(1), torch.jagged, False),
    "jagged norm of tokens": (lambda x: F.layer_norm(x, x.shape[1:]), torch.jagged, False),
}


@pytest.mark.parametrize("name", RIGHT)
def test_dense_parts_have_the_bits_of_themselves_alone(name):
    call, layout, as_dense = RIGHT[name]
    with torch.no_grad(), warnings.catch_warnings(), batch_invariant(strict=True):
        warnings.simplefilter("error", MovesBits)
        for part, given in zip(call(nested(layout=layout)).unbind(), PARTS, strict=True):
            alone = call(given[None])[0] if as_dense else call(nested(given, layout=layout)).unbind()[0]
            assert same_bits(part.contiguous(), alone.contiguous())


PACKED = torch.ops.aten._flash_attention_forward, torch.ops.aten._efficient_attention_forward


@pytest.mark.parametrize("kernel", PACKED, ids=["flash", "efficient"])
def test_kernels_of_packed_sequences_are_refused_by_name(kernel):
    """Those that a GPU runs for jagged attention."""
    q = portable(8, 64, torch.bfloat16, DEVICE).view(8, 4, 16)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    numbers = (bounds, bounds, 5, 5, 0.0, True, False) if kernel is PACKED[0] else \
        (None, bounds, bounds, 5, 5, 0.0, 1, False)
    q = q if kernel is PACKED[0] else q[None]
    with batch_invariant(strict=True), pytest.raises(Refused, match="sequences behind each other"):
        kernel(q, q, q, *numbers)
