"""Checkers of notebook 00, Start here."""
from __future__ import annotations

from itertools import permutations

import torch

from .... import bits
from ....arithmetic import sums
from ..exercises import exercise
from ..written import describe, number, numbers


@exercise("00.1", wants="a whole number")
def _(answer):
    assert isinstance(answer, int), f"a count is a whole number, and this is {describe(answer)}."
    found = {_left_to_right(order) for order in permutations([1e8, 1.0, -1e8, 1.0])}
    assert answer != 24, "24 is the number of orders; many of them give the same sum."
    assert answer == len(found), "in float32 1e8 + 1 is 1e8: is each 1 added before 1e8 is gone, or after?"


def _left_to_right(numbers) -> float:
    total = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    for value in numbers:
        total = total + torch.tensor(value, dtype=torch.float32, device="cpu")
    return total.item()


@exercise("00.2", "pairs(x)", wants="one number")
def _(pairs):
    for width, seed in ((1, 0), (2, 0), (8, 0), (8, 1), (64, 0), (1024, 0), (1024, 1), (4096, 0)):
        x = bits.portable(1, width, seed=seed)[0]
        got = torch.as_tensor(pairs(x.clone())).reshape(-1)
        assert got.numel() == 1, f"{width} numbers left {got.numel()}; go on until one is left."
        assert torch.isclose(got, x.sum(), rtol=1e-4, atol=1e-4).all(), f"this is not the sum of {width} numbers."
        assert bits.same_bits(got, sums.add_neighbours(x)), (
            f"near, but other bits for {width} numbers: which are neighbours, 0 and 1, or 0 and the middle?")


@exercise("00.3", wants="three numbers (a, b, c)", kind="open")
def _(answer):
    a, b, c = (torch.tensor(value, dtype=torch.float32, device="cpu")
               for value in numbers(answer, 3, "three numbers (a, b, c)"))
    left, right = number((a + b) + c), number(a + (b + c))
    assert torch.isfinite(a + b + c), "a sum that overflows is no number: take smaller ones."
    assert left != right, f"both groupings give {left:g}; which addition has to round, and which must not?"
    assert left == 0, f"(a + b) + c is {left:g}, and should be 0: let a be lost in a + b, and c take b away."
