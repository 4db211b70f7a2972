"""Sum and mean over any dimensions.

    sum(x, dim, keepdim)     mean(x, dim, keepdim) = sum * float32(1 / count)

The order. The numbers that make one result, in row-major order of the reduced dimensions (as they stand in x's
shape, in whatever order `dim` names them), are one row of `count` float32 numbers. It is summed as arithmetic/sums.py
says: chunks of 1024 in sequence, then neighbours in pairs. Then +0 is added, which turns -0 into +0 and changes
nothing else. The mean is one float32 multiplication more. The result is rounded once to x's dtype.

Why a batch cannot change it: every step names numbers of one row and their count. The number of rows, the other
dimensions, the strides, the GPU and the launch appear nowhere.

Accuracy, tested against float64 on rows of up to 3000 numbers: within half an ulp of the dtype for the last rounding
and, for each float32 rounding on the way (chunks - 1, log2 of the columns, and 2), 2**-24 of the sum of |x|, or of the
mean of |x|; 1 % more at most.

Corners, all decided by that order:

- A sum of nothing is +0, a mean of nothing NaN (0 * inf).
- Numbers that cancel, and any number of -0.0, give +0, as in torch.
- NaN, or infinities of both signs, give NaN; one sign of infinity gives that infinity.
- A float32 sum may overflow on the way, also where the mean would fit. A float16 sum beyond 65504 becomes infinite
  in the last rounding; its mean does not, being scaled before.
- A tensor without dimensions is a row of one number. An expanded, strided or lazily negated input gives the bits
  of its contiguous copy.

Which inputs are read in place: those whose numbers, taken in order of falling stride, are (outer, reduced, inner)
with one stride each, and contiguous in the last. Contiguous tensors with neighbouring reduced dimensions are of this
kind, and so are their transposes and columns of wider ones. Others are permuted into rows and copied first.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch

from .. import bits
from ..arithmetic.sums import CHUNK, add_in_sequence, ordered_sum, tree, tree_down, tree_width
from ..call import KernelCall, check_tensors
from ..launch import Step, compiled
from ..op import Op, Shape, Work
from ..runtime import contiguous_strides, tl, triton

RESIDENT_WIDTH = 16 * CHUNK  # wider rows are streamed
ENOUGH_PROGRAMS = 132  # to give each multiprocessor of a large GPU one


def _specify(x, dim, keepdim, mean):
    dims = _check(x, dim, keepdim)
    kept = [i for i in range(x.dim()) if i not in dims]
    count = prod(x.shape[i] for i in dims)
    rows = x.float().permute((*kept, *dims)).reshape(*[x.shape[i] for i in kept], count)
    total = ordered_sum(rows)[..., 0] + 0.0 if count else rows.new_zeros(rows.shape[:-1])
    if mean:  # a float32 tensor: both factors round once, alike
        total = total * torch.full_like(total, 1.0 / count if count else float("inf"))
    return total.to(x.dtype).view(_shape(x, dims, keepdim))


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


@dataclass(frozen=True)
class Schedule:
    """How the order is carried out. `kind` is the kernel:

    rows     `rows` whole rows a program, up to RESIDENT_WIDTH long
    stream   one row of any length a program, `flight` chunks in flight
    inner    `columns` neighbouring results a program, in `parts` passes, `flight` chunks of each in flight
    split    `columns` of a row's column sums a program, `flight` of its chunks in flight; a second launch adds them
    """

    kind: str
    warps: int
    rows: int = 1
    flight: int = 1
    columns: int = 1
    parts: int = 1

    def __str__(self):
        named = {"rows": f"rows={self.rows}", "stream": f"stream={self.flight}",
                 "inner": f"inner={self.columns} parts={self.parts} flight={self.flight}",
                 "split": f"split={self.columns} flight={self.flight}"}
        return f"{named[self.kind]} warps={self.warps}"


def _schedule(outer: int, length: int, inner: int = 1, itemsize: int = 2) -> Schedule:
    """The fastest schedule we know for numbers of `itemsize` bytes laid out as (outer, length, inner).

    It is chosen from a table of cases; none changes a bit.
    """
    width = tree_width(length)
    if inner > 1:
        return _schedule_inner(outer, length, inner, itemsize)
    if length >= 64 * CHUNK and outer < ENOUGH_PROGRAMS:
        return _schedule_split(outer * width)
    if length > RESIDENT_WIDTH:
        return Schedule("stream", warps=16, flight=4)
    if width < CHUNK:  # several narrow rows a program, once there are enough to go round
        rows = min(2 * CHUNK // width, _power_of_two(outer // (4 * ENOUGH_PROGRAMS)))
        return Schedule("rows", warps=4 if rows * width >= 512 else 1, rows=rows)
    return Schedule("rows", warps=4 if length * itemsize <= 16 * CHUNK else 8 if length <= 8 * CHUNK else 16)


def _schedule_inner(outer, length, inner, itemsize) -> Schedule:
    width = tree_width(length)
    columns = min(2 * _power_of_two(inner - 1), 64 * CHUNK // (width * itemsize), CHUNK)
    # cut finer until every multiprocessor has a program, but not below a few thousand numbers or a sector of memory
    while outer * -(-inner // columns) < ENOUGH_PROGRAMS and columns * length > 4 * CHUNK and columns * itemsize > 32:
        columns //= 2
    if outer * -(-inner // columns) < ENOUGH_PROGRAMS and length > RESIDENT_WIDTH:
        return _schedule_split(outer * inner * CHUNK)
    warps = min(16, _power_of_two(width * columns // (2 * CHUNK)))
    return Schedule("inner", warps, flight=min(4, 2 * _power_of_two((length - 1) // CHUNK)), columns=columns,
                    parts=min(8, width) if inner * itemsize >= 32 else 1)


def _schedule_split(columns: int) -> Schedule:
    """A split of `columns` column sums: one program a multiprocessor if there are enough, a warp's sums at least."""
    each = min(256, max(32, _power_of_two(columns // ENOUGH_PROGRAMS)))
    return Schedule("split", warps=1, flight=2 * CHUNK // each, columns=each)


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n, and 1 for less."""
    return 1 << max(n, 1).bit_length() - 1


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    length, inner = _sizes(shape)
    split = [Schedule("split", warps, flight=flight, columns=columns)
             for columns, flight, warps in ((32, 16, 1), (128, 4, 1), (256, 2, 4))]
    tokens = (*range(1, 300), *(1 << i for i in range(21)))
    chosen = [_schedule(outer, length, inner, dtype.itemsize) for outer in tokens]
    if inner > 1:
        wide = [Schedule("inner", warps, flight=flight, columns=columns, parts=parts)
                for columns, parts, flight, warps in ((16, 1, 1, 8), (16, 8, 4, 8), (32, 8, 1, 16), (32, 8, 2, 16))
                if parts <= tree_width(length)]
        return list(dict.fromkeys([*wide, *split, *chosen]))
    rows = [Schedule("rows", warps, rows=rows) for rows in (1, 2, 4) for warps in (1, 4, 8, 16)
            if length <= RESIDENT_WIDTH and rows * length <= 8 * CHUNK * warps]
    stream = [Schedule("stream", warps, flight=flight) for warps in (4, 16) for flight in (1, 4)]
    return list(dict.fromkeys([*rows, *stream, *split, *chosen]))


class _View(NamedTuple):
    """x as (outer, length, inner), read at outer_stride, stride and 1; after a copy in this order, if one is given."""

    outer: int
    length: int
    inner: int
    outer_stride: int
    stride: int
    order: tuple[int, ...] | None = None


def _view(x, dims) -> _View:
    """How the kernels read x, which is not empty."""
    order = sorted((i for i in range(x.dim()) if x.shape[i] > 1), key=lambda i: -x.stride(i))
    kept, reduced = [i for i in order if i not in dims], [i for i in order if i in dims]
    first = order.index(reduced[0]) if reduced else len(order)
    outer, inner = kept[:first], kept[first:]
    if order == outer + reduced + inner and kept == sorted(kept) and reduced == sorted(reduced):
        strides = [_stride(x, group) for group in (outer, reduced, inner)]
        if None not in strides and (strides[2] if inner else strides[1]) == 1:
            return _View(*(prod(x.shape[i] for i in group) for group in (outer, reduced, inner)), *strides[:2])
    kept = [i for i in range(x.dim()) if i not in dims]
    outer, length = prod(x.shape[i] for i in kept), prod(x.shape[i] for i in dims)
    return _View(outer, length, 1, length, 1, (*kept, *dims))


def _stride(x, dims) -> int | None:
    """The one stride that walks these dimensions in order; None if there is none, 1 for no dimension."""
    for i, after in pairwise(dims):
        if x.stride(i) != x.stride(after) * x.shape[after]:
            return None
    return x.stride(dims[-1]) if dims else 1


def _check(x, dim=None, keepdim=False) -> tuple[int, ...]:
    check_tensors(x=x)
    if not isinstance(keepdim, bool):
        raise TypeError(f"keepdim must be True or False, got {type(keepdim).__name__}")
    return _dims(x, dim)


def _dims(x, dim) -> tuple[int, ...]:
    """The reduced dimensions counted from 0, in order. None and () mean all, as in torch."""
    given = () if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    for d in given:
        if not isinstance(d, int) or isinstance(d, bool):
            raise TypeError(f"dim must be None, an int or a tuple of ints, got {dim!r}")
        if not -max(x.dim(), 1) <= d < max(x.dim(), 1):
            raise ValueError(f"dim must name dimensions of x, which has {x.dim()}, got {dim!r}")
    counted = sorted(d % max(x.dim(), 1) for d in given)
    if len(set(counted)) < len(counted):
        raise ValueError(f"dim must name each dimension once, got {dim!r} for a tensor that has {x.dim()}")
    return tuple(counted if given and x.dim() else range(x.dim()))


def _shape(x, dims, keepdim) -> tuple[int, ...]:
    return tuple(1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims)


class _Reduction(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

    parameters = "Tensor x, int[]? dim=None, bool keepdim=False"
    Schedule, kernel = Schedule, _rows_kernel
    check = staticmethod(_check)

    def __init__(self, name: str, mean: bool):
        self.name, self.mean = name, mean
        super().__init__()

    def traceable(self, x, dim, keepdim):
        return x, _dims(x, dim), keepdim

    def outputs(self, x, dim, keepdim):
        return (x.new_empty(_shape(x, _dims(x, dim), keepdim)),)

    def empty(self, plan, x, dim, keepdim):
        return super().empty(plan, x, dim, keepdim).fill_(float("nan") if self.mean else 0.0)

    def schedule(self, x, dim, keepdim):
        return _schedule(*_view(x, _dims(x, dim))[:3], x.itemsize)

    def readable(self, x, dim, keepdim):
        order = _view(x, _dims(x, dim)).order
        if order is None:
            return x, dim, keepdim
        return x.permute(order).contiguous(), tuple(range(x.dim() - len(_dims(x, dim)), x.dim())), keepdim

    def finish(self, y, x, dim, keepdim):
        return y.view(_shape(x, _dims(x, dim), keepdim))

    def steps(self, schedule, x, dim, keepdim):
        view = _view(x, _dims(x, dim))
        if schedule.kind in ("rows", "stream") and view.inner > 1:
            raise ValueError(f"schedule {schedule} sums dimensions that are last in memory; dim {dim} of shape "
                             f"{tuple(x.shape)} is not: it needs an inner or a split schedule")
        return _steps(schedule, view, {"x_ptr": x.dtype, "y_ptr": x.dtype}, 1.0 / view.length if self.mean else 1.0)

    def prepare(self, plan, x, dim, keepdim):
        plan.shape, plan.device = _shape(x, _dims(x, dim), keepdim), x.device
        plan.strides = contiguous_strides(plan.shape)

    def launch(self, plan, x, dim, keepdim):
        if plan.copies:
            x = self.readable(x, dim, keepdim)[0]
        y = torch.empty_strided(plan.shape, plan.strides, dtype=plan.dtype, device=plan.device)
        px, py = x.data_ptr(), y.data_ptr()
        if plan.second is None:
            plan.first(px, px, py)
        else:
            sums = torch.empty(plan.scratch, dtype=torch.float32, device=plan.device)
            plan.first(px, px, sums.data_ptr())
            plan.second(0, sums.data_ptr(), py)
        return y

    def memory(self, plan, x, dim, keepdim):
        y = x.new_empty(_shape(x, _dims(x, dim), keepdim))
        return {"x_ptr": x, "sums_ptr": x.new_empty(plan.scratch), "y_ptr": y}


def _steps(schedule: Schedule, view: _View, given: dict, scale: float) -> list[Step]:
    """One launch, or two for a split."""
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
    sums = _View(outer, width, inner, width * inner, inner)
    then = _schedule(outer, width, inner, torch.float32.itemsize)
    second, = _steps(then, sums, {**given, "x_ptr": torch.float32}, scale)
    return [first, replace(second, named={"x_ptr": "sums_ptr"})]


def _sizes(shape) -> tuple[int, int]:
    """D and inner: a token is a row of D numbers, or of D times inner with only the D reduced."""
    shape = Shape.parse(shape, "D")
    return shape["D"], shape.get("inner", 1)


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """(tokens, D) and dim -1, or for a shape such as D=1000,inner=64 (tokens, D, inner) and dim 1."""
    length, inner = _sizes(shape)
    x = bits.portable(tokens, length * inner, dtype, device, seed)
    return (x, -1) if inner == 1 else (x.view(tokens, length, inner), 1)


def _op(name: str, title: str, default, order: str, mean: bool) -> Op:
    call = _Reduction(name, mean)

    def cuda(x, dim=None, keepdim=False):
        """The default: PyTorch's own."""
        return default(x, dim, keepdim)

    def python(x, dim=None, keepdim=False):
        """The specification: x of any shape, float32, float16 or bfloat16, reduced over `dim`, in x's dtype.

        dim is None or () for all dimensions, an int, or a tuple of ints; negative ones count from the end. Reduced
        dimensions stay with size 1 if keepdim. Raises TypeError or ValueError for anything else. Differentiable.
        """
        return _specify(x, dim, keepdim, mean)

    def work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
        length, inner = _sizes(shape)
        return Work(bytes=tokens * (length + 1) * inner * dtype.itemsize, flops=tokens * (length - 1 + mean) * inner)

    def schedule(tokens: int, shape, dtype) -> str:
        return str(_schedule(tokens, *_sizes(shape), dtype.itemsize))

    return Op(name=name, title=title, order=order, cuda=cuda, python=call.specification(python), triton=call.triton,
              inputs=_inputs, work=work, per_token=(0,), shapes=("D=8192", "D=4096"), schedules=_schedules,
              schedule=schedule, extras={"compile": compiled(cuda)}, call=call)


_ORDER = "chunks of 1024 in sequence, then neighbours in pairs"
sum = _op("sum", "Sum", torch.sum, _ORDER, False)
mean = _op("mean", "Mean", torch.mean, _ORDER + ", times 1 / count", True)
