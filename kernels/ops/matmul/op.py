"""The matrix product y = x @ weight.T + bias, in F.linear's layout, in one order at every token count.

The order of one element of y, for weight (N, K). float16 and bfloat16: a chain over k, sixteen products a step, each
step one addition of the tensor core (arithmetic/tensor_core.py says what that rounds). float32: a chain over k of fused
multiply-adds, one rounding each. One chain leaves a GPU idle where a weight has few rows, and where k is very long.
There `order(N, K)` cuts k into segments of one length, each with a chain of its own that starts from zero.
The sum starts from +0, the chains are added to it in sequence in float32, then the bias; the result is rounded
once to the dtype.

Why a batch cannot change it: the order names one row of x, one row of the weight, and the two numbers N and K.
The number of tokens chooses tiles, warps, and whether segments run side by side, which is no part of the order.
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ... import bits
from ...arithmetic import tensor_core
from ...arithmetic.elementary import fma
from ...launch import Plans, check_tensors
from ...op import Op, Shape, Work
from ...runtime import HAS_GPU, Unavailable, current_device, has_pdl
from . import schedule as schedules
from .plan import Plan
from .schedule import Schedule

SEGMENT_STEP = 256  # segments are so many k long, or a multiple: every tile's block of k divides them
SHORTEST_SEGMENT = 512  # two blocks of k at least: a compiler may merge segments of one block into one chain
FEW_ROWS = 2048  # as many rows fill a GPU with one chain each
LONG = 8192  # a longer chain is too long a wait where there are few tokens


def order(n: int, k: int) -> tuple[int, int]:
    """(segments, length): k of a weight (n, k) is cut every `length`, into so many segments; (1, k) is one chain."""
    wanted = 1
    while wanted < 8 and wanted * n < FEW_ROWS:
        wanted *= 2
    wanted = max(wanted, -(-k // LONG))
    length = max(-(-k // wanted), SHORTEST_SEGMENT)
    length += -length % SEGMENT_STEP
    return (1, k) if wanted == 1 or length >= k else (-(-k // length), length)


def _cuda(x, weight, bias=None):
    """The default: F.linear."""
    return F.linear(x, weight, bias)


def _python(x, weight, bias=None):
    """The specification: x (..., K), weight (N, K), bias (N,) or None -> (..., N) in x's dtype.

    float32, float16 or bfloat16, all of one dtype. Raises TypeError or ValueError for anything else.
    """
    if torch.is_grad_enabled() and _wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, _specified)
    return _specified(x, weight, bias)


def _specified(x, weight, bias, whole=False):
    """The specification without gradients; `whole` makes it one chain whatever (N, K)."""
    _check(x, weight, bias)
    segments, length = (1, x.shape[-1]) if whole else order(*weight.shape)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    total = torch.zeros(len(rows), len(weight), dtype=torch.float32, device=x.device)
    for start in range(0, segments * length, max(length, 1)):
        piece = slice(start, start + length)
        total = total + _chain(rows[:, piece], weight[:, piece])
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).view(*x.shape[:-1], len(weight))


def _chain(x, weight):
    """One chain over k: x (M, K), weight (N, K) -> (M, N) float32."""
    if x.dtype != torch.float32:
        return tensor_core.chain(x, weight)
    total = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        total = fma(x[:, k, None].expand_as(total), weight[None, :, k].expand_as(total), total)
    return total


def _triton(x, weight, bias=None):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it.

    float16 and bfloat16 have its bits on a Hopper GPU. Older tensor cores add in another way, which is warned about.
    """
    if torch.compiler.is_compiling():
        return _matmul_op(x, weight, bias)
    if torch.is_grad_enabled() and _wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, _run)
    return _run(x, weight, bias)


def _wants_gradient(x, weight, bias):
    return getattr(x, "requires_grad", False) or getattr(weight, "requires_grad", False) or getattr(
        bias, "requires_grad", False)


def run_schedule(schedule: Schedule, x, weight, bias=None):
    """Run one given schedule; tests and the tuner use it. Same arguments and bits as the rest.

    Raises Unsuitable (a ValueError) if the schedule cannot carry out this shape's order or read these strides.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}; Schedule.parse reads one line of "
                        "text")
    return _run(x, weight, bias, schedule=schedule)


_PLANS = Plans()


def _run(x, weight, bias, whole=False, schedule=None):
    """The product by a kept plan; `whole` makes it one chain whatever (N, K), for a k that is a token count."""
    try:
        if x.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg()):
            x, weight = x.resolve_neg(), weight.resolve_neg()  # lazily negated: the memory holds the opposite
            bias = None if bias is None else bias.resolve_neg()
        key = (x.shape, x.stride(), x.dtype, x.get_device(), weight.shape, weight.stride(), weight.dtype,
               weight.get_device(), weight.is_meta, whole, schedule)
        if bias is not None:
            key += (bias.shape, bias.dtype, bias.get_device())
    except (AttributeError, RuntimeError):  # not tensors, or without strides: say so by name
        _check(x, weight, bias)
        raise
    plan = _PLANS.get(key) or _PLANS.keep(key, _planned(x, weight, bias, whole, schedule))
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    return plan(x, weight, bias)


def _planned(x, weight, bias, whole, schedule):
    _check(x, weight, bias)
    return Plan(x, weight, bias, (1, weight.shape[1]) if whole else order(*weight.shape), schedule)


def _check(x, weight, bias):
    check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions (N, K), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have a last dimension of {weight.shape[1]}, the K of weight {tuple(weight.shape)}, "
                         f"got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), the N of weight, got {tuple(bias.shape)}")


class _Linear(torch.autograd.Function):
    """The product with a backward pass whose three sums have an order too.

    dx = dy @ weight          as a product by weight.t(): order(K, N)
    dweight = dy.t() @ x      one chain over the tokens, in their order; so it depends on how many there are
    dbias = dy.t() @ ones     the same chain
    """

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return (*_gradients(ctx.needs_input_grad, dy, *ctx.saved_tensors, ctx.product), None)


def _gradients(needs, dy, x, weight, product):
    """(dx, dweight, dbias), None for those not needed; product(x, weight, bias, whole) as in `_run`."""
    tokens = math.prod(x.shape[:-1])
    rows, dy_rows = x.reshape(tokens, x.shape[-1]), dy.reshape(tokens, dy.shape[-1])
    dx = product(dy_rows, weight.t(), None).view(x.shape) if needs[0] else None
    dweight = product(dy_rows.t(), rows.t(), None, True) if needs[1] else None
    dbias = None
    if needs[2]:
        ones = torch.ones(1, tokens, dtype=x.dtype, device=x.device)
        dbias = product(dy_rows.t(), ones, None, True)[:, 0]
    return dx, dweight, dbias


@torch.library.custom_op("same_bits::matmul", mutates_args=())
def _matmul_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
               whole: bool = False) -> torch.Tensor:
    return _run(x, weight, bias, whole)


@_matmul_op.register_fake
def _(x, weight, bias=None, whole=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _backward(ctx, dy):
    needs = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    return (*_gradients(needs, dy, *ctx.saved_tensors, _matmul_op), None)


_matmul_op.register_autograd(_backward, setup_context=_save)


def tiled(x, weight, bias=None):
    """Batch-invariant in plain PyTorch: 128 rows at a time, the last ones padded, so that every call has one shape.

    The order is the library's, unknown but the same for a row in any batch, if a row's place in its tile does not
    matter to the library: *certified by test, not by construction*.
    """
    _check(x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % 128))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(128) if len(padded)]
    y = torch.cat(tiles)[: len(rows)] if tiles else rows.new_empty(0, len(weight))
    return y.view(*x.shape[:-1], len(weight))


FROZEN = Schedule("pointer", 128, 128, 64, warps=8, stages=3, group=8)
_FROZEN_FLOAT32 = replace(FROZEN, block_k=16)


def frozen(x, weight, bias=None):
    """Batch invariance as it is usually had: one schedule, tiles of 128 by 128 by 64, for all token counts."""
    _check(x, weight, bias)
    return run_schedule(FROZEN if x.dtype != torch.float32 else _FROZEN_FLOAT32, x, weight, bias)


_SWITCH = {torch.bfloat16: "allow_bf16_reduced_precision_reduction",
           torch.float16: "allow_fp16_reduced_precision_reduction"}


def cublas_no_split_k(x, weight, bias=None):
    """F.linear with cuBLAS told not to split k; the settings are put back afterwards.

    Nothing is guaranteed: cuBLAS still chooses a kernel by the number of tokens. *By test*, its bits are ours wherever
    our order is one chain; where it is several they are not (but at one recorded point), and moved at a few.
    Raises Unavailable on a CPU and for float32, which have no such setting.
    """
    _check(x, weight, bias)
    if not x.is_cuda or x.dtype not in _SWITCH:
        raise Unavailable(f"cuBLAS has no setting against split-K for {x.dtype} on {x.device.type}")
    switches, name, library = torch.backends.cuda.matmul, _SWITCH[x.dtype], torch.backends.cuda.preferred_blas_library
    before, preferred = (getattr(switches, name), getattr(switches, f"{name}_split_k")), library()
    try:
        library("cublaslt")  # the only one of cuBLAS's interfaces that knows the setting
        setattr(switches, name, (False, False))
        return F.linear(x, weight, bias)
    finally:
        setattr(switches, name, before)
        library(preferred)


def _spread(width: int, step: int, dtype, device) -> torch.Tensor:
    """2**-4 to 2**4 over the columns: 8-bit numbers of one size have sums that are exact, and so no order."""
    exponent = torch.arange(width, device=device) * step % 9
    return ((torch.ones_like(exponent) << exponent) * 2.0**-4).to(dtype)


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    shape = Shape.parse(shape, "N", "K")
    x = bits.portable(tokens, shape["K"], dtype, device, seed) * _spread(shape["K"], 7, dtype, device)
    weight = bits.portable(shape["N"], shape["K"], dtype, device, seed + 1) * _spread(shape["K"], 5, dtype, device)
    bias = bits.portable(1, shape["N"], dtype, device, seed + 2)[0] if shape.get("bias") else None
    return x, weight, bias


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    shape = Shape.parse(shape, "N", "K")
    n, k = shape["N"], shape["K"]
    bias = n if shape.get("bias") else 0
    return Work(bytes=(tokens * (n + k) + n * k + bias) * dtype.itemsize, flops=2 * tokens * n * k)


def _index() -> int:
    return current_device() if HAS_GPU else -1


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    n, k = (Shape.parse(shape, "N", "K")[name] for name in "NK")
    shape = Shape(N=n, K=k)
    chosen = [s for tokens in (1 << i for i in range(18)) for index in {-1, _index()}
              for s in schedules.choose("matmul", shape, dtype, tokens, index)]
    if dtype == torch.float32:
        tiles = [Schedule("pointer", *tile, warps=4, stages=2) for tile in ((16, 16, 16), (32, 64, 32), (64, 16, 32))]
    else:
        tiles = [Schedule("pointer", m, n, k, warps=w, stages=s) for m, n, k, w, s in (
            (16, 16, 16, 1, 2), (16, 128, 64, 4, 3), (64, 32, 128, 4, 2), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4))]
        tiles += [Schedule("hopper", m, n, k, warps=w, stages=s, swap=swap, persistent=True, stream=stream)
                  for m, n, k, w, s, swap, stream in (
                      (128, 256, 64, 8, 3, False, False), (256, 128, 64, 8, 3, True, False),
                      (16, 64, 64, 4, 8, True, True), (32, 128, 64, 8, 6, True, True), (64, 16, 64, 4, 8, False, True),
                      (64, 160, 64, 4, 6, False, False), (64, 80, 64, 4, 8, False, True))]
        tiles.append(Schedule("hopper", 128, 256, 64, warps=8, stages=3, persistent=True, store=True))
    every = list(dict.fromkeys(chosen + tiles + [replace(s, swap=not s.swap) for s in tiles if s.kind == "pointer"]))
    if order(n, k)[0] > 1:
        every += [replace(s, split=not s.split, reduce=False) for s in every
                  if not (s.persistent or s.store or s.kind == "hopper")]
        every += [replace(s, split=True, reduce=True) for s in every if s.kind == "hopper" or not s.persistent]
        length = order(n, k)[1]
        every = [s for s in every if not length % s.block_k and (s.split or length >= 2 * s.block_k and not s.stream)]
    gpu = HAS_GPU and has_pdl(_index()) and k * dtype.itemsize % 16 == 0
    return [s for s in dict.fromkeys(every) if s.kind == "pointer" or gpu]


def _schedule(tokens, shape, dtype) -> str:
    return str(next(schedules.choose("matmul", shape, dtype, tokens, _index())))


_LLAMA_8B = ("N=6144,K=4096", "N=4096,K=4096", "N=28672,K=4096", "N=4096,K=14336", "N=128256,K=4096")
_SHARDS = ("N=1280,K=8192", "N=7168,K=8192", "N=8192,K=1024", "N=8192,K=3584", "N=1024,K=4096", "N=512,K=4096")

matmul = Op(
    name="matmul",
    title="Matrix product",
    order="a chain over k; small or deep weights: k in segments of fixed length, added in sequence",
    cuda=_cuda,
    python=_python,
    triton=_triton,
    inputs=_inputs,
    work=_work,
    per_token=(0,),
    shapes=_LLAMA_8B + _SHARDS,
    schedules=_schedules,
    schedule=_schedule,
    extras={"tiled": tiled, "frozen": frozen, "cublas_no_split_k": cublas_no_split_k},
)
