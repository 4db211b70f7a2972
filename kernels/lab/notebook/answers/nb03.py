"""Checkers of notebook 03, Normalize a row."""
from __future__ import annotations

import torch

from .... import bits
from ....arithmetic import sums
from ..exercises import exercise
from ..written import describe, number, numbers, refuse_library_sums


@exercise("03.1", wants="a pair (first, last)")
def _(answer):
    first, last = numbers(answer, 2, "a pair (first, last)")
    assert last - first == 7, "each side of an addition covers as many columns as the other: eight."
    assert (first, last) != (16, 23), "close: in which pairs do the blocks of eight go, counted from column 0?"
    assert (first, last) == (0, 7), "draw the tree over 16 columns: 0+1, 2+3, ..., then pairs of pairs."


@exercise("03.2", wants="a number of microseconds")
def _(answer):
    answer = number(answer, "a number of microseconds")
    exact = 4 * 4096 * 8192 * 2 / 4.0e12 * 1e6
    assert abs(answer / exact - 0.5) > 0.02, "half of it: two rows are read and two are written."
    assert abs(answer / exact - 2) > 0.04, "twice it: a bfloat16 number has two bytes."
    assert abs(answer / exact - 1) < 0.02, "bytes read and written, divided by bytes a second, in microseconds."


@exercise("03.3", "another_order(row)", wants="one number", kind="open")
def _(another_order):
    rows = bits.portable(16, 4096)
    got, again = (torch.stack([_one(another_order(row.clone())) for row in rows]) for _ in range(2))
    wrong = (got / rows.double().square().sum(-1, keepdim=True) - 1).abs().max().item()
    assert wrong < 1e-5, f"this is not the sum of squares: {wrong:.2g} of it is missing or too much."
    assert bits.same_bits(got, again), "the same row gave other bits the second time."
    refuse_library_sums(another_order, rows[0].clone())
    assert not bits.same_bits(got, sums.ordered_sum(rows * rows)), "these are our order's bits; find another order."


def _one(value) -> torch.Tensor:
    value = torch.as_tensor(value).reshape(-1)
    assert value.numel() == 1, f"one sum a row is asked for, and this is {value.numel()} numbers."
    return value


@exercise("03.4", "our_order(row)", wants="one number")
def _(our_order):
    for width in (1024, 4096, 1, 37, 1025, 3000):
        row = bits.portable(1, width, seed=width)[0]
        got = torch.as_tensor(our_order(row.clone())).reshape(-1)
        assert got.numel() == 1, f"one sum of {width} numbers is asked for, and this is {describe(got)}."
        assert torch.isclose(got.double(), row.double().sum(), atol=1e-4).all(), f"not the sum of {width} numbers."
        assert bits.same_bits(got.float(), sums.ordered_sum(row)), (
            f"near, but other bits for {width} numbers: chunks of 1024 in sequence, column by column, then neighbours.")
