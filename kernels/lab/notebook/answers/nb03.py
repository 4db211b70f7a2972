"""Checkers of notebook 03, Normalize a row."""
from __future__ import annotations

import torch

from .... import bits
from ....arithmetic import sums
from ..exercises import exercise


@exercise("03.1")
def _(answer):
    first, last = answer
    assert last - first == 7, "each side of an addition covers as many columns as the other: eight."
    assert (first, last) != (16, 23), "close: in which pairs do the blocks of eight go, counted from column 0?"
    assert (first, last) == (0, 7), "draw the tree over 16 columns: 0+1, 2+3, ..., then pairs of pairs."


@exercise("03.2")
def _(answer):
    exact = 4 * 4096 * 8192 * 2 / 4.0e12 * 1e6
    assert abs(answer / exact - 0.5) > 0.02, "half of it: two rows are read and two are written."
    assert abs(answer / exact - 2) > 0.04, "twice it: a bfloat16 number has two bytes."
    assert abs(answer / exact - 1) < 0.02, "bytes read and written, divided by bytes a second, in microseconds."


@exercise("03.3")
def _(answer):
    rows = bits.portable(16, 4096)
    got = torch.stack([torch.as_tensor(answer(row.clone())).reshape(-1) for row in rows])
    exact = rows.double().square().sum(-1, keepdim=True)
    assert got.shape == exact.shape, f"one sum a row is asked for, and this is {got.shape[-1]} numbers."
    wrong = (got / exact - 1).abs().max().item()
    assert wrong < 1e-5, f"this is not the sum of squares: {wrong:.2g} of it is missing or too much."
    again = torch.stack([torch.as_tensor(answer(row.clone())).reshape(-1) for row in rows])
    assert bits.same_bits(got, again), "the same row gave other bits the second time."
    assert not bits.same_bits(got, sums.ordered_sum(rows * rows)), "these are our order's bits; find another order."
