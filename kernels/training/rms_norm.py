"""The gradient of RMSNorm, y = h * r * weight with r = 1 / sqrt(mean(h**2) + eps), for a stream h of rows.

The order, for one row of D numbers. r is made as in ops/rms_norm.py, in its order. Then

    g = dy * weight,  n = h * r
    c = the sum of g * h over the row, as arithmetic/sums.py says
    k = (c * r) * float32(1 / D)
    dx = (g - n * k) * r, and the gradient that comes along the stream is added to it if there is one

rounded once to the dtype. dweight is the sum of dy * n over the tokens, as ops/mean/order.py says, rounded once: chunks
of 1024 tokens in sequence, then neighbours in pairs. Every step is one float32 operation.

Why a batch cannot change dx: every step names elements of one row. dweight adds over the tokens, in their order, so it
depends on how many there are and on nothing else.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.sums import CHUNK, ordered_sum, tree, tree_width
from ..call import check_tensors
from ..launch import Step
from ..ops import mean
from ..runtime import tl, triton
from .backward import BackwardCall, Pass, check_tokens

WIDEST = 8 * CHUNK  # a row is held in registers


def _python(h, weight, dy, dstream=None, eps=1e-6):
    """The specification: h, dy (T, D), weight (D,), dstream (T, D) or None -> dx (T, D), dweight (D,), in h's dtype.

    float32, float16 or bfloat16, all of one dtype; D up to 8192. Raises TypeError or ValueError for anything else.
    """
    dx, terms = _specified(h, weight, dy, dstream, eps)
    return dx, mean.sum.python(terms, 0).to(h.dtype)


def _triton(h, weight, dy, dstream=None, eps=1e-6):
    """A schedule: the arguments, results and bits of the specification."""
    dx, terms = _CALL.triton(h, weight, dy, dstream, eps)
    return dx, mean.sum.triton(terms, 0).to(h.dtype)


def _specified(h, weight, dy, dstream, eps):
    """dx in h's dtype, and what is added up for dweight, (T, D) float32."""
    _CALL.check(h, weight, dy, dstream, eps)
    x, given = h.float(), dy.float()
    total = ordered_sum(x * x)
    share = torch.full_like(total, 1.0 / h.shape[1])  # a float32 tensor: both factors round once, alike
    root = (total * share + torch.full_like(total, eps)).double().sqrt().float()  # a CPU's float32 sqrt is not exact
    r = 1.0 / root
    g, n = given * weight.float(), x * r
    k = (ordered_sum(g * x) * r) * share
    dx = (g - n * k) * r
    if dstream is not None:
        dx = dx + dstream.float()
    return dx.to(h.dtype), given * n


@triton.jit
def _kernel(h_ptr, weight_ptr, dy_ptr, dstream_ptr, dx_ptr, terms_ptr, rows, eps, D: tl.constexpr,
            WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_STREAM: tl.constexpr, PDL: tl.constexpr):
    """ROWS rows a program, held in registers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    hs = ()
    dys = ()
    weights = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        inside = (row < rows) & (j < D)
        hs = hs + (tl.load(h_ptr + row * D + j, mask=inside, other=0.0),)
        dys = dys + (tl.load(dy_ptr + row * D + j, mask=inside, other=0.0),)
        weights = weights + (tl.load(weight_ptr + j, mask=j < D, other=0.0),)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    for c in tl.static_range(CHUNKS):
        h = hs[c].to(tl.float32)
        product = (dys[c].to(tl.float32) * weights[c].to(tl.float32)) * h
        squares = h * h if c == 0 else squares + h * h
        products = product if c == 0 else products + product
    total = tl.reshape(tree(squares), [ROWS])  # of one dimension: else every thread would work out the whole row
    c = tl.reshape(tree(products), [ROWS])
    r = tl.div_rn(1.0, tl.sqrt_rn(total * (1.0 / D) + eps))
    k = ((c * r) * (1.0 / D))[:, None]
    r = r[:, None]
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        inside = (row < rows) & (j < D)
        n = hs[c].to(tl.float32) * r
        dy = dys[c].to(tl.float32)
        dx = (dy * weights[c].to(tl.float32) - n * k) * r
        if HAS_STREAM:
            dx += tl.load(dstream_ptr + row * D + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + j, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(terms_ptr + row * D + j, dy * n, mask=inside)


@dataclass(frozen=True)
class Schedule:
    """Rows a program, and warps."""

    rows: int = 1
    warps: int = 4


class _RMSNormBackward(BackwardCall):
    """A schedule that leaves dweight's terms for the op `sum`."""

    name = "rms_norm_backward"
    parameters = "Tensor h, Tensor weight, Tensor dy, Tensor? dstream=None, float eps=1e-6"
    Schedule, kernel = Schedule, _kernel

    def check(self, h, weight, dy, dstream=None, eps=1e-6):
        given = {"h": h, "weight": weight, "dy": dy} | ({} if dstream is None else {"dstream": dstream})
        check_tensors(**given)
        if h.dim() != 2 or not 1 <= h.shape[1] <= WIDEST:
            raise ValueError(f"h must have shape (T, D) with D from 1 to {WIDEST}, got {tuple(h.shape)}")
        check_tokens("weight", weight, h.shape[1:], h.dtype, h)
        for name in ("dy", "dstream"):
            if name in given:
                check_tokens(name, given[name], h.shape, h.dtype, h)
        if not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
            raise ValueError(f"eps must be a positive number, got {eps!r}")

    def results(self, h, weight, dy, dstream, eps):
        return {"dx": torch.empty_like(h, memory_format=torch.contiguous_format),
                "terms": torch.empty(h.shape, dtype=torch.float32, device=h.device)}

    def schedule(self, h, weight, dy, dstream, eps):
        width = tree_width(h.shape[1])
        return Schedule(max(1, CHUNK // width), 4 if h.shape[1] <= 2 * CHUNK else 8)

    def readable(self, h, weight, dy, dstream, eps):
        return *(t if t is None else t.contiguous() for t in (h, weight, dy, dstream)), eps

    def steps(self, schedule, h, weight, dy, dstream, eps):
        given = dict.fromkeys(("h_ptr", "weight_ptr", "dy_ptr", "dstream_ptr", "dx_ptr"), h.dtype)
        return [Step(_kernel, -(-len(h) // schedule.rows), {**given, "terms_ptr": torch.float32},
                     {"rows": len(h), "eps": eps},
                     {"D": h.shape[1], "WIDTH": tree_width(h.shape[1]), "ROWS": schedule.rows,
                      "HAS_STREAM": dstream is not None}, {"num_warps": schedule.warps})]


_CALL = _RMSNormBackward()
rms_norm_backward = Pass("rms_norm_backward", "a row: chunks of 1024 in sequence, then neighbours in pairs; dweight: "
                         "the same over the tokens", _python, _triton, _CALL)
