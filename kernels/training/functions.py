"""The model's steps as autograd knows them: forward by this suite's ops, backward by the passes beside this file.

`how` is `python` or `triton`, the name of the implementation in both directions. A stream's gradient goes into the
RMSNorm that read it and is added there, so that autograd itself adds nothing.

Gradients that add over the T tokens of a batch, those of matrices and of the embedding, are products, whose order is
the tokens': segments of 2048 tokens, each a chain of its own, added in sequence.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import mean
from ..ops.attention.op import attention_prefill
from ..ops.matmul.op import matmul
from ..ops.matmul.order import Order
from ..ops.rms_norm import rms_norm
from ..ops.rotary import rotary
from ..ops.softmax import log_softmax
from ..ops.swiglu import swiglu
from .attention import attention_backward
from .cross_entropy import cross_entropy_backward
from .rms_norm import rms_norm_backward
from .swiglu import swiglu_backward

SEGMENT = 2048  # tokens: one chain over all would keep most of a GPU waiting


def over_tokens(tokens: int) -> Order:
    """The order of a product that adds over so many tokens."""
    return Order(1, tokens) if tokens <= SEGMENT else Order(-(-tokens // SEGMENT), SEGMENT)


class Embed(Function):
    """tokens (T,), table (V, D) -> (T, D). Its gradient is the product of the tokens' ones and zeros."""

    @staticmethod
    def forward(ctx, tokens, table, how):
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.how = len(table), how
        return F.embedding(tokens, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tokens, = ctx.saved_tensors
        hot = tokens[:, None] == torch.arange(ctx.rows, dtype=torch.int64, device=tokens.device)
        product = matmul.implementation(ctx.how)
        return None, product(hot.to(dy.dtype).t(), dy.t(), None, over_tokens(len(tokens))), None


class Linear(Function):
    """x (T, K), weight (N, K) -> (T, N), k cut as `order` says, None for the op's own choice.

    dx is a product by the weight's transpose, in the op's own order.
    """

    @staticmethod
    def forward(ctx, x, weight, order, how):
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return matmul.implementation(how)(x, weight, None, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), product = ctx.saved_tensors, matmul.implementation(ctx.how)
        dx = product(dy, weight.t().contiguous())  # the copy is small, and bulk copies need it
        return dx, product(dy.t(), x.t(), None, over_tokens(len(x))), None, None


class Norm(Function):
    """x (T, D), weight (D,), residual (T, D) or None -> the normalised sum and the sum itself, the new stream."""

    @staticmethod
    def forward(ctx, x, weight, residual, eps, how):
        ctx.set_materialize_grads(False)
        norm = rms_norm.implementation(how)
        y, stream = (norm(x, weight, None, eps), x) if residual is None else norm(x, weight, residual, eps)
        ctx.save_for_backward(stream, weight)
        ctx.eps, ctx.how, ctx.added = eps, how, residual is not None
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstream):
        stream, weight = ctx.saved_tensors
        dx, dweight = rms_norm_backward.implementation(ctx.how)(stream, weight, dy, dstream, ctx.eps)
        return dx, dweight, dx if ctx.added else None, None, None


class Attend(Function):
    """qkv (T, (heads + 2 kv_heads) * D) -> (T, heads * D): queries and keys turned, then causal attention."""

    @staticmethod
    def forward(ctx, qkv, heads, kv_heads, places, how):
        x = qkv.unflatten(1, (heads + 2 * kv_heads, -1))
        turned = rotary.implementation(how)(x[:, : heads + kv_heads], places.table, places.positions)
        q, k, v = turned[:, :heads], turned[:, heads:], x[:, heads + kv_heads :]
        cached = (t.unflatten(0, (-1, places.length)) for t in (k, v))
        y, lse = attention_prefill.implementation(how)(q, *cached, places.sequences, 0, True)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.places, ctx.how = places, how
        return y.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, y, lse = ctx.saved_tensors
        places, turn = ctx.places, rotary.implementation(ctx.how)
        given = dy.view(y.shape), places.length
        dq, dk, dv = attention_backward.implementation(ctx.how)(q, k, v, y, lse, *given)
        dq, dk = (turn(d, places.turned_back, places.positions) for d in (dq, dk))
        return torch.cat([dq, dk, dv], 1).flatten(1), None, None, None, None


class SwiGLU(Function):
    """gate_up (T, 2F) -> (T, F)"""

    @staticmethod
    def forward(ctx, gate_up, how):
        ctx.save_for_backward(gate_up)
        ctx.how = how
        return swiglu.implementation(how)(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return swiglu_backward.implementation(ctx.how)(*ctx.saved_tensors, dy), None


class CrossEntropy(Function):
    """logits (T, V), targets (T,) -> the mean of -log p(target) in natural units, () float32."""

    @staticmethod
    def forward(ctx, logits, targets, how):
        logp = log_softmax.implementation(how)(logits, -1, torch.float32)
        ctx.save_for_backward(logp, targets)
        ctx.how = how
        return mean.mean.implementation(how)(-logp.gather(1, targets[:, None]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return cross_entropy_backward.implementation(ctx.how)(*ctx.saved_tensors, dloss), None, None
