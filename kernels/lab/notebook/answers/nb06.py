"""Checkers of notebook 06, Serve a model."""
from __future__ import annotations

import torch

from ....model.sampling import Sampler
from ..exercises import exercise


@exercise("06.1")
def _(answer):
    steps = {"rms_norm", "linear", "rotary", "attention", "swiglu"}
    assert set(answer) <= steps, f"the steps are called {', '.join(sorted(steps))}."
    assert "rotary" not in answer, "a rotation names two numbers of one row and one position: there is no sum to cut."
    assert "swiglu" not in answer, "swiglu works element by element: there is no sum to cut."
    assert set(answer) == {"rms_norm", "linear", "attention"}, "which steps add up many numbers for one result?"


@exercise("06.2")
def _(answer):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-1.0, -2.0, -1.0, -1.0], [5.0, 4.0, 4.0, 5.0]],
                          dtype=torch.float32, device="cpu")
    got = [int(answer(row)) for row in logits]
    right = Sampler()(logits).tolist()
    assert got[1:] != [2, 3] and got[1:] != [3, 3], "of equal logits the first is taken, not the last."
    assert got == right, f"for rows {logits.tolist()} greedy chooses {right}, not {got}."


@exercise("06.3")
def _(answer):
    for chunks in ([8], [3, 5], [1] * 8, [2, 2, 2, 1, 1]):
        got = list(answer(chunks))
        right = [(sum(chunks[:i]), sum(chunks[: i + 1])) for i in range(len(chunks))]
        assert len(got) == len(chunks), f"one pair a chunk: {len(chunks)} for {chunks}, not {len(got)}."
        assert got == right, (f"for {chunks}, {right}: a chunk begins where the one before it ended, "
                              f"and sees all keys up to its own end; got {got}.")
