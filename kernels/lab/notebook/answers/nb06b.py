"""Checkers of notebook 06b, Fix a model you did not write."""
from __future__ import annotations

import torch
from torch import nn

from .... import bits
from ...moving import find_moving_ops
from ..exercises import exercise


def _rows(count: int = 5) -> torch.Tensor:
    return bits.portable(count, 6, device="cpu") + 2.0


class _Only(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@exercise("06b.1", wants="the name of a layer")
def _(answer):
    layers = ("widen", "norm", "gate", "narrow")
    assert answer in layers, f"its layers are called {', '.join(layers)}."
    assert answer != "gate", "a ReLU names one number. It may carry a difference, and starts none."
    assert answer != "norm", "its mean is over a row's own numbers; over which dimension would neighbours come in?"
    assert answer != "widen", "a product of one row with the weights: on a CPU it may move, but nobody planted that. " \
                              "Under the mode it is still; which layer is not?"
    assert answer == "narrow"


@exercise("06b.2", "centred(x)", wants="a tensor")
def _(answer):
    x = _rows()
    got, right = answer(x), x - x.mean(1, keepdim=True)
    assert isinstance(got, torch.Tensor) and got.shape == x.shape, "one result for each number of x is asked for."
    report = bits.check_invariance(answer, (x,), batches=[slice(0, 1), slice(1, 3)])
    assert report, "a row's result still depends on the others: the mean must be over the row's own numbers."
    assert torch.allclose(got, right), "subtract from each number the mean of its row."


@exercise("06b.3", "by_place(x)", wants="a tensor", kind="open")
def _(answer):
    report = find_moving_ops(_Only(answer), _rows(), ("batch", "place"))
    moved = {call.way for call in report.calls if call.moved}
    assert moved, "no bit moves in either way: what does a row's place in the batch change?"
    assert "batch" not in moved, "the first row alone has other bits than among others: leave it as it is alone."
    assert moved == {"place"}
