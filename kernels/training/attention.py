"""The gradients of causal attention, whose every sum has an order; and the specification that carries it out.

Sequences of equal length lie one after another. For one sequence and one head, query i sees the keys j <= i, and
p[i, j] = exp(q[i] . k[j] / sqrt(D) - lse[i]), made anew from the log-sum-exp that the forward pass returns. Every
number is float32 unless said otherwise, every operation is rounded once, fma(a, b, c) is a * b + c rounded once; scale,
chains and ex2 are those of ops/attention/order.py.

    1. delta[i] = the sum of dy[i] * y[i] over D, as arithmetic/sums.py says; e[i] = lse[i] * log2(e)
    2. s = q[i] . k[j], a chain over D;  p = ex2(fma(s, scale, -e[i])), 0 where the key is unseen
    3. t = dy[i] . v[j], a chain over D;  d = p * (t - delta[i])
    4. dq[i] = the chain over the sequence's keys of d, rounded to bfloat16, and k[j]
    5. dv[j] = the chain over the sequence's queries of p, rounded to bfloat16, and dy[i]
    6. dk[j] = the chain over the sequence's queries of d, rounded to bfloat16, and q[i]
    7. dq and dk are multiplied by float32(1 / sqrt(D)); all three are rounded once to bfloat16

Where heads of q share one of k, the chains of dk and dv run through the queries of the first head, then of the next,
and so on. Blocks that are wholly unseen may be left out: a chain to which 0 is added keeps its bits.

Why a batch cannot change it: every operation names one sequence, its length and its positions. Why no launch can: a
program owns its rows of dq, or of dk and dv, and takes the blocks in order; nothing is added by atomics.

Method: Dao, FlashAttention-2, arXiv 2307.08691.
"""
from __future__ import annotations

import math
from ctypes import c_float
from dataclasses import dataclass

import torch

from ..arithmetic.elementary import LOG2_E, fma
from ..arithmetic.ex2 import ex2
from ..arithmetic.sums import ordered_sum
from ..arithmetic.tensor_core import chain
from ..call import check_tensors
from ..launch import Step
from ..ops.attention.order import scale_of
from .attention_kernels import keys_kernel, queries_kernel
from .backward import DTYPE, BackwardCall, Pass, check_tokens

WIDTHS = (16, 32, 64, 128)  # D


def root_of(width: int) -> float:
    """1 / sqrt(D), rounded to float32."""
    return c_float(1.0 / math.sqrt(width)).value


def _python(q, k, v, y, lse, dy, length):
    """The specification: the gradients (dq, dk, dv) of attention over sequences of `length` positions each.

    q, y, dy   (T, H, D) bfloat16, T a multiple of `length`, D 16, 32, 64 or 128; y is attention's result, dy its
               gradient
    k, v       (T, KV, D) bfloat16, H a multiple of KV
    lse        (T, H) float32, as attention returns it

    Raises TypeError or ValueError for anything else.
    """
    _CALL.check(q, k, v, y, lse, dy, length)
    results = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta = ordered_sum(dy.float() * y.float())[..., 0]
    group, given = q.shape[1] // k.shape[1], (q, k, v, lse * LOG2_E, delta, dy)
    for start in range(0, len(q), length):
        own = slice(start, start + length)
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            q_, e, delta_, dy_ = (given[i][own, heads] for i in (0, 3, 4, 5))
            found = _one_head(q_, k[own, head], v[own, head], e, delta_, dy_)
            for result, part, which in zip(results, found, (heads, head, head), strict=True):
                result[own, which] = part
    return results


def _one_head(q, k, v, e, delta, dy):
    """One sequence and one head of k: q, dy (L, group, D), k, v (L, D), e, delta (L, group) -> dq, dk, dv, float32."""
    scale, root = scale_of(q.shape[2]), torch.full((), root_of(q.shape[2]), dtype=torch.float32, device=q.device)
    place = torch.arange(len(q), dtype=torch.int64, device=q.device)
    seen, dq, dk, dv = place[None, :] <= place[:, None], [], None, None
    for i in range(q.shape[1]):
        p = ex2(fma(chain(q[:, i], k), scale, -e[:, i, None]))
        p = torch.where(seen, p, 0.0)
        d = (p * (chain(dy[:, i], v) - delta[:, i, None])).to(DTYPE)
        dq.append(chain(d, k.t()) * root)
        dk, dv = chain(d.t(), q[:, i].t(), start=dk), chain(p.to(DTYPE).t(), dy[:, i].t(), start=dv)
    return torch.stack(dq, 1), dk * root, dv


@dataclass(frozen=True)
class Schedule:
    """Queries and keys of a block, warps a program, and blocks in flight."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2

    def __str__(self):
        return f"queries={self.queries} keys={self.keys} warps={self.warps} stages={self.stages}"


class _AttentionBackward(BackwardCall):
    """A schedule: the arguments, results and bits of the specification, on a Hopper GPU."""

    name = "attention_backward"
    parameters = "Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor dy, int length"
    Schedule, kernel = Schedule, keys_kernel

    def check(self, q, k, v, y, lse, dy, length):
        if isinstance(q, torch.Tensor) and q.dtype != DTYPE:
            raise TypeError(f"q must be {DTYPE}, got {q.dtype}")
        check_tensors(q=q, k=k, v=v, y=y, dy=dy)
        for name, tensor in (("q", q), ("k", k)):
            if tensor.dim() != 3 or tensor.shape[2] not in WIDTHS:
                raise ValueError(f"{name} must be three-dimensional, its last dimension one of "
                                 f"{', '.join(map(str, WIDTHS))}, got shape {tuple(tensor.shape)}")
        if type(length) is not int or length < 1 or len(q) % length:
            raise ValueError(f"length must be a whole number that divides q's {len(q)} tokens, got {length!r}")
        heads, kv_heads = q.shape[1], k.shape[1]
        if not kv_heads or heads % kv_heads:
            raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
        of_k = len(q), kv_heads, q.shape[2]
        for name, tensor, shape in (("k", k, of_k), ("v", v, of_k), ("y", y, q.shape), ("dy", dy, q.shape)):
            check_tokens(name, tensor, shape, DTYPE, q)
        check_tokens("lse", lse, q.shape[:2], torch.float32, q)

    def results(self, q, k, v, y, lse, dy, length):
        return {f"d{name}": torch.empty_like(t, memory_format=torch.contiguous_format)
                for name, t in (("q", q), ("k", k), ("v", v))}

    def scratch(self, q, k, v, y, lse, dy, length):
        return {"delta": torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)}

    def schedule(self, q, k, v, y, lse, dy, length):
        return Schedule()

    def readable(self, q, k, v, y, lse, dy, length):
        return (*(t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v)),
                *(t.contiguous() for t in (y, lse, dy)), length)

    def steps(self, schedule, q, k, v, y, lse, dy, length):
        heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[2]
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        names = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")
        scalars = {**dict(zip(names, strides, strict=True)), "length": length, "scale": scale_of(width),
                   "root": root_of(width)}
        constants = {"HEADS": heads, "GROUP": heads // kv_heads, "D": width, "QUERIES": schedule.queries,
                     "KEYS": schedule.keys, "STAGES": schedule.stages,
                     "ADDER": "bfloat16" if q.dtype == torch.float32 else ""}  # float32: copies, for the interpreter
        read = {"q_ptr": q.dtype, "k_ptr": q.dtype, "v_ptr": q.dtype}
        between = {"lse_ptr": torch.float32, "dy_ptr": q.dtype, "delta_ptr": torch.float32}
        sequences, warps = len(q) // length, {"num_warps": schedule.warps}
        return [Step(queries_kernel, sequences * heads * -(-length // schedule.queries),
                     {**read, "y_ptr": q.dtype, **between, "dq_ptr": q.dtype}, scalars, constants, warps),
                Step(keys_kernel, sequences * kv_heads * -(-length // schedule.keys),
                     {**read, **between, "dk_ptr": q.dtype, "dv_ptr": q.dtype}, scalars, constants, warps)]


_CALL = _AttentionBackward()
attention_backward = Pass("attention_backward", "dq: a chain over keys; dk, dv: a chain over queries, head after head",
                          _python, _CALL.triton, _CALL)
