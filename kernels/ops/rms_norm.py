"""RMSNorm of each row, with the residual added first if there is one.

    stream = x + residual                      rounded to x's dtype, returned as the new residual stream
    y      = stream / sqrt(mean(stream**2) + eps) * weight

The order. Square each element in float32. Sum the squares as arithmetic/sums.py says: chunks of 1024 in sequence,
then neighbours in pairs. Multiply by float32(1 / D), add eps, take the square root, take the reciprocal. Each element
is then (stream * reciprocal) * weight, rounded once to the dtype.

Why a batch cannot change it: every step names elements of one row and the row's own length. The number of
rows, the neighbours, the GPU and the launch appear nowhere.

Method: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import bits
from ..arithmetic.sums import CHUNK, ordered_sum, tree, tree_width
from ..call import KernelCall, check_tensors, row_stride
from ..launch import Step, compiled
from ..op import Op, Shape, Work
from ..runtime import tl, triton
from .contenders import eager_rms_norm, flashinfer_rms_norm, split_rms_norm, two_pass_rms_norm

RESIDENT_WIDTH = 16 * CHUNK  # wider rows do not fit a block's registers and are read twice


def _cuda(x, weight, residual=None, eps=1e-6):
    """The default: F.rms_norm, after an addition if there is a residual."""
    if residual is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    stream = x + residual
    return F.rms_norm(stream, (x.shape[-1],), weight, eps), stream


def _python(x, weight, residual=None, eps=1e-6):
    """The specification: x (..., D), weight (D,) -> y (..., D), and the new residual stream if one was given.

    float32, float16 or bfloat16; eps in float32. Raises TypeError or ValueError for anything else.
    """
    _CALL.check(x, weight, residual, eps)
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    h = stream.float()
    total = ordered_sum(h * h)
    mean = total * torch.full_like(total, 1.0 / x.shape[-1])  # a float32 tensor: both factors round once, alike
    shifted = mean + torch.full_like(total, eps)
    root = shifted.double().sqrt().float()  # a CPU's float32 sqrt is not always correctly rounded
    y = ((h * (1.0 / root)) * weight.float()).to(x.dtype)
    return y if residual is None else (y, stream)


@triton.jit
def _resident_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rows, x_stride, residual_stride, eps,
                     D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                     PDL: tl.constexpr):
    """ROWS rows a program, held in registers; every load is issued before the first addition waits for one."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    CHUNKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    dtype = y_ptr.dtype.element_ty
    xs = ()
    residuals = ()
    weights = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        inside = (row < rows) & (j < D)
        xs = xs + (tl.load(x_ptr + row * x_stride + j, mask=inside, other=0.0),)
        if HAS_RESIDUAL:
            residuals = residuals + (tl.load(residual_ptr + row * residual_stride + j, mask=inside, other=0.0),)
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        weights = weights + (tl.load(weight_ptr + j, mask=j < D, other=0.0),)

    total = tl.zeros([ROWS, WIDTH], tl.float32)
    streams = ()
    for c in tl.static_range(CHUNKS):
        h = xs[c]
        if HAS_RESIDUAL:
            j = c * WIDTH + column
            h = (h.to(tl.float32) + residuals[c].to(tl.float32)).to(dtype)
            tl.store(stream_ptr + row * D + j, h, mask=(row < rows) & (j < D))
        streams = streams + (h,)
        square = h.to(tl.float32) * h.to(tl.float32)
        total = square if c == 0 else total + square

    if PDL:  # the next kernel's blocks may come while this one's stores drain; they wait before touching memory
        tl.extra.cuda.gdc_launch_dependents()
    scale = tl.div_rn(1.0, tl.sqrt_rn(tree(total) * (1.0 / D) + eps))
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        y = (streams[c].to(tl.float32) * scale) * weights[c].to(tl.float32)
        tl.store(y_ptr + row * D + j, y.to(dtype), mask=(row < rows) & (j < D))


@triton.jit
def _streaming_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rows, x_stride, residual_stride, eps,
                      D: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                      PDL: tl.constexpr):
    """One row of any width a program, CHUNKS chunks in flight; the second pass reads what the first left in L2."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    dtype = y_ptr.dtype.element_ty
    total = tl.zeros([1, WIDTH], tl.float32)
    for start in range(0, D, WIDTH * CHUNKS):
        xs = ()
        residuals = ()
        for c in tl.static_range(CHUNKS):
            j = start + c * WIDTH + column
            xs = xs + (tl.load(x_ptr + row * x_stride + j, mask=j < D, other=0.0),)
            if HAS_RESIDUAL:
                residuals = residuals + (tl.load(residual_ptr + row * residual_stride + j, mask=j < D, other=0.0),)
        for c in tl.static_range(CHUNKS):
            h = xs[c]
            if HAS_RESIDUAL:
                j = start + c * WIDTH + column
                h = (h.to(tl.float32) + residuals[c].to(tl.float32)).to(dtype)
                tl.store(stream_ptr + row * D + j, h, mask=j < D)
            total += h.to(tl.float32) * h.to(tl.float32)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    scale = tl.div_rn(1.0, tl.sqrt_rn(tree(total) * (1.0 / D) + eps))
    tl.debug_barrier()  # what follows reads what other threads stored
    if HAS_RESIDUAL:
        source_ptr = stream_ptr + row * D
    else:
        source_ptr = x_ptr + row * x_stride
    for start in range(0, D, WIDTH):
        j = start + column
        h = tl.load(source_ptr + j, mask=j < D, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + j, mask=j < D, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + j, ((h * scale) * w).to(dtype), mask=j < D)


@dataclass(frozen=True)
class Schedule:
    """How the order is carried out: rows a program, warps, and for a streamed row the chunks in flight."""

    rows: int = 1
    warps: int = 8
    streaming: int = 0

    def __str__(self):
        return (f"stream={self.streaming}" if self.streaming else f"rows={self.rows}") + f" warps={self.warps}"


def _schedule(tokens: int, width: int, itemsize: int = 2) -> Schedule:
    """The fastest schedule known for `tokens` rows of this width, with numbers of `itemsize` bytes."""
    if width > RESIDENT_WIDTH:
        return Schedule(warps=16, streaming=4)
    if width < CHUNK:  # several narrow rows a program, once there are enough to go round
        rows = min(2 * CHUNK // tree_width(width), 1 << max(tokens // 528, 1).bit_length() - 1)
        return Schedule(rows, 4 if rows * tree_width(width) >= 512 else 1)
    return Schedule(warps=4 if width < 2 * CHUNK else 8 if width * itemsize <= 16 * CHUNK else 16)


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    width = Shape.parse(shape, "D")["D"]
    streaming = [Schedule(1, warps, chunks) for warps in (4, 16) for chunks in (1, 4)]
    if width > RESIDENT_WIDTH:
        return streaming
    resident = [Schedule(rows, warps) for rows in (1, 2, 4) for warps in (1, 4, 8, 16)
                if rows * width <= 8 * 1024 * warps]
    chosen = [_schedule(1 << i, width, dtype.itemsize) for i in range(21)]
    return list(dict.fromkeys(resident + chosen + streaming))


class RMSNorm(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

    name = "rms_norm"
    parameters = "Tensor x, Tensor weight, Tensor? residual=None, float eps=1e-6"
    Schedule, kernel = Schedule, _resident_kernel

    def check(self, x, weight, residual=None, eps=1e-6):
        check_tensors(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight must have shape ({x.shape[-1]},), the width of x, got {tuple(weight.shape)}")
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if not isinstance(eps, (int, float)):
            raise TypeError(f"eps must be a number, got {type(eps).__name__}")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be a positive number, got {eps}")

    def outputs(self, x, weight, residual, eps):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format)
                     for _ in range(1 if residual is None else 2))

    def schedule(self, x, weight, residual, eps):
        return _schedule(x.numel() // x.shape[-1], x.shape[-1], x.itemsize)

    def readable(self, x, weight, residual, eps):
        if row_stride(x) is None or residual is not None and row_stride(residual) is None:
            x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        return x, weight.contiguous(), residual, eps

    def steps(self, schedule, x, weight, residual, eps):
        s, width, rows = schedule, x.shape[-1], x.numel() // x.shape[-1]
        held = {"CHUNKS": s.streaming} if s.streaming else {"ROWS": s.rows}
        return [Step(_streaming_kernel if s.streaming else _resident_kernel, -(-rows // s.rows),
                     dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "stream_ptr"), x.dtype),
                     {"rows": rows, "x_stride": row_stride(x),
                      "residual_stride": row_stride(x if residual is None else residual), "eps": eps},
                     {"D": width, "WIDTH": tree_width(width), **held, "HAS_RESIDUAL": residual is not None},
                     {"num_warps": s.warps})]

    def launch(self, plan, x, weight, residual, eps):
        if plan.copies:
            x, weight, residual, eps = self.readable(x, weight, residual, eps)
        y = plan.like(x)
        px, pw, py = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        if residual is None:
            plan.first(px | pw, px, px, pw, py, py)
            return y
        stream, pr = torch.empty_like(y), residual.data_ptr()
        plan.first(px | pr | pw, px, pr, pw, py, stream.data_ptr())
        return y, stream

    def memory(self, plan, x, weight, residual, eps):
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        return {"x_ptr": x, "residual_ptr": x, "weight_ptr": weight, "y_ptr": y, "stream_ptr": y}

    def in_float32(self, x, weight, residual, eps):
        return x.float().contiguous(), weight.float(), None, eps  # as a stream made here is

    def interpret(self, plan, x, weight, residual, eps):
        """The residual is added before: a kernel of float32 would not round the stream to x's dtype."""
        self.check(x, weight, residual, eps)
        if residual is None:
            return super().interpret(plan, x, weight, None, eps)
        stream = (x.float() + residual.float()).to(x.dtype).contiguous()
        return super().interpret(plan, stream, weight, None, eps), stream


_CALL = RMSNorm()


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    shape = Shape.parse(shape, "D")
    x = bits.portable(tokens, shape["D"], dtype, device, seed)
    weight = bits.portable(1, shape["D"], dtype, device, seed + 1)[0]
    return x, weight, bits.portable(tokens, shape["D"], dtype, device, seed + 2) if shape.get("residual") else None


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    shape = Shape.parse(shape, "D")
    tensors, elements = 4 if shape.get("residual") else 2, tokens * shape["D"]
    return Work(bytes=(tensors * elements + shape["D"]) * dtype.itemsize, flops=(4 + tensors // 4) * elements)


rms_norm = Op(
    name="rms_norm", title="RMSNorm", order="chunks of 1024 in sequence, then neighbours in pairs",
    cuda=_cuda, python=_CALL.specification(_python), triton=_CALL.triton, inputs=_inputs, work=_work, per_token=(0, 2),
    shapes=("D=8192,residual", "D=8192", "D=4096,residual", "D=4096"), schedules=_schedules,
    schedule=lambda tokens, shape, dtype: str(_schedule(tokens, Shape.parse(shape, "D")["D"], dtype.itemsize)),
    extras={"compile": compiled(_cuda), "flashinfer": flashinfer_rms_norm, "eager": eager_rms_norm,
            "two_pass": two_pass_rms_norm, "split": split_rms_norm},
    mutates=frozenset({"flashinfer"}), call=_CALL)
