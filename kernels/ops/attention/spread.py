"""Kind spread: a leaf of a tile of rows a program, and a second launch that joins each row's leaves, newest first."""
from __future__ import annotations

import torch

from ...arithmetic.elementary import for_kernels
from ...launch import Step
from ...runtime import tl, triton
from .form import Form
from .join import join_step, partial_rows
from .leaf import nothing, one_leaf, spans, wholly_seen
from .order import BLOCK
from .schedule import Schedule
from .walk import tile_of
from .work import FIELDS, Work

_FIELDS, _BLOCK = map(for_kernels, (FIELDS, BLOCK))


def steps(schedule: Schedule, form: Form, work: Work) -> list[Step]:
    """The two launches."""
    parts = schedule.parts if form.columns == 128 else 1
    count = partial_rows(form, work, schedule.rows)
    first = Step(spread_kernel, len(work.leaves) * form.kv_heads * parts,
                 {**form.inputs, "part_ptr": torch.float32}, {**form.scalars, "count": count},
                 {**form.constants, "ROWS": schedule.rows, "LEAF": work.leaf, "PARTS": parts,
                  "STAGES": schedule.stages}, {"num_warps": schedule.warps},
                 named={"work_ptr": "leaves_ptr"}, leaves=count * (form.columns + 2))
    return [first, join_step(form, work, schedule.rows)]


@triton.jit
def spread_kernel(q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, part_ptr, q_token, q_head, k_batch, k_row, k_head,
                  v_batch, v_row, v_head, table_width, window, scale, count, HEADS: tl.constexpr, GROUP: tl.constexpr,
                  D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, ADDER: tl.constexpr,
                  ROWS: tl.constexpr, LEAF: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                  PDL: tl.constexpr):
    """One leaf of a tile of rows of one kv head a program; its m, l and acc are left in `part`.

    part: `count` rows of WIDTH numbers acc, then as many m, then as many l; row (slot, kv head, row of the tile).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    KV_HEADS: tl.constexpr = HEADS // GROUP
    VALUES: tl.constexpr = WIDTH // PARTS
    value0 = tl.program_id(0) % PARTS * VALUES
    line_ptr = work_ptr + tl.program_id(0) // (PARTS * KV_HEADS) * _FIELDS
    head = tl.program_id(0) // PARTS % KV_HEADS
    q, position, at, real, least, newest = tile_of(line_ptr, q_ptr, q_token, q_head, head, HEADS, GROUP, D, WIDTH, ROWS)
    length = tl.load(line_ptr + 4)
    k_ptr, v_ptr, pages_ptr = spans(line_ptr, k_ptr, v_ptr, pages_ptr, head, k_batch, k_head, v_batch, v_head,
                                    table_width, PAGE)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(least - window + 1, 0)
    leaf = tl.load(line_ptr + 6)
    m, sums, acc = nothing(ROWS, VALUES)
    if wholly_seen(leaf, least, newest, window, LEAF, WINDOW):
        m, part, acc = one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, newest // _BLOCK,
                                oldest, length, position, window, scale, value0, m, sums, acc, D, PAGE, WINDOW, False,
                                LEAF, STAGES, ADDER)
    else:
        m, part, acc = one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, newest // _BLOCK,
                                oldest, length, position, window, scale, value0, m, sums, acc, D, PAGE, WINDOW, True,
                                LEAF, STAGES, ADDER)
    row = (tl.load(line_ptr + 7).to(tl.int64) * KV_HEADS + head) * ROWS + tl.arange(0, ROWS)
    value = value0 + tl.arange(0, VALUES)
    tl.store(part_ptr + row[:, None] * WIDTH + value[None, :], acc, mask=real[:, None])
    if value0 == 0:
        m_ptr = part_ptr + tl.cast(count, tl.int64) * WIDTH
        tl.store(m_ptr + row, m, mask=real)
        tl.store(m_ptr + count + row, part, mask=real)
