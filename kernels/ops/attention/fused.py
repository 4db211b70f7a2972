"""Kinds blocks and spread in one launch: programs that count, in the place of launches that follow each other.

blocks  first the programs that make scores, then those of values. They load values, and wait for their own leaf's
        scores alone.
both    where a tile has several leaves, the last of those of a share of v's columns joins them, newest first: a
        column does not know of the others, so nobody waits.

A launch less is microseconds less, which few rows on few keys notice. The order is blocks.py's and spread.py's.
"""
from __future__ import annotations

import torch

from ...arithmetic.elementary import for_kernels
from ...launch import Step
from ...runtime import device_function, tl, triton
from .blocks import chained, scores_kernel
from .form import Form
from .join import partial_rows
from .leaf import finish, join
from .order import BLOCK
from .schedule import Schedule
from .signals import is_last, signal
from .spread import spread_leaf
from .work import Work

_NONE = for_kernels(float("-inf"))


def steps(schedule: Schedule, form: Form, work: Work) -> list[Step]:
    """The launch. Its counters are `counters` many, and zero before and after it."""
    return [_blocks(schedule, form, work) if schedule.kind == "blocks" else _spread(schedule, form, work)]


def counters(schedule: Schedule, form: Form, work: Work) -> int:
    """How many counters the launch needs: one for each leaf's scores, and one for each tile's share of columns."""
    scores = len(work.leaves) * form.kv_heads if schedule.kind == "blocks" else 0
    return scores + work.slots * form.kv_heads * _parts(schedule, form)


def _parts(schedule, form) -> int:
    return min(schedule.parts, form.columns // 16)


def _blocks(schedule, form, work) -> Step:
    piece, parts, height = BLOCK // schedule.stages, _parts(schedule, form), _height(schedule, work)
    direct, leaves = work.slots == work.real, len(work.leaves) * form.kv_heads
    count, scores_at = _left(form, work, height, parts, direct)
    scores = leaves * (work.leaf // piece)
    return Step(blocks_kernel, scores + leaves * parts, _pointers(form),
                {**form.scalars, "count": count, "scores_at": scores_at, "scores": scores, "leaves": leaves},
                {**form.constants, "ROWS": schedule.rows, "HEIGHT": height, "LEAF": work.leaf, "PIECE": piece,
                 "PARTS": parts, "DIRECT": direct, "LSE": form.lse}, {"num_warps": schedule.warps},
                {"work_ptr": "leaves_ptr"}, leaves=scores_at + partial_rows(form, work, height) * work.leaf)


def _spread(schedule, form, work) -> Step:
    parts, height = _parts(schedule, form), _height(schedule, work)
    direct = work.slots == work.real
    count, numbers = _left(form, work, height, parts, direct)
    return Step(spread_kernel, len(work.leaves) * form.kv_heads * parts, _pointers(form),
                {**form.scalars, "count": count},
                {**form.constants, "ROWS": schedule.rows, "HEIGHT": height, "LEAF": work.leaf, "PARTS": parts,
                 "STAGES": schedule.stages, "DIRECT": direct, "LSE": form.lse}, {"num_warps": schedule.warps},
                {"work_ptr": "leaves_ptr"}, leaves=numbers)


def _pointers(form) -> dict:
    return {**form.inputs, "part_ptr": torch.float32, "counter_ptr": torch.int32, **form.outputs}


def _height(schedule, work) -> int:
    """Rows of partial results a leaf of a tile: few rows lie close together."""
    return min(1 << max(work.most - 1, 0).bit_length(), schedule.rows)


def _left(form, work, height, parts, direct) -> tuple[int, int]:
    """(rows of partial results, how many numbers they are): each share of columns has its own m and l."""
    count = 0 if direct else partial_rows(form, work, height)
    return count, -(-count * (form.columns + 2 * parts) // 32) * 32


@triton.jit
def blocks_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, counter_ptr, o_ptr, lse_ptr, q_token, q_head,
                  k_batch, k_row, k_head, v_batch, v_row, v_head, table_width, window, scale, count, scores_at, scores,
                  leaves, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                  PAGE: tl.constexpr, WINDOW: tl.constexpr, ADDER: tl.constexpr, ROWS: tl.constexpr,
                  HEIGHT: tl.constexpr, LEAF: tl.constexpr, PIECE: tl.constexpr, PARTS: tl.constexpr,
                  DIRECT: tl.constexpr, LSE: tl.constexpr, PDL: tl.constexpr):
    """`scores` programs make scores as scores_kernel does; each of the others takes a leaf, as values_kernel does.

    counter_ptr: `leaves` counters, one for the scores of each leaf and kv head, then those of leave_and_join.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) < scores:
        scores_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, q_token, q_head, k_batch, k_row, k_head,
                      v_batch, v_row, v_head, table_width, window, scale, count, scores_at, HEADS, GROUP, D, WIDTH,
                      PAGE, WINDOW, ADDER, ROWS, HEIGHT, LEAF, PIECE, False)
        signal(counter_ptr + tl.program_id(0) // (LEAF // PIECE))
    else:
        number = tl.program_id(0) - scores
        m, total, acc, line_ptr, head, value, position, at, real, least, newest, row = chained(
            number, counter_ptr, q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, q_token, q_head, k_batch, k_row,
            k_head, v_batch, v_row, v_head, table_width, window, scale, scores_at, HEADS, GROUP, D, WIDTH, PAGE, WINDOW,
            ADDER, ROWS, HEIGHT, LEAF, PARTS, LEAF // PIECE, False)
        if DIRECT:
            finish(m, total, acc, o_ptr, lse_ptr, at, real, value, D, LSE)
        else:
            leave_and_join(m, total, acc, part_ptr, counter_ptr + leaves, count, line_ptr, head, number % PARTS,
                           position, least, newest, window, at, real, o_ptr, lse_ptr, HEADS // GROUP, HEIGHT, LEAF,
                           PARTS, WINDOW, D, LSE)


@triton.jit
def spread_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, counter_ptr, o_ptr, lse_ptr, q_token, q_head,
                  k_batch, k_row, k_head, v_batch, v_row, v_head, table_width, window, scale, count,
                  HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
                  WINDOW: tl.constexpr, ADDER: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr,
                  LEAF: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr,
                  LSE: tl.constexpr, PDL: tl.constexpr):
    """A leaf of a tile of rows of one kv head and a share of v's columns a program; the last one joins."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m, total, acc, line_ptr, head, value0, position, at, real, least, newest = spread_leaf(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, q_token, q_head, k_batch, k_row, k_head, v_batch,
        v_row, v_head, table_width, window, scale, HEADS, GROUP, D, WIDTH, PAGE, WINDOW, ADDER, ROWS, LEAF, PARTS,
        STAGES)
    if DIRECT:
        finish(m, total, acc, o_ptr, lse_ptr, at, real, value0 + tl.arange(0, WIDTH // PARTS), D, LSE)
    else:
        leave_and_join(m, total, acc, part_ptr, counter_ptr, count, line_ptr, head, tl.program_id(0) % PARTS, position,
                       least, newest, window, at, real, o_ptr, lse_ptr, HEADS // GROUP, HEIGHT, LEAF, PARTS, WINDOW, D,
                       LSE)


@device_function
def leave_and_join(m, total, acc, part_ptr, counter_ptr, count, line_ptr, head, part, position, least, newest, window,
                   at, real, o_ptr, lse_ptr, KV_HEADS: tl.constexpr, HEIGHT: tl.constexpr, LEAF: tl.constexpr,
                   PARTS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, LSE: tl.constexpr):
    """Leave a leaf's three; the last program of a tile's leaves joins them, newest first, and ends the rows.

    A share of columns has `count` rows of VALUES numbers acc, then as many m, then as many l, and a counter a tile:
    that of the tile's first slot.
    """
    VALUES: tl.constexpr = acc.shape[1]
    leaf = tl.load(line_ptr + 6)
    column = tl.arange(0, VALUES)
    share_ptr = part_ptr + tl.cast(part, tl.int64) * count * (VALUES + 2)
    if leaf >= 0:  # a line of no rows is no tile's
        slot = tl.load(line_ptr + 7)
        place = (slot.to(tl.int64) * KV_HEADS + head) * HEIGHT + tl.arange(0, acc.shape[0])
        m_ptr = share_ptr + tl.cast(count, tl.int64) * VALUES
        tl.store(share_ptr + place[:, None] * VALUES + column[None, :], acc, mask=real[:, None])
        tl.store(m_ptr + place, m, mask=real)
        tl.store(m_ptr + count + place, total, mask=real)
        newest_leaf = newest // LEAF
        many = newest_leaf + 1
        if WINDOW:
            many -= tl.maximum(least - window + 1, 0) // LEAF
        first = slot - (newest_leaf - leaf)
        if is_last(counter_ptr + (first * KV_HEADS + head) * PARTS + part, many):
            M, L, A = _joined(share_ptr, count, place - (slot - first).to(tl.int64) * (KV_HEADS * HEIGHT), many,
                              newest_leaf, position, window, real, VALUES, KV_HEADS * HEIGHT, LEAF, WINDOW)
            finish(M, L, A, o_ptr, lse_ptr, at, real, part * VALUES + column, D, LSE)


@device_function
def _joined(share_ptr, count, place, many, newest_leaf, position, window, real, VALUES: tl.constexpr,
            STEP: tl.constexpr, LEAF: tl.constexpr, WINDOW: tl.constexpr):
    """The three of each row's leaves, which are loaded eight at a time."""
    ROWS: tl.constexpr = position.shape[0]
    M = tl.full([ROWS], _NONE, tl.float32)
    L = tl.zeros([ROWS], tl.float32)
    A = tl.zeros([ROWS, VALUES], tl.float32)
    m_ptr = share_ptr + tl.cast(count, tl.int64) * VALUES
    column = tl.arange(0, VALUES)
    for begin in range(0, many, 8):
        switches = ()
        maxima = ()
        totals = ()
        values = ()
        for i in tl.static_range(8):
            leaf = newest_leaf - begin - i
            seen = real & (begin + i < many) & (leaf * LEAF <= position)
            if WINDOW:
                seen = seen & (leaf * LEAF + LEAF > position - window + 1)
            row = place + (begin + i) * STEP
            switches = switches + (seen,)
            maxima = maxima + (tl.load(m_ptr + row, mask=seen, other=_NONE, cache_modifier=".cg"),)
            totals = totals + (tl.load(m_ptr + count + row, mask=seen, other=0.0, cache_modifier=".cg"),)
            values = values + (tl.load(share_ptr + row[:, None] * VALUES + column[None, :], mask=seen[:, None],
                                       other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(8):
            top, total, acc = join(M, L, A, maxima[i], totals[i], values[i])
            M = tl.where(switches[i], top, M)  # what is not there may not even turn -0 into +0
            L = tl.where(switches[i], total, L)
            A = tl.where(switches[i][:, None], acc, A)
    return M, L, A
