"""Checkers of notebook 05, Attend to tokens."""
from __future__ import annotations

import torch

from .... import bits
from ....arithmetic.elementary import LN2, fma, log
from ....arithmetic.ex2 import ex2, explain
from ....ops.attention import Sequences, attention_decode
from ....ops.attention.order import LEAF
from ...attention.chart import blocks
from ...attention.measure import leaf_by_hand
from ..exercises import exercise
from ..written import number


@exercise("05.1", "join_leaves(newer, older)", wants="three tensors (M, L, A)")
def _(join_leaves):
    q, k, v, _ = attention_decode.inputs(1, f"H=64,KV=1,D=16,context={LEAF + 76}", torch.bfloat16)
    newer, older = (leaf_by_hand(q[0], k[0, part, 0], v[0, part, 0]) for part in (slice(LEAF, None), slice(LEAF)))
    got = join_leaves(tuple(t.clone() for t in newer), tuple(t.clone() for t in older))
    assert isinstance(got, tuple) and [tuple(t.shape) for t in got] == [(64,), (64,), (64, 16)], (
        "three tensors are asked for, M and L for each row and A for each row and column.")
    y, lse = attention_decode.python(q, k, v, Sequences([1], [LEAF + 76]), lse=True)
    top, total, values = got
    assert torch.equal(top, torch.maximum(newer[0], older[0])), "M is the larger of both leaves' largest numbers."
    mine, (a, c) = fma(top, LN2, log(total)), (ex2(part[0] - top) for part in (newer, older))
    assert torch.allclose(mine, lse[0], rtol=1e-5), "L is not the sum of both leaves' weights: rescale each to M first."
    assert bits.same_bits(total, fma(newer[1], a, older[1] * c)) and bits.same_bits(mine, lse[0]), (
        "L has other bits: L = fma(L, a, l * c) rescales the newer leaf inside the fused multiply-add.")
    assert bits.same_bits(values, fma(newer[2], a[:, None], older[2] * c[:, None])) and bits.same_bits(
        (values * (1.0 / total)[:, None]).bfloat16(), y[0]), (
        "A has other bits than the order's: it is joined as L is, column by column.")


@exercise("05.2", wants='two words of letters, such as ("a", "abc")')
def _(answer):
    batch, length = map(set, answer)
    assert "a" not in batch | length, "a's edges lie at absolute positions: neither batch nor length is in them."
    assert batch == {"c"}, "when the batch grows, only a number of parts that the batch decides moves its edges."
    assert "b" in length, "b's parts are a quarter of the length each; where are their edges in a longer sequence?"
    assert length == {"b", "c"}, "c's parts have equal lengths too; where are their edges in a longer sequence?"


@exercise("05.3", wants="a whole number")
def _(answer):
    answer, right = number(answer, "a whole number"), len(blocks(2600, 500))
    assert answer != 4, "500 keys fill 3.9 blocks, but the edges of blocks stay where they are."
    assert answer != 21, "21 is without a window; which is the oldest key that it sees?"
    assert answer == right, "count the multiples of 128 from the oldest key it sees to the newest: 2101 to 2600."


@exercise("05.4", wants="a number between -1 and 0", kind="open")
def _(answer):
    answer = number(answer, "a number between -1 and 0")
    assert -1 < answer < 0, "a number between -1 and 0 is asked for."
    table = explain(answer)
    assert table["ulps"] > 0, (
        f"the unit gives {table['result']!r} there, and the nearest float32 number is {table['nearest']!r}: "
        f"{'none apart' if table['ulps'] == 0 else 'it errs downward'}.")
