"""Fused multiply-add, exponential and logarithm of float32 with the same bits everywhere.

IEEE 754 does not say which bits an exponential or a logarithm has, so every library and every GPU has its own.
Here both are a fixed chain of float32 operations that it does fix (fused multiply-add, add, multiply, maximum,
minimum) and of shifts of a number's bits. So plain PyTorch on a CPU or a GPU and a Triton kernel agree for every
input. A NaN comes out as some NaN. Below, fma(a, b, c) is a b + c rounded once.

exp(x). Clamp x to [-104, 89]. n = fma(x, 1 / ln 2, M) - M is an integer: beside M = 1.5 * 2**23 + 157 no fraction
fits. r = fma(n, -l, fma(n, -h, x)) with h + l = ln 2, so |r| < 0.35. Then e**r = 1 + s with s = fma(r * r, q(r), r),
q of degree 4 by Horner's rule, one fma a coefficient. The result is (1 + s) 2**n, in two steps, of which the first
is exact and the second rounds only to a subnormal number. Largest error over every float32: 0.987 ulp.

log(x). x = m 2**n with m in [sqrt(1/2), sqrt(2)), after a factor of 2**23 if x is subnormal. f = m - 1 is exact.
log m = fma(f * f, q(f), f), q of degree 8 by Horner's rule. The result is fma(n, h, log m). Largest error over every
float32: 0.922 ulp.

Neither falls where its argument rises. An ulp is the distance between two float32 numbers where the exact result
lies. (1 + r (1 + r q(r)), Horner's rule to the end, takes as many instructions as 1 + s, and does fall, at some r
above -1/4.)

The coefficients of q are minimax polynomials (Remez's algorithm), rounded to float32; those of exp were then
moved by a random search that lowered the largest error.

Method: Cody and Waite, Software Manual for the Elementary Functions, 1980 (both reductions). Boldo and
Melquiond, Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd, 2008 (fma).
"""
from __future__ import annotations

from ctypes import c_float

import torch

from ..runtime import HAS_TRITON, device_function, tl, where

LOWEST_FLOAT = torch.finfo(torch.float32).min  # -3.4e38
LOWEST, HIGHEST = -104.0, 89.0  # e**-104 rounds to 0, e**89 to infinity
LOG2_E = float.fromhex("0x1.715476p+0")
LN2, LN2_REST = float.fromhex("0x1.62e430p-1"), float.fromhex("-0x1.05c610p-29")
SHIFT = 30  # what 2**n is short of while it is built, so that a subnormal result is rounded once
MAGIC = 1.5 * 2**23 + 127 + SHIFT  # x + MAGIC holds the rounded x, ready to be an exponent, in its lowest bits
EXP = tuple(map(float.fromhex, (
    "0x1p-1", "0x1.55548cp-3", "0x1.5558cep-5", "0x1.12475ep-7", "0x1.69fc84p-10")))
LOG = tuple(map(float.fromhex, (
    "-0x1.fffff8p-2", "0x1.555550p-2", "-0x1.000422p-2", "0x1.99a3f6p-3", "-0x1.542810p-3", "0x1.2271b2p-3",
    "-0x1.0f32dap-3", "0x1.08466cp-3", "-0x1.383fcap-4")))
SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)
SMALLEST_NORMAL = 2.0**-126
SLICE = 1 << 14  # elements


def fma(a, b, c) -> torch.Tensor:
    """a * b + c in float32, rounded once: what a GPU's fused multiply-add gives, on any device, for every input.

    Float32 tensors of shapes that broadcast; one or two of the three may be numbers, which are rounded to float32.
    Raises TypeError or ValueError for anything else, RuntimeError where a gradient is asked for.

    In float64 the product is exact and the sum is not. So the sum is rounded to odd: where it is inexact, of its two
    neighbours in float64 the one with an odd last bit is taken. That is never halfway between two float32
    numbers, so the last rounding goes the right way.
    """
    operands = [_operand(name, v) for name, v in (("a", a), ("b", b), ("c", c))]
    shapes = [v.shape for v in operands if isinstance(v, torch.Tensor)]
    if not shapes:
        raise TypeError("a, b or c must be a tensor, got three numbers")
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(f"a, b and c must broadcast, got shapes {', '.join(str(tuple(s)) for s in shapes)}") from None
    devices = {v.device for v in operands if isinstance(v, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"a, b and c must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return _by_slices(_fma, *operands)


def exp(x: torch.Tensor) -> torch.Tensor:
    """e**x of a float32 tensor of any shape, as this file says.

    exp(-inf) = +0, exp(+-0) = 1, exp(inf) = inf, exp(NaN) = NaN. Raises TypeError for other dtypes, RuntimeError
    where a gradient is asked for.
    """
    _check("x", x)
    return _by_slices(_exp, x.flatten()).view(x.shape)


def log(x: torch.Tensor) -> torch.Tensor:
    """The natural logarithm of a float32 tensor of any shape, as this file says.

    log(1) = +0, log(+-0) = -inf, log(inf) = inf, NaN for NaN and below zero. Raises TypeError for other dtypes,
    RuntimeError where a gradient is asked for.
    """
    _check("x", x)
    return _by_slices(_log, x.flatten()).view(x.shape)


def _fma(a, b, c):
    product = _wide(a) * _wide(b)
    c = _wide(c)
    total = product + c
    added = total - product
    error = (product - (total - added)) + (c - added)
    bits = total.view(torch.int64)
    toward_zero = (bits ^ error.view(torch.int64)) >> 63  # -1 where the exact sum is the smaller one, else 0
    odd = ((bits + toward_zero) | 1).view(torch.float64)
    return torch.where(error.abs() > 0, odd, total).float()  # the error of an infinite sum is NaN, and not > 0


def _exp(x):
    x = x.clamp(LOWEST, HIGHEST)
    shifted = _fma(x, LOG2_E, MAGIC)
    n = shifted - MAGIC
    r = _fma(n, -LN2_REST, _fma(n, -LN2, x))
    s = _fma(r * r, _horner(r, EXP), r)
    up = x > 0
    exponent = shifted.view(torch.int32)
    scale = (torch.where(up, exponent - 2 * SHIFT, exponent) << 23).view(torch.float32)
    y = (1.0 + s) * scale
    return torch.where(up, y * 2.0**SHIFT, y * 2.0**-SHIFT)


def _log(x):
    small = x < SMALLEST_NORMAL
    bits = torch.where(small, x * 2.0**23, x).view(torch.int32)
    exponent = (bits - SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    n = torch.where(small, exponent - 23, exponent).float()
    y = _fma(n, LN2, _fma(f * f, _horner(f, LOG), f))
    y = torch.where(x > 0, y, float("nan"))
    y = torch.where(x == 0, -float("inf"), y)
    return torch.where(x == float("inf"), x, y)


def _horner(x, coefficients):
    """c0 + x (c1 + x (c2 + ...)), one fused multiply-add for each coefficient but the last."""
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = _fma(x, total, c)
    return total


def _by_slices(function, *operands):
    """function(*operands) of each element; on a CPU in slices so short that all its temporaries stay in the cache."""
    tensors = [v for v in operands if isinstance(v, torch.Tensor)]
    shape = torch.broadcast_shapes(*(v.shape for v in tensors))
    if tensors[0].device.type != "cpu" or shape.numel() <= SLICE:
        return function(*operands)

    def rows(value, start, stop):
        whole = not isinstance(value, torch.Tensor) or value.dim() < len(shape) or value.shape[0] == 1
        return value if whole else value[start:stop]

    result = torch.empty(shape, dtype=torch.float32, device="cpu")
    step = max(1, SLICE * shape[0] // shape.numel())
    for start in range(0, shape[0], step):
        result[start : start + step] = function(*(rows(v, start, start + step) for v in operands))
    return result


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def _operand(name, value):
    """A float32 tensor as it is, a number rounded to float32."""
    if isinstance(value, (int, float)):
        return c_float(value).value
    _check(name, value)
    return value


def _check(name, tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires a gradient, which this function does not have: "
                           "call it under torch.no_grad()")


def for_kernels(value):
    """A constant as a kernel may read it."""
    return tl.constexpr(value) if HAS_TRITON else value


_INTERPRETED, _EXP, _LOG, _SQRT_HALF, _SMALLEST_NORMAL, _UP, _DOWN = map(for_kernels, (
    where() == "INTERPRETER", EXP, LOG, SQRT_HALF, SMALLEST_NORMAL, 2.0**SHIFT, 2.0**-SHIFT))
_LOWEST, _HIGHEST, _LOG2_E, _LN2, _LN2_REST, _MAGIC, _TWICE_SHIFT = map(for_kernels, (
    LOWEST, HIGHEST, LOG2_E, LN2, LN2_REST, MAGIC, 2 * SHIFT))


@device_function
def tl_fma(a, b, c):
    """`fma` in a kernel: one instruction on a GPU. The interpreter's own rounds twice, so float64 does it there."""
    if _INTERPRETED:
        product = tl.cast(a, tl.float64) * tl.cast(b, tl.float64)
        c = tl.cast(c, tl.float64)
        total = product + c
        added = total - product
        error = (product - (total - added)) + (c - added)
        bits = total.to(tl.int64, bitcast=True)
        toward_zero = (bits ^ error.to(tl.int64, bitcast=True)) >> 63
        odd = ((bits + toward_zero) | 1).to(tl.float64, bitcast=True)
        return tl.where(tl.abs(error) > 0, odd, total).to(tl.float32)
    else:  # noqa: RET505 - only a branch that is not taken is not compiled
        return tl.fma(a, b, c)


@device_function
def opaque(x):
    """x, hidden from LLVM, whose vectoriser otherwise takes minutes over long chains of maxima and exponentials."""
    if _INTERPRETED:
        return x
    else:  # noqa: RET505 - a branch that is not taken must not be compiled
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@device_function
def tl_exp(x, NONPOSITIVE: tl.constexpr = False):
    """`exp` in a kernel: 14 instructions a number if the caller promises that none is above zero, else 19."""
    x = tl.maximum(x, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    if not NONPOSITIVE:
        x = tl.minimum(x, _HIGHEST, propagate_nan=tl.PropagateNan.ALL)
    shifted = tl_fma(x, _LOG2_E, _MAGIC)
    n = shifted - _MAGIC
    r = tl_fma(n, -_LN2_REST, tl_fma(n, -_LN2, x))
    s = tl_fma(r * r, _tl_horner(r, _EXP, 5), r)
    exponent = shifted.to(tl.int32, bitcast=True)
    if not NONPOSITIVE:
        exponent = tl.where(x > 0, exponent - _TWICE_SHIFT, exponent)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    y = tl_fma(s, scale, scale)  # (1 + s) * scale: a power of two does not move the rounding
    if NONPOSITIVE:
        return y * _DOWN
    else:  # noqa: RET505
        return y * tl.where(x > 0, _UP, _DOWN)


@device_function
def tl_log(x):
    """`log` in a kernel."""
    small = x < _SMALLEST_NORMAL
    bits = tl.where(small, x * 2.0**23, x).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = tl.where(small, exponent - 23, exponent).to(tl.float32)
    y = tl_fma(n, _LN2, tl_fma(f * f, _tl_horner(f, _LOG, 9), f))
    y = tl.where(x > 0, y, float("nan"))
    y = tl.where(x == 0, -float("inf"), y)
    return tl.where(x == float("inf"), x, y)


@device_function
def _tl_horner(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    total = tl_fma(x, COEFFICIENTS[COUNT - 1], COEFFICIENTS[COUNT - 2])
    for i in tl.static_range(COUNT - 2):
        total = tl_fma(x, total, COEFFICIENTS[COUNT - 3 - i])
    return total
