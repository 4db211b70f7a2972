"""RMSNorm as torch.compile sees it under the mode: its operations and the addition before them, as one opaque op.

Models write the norm of x (..., D), of float32, float16 or bfloat16, in operations that each round:

    stream = x + residual                                            rounded to x's dtype
    scale  = rsqrt(mean(float32(stream)**2) + eps)                   in float32
    y      = weight * (float32(stream) * scale rounded to x's dtype) rounded to x's dtype

The mean is opaque to Inductor, which so makes three kernels of a norm. The ops here have the bits of these operations:
they add as ops/mean/order.py does and round where they round. A GPU's rsqrt is one approximate instruction in PyTorch,
in Inductor and here. (PyTorch's takes subnormal numbers too, Triton's makes them zero, so eps is to be a normal
number.) norm_fusion.py puts them into graphs.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from ..arithmetic.sums import tree
from ..ops.mean import mean
from ..ops.rms_norm import RESIDENT_WIDTH, RMSNorm
from ..runtime import tl, triton
from .elements import steady
from .opaque import defined
from .products import how

SMALLEST_EPS, LARGEST_EPS = 1e-30, 1e30  # normal numbers of float32


@triton.jit
def _rounded_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rows, x_stride, residual_stride, eps,
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
    scale = tl.rsqrt(tree(total) * (1.0 / D) + eps)
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        normed = (streams[c].to(tl.float32) * scale).to(dtype)
        y = normed.to(tl.float32) * weights[c].to(tl.float32)
        tl.store(y_ptr + row * D + j, y.to(dtype), mask=(row < rows) & (j < D))


class _RoundedNorm(RMSNorm):
    """RMSNorm that rounds as the operations do of which models make it, for rows that registers hold."""

    name, kernel = "rounded_rms_norm", _rounded_kernel

    def check(self, x, weight, residual=None, eps=1e-6):
        super().check(x, weight, residual, eps)
        if x.shape[-1] > RESIDENT_WIDTH:
            raise ValueError(f"x must have rows of at most {RESIDENT_WIDTH} numbers, got {x.shape[-1]}")
        if not SMALLEST_EPS <= eps <= LARGEST_EPS:
            raise ValueError(f"eps must be between {SMALLEST_EPS} and {LARGEST_EPS}, got {eps}")

    def steps(self, schedule, x, weight, residual, eps):
        if schedule.streaming:
            raise ValueError(f"schedule {schedule} reads rows twice, for which there is no kernel here")
        return [replace(step, kernel=_rounded_kernel) for step in super().steps(schedule, x, weight, residual, eps)]

    def interpret(self, plan, x, weight, residual, eps):
        """Numbers of 16 bits meet their weight afterwards: a kernel of float32 does not round what it multiplies."""
        if x.dtype == torch.float32:
            return super().interpret(plan, x, weight, residual, eps)
        self.check(x, weight, residual, eps)
        found = super().interpret(plan, x, torch.ones_like(weight), residual, eps)
        return weight * found if residual is None else (weight * found[0], found[1])


_CALL = _RoundedNorm()
_rsqrt = steady("rsqrt", 1)


def _run(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the stream: a schedule on a GPU, and on a CPU the operations, as the mode's rules take them."""
    if x.is_cuda and residual is not None:
        return _CALL.triton(x, weight, residual, eps)
    if x.is_cuda:
        return _CALL.triton(x, weight, None, eps), x
    stream = x if residual is None else x + residual
    h = stream.float()
    shifted = how(x, mean)(h * h, -1, True) + eps
    scale = _rsqrt(shifted) if shifted.numel() else shifted
    return (weight * (h * scale).to(x.dtype)).contiguous(), stream.contiguous()


NORM = defined("rounded_rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor",
               lambda x, weight, eps: _run(x, None, weight, eps)[0],
               lambda x, weight, eps: x.new_empty(x.shape))
ADDED = defined("add_rounded_rms_norm", "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
                _run, lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)))
