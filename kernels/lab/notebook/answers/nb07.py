"""Checkers of notebook 07, Verify and roll back."""
from __future__ import annotations

from ..exercises import exercise


@exercise("07.1")
def _(answer):
    assert abs(answer / 600 - 1) > 0.02, "twice of it: a weight takes two operations a token, a multiply and an add."
    assert abs(answer / 150 - 1) > 0.02, "half of it: a bfloat16 weight has two bytes."
    assert abs(answer / 300 - 1) < 0.02, "bytes / (bytes a second) = operations / (operations a second)."


@exercise("07.2")
def _(answer):
    exact = 8 * 4000 * 32 * 2 * 8 * 128 * 2 / 1e9
    assert abs(answer / exact - 4) > 0.1, "four times too much: keys and values have 8 heads, not 32."
    assert abs(answer / exact - 0.5) > 0.01, "half of it: there is a key and a value, and each number has two bytes."
    assert abs(answer / exact - 0.125) > 0.01, "that is one request; the group has eight."
    assert abs(answer / exact - 1) < 0.03, "requests x tokens x layers x 2 x kv_heads x head_dim x bytes, in GB."


@exercise("07.3")
def _(answer):
    assert abs(answer(1.0, 64) - 1) < 1e-6, "if every draft differs, a pass still yields one token: the verifier's own."
    for p, window in ((0.5, 2), (0.01, 64), (0.003, 512)):
        exact = sum((1 - p) ** i for i in range(window))
        assert abs(answer(p, window) / exact - 1) < 1e-6, (
            f"p={p}, W={window} gives {exact:.4g}. Token i is kept, as it is or replaced, if all before it agreed.")
