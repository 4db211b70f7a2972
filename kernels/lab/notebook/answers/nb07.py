"""Checkers of notebook 07, Verify and roll back."""
from __future__ import annotations

from ...window.chart import published
from ..exercises import exercise
from ..written import number


@exercise("07.1", wants="a number of tokens")
def _(answer):
    answer = number(answer, "a number of tokens")
    assert abs(answer / 600 - 1) > 0.02, "twice of it: a weight takes two operations a token, a multiply and an add."
    assert abs(answer / 150 - 1) > 0.02, "half of it: a bfloat16 weight has two bytes."
    assert abs(answer / 300 - 1) < 0.02, "bytes / (bytes a second) = operations / (operations a second)."


@exercise("07.2", wants="a number of GB")
def _(answer):
    answer, exact = number(answer, "a number of GB"), 8 * 4000 * 32 * 2 * 8 * 128 * 2 / 1e9
    assert abs(answer / exact - 4) > 0.1, "four times too much: keys and values have 8 heads, not 32."
    assert abs(answer / exact - 0.5) > 0.01, "half of it: there is a key and a value, and each number has two bytes."
    assert abs(answer / exact - 0.125) > 0.01, "that is one request; the group has eight."
    assert abs(answer / exact - 1) < 0.03, "requests x tokens x layers x 2 x kv_heads x head_dim x bytes, in GB."


@exercise("07.3", "tokens_kept(p, W)", wants="a number")
def _(tokens_kept):
    assert abs(number(tokens_kept(1.0, 64)) - 1) < 1e-6, (
        "if every draft differs, a pass still yields one token: the verifier's own.")
    for p, window in ((0.5, 2), (0.01, 64), (0.003, 512)):
        exact = _kept(p, window)
        assert abs(number(tokens_kept(p, window)) / exact - 1) < 1e-6, (
            f"p={p}, W={window} gives {exact:.4g}. Token i is kept, as it is or replaced, if all before it agreed.")


def _kept(p: float, window: int) -> float:
    return sum((1 - p) ** i for i in range(window))


@exercise("07.4", wants="a probability", kind="open")
def _(answer):
    p = number(answer, "a probability")
    assert 0 < p < 1, f"a probability between 0 and 1 is asked for, and this is {p:g}."
    cost = {int(row.tokens): row.logged_total_ms / _kept(p, int(row.tokens)) for row in published().itertuples()}
    best = min(cost, key=cost.__getitem__)
    assert best == 256, (f"at p = {p:g} the window of {best} costs least, {cost[best]:.3g} ms for a kept token; 256 "
                         f"costs {cost[256]:.3g}. {'More' if best > 256 else 'Fewer'} flips would favour it.")
