"""Sequences: what they refuse, what they hold, how they are taken apart; and the tables made of them."""
import numpy as np
import pytest
import torch
from common import HERE
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops.attention import Sequences
from kernels.ops.attention.inputs import Queries
from kernels.ops.attention.work import FIELDS, work_of


@pytest.mark.parametrize(("given_", "error", "message"), [
    (dict(queries=[1], keys=[1, 2]), ValueError, r"keys .*1 sequences, got 2"),
    (dict(queries=[2], keys=[1]), ValueError, r"keys .*sequence 0 has 1 keys and 2 queries"),
    (dict(queries=[-1], keys=[1]), ValueError, r"queries .*-1"),
    (dict(queries=[1], keys=[2**31]), ValueError, r"keys .*2147483648"),
    (dict(queries=[1], keys=[2**70]), ValueError, r"keys .*2\*\*31"),
    (dict(queries=[2**30] * 2, keys=[2**30] * 2), ValueError, r"queries .*2147483648"),
    (dict(queries=[1.0], keys=[1]), TypeError, r"queries .*1\.0"),
    (dict(queries=[True], keys=[1]), TypeError, r"queries .*True"),
    (dict(queries=1, keys=[1]), TypeError, r"queries .*None"),
    (dict(queries="1", keys=[1]), TypeError, r"queries"),
    (dict(queries=[1], keys=[None]), TypeError, r"keys .*None"),
    (dict(queries=[1], keys=[5], pages=[[0]], page_size=4), ValueError, r"pages\[0\] .*need 2, got 1"),
    (dict(queries=[1], keys=[5], pages=[[3, 3]], page_size=4), ValueError, r"pages\[0\] .*twice: \[3, 3\]"),
    (dict(queries=[1], keys=[5], pages=[[3, -1]], page_size=4), ValueError, r"pages\[0\] .*-1"),
    (dict(queries=[1], keys=[5], pages=[[3, 0.5]], page_size=4), TypeError, r"pages\[0\] .*0\.5"),
    (dict(queries=[1], keys=[5], pages=[[3, 4], [5]], page_size=4), ValueError, r"pages .*1 sequences, got 2"),
    (dict(queries=[1], keys=[5], pages=[[3, 4]]), TypeError, r"page_size .*None"),
    (dict(queries=[1], keys=[5], pages=[[3, 4]], page_size=0), ValueError, r"page_size .*0"),
    (dict(queries=[1], keys=[5], pages=[[3, 4]], page_size=4.0), TypeError, r"page_size .*4\.0"),
    (dict(queries=[1], keys=[5], page_size=4), ValueError, r"page_size .*no pages, got 4"),
    (dict(queries=[1], keys=[5], slots=[0, 1]), ValueError, r"slots .*1 sequences, got 2"),
    (dict(queries=[1], keys=[5], slots=[-1]), ValueError, r"slots .*-1"),
    (dict(queries=[1], keys=[5], slots=[0], pages=[[3, 4]], page_size=4), ValueError, r"slots and pages"),
])
def test_bad_sequences_are_named(given_, error, message):
    with pytest.raises(error, match=message):
        Sequences(**given_)


def test_what_sequences_hold():
    s = Sequences([1, 0, 5], [700, 0, 2000], HERE)
    assert (len(s), s.tokens, s.longest, s.highest) == (3, 6, 2000, 2) and s.starts.tolist() == [0, 1, 1]
    paged = Sequences(torch.tensor([1, 2]), np.array([3, 9]), HERE, [[7, 99], [5, 2, 8]], 4)
    assert paged.highest == 8 and paged.table.tolist() == [[7, 99, 0], [5, 2, 8]]  # page 99 holds no key
    empty = Sequences([], [], HERE)
    assert (len(empty), empty.tokens, empty.longest, empty.highest) == (0, 0, 0, -1)
    assert Sequences.of(s.handle) is s


def test_sequences_that_are_gone_are_named():
    handle = Sequences([1], [1]).handle
    with pytest.raises(ValueError, match="still held"):
        Sequences.of(handle)


@pytest.mark.parametrize("rows", [slice(1, None), [2, 0, 2], torch.tensor([1]), slice(0, 0), [],
                                  torch.tensor([True, False, True])])
def test_some_sequences_are_taken(rows):
    s = Sequences([1, 0, 5], [7, 3, 20], pages=[[0, 1], [2], [5, 4, 3]], page_size=8)
    which = np.arange(3)[rows.numpy() if isinstance(rows, torch.Tensor) else rows if rows != [] else slice(0, 0)]
    some = s[rows]
    assert some.queries.tolist() == s.queries[which].tolist() and some.keys.tolist() == s.keys[which].tolist()
    assert [p.tolist() for p in some.pages] == [s.pages[i].tolist() for i in which] and some.page_size == 8


@pytest.mark.parametrize("rows", [[3], [[0]], [0.5], torch.tensor([-4])])
def test_rows_that_are_not_there_are_named(rows):
    with pytest.raises(IndexError):
        Sequences([1, 0, 5], [7, 3, 20])[rows]


def test_slots_stay_when_sequences_are_taken_and_rows_do_not():
    assert Sequences([1, 1], [2, 2], slots=[4, 3])[[1]].place.tolist() == [3]
    assert Sequences([1, 1], [2, 2])[[1]].place.tolist() == [0]  # k is indexed as well


def test_neighbouring_queries_stay_one_sequence():
    s = Queries([8], [18])
    assert s.queries.tolist() == [8] and s.keys.tolist() == [18]
    some = s[torch.tensor([0, 1, 2, 5, 4, 5, 6])]
    assert some.queries.tolist() == [3, 1, 3] and some.keys.tolist() == [13, 16, 17] and not any(some.place)
    assert len(s[:0]) == 0


lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 700)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(lengths, st.sampled_from([1, 3, 4, 8]), st.sampled_from([16, 64]), st.sampled_from([0, 1, 100, 300]))
def test_tables_name_every_row_and_every_leaf_that_it_sees_once(drawn, group, rows, window):
    leaf = 128
    s = Sequences([n for n, _ in drawn], [n + before for n, before in drawn])
    spread, walk = (work_of(s, rows, group, window, kind, leaf) for kind in (True, False))
    each = zip(s.starts.tolist(), s.queries.tolist(), s.keys.tolist(), strict=True)
    wanted = {(t * group + r, number) for t, n, k in each for r in range(n * group) for at in [k - n + r // group]
              for number in range(max(0, at - window + 1) // leaf if window else 0, at // leaf + 1)}
    slots, found = set(), set()
    for token, row, total, first, length, place, number, slot in spread.leaves.tolist():
        if total:
            assert slot not in slots
            slots.add(slot)
            assert length == s.keys[place] and first == length - s.queries[place] and token == s.starts[place]
            found |= {(token * group + r, number) for r in range(row, min(row + rows, total))}
    assert wanted <= found and slots == set(range(spread.slots))
    tiles = [line for line in walk.tiles.tolist() if line[2]]
    assert found == {(t * group + r, number) for t, row, total, *_, newest, oldest in tiles
                     for r in range(row, min(row + rows, total)) for number in range(oldest, newest + 1)}
    depths = [newest - oldest for *_, newest, oldest in tiles]
    assert depths == sorted(depths, reverse=True)  # the longest first
    assert walk.most == max([min(rows, total - row) for _, row, total, *_ in tiles], default=0)
    assert walk.tiles.shape[1] == FIELDS and walk.tiles.dtype == torch.int32
