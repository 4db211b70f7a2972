"""The kernels of sum and mean, and which of them carry out a schedule."""
from __future__ import annotations

from dataclasses import replace

import torch

from ...arithmetic.sums import add_in_sequence, tree, tree_down, tree_width
from ...launch import Step
from ...runtime import tl, triton
from .schedule import Schedule, choose
from .view import View


@triton.jit
def _rows_kernel(x_ptr, y_ptr, rows, length, x_stride, scale, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
                 ROWS: tl.constexpr, PDL: tl.constexpr):
    """ROWS rows a program; every load is issued before the first addition waits for one."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    xs = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        xs = xs + (tl.load(x_ptr + row * x_stride + j, mask=(row < rows) & (j < length), other=0.0),)
    total = xs[0].to(tl.float32)
    for c in tl.static_range(1, CHUNKS):
        total += xs[c].to(tl.float32)
    if PDL:  # the next kernel's blocks may come now; they wait for this one's end before touching memory
        tl.extra.cuda.gdc_launch_dependents()
    y = (tree(total) + 0.0) * scale
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _stream_kernel(x_ptr, y_ptr, length, x_stride, scale, WIDTH: tl.constexpr, FLIGHT: tl.constexpr,
                   PDL: tl.constexpr):
    """One row of any length a program, FLIGHT chunks in flight."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    total = add_in_sequence(x_ptr + row * x_stride, column, column, True, length, WIDTH, WIDTH, FLIGHT)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    y = (tree(total) + 0.0) * scale
    tl.store(y_ptr + row + tl.arange(0, 1)[:, None], y.to(y_ptr.dtype.element_ty))


@triton.jit
def _inner_kernel(x_ptr, y_ptr, length, inner, outer_stride, stride, scale, WIDTH: tl.constexpr,
                  FLIGHT: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
    """COLUMNS results that lie side by side a program, where the reduced dimension is not the last.

    A chunk is WIDTH rows of x, taken in PARTS passes: every PARTS-th row, so that the first additions of the tree
    join whole passes and stay within a thread.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    blocks = tl.cdiv(inner, COLUMNS)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x_ptr += outer * outer_stride
    step = tl.cast(stride, tl.int64) * WIDTH
    sums = ()
    for part in tl.static_range(PARTS):
        j = tl.arange(0, WIDTH // PARTS)[:, None] * PARTS + part
        at = j.to(tl.int64) * stride + i
        total = add_in_sequence(x_ptr, at, j, i < inner, length, step, WIDTH, FLIGHT)
        for level in tl.static_range(10):  # as a binary counter carries: join what is complete
            if part % (2 << level) == (2 << level) - 1:
                total = sums[len(sums) - 1] + total
                sums = sums[:len(sums) - 1]
        sums = sums + (total,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    y = (tree_down(sums[0]) + 0.0) * scale
    tl.store(y_ptr + outer * inner + i, y.to(y_ptr.dtype.element_ty), mask=i < inner)


@triton.jit
def _split_kernel(x_ptr, sums_ptr, length, inner, outer_stride, stride, WIDTH: tl.constexpr, FLIGHT: tl.constexpr,
                  COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """COLUMNS of a row's column sums a program, left in float32 for a second launch to add up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    columns = tl.cast(inner, tl.int64) * WIDTH
    blocks = tl.cdiv(columns, COLUMNS)
    outer = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    j = m // inner
    step = tl.cast(stride, tl.int64) * WIDTH
    x_ptr += outer * outer_stride
    total = add_in_sequence(x_ptr, j * stride + m % inner, j, m < columns, length, step, WIDTH, FLIGHT)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(sums_ptr + outer * columns + m, total, mask=m < columns)


SHOWN = _rows_kernel  # by a notebook, for `op.triton`


def steps(schedule: Schedule, view: View, given: dict, scale: float) -> list[Step]:
    """The launches that carry out a schedule: one, or two for a split."""
    outer, length, inner, outer_stride, stride, _ = view
    width, s, warps = tree_width(length), schedule, {"num_warps": schedule.warps}
    row = {"length": length, "x_stride": outer_stride, "scale": scale}
    if s.kind == "rows":
        return [Step(_rows_kernel, -(-outer // s.rows), given, {"rows": outer, **row},
                     {"WIDTH": width, "CHUNKS": -(-length // width), "ROWS": s.rows}, warps)]
    chain = {"WIDTH": width, "FLIGHT": s.flight}
    if s.kind == "stream":
        return [Step(_stream_kernel, outer, given, row, chain, warps)]
    sizes = {"length": length, "inner": inner, "outer_stride": outer_stride, "stride": stride}
    if s.kind == "inner":
        return [Step(_inner_kernel, outer * -(-inner // s.columns), given, {**sizes, "scale": scale},
                     {**chain, "COLUMNS": s.columns, "PARTS": s.parts}, warps)]
    first = Step(_split_kernel, outer * -(-width * inner // s.columns),
                 {"x_ptr": given["x_ptr"], "sums_ptr": torch.float32}, sizes, {**chain, "COLUMNS": s.columns}, warps,
                 leaves=outer * width * inner)
    sums = View(outer, width, inner, width * inner, inner)
    then = choose(outer, width, inner, torch.float32.itemsize)
    second, = steps(then, sums, {**given, "x_ptr": torch.float32}, scale)
    return [first, replace(second, named={"x_ptr": "sums_ptr"})]
