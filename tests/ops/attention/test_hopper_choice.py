"""Which sequences of a call walk on Hopper: the ways tried are compared at once, each by its own sequences."""
from types import SimpleNamespace

import numpy as np
import pytest

from kernels.ops.attention.hopper_choice import ROW_US, SECOND_US, TRIED, _quickest, _spread_us, _walk_us

FORM, SMALL = (SimpleNamespace(group=4, kv_heads=n, heads=4 * n, page=0) for n in (8, 1))
QUERIES = np.array([1, 1, 17, 64, 130, 700, 2])
KEYS = np.array([1, 9000, 17, 640, 1300, 700, 300])
LONG = np.array(TRIED)[:, None] <= QUERIES
CHOSEN = np.concatenate([LONG, ~LONG, np.eye(len(QUERIES), dtype=bool)])


@pytest.mark.parametrize("form", [FORM, SMALL], ids=["8 heads of k", "one"])
@pytest.mark.parametrize("time", [_walk_us, lambda *given: _spread_us(*given, 64),
                                  lambda *given: _spread_us(*given, 128)], ids=["walk", "spread 64", "spread 128"])
def test_a_row_of_choices_takes_the_time_of_its_sequences_alone(time, form):
    every = np.ones((1, len(QUERIES)), dtype=bool)
    alone = [time(QUERIES[row], KEYS[row], form, every[:, row])[0] for row in CHOSEN]
    np.testing.assert_allclose(time(QUERIES, KEYS, form, CHOSEN), alone, rtol=1e-12)
    assert 0.0 in alone  # of no sequence


def test_what_one_sequence_takes():
    """300 queries on 1100 keys: tiles 6 to 8 of 128 positions, with 7, 8 and 9 blocks each, of 32 heads."""
    one = np.ones((1, 1), dtype=bool)
    queries, keys = np.array([300]), np.array([1100])
    alone = 9 * 1.5 + 3.5  # the last tile, which is longer than a program's share of all
    assert alone > 32 * (24 * 1.5 + 3 * 3.5) / 132
    assert _walk_us(queries, keys, FORM, one)[0] == pytest.approx(SECOND_US + alone)
    tiles = 10 * 8  # 1200 rows of a head of k, 128 a tile
    leaves = -(-1100 // 1024)
    assert _spread_us(queries, keys, FORM, one, 128)[0] == pytest.approx(
        2 * SECOND_US + max(tiles * (9 * 1.5 + leaves * 3.5) / 132, 8 * 1.5 + 3.5) + 300 * 32 * leaves * ROW_US)


def test_the_quickest_way_is_taken():
    assert _quickest(np.array([4096]), np.array([4096]), FORM)[0] <= 512  # a long prompt walks
    assert _quickest(np.array([1] * 8), np.array([9000] * 8), FORM) == (16, 64)  # one query does not: any limit will do
