"""The launch that joins each row's leaves, newest first, several of them in flight at once."""
from __future__ import annotations

import torch

from ...arithmetic.elementary import for_kernels
from ...launch import Step
from ...runtime import device_function, tl, triton
from .form import Form
from .leaf import finish, join
from .work import FIELDS, Work

_FIELDS, _NONE = map(for_kernels, (FIELDS, float("-inf")))


def partial_rows(form: Form, work: Work, height: int) -> int:
    """How many rows of partial results the launches before leave, `height` a leaf of a tile."""
    return work.slots * form.kv_heads * height


def join_step(form: Form, work: Work, height: int) -> Step:
    """The launch that joins a row's leaves, of which the launches before left `height` rows a tile."""
    heads = {name: form.constants[name] for name in ("HEADS", "GROUP", "D", "WIDTH", "WINDOW")}
    batch, joined = batch_and_rows(work, form.kv_heads)
    programs = -(-work.most // joined)
    return Step(join_kernel, len(work.tiles) * form.kv_heads * programs,
                {"part_ptr": torch.float32, "work_ptr": torch.int32, **form.outputs},
                {"count": partial_rows(form, work, height), "programs": programs, "window": form.window},
                {**heads, "LSE": form.lse, "ROWS": height, "LEAF": work.leaf, "BATCH": batch, "JOINED": joined},
                {"num_warps": joined})


def batch_and_rows(work: Work, kv_heads: int) -> tuple[int, int]:
    """(leaves that a program loads before it joins them, rows that it joins): what took the least time on an H200.

    With 32 heads on 8: one query on 64 leaves took 82 us with 16 leaves loaded at once, 88 with 8; on 9 leaves they are
    equal. 128 queries on 4096 keys took 27 us with four rows a program, 30 with one; 64 queries or fewer gain nothing.
    """
    many_leaves = work.lines[:, 6].max(initial=0) >= 32
    many_rows = len(work.tiles) * kv_heads * work.most >= 4096
    return 16 if many_leaves else 8, min(4, 1 << max(work.most - 1, 0).bit_length()) if many_rows else 1


@triton.jit
def join_kernel(part_ptr, work_ptr, o_ptr, lse_ptr, count, programs, window, HEADS: tl.constexpr, GROUP: tl.constexpr,
                D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, LSE: tl.constexpr, ROWS: tl.constexpr,
                LEAF: tl.constexpr, BATCH: tl.constexpr, JOINED: tl.constexpr, PDL: tl.constexpr):
    """JOINED rows of o a program: the leaves that each sees. `programs` a tile and kv head."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    inner = tl.program_id(0) % programs * JOINED + tl.arange(0, JOINED)
    head = tl.program_id(0) // programs % KV_HEADS
    line_ptr = work_ptr + tl.program_id(0) // programs // KV_HEADS * _FIELDS
    row = tl.load(line_ptr + 1) + inner
    rows = tl.load(line_ptr + 2)
    position = tl.load(line_ptr + 3) + row // GROUP
    query = tl.load(line_ptr).to(tl.int64) + row // GROUP
    first_slot = tl.load(line_ptr + 7) + tl.load(line_ptr + 6)
    if PDL:  # no launch writes the table of work, so it is read already
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    real = (row < rows) & (inner < ROWS)
    newest = position // LEAF
    oldest = tl.zeros([JOINED], tl.int32)
    if WINDOW:
        oldest = tl.maximum(position - window + 1, 0) // LEAF
    left = tl.where(real, newest - oldest + 1, 0)
    at = ((first_slot - newest).to(tl.int64) * KV_HEADS + head) * ROWS + inner
    column = tl.arange(0, WIDTH)
    M = tl.full([JOINED], _NONE, tl.float32)
    L = tl.zeros([JOINED], tl.float32)
    A = tl.zeros([JOINED, WIDTH], tl.float32)
    for begin in range(0, tl.max(left, axis=0), BATCH):
        M, L, A = _join_some(M, L, A, part_ptr, count, at, left - begin, column, KV_HEADS * ROWS, BATCH)
        at += KV_HEADS * ROWS * BATCH
    number = query * HEADS + head * GROUP + row % GROUP
    finish(M, L, A, o_ptr, lse_ptr, number, real, column, D, LSE)


@device_function
def _join_some(M, L, A, part_ptr, count, at, left, column, STEP: tl.constexpr, BATCH: tl.constexpr):
    """Each row's next BATCH leaves, or the `left` that there are: all are loaded before the first is joined."""
    WIDTH: tl.constexpr = A.shape[1]
    m_ptr = part_ptr + tl.cast(count, tl.int64) * WIDTH
    maxima = ()
    totals = ()
    values = ()
    for i in tl.static_range(BATCH):
        place = at + i * STEP
        maxima = maxima + (tl.load(m_ptr + place, mask=i < left, other=_NONE),)
        totals = totals + (tl.load(m_ptr + count + place, mask=i < left, other=0.0),)
        values = values + (tl.load(part_ptr + place[:, None] * WIDTH + column[None, :], mask=(i < left)[:, None],
                                   other=0.0),)
    for i in tl.static_range(BATCH):
        top, total, acc = join(M, L, A, maxima[i], totals[i], values[i])
        M = tl.where(i < left, top, M)  # what is not there may not even turn -0 into +0
        L = tl.where(i < left, total, L)
        A = tl.where((i < left)[:, None], acc, A)
    return M, L, A
