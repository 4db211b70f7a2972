"""Checkers of notebook 02, Find where bits change."""
from __future__ import annotations

import torch

from .... import bits
from ...sources.claims import SOURCES
from ..exercises import exercise
from ..written import describe, number, refuse_library_sums


@exercise("02.1", wants="a whole number")
def _(answer):
    answer, blind = number(answer, "a whole number"), sum("run" not in source.breaks for source in SOURCES)
    assert answer != len(SOURCES) - blind, "those are the sources that break `run`; her test is blind to the others."
    assert answer != len(SOURCES), "two of the fourteen break `run`, and a test of `run` can see these."
    assert answer != blind + 1, "near: a source that breaks `run` and another property is one that she can see."
    assert answer == blind, "count the lines of the first table that do not name `run`."


@exercise("02.2", "first_change(f, x)", wants="a whole number or None", none=True)
def _(first_change):
    x = bits.portable(12, 64)
    for change in (2, 5, 12, None):
        def moves(rows, change=change):
            return rows.sum(-1) + (len(rows) == change) * 2.0**-10

        got = first_change(moves, x)
        assert got == change, f"row 0 has other bits first at {change} rows, and this says {got}."

    def moves_elsewhere(rows):
        return torch.cat([rows[:1, 0], rows[1:, 0] + len(rows)])

    got = first_change(moves_elsewhere, x)
    assert got is None, f"row 0 keeps its bits here, other rows do not; this says {got}."

    def zeros(rows):
        return torch.full((len(rows),), -0.0 if len(rows) == 3 else 0.0, dtype=torch.float32, device="cpu")

    assert first_change(zeros, x) == 3, "-0.0 and 0.0 are equal, and they have other bits: compare with bits.same_bits."


@exercise("02.3", "add_ranks(ranks)", wants="a tensor of shape (n,)")
def _(add_ranks):
    pieces = bits.portable(8, 4096)
    exact, sums_ = pieces.double().sum(0), {}
    for ranks in (1, 2, 4, 8):
        got = add_ranks([piece.clone() for piece in pieces.chunk(ranks)])
        assert got.shape == exact.shape, f"{ranks} processes left the shape {tuple(got.shape)}, not (4096,)."
        assert (got - exact).abs().max() < 1e-5, f"for {ranks} processes this is not the sum of the eight pieces."
        sums_[ranks] = got
    for ranks, got in sums_.items():
        assert bits.same_bits(got, sums_[1]), (
            f"{ranks} processes and 1 give other bits: does each process add its own pieces first?")
    refuse_library_sums(add_ranks, [piece.clone() for piece in pieces.chunk(4)])


@exercise("02.4", "culprit(rows)", wants="a tensor with one mean a row", kind="open")
def _(culprit):
    rows, found = bits.portable(16, 1000), []
    for size in range(1, 17):
        once, again = (torch.as_tensor(culprit(rows[:size].clone())) for _ in range(2))
        assert once.shape == (size,), f"{size} rows should give {size} means, and this is {describe(once)}."
        assert bits.same_bits(once, again), f"a batch of {size} does not repeat itself: `run` must stay whole."
        wrong = (once.double() - rows[:size].double().mean(-1)).abs().max().item()
        assert wrong < 1e-6, f"a batch of {size} is {wrong:.2g} away from the mean; only the rounding may change."
        found.append(once[:1])
    assert not all(bits.same_bits(one, found[0]) for one in found), (
        "row 0 has the same bits in every batch of 1 to 16: let the number of rows decide how a row is cut.")
