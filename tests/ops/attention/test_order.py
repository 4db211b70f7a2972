"""Attention's specification: against a pencil and float64, and one sequence computed in many ways."""
import math

import numpy as np
import pytest
import torch
from common import INF, NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from made import batch, one

from kernels.arithmetic.elementary import LN2, fma, log
from kernels.arithmetic.ex2 import ex2
from kernels.arithmetic.tensor_core import AMPERE, chain
from kernels.bits import digest, same_bits
from kernels.ops.attention import Sequences, attention_chunk, attention_prefill
from kernels.ops.attention.order import LEAF, specified

SMALL = 256  # keys a leaf: two blocks
EDGES = sorted({edge + d for edge in (128, 256, 512) for d in (-1, 0, 1)} | {0, 5})


def number(x):
    return torch.tensor([x], dtype=torch.float32)


def pencil_block(s, m, sums, acc, v, scale):
    """One block by the six steps of order.py: s and v hold its 128 keys."""
    t = max(m, float(np.float32(max(s)) * scale))
    safe = 0.0 if t == -INF else t
    p = ex2(fma(torch.tensor(s), float(scale), number(-safe)))
    f = float(ex2(number(np.float32(m) - np.float32(safe))))
    for c in range(4):
        parts = [[p[8 * n + 2 * c + h].numpy() for n in range(16)] for h in (0, 1)]
        while len(parts[0]) > 1:
            half = len(parts[0]) // 2
            parts = [[side[n] + side[n + half] for n in range(half)] for side in parts]
        sums[c] = float(fma(number(sums[c]), f, number(parts[0][0] + parts[1][0])))
    return t, sums, chain(p[None].to(v.dtype), v.t(), start=acc * f)


def pencil(q, k, v, i, window=0, leaf=LEAF):
    """One query (D,) at position i, with every block of every leaf that it sees: ((D,), lse)."""
    scale = np.float32(1.4426950408889634 / math.sqrt(len(q)))
    top, total, values = -INF, 0.0, torch.zeros(1, len(q))
    oldest = max(0, i - window + 1) if window else 0
    for leaf_number in range(i // leaf, oldest // leaf - 1, -1):
        m, sums, acc = -INF, [0.0] * 4, torch.zeros(1, len(q))
        for begin in range(leaf_number * leaf + leaf - 128, leaf_number * leaf - 1, -128):
            here = [j for j in range(begin, begin + 128) if oldest <= j <= i]
            s, block = [-INF] * 128, torch.zeros(128, len(q), dtype=q.dtype)
            for j, score in zip(here, chain(q[None], k[here]).tolist()[0] if here else (), strict=True):
                s[j - begin], block[j - begin] = score, v[j]
            m, sums, acc = pencil_block(s, m, sums, acc, block, scale)
        part = (np.float32(sums[0]) + np.float32(sums[1])) + (np.float32(sums[2]) + np.float32(sums[3]))
        new = max(top, m)
        safe = 0.0 if new == -INF else new
        a, c = (float(ex2(number(np.float32(x) - np.float32(safe)))) for x in (top, m))
        total = float(fma(number(total), a, number(part * np.float32(c))))
        values, top = fma(values, a, acc * c), new
    y = values[0] * float(np.float32(1) / np.float32(total))
    return y.to(q.dtype), fma(number(top), LN2, log(number(total)))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "window", "leaf", "positions"), [
    (40, 0, 256, (0, 127, 128, 300, 511, 513)), (64, 200, 256, (0, 199, 256, 460)), (16, 1, 256, (256,)),
    (8, 0, LEAF, (1023, 1100)), (8, 0, 128, tuple(range(400, 440)))])  # an ulp of a sum shows in few results
def test_the_specification_is_the_pencil(width, window, leaf, positions, dtype):
    whole = one(max(positions) + 1, 1, 1, width, dtype, seed=width)
    for i in positions:
        y, lse = specified(*batch([whole], [(i, i + 1)]), window, True, leaf=leaf)
        q, k, v = (x[:, 0] for x in whole)
        wanted = pencil(q[i], k, v, i, window, leaf)
        assert same_bits((y[0, 0], lse[0, 0]), wanted), i


def exact(q, k, v, keys, window):
    """Attention of the last queries of `keys` keys in float64: results, lse, and the root of all (weight v)**2."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double().transpose(0, 1), *(x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    position = torch.arange(keys - q.shape[1], keys)[:, None]
    hidden = (torch.arange(keys) > position) | ((torch.arange(keys) <= position - window) if window else False)
    s = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).masked_fill(hidden, -INF)
    w = s.softmax(-1)
    return (w @ v).transpose(0, 1), s.logsumexp(-1).transpose(0, 1), (w**2 @ v**2).sqrt().transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), [(4, 2, 64, 0), (3, 1, 80, 100), (2, 2, 128, 0),
                                                                    (1, 1, 2, 0)])
def test_accuracy_against_float64(heads, kv_heads, width, window, dtype):
    q, k, v = one(1200, heads, kv_heads, width, dtype)
    given_ = batch([(q, k, v)], [(1150, 1200)])
    y, lse = specified(*given_, window, True)
    wanted, logs, size = exact(q[1150:], k, v, 1200, window)
    unit = torch.finfo(dtype).eps / 2  # of a rounding: one of each weight, one of the result
    allowed = unit * wanted.abs() + 5 * unit * size + 2.0**-24

    def near(found):
        return (found.double() - wanted).abs().le(allowed).all()
    assert near(y) and not near((wanted * (1 + 16 * unit)).to(dtype))
    assert (lse.double() - logs).abs().le(2.0**-20 * (1 + logs.abs())).all()


WAYS = {  # name -> spans of each call, of queries of one sequence
    "whole": [(0, 560)],
    "chunks of 100": [(a, min(a + 100, 560)) for a in range(0, 560, 100)],
    "chunks of 128": [(a, min(a + 128, 560)) for a in range(0, 560, 128)],
    "chunks of 333": [(0, 333), (333, 560)],
    "decode": [(0, 254), *((i, i + 1) for i in range(254, 258)), (258, 540), *((i, i + 1) for i in range(540, 560))],
}


def in_calls(run, whole, spans, **kind):
    """One sequence, a call a span."""
    return torch.cat([run(*batch([whole], [span], **kind)) for span in spans])


def in_one_call(run, whole, spans, **kind):
    return run(*batch([whole] * len(spans), spans, **kind))


@pytest.fixture(scope="module")
def digested():
    whole = one(560)
    return whole, digest(specified(*batch([whole], [(0, 560)]), leaf=SMALL))


def run_small(*arguments):
    return specified(*arguments, leaf=SMALL)


@pytest.mark.parametrize("name", [*WAYS, "paged", "in reverse", "with strangers", "after a prefix that another left"])
def test_every_way_to_compute_a_sequence_gives_one_digest(name, digested):
    whole, wanted = digested
    if name in WAYS:
        found = in_calls(run_small, whole, WAYS[name])
    elif name == "paged":
        found = in_one_call(run_small, whole, WAYS["decode"], page_size=16)
    elif name == "in reverse":
        parts = [run_small(*batch([whole], [span])) for span in reversed(WAYS["chunks of 100"])]
        found = torch.cat(parts[::-1])
    elif name == "with strangers":
        others = [one(n, seed=n) for n in (7, 600, 300)]
        q, k, v, s = batch([others[0], whole, *others[1:]], [(0, 7), (60, 560), (590, 600), (299, 300)], capacity=700)
        found = torch.cat([run_small(*batch([whole], [(0, 60)])), run_small(q, k, v, s)[7:507]])
    else:  # pages of the first 400 keys, filled by another sequence, are shared
        q, k, v, s = batch([whole], [(0, 560)], page_size=16)
        page = s.pages[0]
        shared = Sequences([400, 160], [400, 560], q.device, [page[:25], page], 16)
        found = run_small(torch.cat([q[:400], q[400:]]), k, v, shared)
    assert digest(found) == wanted


def test_another_leaf_is_another_order():
    """Inverse test: the digest would notice."""
    whole = one(560)
    given_ = batch([whole], [(500, 560)])
    before = specified(*given_, lse=True)
    assert not same_bits(before, specified(*given_, lse=True, leaf=SMALL))
    assert not same_bits(before, specified(*given_, lse=True, adder=AMPERE))


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_a_row_in_any_batch_is_the_row_alone(data):
    """Lengths, groups, windows, widths and tables of pages as they come; NaN and Inf wherever no key lies."""
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    width, window = data.draw(st.sampled_from([8, 48])), data.draw(st.sampled_from([0, 1, 130, 300]))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    spans, whole = [], []
    for i in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.one_of(st.integers(1, 600), st.sampled_from(EDGES[1:])))
        spans.append((end - min(end, data.draw(st.sampled_from([0, 1, 4, 30]))), end))
        whole.append(one(end, heads, kv_heads, width, dtype, seed=i))
    page = data.draw(st.sampled_from([None, 1, 16, 100, 256]))
    found = run_small(*batch(whole, spans, page, seed=len(whole)), window, True)
    at = 0
    for w, (begin, end) in zip(whole, spans, strict=True):
        rows = [i for i in (begin, (begin + end) // 2, end - 1) if begin <= i < end]
        for i in rows:
            alone = run_small(*batch([w], [(i, i + 1)]), window, True)
            assert same_bits([x[at + i - begin][None] for x in found], list(alone)), (i, end)
        at += end - begin


@pytest.mark.parametrize("position", EDGES)
def test_a_position_at_an_edge_is_that_of_a_prefill(position):
    whole = one(EDGES[-1] + 1, width=8)
    many = specified(*batch([whole], [(0, EDGES[-1] + 1)]), leaf=SMALL)
    assert same_bits(many[position : position + 1], run_small(*batch([whole], [(position, position + 1)])))


def test_the_window_hides_what_it_should():
    """Keys that a window hides may change, those in it may not."""
    q, k, v = one(700, width=16)
    for window in (2, 100, 128, 300):
        before = run_small(*batch([(q, k, v)], [(690, 700)]), window, True)
        other = k.clone()
        other[: 691 - window] = one(691 - window, width=16, seed=99)[1]
        assert same_bits(run_small(*batch([(q, other, v)], [(690, 700)]), window, True), before)
        other[691 - window] *= -4
        assert not same_bits(run_small(*batch([(q, other, v)], [(690, 700)]), window, True)[1][:1], before[1][:1])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_score_that_is_no_number_makes_its_row_nan_and_no_other(bad):
    q, k, v = one(300, 1, 1, 8)
    k, q = k.clone(), q.abs() + 1
    k[140, 0, 0] = bad
    y, lse = run_small(*batch([(q, k, v)], [(0, 300)]), 0, True)
    assert y[140:].isnan().all() and lse[140:].isnan().all()
    assert y[:140].isfinite().all() and lse[:140].isfinite().all()


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = one(300, 1, 1, 8)
    q, k = q.abs() + 1, k.clone()
    k[:200] = -INF  # all scores of the first 200 rows are -inf
    y, lse = run_small(*batch([(q, k, v)], [(0, 300)]), 0, True)
    assert not y[:200].any() and (lse[:200] == -INF).all()
    assert y[200:].isfinite().all() and y[200:].any(-1).all() and lse[200:].isfinite().all()


def test_empty_calls_have_empty_results():
    _, k, v = one(5, 4, 2, 8)
    q, cache = k.new_zeros(0, 4, 8), k.new_zeros(0, 5, 2, 8)
    y, lse = specified(q, cache, cache, Sequences([], []), 0, True)
    assert y.shape == (0, 4, 8) and lse.shape == (0, 4)
    assert specified(q, k[None], v[None], Sequences([0], [5])).shape == (0, 4, 8)
    assert specified(q, k[None], v[None], Sequences([0], [0])).shape == (0, 4, 8)


def test_rows_of_the_ops_do_not_depend_on_their_number():
    for op, shape in ((attention_prefill, "H=2,KV=1,D=8"), (attention_chunk, "H=2,KV=1,D=8,context=140")):
        many, few = op.inputs(150, shape), op.inputs(10, shape)
        assert same_bits(op.python(*many)[:10], op.python(*few))
