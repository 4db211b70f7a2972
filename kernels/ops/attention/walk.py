"""Kind walk: one program takes a tile of rows through all its leaves, and joins them as it goes."""
from __future__ import annotations

from ...arithmetic.elementary import for_kernels
from ...launch import Step
from ...runtime import device_function, tl, triton
from .form import Form
from .leaf import finish, join, one_leaf, spans, wholly_seen
from .schedule import Schedule
from .work import FIELDS, Work

_FIELDS, _NONE = map(for_kernels, (FIELDS, float("-inf")))


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
    newest = first + tl.maximum(tl.minimum(begin + ROWS, rows) - 1, 0) // GROUP
    return q, first + query, (token + query) * HEADS + number, real, first + begin // GROUP, newest


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
    q, position, at, real, least, newest = tile_of(line_ptr, q_ptr, q_token, q_head, head, HEADS, GROUP, D, WIDTH, ROWS)
    length = tl.load(line_ptr + 4)
    k_ptr, v_ptr, pages_ptr = spans(line_ptr, k_ptr, v_ptr, pages_ptr, head, k_batch, k_head, v_batch, v_head,
                                    table_width, PAGE)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(least - window + 1, 0)
    M = tl.full([ROWS], _NONE, tl.float32)
    L = tl.zeros([ROWS], tl.float32)
    A = tl.zeros([ROWS, WIDTH], tl.float32)
    newest_leaf = tl.load(line_ptr + 6)
    for i in range(newest_leaf - tl.load(line_ptr + 7) + 1):
        leaf = newest_leaf - i
        if wholly_seen(leaf, least, newest, window, LEAF, WINDOW):
            m, part, acc = one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, newest, oldest,
                                    length, position, window, scale, 0, WIDTH, D, PAGE, WINDOW, False, LEAF, STAGES,
                                    ADDER)
        else:
            m, part, acc = one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, newest, oldest,
                                    length, position, window, scale, 0, WIDTH, D, PAGE, WINDOW, True, LEAF, STAGES,
                                    ADDER)
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
    finish(M, L, A, o_ptr, lse_ptr, at, real, tl.arange(0, WIDTH), D, LSE)
