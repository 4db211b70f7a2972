"""Every query of every head is in exactly one job of Hopper's attention kernel, whatever the lengths."""
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops.attention import Sequences
from kernels.ops.attention.hopper_jobs import FIXED, TILE, deal, jobs, short_between


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), max_size=6), st.integers(1, 5), st.integers(1, 40))
def test_jobs_cover_each_query_once(lengths, heads, programs):
    queries = np.array([q for q, _ in lengths], dtype=np.int64)
    keys = np.array([q + more for q, more in lengths], dtype=np.int64)
    place = np.arange(len(lengths))[::-1].copy()
    sequences = Sequences(queries, keys, slots=place)
    table = jobs(sequences, heads, programs)
    assert table.shape[1:] == (programs, 4) and table.dtype == np.int32
    seen = np.zeros((int(queries.sum()), heads), dtype=np.int64)
    starts = np.cumsum(queries) - queries
    for row, where, tile, packed in table.reshape(-1, 4):
        if tile < 0:
            continue
        head, first, last = packed & 0xFFFF, packed >> 16 & 0x7F, packed >> 24
        seen[row + first : row + last + 1, head] += 1
        i = int(np.flatnonzero(place == where)[0])
        position = keys[i] - queries[i] + (row + first - starts[i])
        assert position == tile * TILE + first  # tiles begin at multiples of 128 positions
    assert (seen == 1).all()


def test_a_program_has_its_jobs_without_gaps_and_no_more_than_its_share():
    count = np.array([8192])
    table = jobs(Sequences(count, count), 32, 132)
    there = table[:, :, 2] >= 0
    assert (np.diff(there.astype(int), axis=0) <= 0).all() and there.sum() == 64 * 32
    cost = np.where(there, table[:, :, 2] + 1 + FIXED, 0).sum(0)
    assert cost.max() < 1.01 * cost.mean()
    assert table[0, :, 2].min() >= 59  # the longest first


def test_only_chosen_sequences_have_jobs():
    count = np.array([300, 200, 100])
    table = jobs(Sequences(count, count), 2, 7, np.array([True, False, True]))
    assert set(table[table[:, :, 2] >= 0][:, 1].tolist()) == {0, 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 12))
def test_jobs_are_dealt_once_each_and_short_ones_fill_gaps(costs, programs):
    costs = np.sort(np.array(costs))[::-1]
    lines = np.stack([np.arange(1, len(costs) + 1), costs], axis=1)
    table = deal(lines, costs, programs, np.array([0, 0]))
    there = table[:, :, 0] > 0
    assert sorted(table[there][:, 0].tolist()) == list(range(1, len(costs) + 1))
    assert (np.diff(there.astype(int), axis=0) <= 0).all()  # without gaps
    waves = int(there.sum(0).max())
    assert len(table) - waves < max(1, 1 << waves.bit_length() >> 3)  # and without more empty waves than are added
    load = np.where(there, table[:, :, 1] + FIXED, 0).sum(0)
    assert load.max() <= load.mean() + costs.max() + FIXED


def test_short_jobs_go_to_programs_that_are_free():
    costs = np.array([8] * 128 + [1] * 16)
    table = deal(costs[:, None], costs, 132, np.array([0]))
    assert (table[:, :, 0].sum(0)[table[0, :, 0] == 8] == 8).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 12))
def test_short_jobs_move_within_their_program(costs, programs):
    costs = np.sort(np.array(costs))[::-1]
    table = deal(np.stack([np.arange(1, len(costs) + 1), costs], axis=1), costs, programs, np.array([0, 0]))
    moved = short_between(table, table[:, :, 1])
    assert (np.sort(moved, axis=0) == np.sort(table, axis=0)).all()  # both fall together
    assert (np.diff((moved[:, :, 0] > 0).astype(int), axis=0) <= 0).all()  # without gaps
    for before, behind in zip(table.swapaxes(0, 1), moved.swapaxes(0, 1), strict=True):
        long = costs.max() / 4
        assert (before[before[:, 1] > long] == behind[behind[:, 1] > long]).all()  # long ones keep their order


def test_short_jobs_lie_evenly_between_long_ones():
    def order(*costs):
        table = np.array(costs)[:, None, None]
        return short_between(table, table[:, :, 0])[:, 0, 0].tolist()
    assert order(8, 8, 1, 1, 0) == [1, 8, 1, 8, 0]
    assert order(8, 8, 8, 8, 1, 0) == [8, 8, 1, 8, 8, 0]
    assert order(8, 7, 3, 0) == [8, 7, 3, 0] and order(1, 1) == [1, 1]
    assert short_between(np.zeros((0, 3, 2)), np.zeros((0, 3))).shape == (0, 3, 2)
