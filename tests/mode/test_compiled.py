"""torch.compile and the mode: one graph outside, one inside, and inside the bits of eager."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant

DEVICE = runtime.device()
W = portable(24, 40, device=DEVICE, seed=1)


def layer(x):
    """A product, a norm of sums, a softmax, a function of one number, and a mean: what Inductor would fuse."""
    y = F.gelu(F.linear(x, W))
    return (y.softmax(-1) * y).sum(-1), y.var(-1) if x.dim() == 3 else y.mean(-1)


@pytest.mark.serial  # it compiles
def test_compiled_has_the_bits_of_eager_and_no_batch_moves_them():
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, dynamic=False), portable(5, 40, device=DEVICE)
    with torch.no_grad():
        outside = compiled(x)
        with batch_invariant(strict=True):
            inside = compiled(x)
            assert same_bits(inside, layer(x)) and not same_bits(inside, outside)
            assert same_bits([y[2:3] for y in inside], compiled(x[2:3]))
        assert same_bits(compiled(x), outside)
    with batch_invariant(strict=True):
        found, alone = (_gradient(compiled, rows) for rows in (x, x[2:3]))
        with pytest.raises(Exception, match="var.correction moves its bits"):
            compiled(x[None])
    assert same_bits(found[2:3], alone)
    torch.testing.assert_close(found, _gradient(layer, x), rtol=1e-4, atol=1e-5)


def _gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x)[0].sum(), x)[0]
