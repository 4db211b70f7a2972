"""Kind blocks: few rows on few keys, for which a leaf a program would leave most of a GPU idle.

The first launch makes scores, a block or a part of one a program. The second takes a leaf's scores through its blocks,
a share of v's columns a program: a column's chain does not know of the others. It loads values while the scores are
still being made. The third joins leaves, where a tile has more than one.
"""
from __future__ import annotations

import torch

from ...arithmetic.elementary import for_kernels
from ...launch import Step
from ...runtime import device_function, tl, triton
from .form import Form
from .join import join_step, partial_rows
from .leaf import add_block, add_lanes, finish, keys_at, rows_of, scores_of, spans
from .order import BLOCK
from .schedule import Schedule
from .walk import tile_of
from .work import FIELDS, Work

_FIELDS, _BLOCK, _NONE = map(for_kernels, (FIELDS, BLOCK, float("-inf")))


def steps(schedule: Schedule, form: Form, work: Work) -> list[Step]:
    """The two launches, or three."""
    direct = work.slots == work.real  # every tile has one leaf
    height = min(1 << max(work.most - 1, 0).bit_length(), schedule.rows)  # few rows lie close together
    count = 0 if direct else partial_rows(form, work, height)
    scores_at = -(-count * (form.columns + 2) // 32) * 32
    piece, tiles = BLOCK // schedule.stages, len(work.leaves) * form.kv_heads
    parts = min(schedule.parts, form.columns // 16)
    part, named = {"part_ptr": torch.float32}, {"work_ptr": "leaves_ptr"}
    constants = {**form.constants, "ROWS": schedule.rows, "HEIGHT": height, "LEAF": work.leaf}
    numbers = {**form.scalars, "count": count, "scores_at": scores_at}
    scores = Step(scores_kernel, tiles * (work.leaf // piece), {**form.inputs, **part}, numbers,
                  {**constants, "PIECE": piece}, {"num_warps": 4}, named,
                  leaves=scores_at + partial_rows(form, work, height) * work.leaf)
    values = Step(values_kernel, tiles * parts, {**form.inputs, **part, **form.outputs}, numbers,
                  {**constants, "PARTS": parts, "DIRECT": direct, "LSE": form.lse}, {"num_warps": schedule.warps},
                  named)
    return [scores, values] if direct else [scores, values, join_step(form, work, height)]


@device_function
def _seen(block, newest, oldest):
    """Whether some row of the tile sees keys of a block."""
    return (block <= newest // _BLOCK) & (block >= oldest // _BLOCK)


@triton.jit
def scores_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, q_token, q_head, k_batch, k_row, k_head, v_batch,
                  v_row, v_head, table_width, window, scale, count, scores_at, HEADS: tl.constexpr, GROUP: tl.constexpr,
                  D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, ADDER: tl.constexpr,
                  ROWS: tl.constexpr, HEIGHT: tl.constexpr, LEAF: tl.constexpr, PIECE: tl.constexpr,
                  PDL: tl.constexpr):
    """The scores of PIECE keys for a tile of rows of one kv head a program.

    They go to part_ptr + scores_at: LEAF numbers a row (slot, kv head, row of the tile), HEIGHT rows a tile.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    KV_HEADS: tl.constexpr = HEADS // GROUP
    PIECES: tl.constexpr = LEAF // PIECE
    first = tl.program_id(0) % PIECES * PIECE
    inner = first + tl.arange(0, PIECE)
    head = tl.program_id(0) // PIECES % KV_HEADS
    line_ptr = work_ptr + tl.program_id(0) // (PIECES * KV_HEADS) * _FIELDS
    q, position, at, real, least, newest = tile_of(line_ptr, q_ptr, q_token, q_head, head, HEADS, GROUP, D, WIDTH, ROWS)
    k_ptr, v_ptr, pages_ptr = spans(line_ptr, k_ptr, v_ptr, pages_ptr, head, k_batch, k_head, v_batch, v_head,
                                    table_width, PAGE)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(least - window + 1, 0)
    leaf = tl.load(line_ptr + 6)
    key = leaf * LEAF + inner
    seen = _seen((leaf * LEAF + first) // _BLOCK, newest, oldest) & (leaf >= 0)
    there = (key < tl.load(line_ptr + 4)) & seen
    place = keys_at(pages_ptr, key, there, k_batch, k_row, PAGE, True)
    k = rows_of(k_ptr, place, there, tl.arange(0, WIDTH), D, WIDTH == D, True, False)
    s = scores_of(q, k, key, position, window, WINDOW, True, ADDER)
    row = (tl.load(line_ptr + 7).to(tl.int64) * KV_HEADS + head) * HEIGHT + tl.arange(0, ROWS)
    tl.store(part_ptr + scores_at + row[:, None] * LEAF + inner[None, :], s, mask=real[:, None] & seen)


@triton.jit
def values_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, o_ptr, lse_ptr, q_token, q_head, k_batch, k_row,
                  k_head, v_batch, v_row, v_head, table_width, window, scale, count, scores_at, HEADS: tl.constexpr,
                  GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
                  ADDER: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, LEAF: tl.constexpr,
                  PARTS: tl.constexpr, DIRECT: tl.constexpr, LSE: tl.constexpr, PDL: tl.constexpr):
    """A leaf of a tile of rows of one kv head, a share of v's columns a program.

    Its m, l and acc are left in `part` as in spread.py, or are the result, if every tile has one leaf.
    """
    KV_HEADS: tl.constexpr = HEADS // GROUP
    VALUES: tl.constexpr = WIDTH // PARTS
    value = tl.program_id(0) % PARTS * VALUES + tl.arange(0, VALUES)
    head = tl.program_id(0) // PARTS % KV_HEADS
    line_ptr = work_ptr + tl.program_id(0) // (PARTS * KV_HEADS) * _FIELDS
    q, position, at, real, least, newest = tile_of(line_ptr, q_ptr, q_token, q_head, head, HEADS, GROUP, D, WIDTH, ROWS)
    k_ptr, v_ptr, pages_ptr = spans(line_ptr, k_ptr, v_ptr, pages_ptr, head, k_batch, k_head, v_batch, v_head,
                                    table_width, PAGE)
    length = tl.load(line_ptr + 4)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(least - window + 1, 0)
    leaf = tl.load(line_ptr + 6)
    row = (tl.load(line_ptr + 7).to(tl.int64) * KV_HEADS + head) * HEIGHT + tl.arange(0, ROWS)
    blocks = ()
    for i in tl.static_range(LEAF // _BLOCK):  # the newest first
        key = leaf * LEAF + LEAF - (i + 1) * _BLOCK + tl.arange(0, _BLOCK)
        there = (key < length) & _seen((leaf + 1) * (LEAF // _BLOCK) - i - 1, newest, oldest) & (leaf >= 0)
        place = keys_at(pages_ptr, key, there, v_batch, v_row, PAGE, True)
        blocks = blocks + (rows_of(v_ptr, place, there, value, D, WIDTH == D, True, True),)
    # scores_kernel lets this one begin only after its own wait: whatever wrote values has ended, and L2 holds them
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    scores = ()
    for i in tl.static_range(LEAF // _BLOCK):
        inner = LEAF - (i + 1) * _BLOCK + tl.arange(0, _BLOCK)
        seen = _seen((leaf + 1) * (LEAF // _BLOCK) - i - 1, newest, oldest) & (leaf >= 0)
        scores = scores + (tl.load(part_ptr + scores_at + row[:, None] * LEAF + inner[None, :],
                                   mask=real[:, None] & seen, other=_NONE),)
    m = tl.full([ROWS], _NONE, tl.float32)
    tops = (m,)
    for i in tl.static_range(LEAF // _BLOCK):
        m = tl.maximum(m, tl.max(scores[i], axis=1) * scale)
        tops = tops + (m,)
    sums = tl.zeros([ROWS, 4], tl.float32)
    acc = tl.zeros([ROWS, VALUES], tl.float32)
    for i in tl.static_range(LEAF // _BLOCK):
        top, sums, acc = add_block(scores[i], tops[i + 1], blocks[i], tops[i], sums, acc, scale, ADDER)
    total = add_lanes(sums)
    if DIRECT:
        finish(m, total, acc, o_ptr, lse_ptr, at, real, value, D, LSE)
    else:
        tl.store(part_ptr + row[:, None] * WIDTH + value[None, :], acc, mask=real[:, None])
        if tl.program_id(0) % PARTS == 0:
            m_ptr = part_ptr + tl.cast(count, tl.int64) * WIDTH
            tl.store(m_ptr + row, m, mask=real)
            tl.store(m_ptr + count + row, total, mask=real)
