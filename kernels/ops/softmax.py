"""softmax and log_softmax over one dimension.

    softmax      y = exp(x - m) * (exp(m - M) / S)
    log_softmax  y = (x - M) - log(S)

The order, for a row of D numbers. Lay it out in chunks of 1024, so that column j holds x[j], x[1024+j], ... and
pad the last chunk with -inf; a row narrower than 1024 has the power of two that holds it as its columns. Each
column keeps two numbers: m, the largest so far (at least -3.4e38, the lowest float32), and s, a sum of exponentials
relative to m. Up to 32 chunks are one segment; a wider row is cut into segments of 8 chunks. For each segment in
sequence

    1. m becomes the largest of m and the column's numbers in the segment
    2. s is multiplied by exp(old m - m)
    3. exp(x - m) is added to s, chunk by chunk in sequence

Then M is the largest m, and S is the sum over the columns of s * exp(m - M), neighbours added in pairs (as
arithmetic/sums.py says). A result of softmax takes its column's m and one factor exp(m - M) * (1 / S). Every step is
one float32 operation, exp and log are those of arithmetic/elementary.py, and the result is rounded once to x's dtype.

Why a batch cannot change it: every step names numbers of one row and the row's own length. The number of
rows, the neighbours, the GPU and the launch appear nowhere. A maximum has no order, so it may be taken in any.

Accuracy, tested against float64 for numbers up to 16 in rows of 1 to 33000: softmax errs by at most 2**-19 |y| in
float32, 2**-11 |y| and 1 % more in float16, 2**-8 |y| and 0.1 % more in bfloat16; log_softmax by at most
2**-22 (1 + |y|), 2**-11 (1 + |y|) and 2**-8 (1 + |y|), the last two and 0.1 % more.

A row with a NaN or +inf, or of -inf alone, gives NaN throughout, as PyTorch's does.

Method: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import bits
from ..arithmetic.elementary import LOWEST_FLOAT, exp, for_kernels, log, opaque, tl_exp, tl_log
from ..arithmetic.sums import add_neighbours, ordered_sum, tree, tree_width
from ..call import KernelCall, check_tensors, refuse_dual, row_stride
from ..launch import Step, compiled
from ..op import Op, Shape, Work
from ..runtime import device_function, tl, triton

WHOLE, SEGMENT = 32, 8  # chunks: rows of up to WHOLE are one segment, wider ones are cut into segments of SEGMENT
_LOWEST = for_kernels(LOWEST_FLOAT)


def _specify(x, dim, logarithm, dtype=None):
    dim, dtype = _check(x, dim, dtype), dtype or x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    rows = x.float().reshape(x.shape or (1,)).movedim(dim, -1)
    width = tree_width(rows.shape[-1])
    padded = F.pad(rows, (0, -rows.shape[-1] % width), value=float("-inf"))
    chunks = padded.unflatten(-1, (-1, width)).unbind(-2)
    m, s = _columns(chunks)
    top = m.amax(-1, keepdim=True)
    total = add_neighbours(s * exp(m - top))
    if logarithm:
        rest = log(total)
        y = [(chunk - top) - rest for chunk in chunks]
    else:
        factor = exp(m - top) * (1.0 / total)
        y = [exp(chunk - m) * factor for chunk in chunks]
    y = torch.cat([chunk.to(dtype) for chunk in y], -1)[..., :rows.shape[-1]]
    return y.movedim(-1, dim).contiguous().view(x.shape)


class _Differentiable(torch.autograd.Function):
    """The specification with a gradient, whose one sum a row has the order of arithmetic/sums.py."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, dim, logarithm, dtype):
        return _specify(x, dim, logarithm, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # apart from `forward`, as torch.func needs it
        ctx.save_for_backward(output)
        x, ctx.dim, ctx.logarithm, _ = inputs
        ctx.dtype = x.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        result, = ctx.saved_tensors
        if result.numel() == 0:
            return dy.to(ctx.dtype), None, None, None
        y, dy = (t.float().reshape(t.shape or (1,)) for t in (result, dy))
        total = ordered_sum((dy if ctx.logarithm else dy * y).movedim(ctx.dim, -1)).movedim(-1, ctx.dim)
        dx = dy - exp(y) * total if ctx.logarithm else y * (dy - total)
        return dx.to(ctx.dtype).view(result.shape), None, None, None


def _columns(chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Each column's largest number and its sum of exponentials relative to that."""
    segment = len(chunks) if len(chunks) <= WHOLE else SEGMENT
    m, s = torch.full_like(chunks[0], LOWEST_FLOAT), torch.zeros_like(chunks[0])
    for start in range(0, len(chunks), segment):
        old = m
        for chunk in chunks[start:start + segment]:
            m = torch.maximum(m, chunk)
        s = s * exp(old - m)
        for chunk in chunks[start:start + segment]:
            s = s + exp(chunk - m)
    return m, s


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


@dataclass(frozen=True)
class Schedule:
    """How the order is carried out. `kind` is the kernel:

    resident  `rows` whole rows of up to 32 chunks a program
    stream    one row of any length a program, `flight` segments of 8 chunks in flight, read a second time at the end
    columns   `columns` of a row's columns a program, `flight` segments in flight; a second launch of `chunks`
              chunks and 4 warps a program makes the results
    """

    kind: str
    warps: int
    rows: int = 1
    flight: int = 1
    columns: int = 32
    chunks: int = 4

    def __str__(self):
        named = {"resident": f"rows={self.rows}", "stream": f"stream={self.flight}",
                 "columns": f"columns={self.columns} flight={self.flight} chunks={self.chunks}"}
        return f"{named[self.kind]} warps={self.warps}"


def _schedule(rows: int, length: int, itemsize: int = 2, logarithm: bool = False) -> Schedule:
    """The fastest schedule known for `rows` rows of this length, with numbers of `itemsize` bytes."""
    chunks, short = -(-length // tree_width(length)), itemsize == 2
    if chunks <= 8:
        together = max(1, min(16, 1024 // tree_width(length), rows // 264))
        return Schedule("resident", 4, rows=1 << (together.bit_length() - 1))
    if chunks <= WHOLE:
        if logarithm and short and rows > 192:
            return Schedule("stream", 8, flight=2)
        return Schedule("resident", 8 if short or rows < 1024 else 16)
    if rows <= 16:
        return Schedule("columns", 1, flight=4, columns=32, chunks=2)
    if rows <= 64:
        return Schedule("columns", 2, flight=4, columns=64)
    if rows <= 192 or short and rows <= 384:
        return Schedule("stream", 16, flight=4)
    if not short:
        return Schedule("stream", 16, flight=2)
    return Schedule("stream", 8, flight=2 if logarithm or rows <= 1024 else 1)


def _schedules(shape, dtype=torch.bfloat16, logarithm: bool = False) -> list[Schedule]:
    """Every schedule worth testing for rows of this length; the chosen ones are among them."""
    length, width = Shape.parse(shape, "D")["D"], tree_width(Shape.parse(shape, "D")["D"])
    flights = (1, 4) if length > SEGMENT * width else (1,)
    found = [Schedule("stream", warps, flight=flight) for warps in (4, 8, 16) for flight in flights]
    found += [Schedule("columns", 1, flight=flights[-1], columns=min(columns, width), chunks=chunks)
              for columns in (16, 64) for chunks in (2, 8)]
    if length <= WHOLE * width:
        found += [Schedule("resident", warps, rows) for rows in (1, 2, 4) for warps in (1, 4, 8, 16)
                  if rows * length <= 4096 * warps]
    return list(dict.fromkeys(found + [_schedule(1 << i, length, dtype.itemsize, logarithm) for i in range(21)]))


def _check(x, dim=-1, dtype=None) -> int:
    """The dimension counted from 0. Raises TypeError or ValueError for what softmax cannot take."""
    check_tensors(x=x)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise ValueError(f"dim must name a dimension of x, which has {x.dim()}, got {dim}")
    if dtype not in (None, x.dtype, torch.float32):
        raise TypeError(f"dtype must be None, x's {x.dtype} or torch.float32, got {dtype!r}")
    return dim % max(x.dim(), 1)


class _Softmax(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

    parameters = "Tensor x, int dim=-1, ScalarType? dtype=None"
    Schedule, kernel = Schedule, _resident_kernel
    check = staticmethod(_check)

    def __init__(self, name: str, logarithm: bool):
        self.name, self.logarithm = name, logarithm
        super().__init__()

    def result_dtype(self, x, dim, dtype):
        return dtype or x.dtype

    def schedule(self, x, dim, dtype):
        return _schedule(x.numel() // (x.shape or (1,))[dim], (x.shape or (1,))[dim], x.itemsize, self.logarithm)

    def readable(self, x, dim, dtype):
        if dim % max(x.dim(), 1) != max(x.dim(), 1) - 1:
            return x.movedim(dim, -1).contiguous(), -1, dtype
        return (x.contiguous() if row_stride(x) is None else x), dim, dtype

    def finish(self, y, x, dim, dtype):
        return y.movedim(-1, dim).contiguous() if y.dim() else y

    def steps(self, schedule, x, dim, dtype):
        s, length, stride = schedule, x.shape[-1] if x.dim() else 1, row_stride(x)
        rows, width, log = x.numel() // length, tree_width(length), {"LOG": self.logarithm}
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

    def launch(self, plan, x, dim, dtype):
        read = self.readable(x, dim, dtype)[0] if plan.copies else x
        y = plan.like(read)
        px, py = read.data_ptr(), y.data_ptr()
        if plan.second is None:
            plan.first(px, px, py)
        else:
            columns = torch.empty(plan.scratch, dtype=torch.float32, device=x.device)
            plan.first(px, px, columns.data_ptr())
            plan.second(px, px, columns.data_ptr(), py)
        return self.finish(y, x, dim, dtype) if plan.copies else y

    def memory(self, plan, x, dim, dtype):
        return {"x_ptr": x, "columns_ptr": x.new_empty(plan.scratch), "y_ptr": x.new_empty(x.shape)}


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    return bits.portable(tokens, Shape.parse(shape, "D")["D"], dtype, device, seed, scale=4), -1


def _op(name: str, title: str, default, logarithm: bool) -> Op:
    call = _Softmax(name, logarithm)

    def cuda(x, dim=-1, dtype=None):
        """The default: PyTorch's own."""
        return default(x, dim, dtype=dtype)

    def python(x, dim=-1, dtype=None):
        """The specification: x of any shape, float32, float16 or bfloat16 -> as many results over `dim`, in x's dtype.

        With `dtype` torch.float32 they are not rounded to 16 bits. Raises TypeError or ValueError for anything else.
        Differentiable, once.
        """
        refuse_dual(f"{name}.python", "x", x)  # exp and log are made of bits, which have no derivative
        gradient = getattr(x, "requires_grad", False) and torch.is_grad_enabled()
        return (_Differentiable.apply if gradient else _specify)(x, dim, logarithm, dtype)

    def work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
        elements = tokens * Shape.parse(shape, "D")["D"]
        return Work(bytes=2 * elements * dtype.itemsize, flops=(4 if logarithm else 5) * elements)

    return Op(name=name, title=title, order="chunks of 1024 in sequence, segment by segment, then neighbours in pairs",
              cuda=cuda, python=call.specification(python), triton=call.triton, inputs=_inputs, work=work,
              per_token=(0,), shapes=("D=32000", "D=128256"), schedules=partial(_schedules, logarithm=logarithm),
              schedule=lambda tokens, shape, dtype: str(
                  _schedule(tokens, Shape.parse(shape, "D")["D"], dtype.itemsize, logarithm)),
              extras={"compile": compiled(cuda)}, call=call)


softmax = _op("softmax", "Softmax", F.softmax, False)
log_softmax = _op("log_softmax", "Log-softmax", F.log_softmax, True)
