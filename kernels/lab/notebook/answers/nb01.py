"""Checkers of notebook 01, Add floats in any order."""
from __future__ import annotations

import torch

from .... import bits
from ...orders import measure as orders
from ..exercises import exercise
from ..written import number, numbers


@exercise("01.1", wants="three numbers (bfloat16's, float16's, float32's)")
def _(answer):
    three = numbers(answer, 3, "three numbers (bfloat16's, float16's, float32's)")
    for n, dtype in zip(three, (torch.bfloat16, torch.float16, torch.float32), strict=True):
        first = next(2**i + 1 for i in range(60) if orders.ulp(2**i, dtype) == 2)
        assert n >= first, f"{dtype} holds every whole number up to {n:g}, and more; where does its gap become 2?"
        assert n == first, f"{dtype} lacks a smaller one than {n:g}; where does its gap become 2?"


@exercise("01.2", wants="a whole number")
def _(answer):
    answer = number(answer, "a whole number")
    assert answer != 3_628_800, "10! orders are those from left to right, and they count a + b and b + a as two."
    assert answer != 17_643_225_600, "that counts a + b and b + a as two: halve it once for each of the 9 additions."
    assert answer == 34_459_425, "eight numbers have 1 x 3 x 5 x 7 x 9 x 11 x 13; how does a ninth one join?"


@exercise("01.3", "steady_sum(x)", wants="one number", kind="open")
def _(steady_sum):
    wide = torch.tensor([1e17, 1.0, -1e17, 1.0, 3e8, -3e8, 1e-3], dtype=torch.float32, device="cpu")
    for x in (orders.numbers(1000, seed=3), orders.numbers(300, spread=40), wide):
        found = torch.stack([torch.as_tensor(steady_sum(x[order])).float().reshape(())
                             for order in orders.shuffles(len(x), 50)])
        off = (found.double() - float(orders.exact(x))).abs().max().item()
        assert off <= 1e-4 * x.abs().sum().item(), f"off by {off:.3g}: that is not the sum of {len(x)} numbers."
        several = len(found.unique())
        assert several == 1, f"50 orders of {len(x)} numbers gave {several} sums: which of its steps still rounds?"


@exercise("01.4", "by_place(partial, block)", wants="one number")
def _(by_place):
    for seed in range(4):
        partial = orders.sequential(orders.numbers(4096, seed=seed).view(64, 64))
        found = torch.stack([torch.as_tensor(by_place(partial[block], block)).reshape(())
                             for block in orders.arrivals(64, 20, 0.5)])
        assert torch.isclose(found, partial.sum(), atol=1e-3).all(), "this is not the sum of the 64 partial sums."
        assert len(found.unique()) == 1, "it still depends on who comes first: give each block a place of its own."
        assert bits.same_bits(found[0], orders.sequential(partial)), (
            "one result at last, but not that of adding block 0, 1, 2, ... left to right.")
