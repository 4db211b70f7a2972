"""Checkers of notebook 00, Start here."""
from __future__ import annotations

from itertools import permutations

import torch

from .... import bits
from ....arithmetic import sums
from ..exercises import exercise


@exercise("00.1")
def _(answer):
    assert isinstance(answer, int), f"a count is a whole number, and this is a {type(answer).__name__}."
    found = {_left_to_right(order) for order in permutations([1e8, 1.0, -1e8, 1.0])}
    assert answer != 24, "24 is the number of orders; many of them give the same sum."
    assert answer == len(found), "in float32 1e8 + 1 is 1e8: is each 1 added before 1e8 is gone, or after?"


def _left_to_right(numbers) -> float:
    total = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    for number in numbers:
        total = total + torch.tensor(number, dtype=torch.float32, device="cpu")
    return total.item()


@exercise("00.2")
def _(answer):
    for width in (1, 2, 8, 1024):
        x = bits.portable(1, width, seed=width)[0]
        got = torch.as_tensor(answer(x.clone())).reshape(-1)
        assert got.numel() == 1, f"{width} numbers left {got.numel()}; go on until one is left."
        assert torch.isclose(got, x.sum(), rtol=1e-4, atol=1e-4).all(), f"this is not the sum of {width} numbers."
        assert bits.same_bits(got, sums.add_neighbours(x)), (
            f"near, but other bits for {width} numbers: which are neighbours, 0 and 1, or 0 and the middle?")
