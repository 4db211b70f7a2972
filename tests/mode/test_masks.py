"""What a mask says of sequences that begin behind their first keys and of queries that see nothing."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from playing import K, Q
from playing import Seen as Ops

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import attention as rules
from kernels.mode import batch_invariant, kept_attention, masks
from kernels.mode.seen import Seen, neighbours, without_mask

DEVICE = runtime.device()
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
STARTS, KEYS = (2, 0, 5), 6


def _numbers(*sizes: int, seed: int = 0) -> torch.Tensor:
    return portable(torch.Size(sizes[:-1]).numel(), sizes[-1], torch.bfloat16, DEVICE, seed).view(sizes)


def _padded(starts=STARTS, keys: int = KEYS, window: int = 0) -> torch.Tensor:
    """A causal mask (B, 1, keys, keys) of sequences that are padded on the left, whose padding sees nothing."""
    seen = torch.ones(len(starts), 1, keys, keys, dtype=torch.bool, device=DEVICE).tril()
    for b, start in enumerate(starts):
        seen[b, ..., :start] = False
    return seen.triu(1 - window) if window else seen


def _seen(mask: torch.Tensor) -> Seen:
    batch, _, queries, keys = mask.shape
    return masks.of_mask(mask, batch, queries, keys, DEVICE)


def _hidden(mask: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=DEVICE).masked_fill(~mask, -math.inf).expand(
        -1, heads, -1, -1)


def test_runs_are_neighbours_of_which_each_follows_the_one_before():
    there = np.array([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=bool)
    follows = np.array([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]], dtype=bool)
    assert neighbours(there) == [(0, 0, 2), (0, 3, 3), (2, 0, 6)]
    assert neighbours(there, follows) == [(0, 0, 2), (0, 3, 2), (0, 5, 1), (2, 0, 1), (2, 1, 3), (2, 4, 2)]
    assert neighbours(there[:, :0]) == neighbours(there[:0]) == []


LAYOUTS = {"by head": lambda t: t, "by key": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
           "in a larger cache": lambda t: torch.cat([t, t], 2)[:, :, :KEYS]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_shifted_in_one_launch_behind_a_copy_at_most(layout):
    cache, seen = LAYOUTS[layout](_numbers(3, 2, KEYS, 8)), _seen(_padded())
    seen.shifted(cache)
    with Ops() as ops:
        found = seen.shifted(cache)
    for b, start in enumerate(STARTS):
        assert same_bits(found[b, :, : KEYS - start].contiguous(), cache[b, :, start:].contiguous())
        assert same_bits(found[b, :, KEYS - start :].contiguous(), cache[b, :, -1:].repeat(1, start, 1))
    views = {"transpose.int", "view.default", "select.int", "_unsafe_view.default"}
    launches = [op for op in ops.ops if str(op).removeprefix("aten.") not in views]
    assert str(launches[-1]) == "aten.index_select.default" and len(launches) == 1 + (layout == "in a larger cache")


def test_keys_that_begin_at_the_first_one_stay():
    cache = _numbers(2, 2, KEYS, 8)
    assert _seen(_padded((0, 0))).shifted(cache) is cache


def test_queries_that_see_nothing_are_found_and_are_in_sequences():
    seen = _seen(_padded())
    assert seen.empty.shape == (3, 1, KEYS, 1)
    assert seen.empty[:, 0, :, 0].tolist() == [[i < start for i in range(KEYS)] for start in STARTS]
    assert seen.sequences.tokens == 3 * KEYS and seen.sequences.place.tolist() == [0, 0, 1, 2, 2]
    assert seen.sequences.queries.tolist() == [2, 4, 6, 5, 1] and seen.sequences.keys.tolist() == [2, 4, 6, 5, 1]
    assert _seen(_padded((0, 0))).empty is None


@pytest.mark.parametrize(("keys", "pieces"), [(3, 3), (200, 64)])
def test_sequences_of_queries_that_see_nothing_are_short(keys, pieces):
    """Each has as many keys as queries, and there may be fewer keys."""
    seen = Seen(1, 150, keys, DEVICE, (0,), ((0, 100, 3, 3),))
    assert seen.sequences.tokens == 150 and seen.sequences.queries.max() == pieces
    assert seen.empty.sum().item() == 147


@pytest.mark.parametrize("on_gpu", [True, False])
def test_masks_in_turn_are_read_once_each(monkeypatch, on_gpu):
    """As of a model whose layers see all keys and a window by turns."""
    read, may_be, looked = masks._read, masks._Last.may_be, []
    monkeypatch.setattr(masks, "_LAST", [])
    monkeypatch.setattr(masks, "_read", lambda mask, *sizes: (looked.append("read"), read(mask, *sizes))[1])
    monkeypatch.setattr(masks._Last, "may_be", lambda *given: (looked.append("compared"), may_be(*given))[1])
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: on_gpu))
    of_all, of_window = _padded(), _padded(window=2)
    seen = [_seen(mask) for mask in (of_all, of_window) * 3]
    assert looked.count("read") == 2 and len(set(map(id, seen))) == 2 and [one.window for one in seen] == [0, 2] * 3
    assert looked.count("compared") == (1 if on_gpu else 1 + 2 * 4)
    looked.clear()
    again = of_all.clone()  # of the next forward
    assert _seen(again) is _seen(again) is seen[0] and looked.count("compared") == (2 if on_gpu else 4)
    again[1, :, :, 0] = False
    assert _seen(again).starts == (2, 1, 5) and looked.count("read") == 1
    for hidden in range(4):
        _seen(_padded((hidden, 0, 0)))
    assert len(masks._LAST) == masks.LAST


def test_a_mask_of_no_keys_shows_nothing():
    seen = masks.of_mask(torch.ones(2, 1, 3, 0, dtype=torch.bool, device=DEVICE), 2, 3, 0, DEVICE)
    assert seen.runs == () and seen.starts == (0, 0)


def _attended(q, k, v, mask):
    return EFFICIENT(q, k, v, _hidden(mask, q.shape[1]), True)[:2]


@pytest.mark.parametrize("window", [0, 2])
def test_a_padded_sequence_has_the_bits_of_itself_alone(window):
    q, k, v = (_numbers(3, 4, KEYS, 8, seed=seed) for seed in range(3))
    v[0, :, 0], k[2, :, 4] = math.nan, math.inf  # padding
    if not q.is_cuda:
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attended = lambda q, k, v, mask: call(q, k, v, attn_mask=_hidden(mask, q.shape[1]))  # noqa: E731
    else:
        attended = _attended
    with batch_invariant(strict=True):
        y, sums = attended(q, k, v, _padded(window=window))
        for b, start in enumerate(STARTS):
            one = [t[b : b + 1, :, start:].contiguous() for t in (q, k, v)]
            alone = attended(*one, _padded((0,), KEYS - start, window))
            assert same_bits([t[b : b + 1, :, start:].contiguous() for t in (y, sums)], [t.contiguous() for t in alone])
            assert not y[b, :, :start].any() and (sums[b, :, :start] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_is_in_no_result_and_in_no_gradient(dtype, side):
    given = [_numbers(2, 4, KEYS, 8, seed=seed).to(dtype) for seed in range(4)]
    padding, mask = (slice(0, 2), _padded((0, 2))) if side == "left" else (slice(4, KEYS), _padded((0, 0)))
    if side == "right":
        mask[1, ..., 4:] = False
        mask[1, :, 4:] = False

    def found(number):
        q, k, v, dy = (t.clone() for t in given)
        for t in (q, k, v, dy):
            t[1, :, padding] = number
        for t in (q, k, v):
            t.requires_grad_()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.detach(), torch.autograd.grad(y, (q, k, v), dy)
    with batch_invariant(strict=True):
        assert same_bits(found(1.0), found(math.nan)) and same_bits(found(1.0), found(math.inf))


@pytest.mark.parametrize("batch", [2, 0])
def test_without_keys_nothing_is_seen(batch):
    q, k = _numbers(2, 4, 3, 8)[:batch], _numbers(2, 4, 1, 8)[:batch, :, :0]
    y, sums = rules.attend(q, k, k, without_mask(batch, 3, 0, False, DEVICE), None, True)
    assert same_bits(y, torch.zeros_like(q)) and same_bits(sums, torch.full((batch, 4, 3), -math.inf, device=DEVICE))
    y, sums = rules.attend(q, k, k, without_mask(batch, 3, 0, False, DEVICE), None, False)
    assert y.shape == q.shape and sums is None


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("start", [1, 3])
def test_padded_attention_is_kept(attention, sums, start):
    """A second call launches what the first one left, with keys moved, and puts right what padding gets."""
    hidden, given = _hidden(_padded((start,), 5), 4), K.repeat_interleave(2, 1)
    with batch_invariant(strict=True):
        first, second = (EFFICIENT(Q, given, given, hidden, sums)[:2] for _ in range(2))
    (kind, *_), (again, q, k, v) = attention
    assert (kind, again) == ("looked at", "launched") and q == Q.data_ptr() and len({q, k, v, given.data_ptr()}) == 4
    (kept,) = kept_attention.ATTENTION.values()
    assert isinstance(kept, kept_attention._Padded)
    for y, of in (first, second):
        assert not y[:, :, :start].any() and y[:, :, start:].any()
        assert not sums or (of[:, :, :start] == -math.inf).all() and of[:, :, start:].isfinite().all()
        assert of.numel() == (20 if sums else 0)
