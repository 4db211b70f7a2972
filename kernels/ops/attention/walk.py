"""Kind walk: one program takes a tile of rows through all its leaves, and joins them as it goes.

Few rows of few keys in their newest block multiply those alone: a block of 128 costs as much for one key as for all.
"""
from __future__ import annotations

from ...arithmetic.elementary import for_kernels
from ...launch import Step
from ...runtime import device_function, tl, triton
from .form import Form
from .leaf import (
    add_lanes,
    after_block,
    finish,
    join,
    keys_and_values,
    nothing,
    one_leaf,
    spans,
    wholly_seen,
)
from .order import BLOCK
from .schedule import Schedule
from .work import FIELDS, Work

_FIELDS, _BLOCK, _NONE = map(for_kernels, (FIELDS, BLOCK, float("-inf")))
_FEW_ROWS = for_kernels(16)  # of a tile that waits for memory, whose newest block may be narrow
_FEW_KEYS = for_kernels(32)  # of a newest block, which cost less than a block does


def steps(schedule: Schedule, form: Form, work: Work) -> list[Step]:
    """The launch."""
    return [Step(walk_kernel, len(work.tiles) * form.kv_heads, {**form.inputs, **form.outputs}, form.scalars,
                 {**form.constants, "LSE": form.lse, "ROWS": schedule.rows, "LEAF": work.leaf,
                  "STAGES": schedule.stages}, {"num_warps": schedule.warps})]


@device_function
def tile_of(line_ptr, q_ptr, q_token, q_head, head, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
            WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """A line's tile: q [ROWS, WIDTH], the rows' positions, their numbers in o (T * H), whether they are real, and the
    positions of the first and the last of them."""
    token = tl.load(line_ptr).to(tl.int64)
    begin = tl.load(line_ptr + 1)
    rows = tl.load(line_ptr + 2)
    first = tl.load(line_ptr + 3)
    row = begin + tl.arange(0, ROWS)
    real = row < rows
    row = tl.maximum(tl.minimum(row, rows - 1), 0)  # the others do as the last one does
    query = row // GROUP
    number = head * GROUP + row % GROUP
    column = tl.arange(0, WIDTH)
    place = (token + query)[:, None] * q_token + number.to(tl.int64)[:, None] * q_head + column[None, :]
    q = tl.load(q_ptr + place, mask=real[:, None] & (column < D)[None, :], other=0.0)
    return (q, first + query, (token + query) * HEADS + number, real, first + begin // GROUP,
            newest_of(line_ptr, GROUP, ROWS))


@device_function
def newest_of(line_ptr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The position of a tile's last real row."""
    last = tl.minimum(tl.load(line_ptr + 1) + ROWS, tl.load(line_ptr + 2)) - 1
    return tl.load(line_ptr + 3) + tl.maximum(last, 0) // GROUP


@triton.jit
def walk_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, o_ptr, lse_ptr, q_token, q_head, k_batch, k_row, k_head,
                v_batch, v_row, v_head, table_width, window, scale, HEADS: tl.constexpr, GROUP: tl.constexpr,
                D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, ADDER: tl.constexpr,
                LSE: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):
    """A tile of rows of one kv head a program, the tiles with the most leaves first."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    KV_HEADS: tl.constexpr = HEADS // GROUP
    line_ptr = work_ptr + tl.program_id(0) // KV_HEADS * _FIELDS
    head = tl.program_id(0) % KV_HEADS
    length = tl.load(line_ptr + 4)
    k_ptr, v_ptr, pages_ptr = spans(line_ptr, k_ptr, v_ptr, pages_ptr, head, k_batch, k_head, v_batch, v_head,
                                    table_width, PAGE)
    newest = newest_of(line_ptr, GROUP, ROWS)
    block = newest // _BLOCK
    few = (ROWS <= _FEW_ROWS) & (newest % _BLOCK < _FEW_KEYS)  # the newest block's, of which no row sees others
    if ROWS <= _FEW_ROWS:  # on their way before the queries are waited for
        key = block * _BLOCK + tl.arange(0, _FEW_KEYS)
        there = (key < length) & few
        k, v = keys_and_values(k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, key, there, 0, WIDTH, WIDTH, D,
                               PAGE, True)
    q, position, at, real, least, newest = tile_of(line_ptr, q_ptr, q_token, q_head, head, HEADS, GROUP, D, WIDTH, ROWS)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(least - window + 1, 0)
    M = tl.full([ROWS], _NONE, tl.float32)
    L = tl.zeros([ROWS], tl.float32)
    A = tl.zeros([ROWS, WIDTH], tl.float32)
    m, sums, acc = nothing(ROWS, WIDTH)
    newest_leaf = tl.load(line_ptr + 6)
    if ROWS <= _FEW_ROWS:  # noqa: SIM102 - the second condition is run-time
        if few:
            k = tl.where(there[:, None], k, 0.0)  # else each would be waited for before the next is loaded
            v = tl.where(there[:, None], v, 0.0)
            m, sums, acc = after_block(q, k, v, key, position, window, scale, m, sums, acc, WINDOW, True, ADDER)
            if block % (LEAF // _BLOCK) == 0:  # all of their leaf
                M, L, A = join(M, L, A, m, add_lanes(sums), acc)
                m, sums, acc = nothing(ROWS, WIDTH)
                newest_leaf -= 1
            block -= 1
    for i in range(newest_leaf - tl.load(line_ptr + 7) + 1):
        leaf = newest_leaf - i
        if wholly_seen(leaf, least, newest, window, LEAF, WINDOW):
            m, part, acc = one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, block, oldest,
                                    length, position, window, scale, 0, m, sums, acc, D, PAGE, WINDOW, False, LEAF,
                                    STAGES, ADDER)
        else:
            m, part, acc = one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, block, oldest,
                                    length, position, window, scale, 0, m, sums, acc, D, PAGE, WINDOW, True, LEAF,
                                    STAGES, ADDER)
        top, total, values = join(M, L, A, m, part, acc)
        if WINDOW:  # what a row does not see may not even turn its -0 into +0
            seen = (leaf * LEAF <= position) & (leaf * LEAF + LEAF > position - window + 1)
            M = tl.where(seen, top, M)
            L = tl.where(seen, total, L)
            A = tl.where(seen[:, None], values, A)
        else:
            M = top
            L = total
            A = values
        m, sums, acc = nothing(ROWS, WIDTH)
    finish(M, L, A, o_ptr, lse_ptr, at, real, tl.arange(0, WIDTH), D, LSE)
