"""LayerNorm of each row: less its mean, over its standard deviation, times a weight and plus a bias.

    y = (x - mean) / sqrt(mean((x - mean)**2) + eps) * weight + bias

The order. In float32, every step one operation, rounded once:

    1. middle = (the sum of x as arithmetic/sums.py says) * float32(1 / D)
    2. d      = x - middle
    3. spread = (the sum of d * d, in the same order) * float32(1 / D)
    4. rstd   = 1 / sqrt(spread + eps)
    5. y      = (d * rstd) * weight + bias      a multiplication, another, an addition; rounded to x's dtype

Without a weight the second multiplication falls away, without a bias the addition.

Why a batch cannot change it: every step names elements of one row and the row's own length. The number of rows, the
neighbours, the GPU and the launch appear nowhere.

It is called by the mode (kernels/mode/) and is not in OPS: no GPU has recorded its digests or its speed yet.

Source: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import bits
from ..arithmetic.sums import CHUNK, ordered_sum, tree, tree_width
from ..call import KernelCall, check_tensors, row_stride
from ..launch import Step, compiled
from ..op import Op, Shape, Work
from ..runtime import tl, triton

RESIDENT_WIDTH = 16 * CHUNK  # wider rows do not fit a block's registers and are read three times


def _cuda(x, weight=None, bias=None, eps=1e-5):
    """The default: PyTorch's own, with the mean and 1 / sqrt(variance + eps) that its backward pass keeps."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _python(x, weight=None, bias=None, eps=1e-5):
    """The specification: x (..., D), weight and bias (D,) or None -> y (..., D), middle and rstd (..., 1) float32.

    x, weight and bias are float32, float16 or bfloat16, of one dtype. Raises TypeError or ValueError for anything else.
    """
    _CALL.check(x, weight, bias, eps)
    h = x.float()
    total = ordered_sum(h)
    share = torch.full_like(total, 1.0 / x.shape[-1])  # float32 tensors: both factors round once, alike
    middle = total * share
    d = h - middle
    shifted = ordered_sum(d * d) * share + torch.full_like(total, eps)
    rstd = 1.0 / shifted.double().sqrt().float()  # a CPU's float32 sqrt is not always correctly rounded
    y = d * rstd
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), middle, rstd


@triton.jit
def _store_row(x, middle, rstd, weight_ptr, bias_ptr, y_ptr, row, rows, j, D: tl.constexpr, HAS_WEIGHT: tl.constexpr,
               HAS_BIAS: tl.constexpr):
    """One chunk's results, from x in float32."""
    inside = (row < rows) & (j < D)
    y = (x - middle) * rstd
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + j, mask=j < D, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + j, mask=j < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + j, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _resident_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, middle_ptr, rstd_ptr, rows, x_stride, eps, D: tl.constexpr,
                     WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
                     PDL: tl.constexpr):
    """ROWS rows a program, held in registers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    CHUNKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    xs = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        xs = xs + (tl.load(x_ptr + row * x_stride + j, mask=(row < rows) & (j < D), other=0.0).to(tl.float32),)
    total = xs[0]
    for c in tl.static_range(1, CHUNKS):
        total += xs[c]
    middle = tree(total) * (1.0 / D)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for c in tl.static_range(CHUNKS):
        d = tl.where(c * WIDTH + column < D, xs[c] - middle, 0.0)  # beyond the row the mean must not count
        squares = d * d if c == 0 else squares + d * d
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tree(squares) * (1.0 / D) + eps))
    tl.store(middle_ptr + row, middle, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    for c in tl.static_range(CHUNKS):
        _store_row(xs[c], middle, rstd, weight_ptr, bias_ptr, y_ptr, row, rows, c * WIDTH + column, D, HAS_WEIGHT,
                   HAS_BIAS)


@triton.jit
def _streaming_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, middle_ptr, rstd_ptr, rows, x_stride, eps, D: tl.constexpr,
                      WIDTH: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr):
    """One row of any width a program; the second and third pass read what the first left in L2."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([1, WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        j = start + column
        total += tl.load(x_ptr + row * x_stride + j, mask=j < D, other=0.0).to(tl.float32)
    middle = tree(total) * (1.0 / D)
    squares = tl.zeros([1, WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        j = start + column
        x = tl.load(x_ptr + row * x_stride + j, mask=j < D, other=0.0).to(tl.float32)
        d = tl.where(j < D, x - middle, 0.0)
        squares += d * d
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tree(squares) * (1.0 / D) + eps))
    tl.store(middle_ptr + row, middle)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, WIDTH):
        j = start + column
        x = tl.load(x_ptr + row * x_stride + j, mask=j < D, other=0.0).to(tl.float32)
        _store_row(x, middle, rstd, weight_ptr, bias_ptr, y_ptr, row, rows, j, D, HAS_WEIGHT, HAS_BIAS)


@dataclass(frozen=True)
class Schedule:
    """How the order is carried out: rows a program and warps; or one row a program, streamed."""

    rows: int = 1
    warps: int = 8
    streaming: bool = False

    def __str__(self):
        return ("stream" if self.streaming else f"rows={self.rows}") + f" warps={self.warps}"


def _schedule(tokens: int, width: int, itemsize: int = 2) -> Schedule:
    """A schedule by rule, as rms_norm's; none was measured."""
    if width > RESIDENT_WIDTH:
        return Schedule(warps=16, streaming=True)
    if width < CHUNK:  # several narrow rows a program, once there are enough to go round
        rows = min(2 * CHUNK // tree_width(width), 1 << max(tokens // 528, 1).bit_length() - 1)
        return Schedule(rows, 4 if rows * tree_width(width) >= 512 else 1)
    return Schedule(warps=4 if width < 2 * CHUNK else 8 if width * itemsize <= 16 * CHUNK else 16)


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    width = Shape.parse(shape, "D")["D"]
    streaming = [Schedule(1, warps, True) for warps in (4, 16)]
    if width > RESIDENT_WIDTH:
        return streaming
    resident = [Schedule(rows, warps) for rows in (1, 2, 4) for warps in (1, 4, 8, 16)
                if rows * width <= 8 * CHUNK * warps]
    chosen = [_schedule(1 << i, width, dtype.itemsize) for i in range(21)]
    return list(dict.fromkeys(resident + chosen + streaming))


class _LayerNorm(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification."""

    name = "layer_norm"
    parameters = "Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5"
    Schedule, kernel = Schedule, _resident_kernel

    def check(self, x, weight=None, bias=None, eps=1e-5):
        given = {name: t for name, t in (("weight", weight), ("bias", bias)) if t is not None}
        check_tensors(x=x, **given)
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
        for name, tensor in given.items():
            if tensor.shape != x.shape[-1:]:
                raise ValueError(f"{name} must have shape ({x.shape[-1]},), the width of x, got {tuple(tensor.shape)}")
        if not isinstance(eps, (int, float)):
            raise TypeError(f"eps must be a number, got {type(eps).__name__}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be a number of at least 0, got {eps}")

    def outputs(self, x, weight, bias, eps):
        small = [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2)]
        return torch.empty_like(x, memory_format=torch.contiguous_format), *small

    def schedule(self, x, weight, bias, eps):
        return _schedule(x.numel() // x.shape[-1], x.shape[-1], x.itemsize)

    def readable(self, x, weight, bias, eps):
        return (x if row_stride(x) is not None else x.contiguous(),
                *(None if t is None else t.contiguous() for t in (weight, bias)), eps)

    def steps(self, schedule, x, weight, bias, eps):
        s, width, rows = schedule, x.shape[-1], x.numel() // x.shape[-1]
        pointers = {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), x.dtype),
                    **dict.fromkeys(("middle_ptr", "rstd_ptr"), torch.float32)}
        return [Step(_streaming_kernel if s.streaming else _resident_kernel, -(-rows // s.rows), pointers,
                     {"rows": rows, "x_stride": row_stride(x), "eps": eps},
                     {"D": width, "WIDTH": tree_width(width), **({} if s.streaming else {"ROWS": s.rows}),
                      "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}, {"num_warps": s.warps})]

    def launch(self, plan, x, weight, bias, eps):
        if plan.copies:
            x, weight, bias, eps = self.readable(x, weight, bias, eps)
        results = self.outputs(x, weight, bias, eps)
        px = x.data_ptr()
        pw, pb = (px if t is None else t.data_ptr() for t in (weight, bias))
        plan.first(px | pw | pb, px, pw, pb, *(t.data_ptr() for t in results))
        return results

    def memory(self, plan, x, weight, bias, eps):
        y, middle, rstd = self.outputs(x, weight, bias, eps)
        return {"x_ptr": x, "weight_ptr": x if weight is None else weight, "bias_ptr": x if bias is None else bias,
                "y_ptr": y, "middle_ptr": middle, "rstd_ptr": rstd}

    def interpret(self, plan, x, weight, bias, eps):
        """As for other ops, and its two float32 results beside y."""
        self.check(x, weight, bias, eps)
        memory = self.memory(plan, *self.in_float32(*self.readable(x, weight, bias, eps)))
        for step in plan.steps:
            step.interpret(memory)
        return memory["y_ptr"].to(x.dtype), memory["middle_ptr"], memory["rstd_ptr"]


_CALL = _LayerNorm()


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    width = Shape.parse(shape, "D")["D"]
    x = bits.portable(tokens, width, dtype, device, seed)
    return x, *(bits.portable(1, width, dtype, device, seed + i)[0] for i in (1, 2))


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    width = Shape.parse(shape, "D")["D"]
    return Work(bytes=(2 * tokens * width + 2 * width) * dtype.itemsize + 8 * tokens, flops=8 * tokens * width)


layer_norm = Op(
    name="layer_norm", title="LayerNorm", order="chunks of 1024 in sequence, then neighbours in pairs; twice",
    cuda=_cuda, python=_CALL.specification(_python), triton=_CALL.triton, inputs=_inputs, work=_work, per_token=(0,),
    shapes=("D=8192", "D=4096"), schedules=_schedules,
    schedule=lambda tokens, shape, dtype: str(_schedule(tokens, Shape.parse(shape, "D")["D"], dtype.itemsize)),
    extras={"compile": compiled(_cuda)}, call=_CALL)
