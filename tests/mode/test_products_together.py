"""Products of the same x in compiled code are one op, with their bits and wherever their weights come from."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant, products_together

DEVICE, PUT_TOGETHER = runtime.device(), products_together.put_together
Q, K, V, OUT = (portable(rows, 40, device=DEVICE, seed=rows) for rows in (24, 16, 8, 40))
X = portable(10, 40, device=DEVICE).view(2, 5, 40)


@pytest.fixture
def graphs(monkeypatch):
    """The ops of products in each graph that Inductor gets, on a CPU too."""
    torch._dynamo.reset()
    found = []

    def everywhere(module):
        PUT_TOGETHER(module, ("cpu", "cuda"))
        module.graph.lint()
        found.append([name for node in module.graph.nodes if node.op == "call_function" and (
            name := getattr(node.target, "name", str)().removeprefix("same_bits_mode::")).endswith("mm")])
    monkeypatch.setattr(products_together, "put_together", everywhere)
    return found


def block(x, *weights):
    """Two groups that share a weight, and a product alone between them."""
    x = F.silu(x)
    q, k, v = (F.linear(x, weight) for weight in weights)
    h = F.linear(x + q.sum(-1, keepdim=True), OUT)
    return torch.cat([F.linear(h, weights[1]) * k, F.linear(h, weights[2]) * v], -1)


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("dynamic", [False, True])
def test_products_of_the_same_rows_are_one_op_with_their_bits(graphs, dynamic):
    compiled = torch.compile(block, dynamic=dynamic)
    with torch.no_grad(), batch_invariant(strict=True):
        assert same_bits(compiled(X, Q, K, V), block(X, Q, K, V))
        assert same_bits(compiled(X[:1], Q, K, V), block(X, Q, K, V)[:1])
    assert graphs[0] == ["several_mm", "aten_mm", "several_mm"]


@pytest.mark.serial  # it compiles
def test_gradients_are_eagers(graphs):
    given = [t.clone().requires_grad_() for t in (X, Q, K, V)]

    def gradients(call):
        return torch.autograd.grad(call(*given).square().sum(), given)
    with batch_invariant(strict=True):
        found, expected = gradients(torch.compile(block, dynamic=False)), gradients(block)
    if DEVICE.type == "cpu":
        assert all(map(same_bits, found, expected))
    torch.testing.assert_close(found, expected)  # on a GPU Inductor has another formula for silu's gradient
    assert len(graphs) == 2 and "several_mm" in graphs[0]


@pytest.mark.serial  # it compiles
def test_weights_that_are_computed_and_other_rows_stay_apart(graphs):
    def computed(x, a, b):
        y = F.linear(x, a)
        return y, F.linear(x, b * y.sum()), F.linear(x + 1, a)
    compiled = torch.compile(computed, dynamic=False)
    with torch.no_grad(), batch_invariant(strict=True):
        assert all(map(same_bits, compiled(X, Q, K), computed(X, Q, K)))
    assert graphs == [["aten_mm"] * 3]


def test_the_op_gives_each_product():
    several = torch.ops.same_bits_mode.several_mm.default
    x = X.flatten(0, 1)
    with torch.no_grad(), batch_invariant(strict=True):
        found = several(x, [Q.t(), K.t()])
        assert all(map(same_bits, found, (x @ Q.t(), x @ K.t()))) and all(t.is_contiguous() for t in found)
    assert [t.shape for t in several(x.to("meta"), [Q.t().to("meta")])] == [(10, 24)]
