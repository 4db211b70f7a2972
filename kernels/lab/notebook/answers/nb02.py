"""Checkers of notebook 02, Find where bits change."""
from __future__ import annotations

import torch

from .... import bits
from ..exercises import exercise


@exercise("02.1")
def _(answer):
    assert answer in ("run", "batch", "schedule"), 'one of the words "run", "batch" and "schedule" is asked for.'
    assert answer != "run", "each kernel repeats itself when it is called again with the same tensors."
    assert answer != "schedule", "the machine, its libraries and its settings are the same at noon; what is not?"


@exercise("02.2")
def _(answer):
    x = bits.portable(12, 64)
    for change in (2, 5, 12, None):
        def moves(rows, change=change):
            return rows.sum(-1) + (len(rows) == change) * 2.0**-10

        got = answer(moves, x)
        assert got == change, f"row 0 has other bits first at {change} rows, and this says {got}."

    def moves_elsewhere(rows):
        return torch.cat([rows[:1, 0], rows[1:, 0] + len(rows)])

    got = answer(moves_elsewhere, x)
    assert got is None, f"row 0 keeps its bits here, other rows do not; this says {got}."

    def zeros(rows):
        return torch.full((len(rows),), -0.0 if len(rows) == 3 else 0.0, dtype=torch.float32, device="cpu")

    assert answer(zeros, x) == 3, "-0.0 and 0.0 are equal, and they have other bits: compare with bits.same_bits."


@exercise("02.3")
def _(answer):
    pieces = bits.portable(8, 4096)
    exact, sums_ = pieces.double().sum(0), {}
    for ranks in (1, 2, 4, 8):
        got = answer([piece.clone() for piece in pieces.chunk(ranks)])
        assert got.shape == exact.shape, f"{ranks} processes left the shape {tuple(got.shape)}, not (4096,)."
        assert (got - exact).abs().max() < 1e-5, f"for {ranks} processes this is not the sum of the eight pieces."
        sums_[ranks] = got
    for ranks, got in sums_.items():
        assert bits.same_bits(got, sums_[1]), (
            f"{ranks} processes and 1 give other bits: does each process add its own pieces first?")
