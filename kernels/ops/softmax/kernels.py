"""Softmax's kernels, and which of them carry out a schedule."""
from __future__ import annotations

import torch

from ...arithmetic.elementary import LOWEST_FLOAT, for_kernels, opaque, tl_exp, tl_log
from ...arithmetic.sums import tree, tree_width
from ...call import row_stride
from ...launch import Step
from ...runtime import device_function, tl, triton
from .order import SEGMENT, WHOLE

_LOWEST = for_kernels(LOWEST_FLOAT)


@device_function
def _load(x_ptr, start, column, length, WIDTH: tl.constexpr, COUNT: tl.constexpr, KEEP: tl.constexpr):
    """COUNT chunks of a row from `start` on, all loads issued at once. KEEP: they will be read again soon."""
    xs = ()
    for c in tl.static_range(COUNT):
        j = start + c * WIDTH + column
        xs = xs + (tl.load(x_ptr + j, mask=j < length, other=float("-inf"),
                           eviction_policy="evict_last" if KEEP else "evict_first"),)
    return xs


@device_function
def _largest(m, xs, FIRST: tl.constexpr, COUNT: tl.constexpr):
    for c in tl.static_range(COUNT):
        m = tl.maximum(m, xs[FIRST + c].to(tl.float32))
    return m


@device_function
def _add_exponentials(s, m, xs, FIRST: tl.constexpr, COUNT: tl.constexpr):
    for c in tl.static_range(COUNT):
        s += tl_exp(xs[FIRST + c].to(tl.float32) - m, NONPOSITIVE=True)
    return s


@device_function
def _walk(x_ptr, column, length, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, SEGMENT: tl.constexpr,
          SEGMENTS: tl.constexpr):
    """m and s of these columns of one row, SEGMENTS times SEGMENT chunks in flight. CHUNKS: the row's if it is one
    segment, else 0."""
    m = tl.full(column.shape, _LOWEST, tl.float32)
    s = tl.zeros(column.shape, tl.float32)
    FLIGHT: tl.constexpr = SEGMENT * SEGMENTS
    if CHUNKS > FLIGHT:
        for start in range(0, length, WIDTH * FLIGHT):
            m = _largest(m, _load(x_ptr, start, column, length, WIDTH, FLIGHT, True), 0, FLIGHT)
        for start in range(0, length, WIDTH * FLIGHT):
            s = _add_exponentials(s, m, _load(x_ptr, start, column, length, WIDTH, FLIGHT, True), 0, FLIGHT)
    elif CHUNKS > 0:
        xs = _load(x_ptr, 0, column, length, WIDTH, CHUNKS, True)
        m = opaque(_largest(m, xs, 0, CHUNKS))
        s = _add_exponentials(s, m, xs, 0, CHUNKS)
    else:
        for start in range(0, length, WIDTH * FLIGHT):
            xs = _load(x_ptr, start, column, length, WIDTH, FLIGHT, True)
            for i in tl.static_range(SEGMENTS):
                old = m
                m = _largest(m, xs, i * SEGMENT, SEGMENT)
                if SEGMENTS > 1:
                    m = opaque(m)
                s = _add_exponentials(s * tl_exp(old - m, NONPOSITIVE=True), m, xs, i * SEGMENT, SEGMENT)
    return m, s


@device_function
def _close(m, s, LOG: tl.constexpr):
    """[rows, columns] of m and s -> M, and what a result takes from the whole row: log(S), or its column's factor."""
    top = tl.max(m, axis=1, keep_dims=True)
    share = tl_exp(m - top, NONPOSITIVE=True)
    total = tree(s * share)
    if LOG:
        rest = tl_log(total)
    else:
        rest = opaque(share * tl.div_rn(1.0, total))
    return top, rest


@device_function
def _store_results(x_ptr, y_ptr, start, column, length, m, top, rest, COUNT: tl.constexpr, LOG: tl.constexpr):
    """The results of COUNT chunks from `start` on. Called in a loop: in one long block, LLVM takes minutes."""
    xs = _load(x_ptr, start, column, length, column.shape[1], COUNT, False)
    for c in tl.static_range(COUNT):
        j = start + c * column.shape[1] + column
        x = xs[c].to(tl.float32)
        y = (x - top) - rest if LOG else tl_exp(x - m, NONPOSITIVE=True) * rest
        tl.store(y_ptr + j, y.to(y_ptr.dtype.element_ty), mask=j < length, eviction_policy="evict_first")


@triton.jit
def _resident_kernel(x_ptr, y_ptr, rows, length, x_stride, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
                     ROWS: tl.constexpr, LOG: tl.constexpr, PDL: tl.constexpr):
    """ROWS rows of one segment a program, held in registers: memory is read once, each exponential taken once."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    xs = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        xs = xs + (tl.load(x_ptr + row * x_stride + j, mask=(row < rows) & (j < length), other=float("-inf")),)
    m = opaque(_largest(tl.full([ROWS, WIDTH], _LOWEST, tl.float32), xs, 0, CHUNKS))
    s = tl.zeros([ROWS, WIDTH], tl.float32)
    exponentials = ()
    for c in tl.static_range(CHUNKS):
        e = tl_exp(xs[c].to(tl.float32) - m, NONPOSITIVE=True)
        exponentials = exponentials + (e,)
        s += e
    if PDL:  # the next kernel's blocks may come now; they wait for this one's end before touching memory
        tl.extra.cuda.gdc_launch_dependents()
    top, rest = _close(m, s, LOG)
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        y = (xs[c].to(tl.float32) - top) - rest if LOG else exponentials[c] * rest
        tl.store(y_ptr + row * length + j, y.to(y_ptr.dtype.element_ty), mask=(row < rows) & (j < length))


@triton.jit
def _stream_kernel(x_ptr, y_ptr, length, x_stride, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
                   SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, LOG: tl.constexpr, PDL: tl.constexpr):
    """One row of any length a program; results are made from its end, which the cache has seen last."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    x_ptr += row * x_stride
    y_ptr += row * length
    m, s = _walk(x_ptr, column, length, WIDTH, CHUNKS, SEGMENT, SEGMENTS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    top, rest = _close(m, s, LOG)
    blocks = tl.cdiv(length, WIDTH * SEGMENT)
    for i in range(blocks):
        start = (blocks - 1 - i) * WIDTH * SEGMENT
        _store_results(x_ptr, y_ptr, start, column, length, m, top, rest, SEGMENT, LOG)


@triton.jit
def _columns_kernel(x_ptr, columns_ptr, length, x_stride, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
                    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """COLUMNS columns of one row a program: m and s, left for a second launch."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = (tl.program_id(0) // (WIDTH // COLUMNS)).to(tl.int64)
    column = tl.program_id(0) % (WIDTH // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m, s = _walk(x_ptr + row * x_stride, column, length, WIDTH, CHUNKS, SEGMENT, SEGMENTS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    columns_ptr += row * 2 * WIDTH
    tl.store(columns_ptr + column, m)
    tl.store(columns_ptr + WIDTH + column, s)


@triton.jit
def _finish_kernel(x_ptr, columns_ptr, y_ptr, length, x_stride, programs, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
                   LOG: tl.constexpr, PDL: tl.constexpr):
    """Results of one row from the m and s of all its columns, CHUNKS chunks at a time, by `programs` programs."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.program_id(0) // programs).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    x_ptr += row * x_stride
    y_ptr += row * length
    columns_ptr += row * 2 * WIDTH
    m = tl.load(columns_ptr + column)
    top, rest = _close(m, tl.load(columns_ptr + WIDTH + column), LOG)
    for block in range(tl.program_id(0) % programs, tl.cdiv(length, WIDTH * CHUNKS), programs):
        _store_results(x_ptr, y_ptr, block * WIDTH * CHUNKS, column, length, m, top, rest, CHUNKS, LOG)


SHOWN = _resident_kernel  # by a notebook, for `op.triton`


def steps(schedule, x, dtype, logarithm: bool) -> list[Step]:
    """The launches that carry out a schedule for x, whose rows are last: one, or two for columns."""
    s, length, stride = schedule, x.shape[-1] if x.dim() else 1, row_stride(x)
    rows, width, log = x.numel() // length, tree_width(length), {"LOG": logarithm}
    chunks, whole = -(-length // width), length <= WHOLE * width
    given, warps = {"x_ptr": x.dtype, "y_ptr": dtype or x.dtype}, {"num_warps": s.warps}
    if s.kind == "resident":
        if not whole:
            raise ValueError(f"schedule {s} holds rows of up to {WHOLE * width}, got {length}")
        return [Step(_resident_kernel, -(-rows // s.rows), given,
                     {"rows": rows, "length": length, "x_stride": stride},
                     {"WIDTH": width, "CHUNKS": chunks, "ROWS": s.rows, **log}, warps)]
    sizes = {"length": length, "x_stride": stride}
    walk = {"WIDTH": width, "CHUNKS": chunks if whole else 0, "SEGMENT": SEGMENT, "SEGMENTS": s.flight}
    if s.kind == "stream":
        return [Step(_stream_kernel, rows, given, sizes, {**walk, **log}, warps)]
    columns, blocks = min(s.columns, width), -(-length // (width * s.chunks))
    between = {"x_ptr": x.dtype, "columns_ptr": torch.float32}
    return [Step(_columns_kernel, rows * (width // columns), between, sizes, {**walk, "COLUMNS": columns}, warps,
                 leaves=rows * 2 * width),
            Step(_finish_kernel, rows * blocks, {**between, "y_ptr": given["y_ptr"]}, {**sizes, "programs": blocks},
                 {"WIDTH": width, "CHUNKS": s.chunks, **log}, {"num_warps": 4})]
