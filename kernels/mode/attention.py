"""Rules for scaled_dot_product_attention and for the kernels it chooses from, forward and backward.

bfloat16 and float16 with heads of up to 128 numbers and the usual scale take this suite's attention. Everything else,
float32 above all, is computed as written here, in float32, for each sequence apart, its keys counted from its first:

    scores  a chain over D of q and k, each times the scale's root; -inf where a key is not seen
    p       softmax over the keys, in the order of ops/softmax/order.py, from a query's first key with a weight on
    y       a chain over the keys, in sequence, of p and v; 0 where no key is seen

What is masked adds +0 to a sum at its end, and what no query sees counts as 0 (padding may hold NaN), so neither the
padding nor the other sequences can be in a result. (Rows of more than 32768 keys have softmax's segments, which their
number decides: there a longer cache may move bits.)

PyTorch chooses the kernel before this suite is asked. Where it chooses none and multiplies itself (its math backend:
masks that learn, wide heads), its operations are the same ones, in float32, and so is its softmax (seen_softmax.py).
So a prompt has its bits by either way: on a GPU, transformers takes one way for float32 alone and the other for float32
that is padded.

The gradients, of the same p: dv a chain over queries of p and dy; with d = p * (dy . v - sum(dy * y)) * scale, dq is
a chain over keys of d and k, dk one over queries of d and q; heads that share a key add up in sequence.
"""
from __future__ import annotations

import math

import torch

from ..ops.attention.op import attention_prefill
from ..ops.attention.order import WIDEST
from ..ops.bmm import bmm
from ..ops.matmul.order import Order
from ..ops.mean import sum
from ..ops.softmax import log_softmax
from .kept_attention import as_cudnn, as_efficient, as_flash, as_rows, keep_attention, nothing, of_rows, with_nothing
from .masks import of_mask
from .products import how, supported
from .seen import Read, Seen, without_mask
from .seen_softmax import seen_softmax
from .switch import Unsupported, rule


def _seen(q, k, mask, causal) -> Seen:
    if mask is not None and causal:
        raise Unsupported("has an order for a mask or is_causal, and both were given")
    if isinstance(mask, Read):
        return mask.seen
    shape = (q.shape[0], q.shape[2], k.shape[2])
    return without_mask(*shape, causal, q.device) if mask is None else of_mask(mask, *shape, q.device)


def _check(q, k, v, dropout) -> bool:
    """False for integers. Raises Unsupported for calls that have no order."""
    if not supported(query=q, key=k, value=v):
        return False
    if dropout:
        raise Unsupported(f"has an order without dropout, and dropout_p is {dropout}")
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3] or q.shape[0] != k.shape[0] \
            or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise Unsupported(f"has an order for shapes (B, H, L, D), got {tuple(q.shape)}, {tuple(k.shape)} and "
                          f"{tuple(v.shape)}")
    return True


def attend(q, k, v, seen: Seen, scale: float | None, lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q (B, H, Q, D), k and v (B, KV, K, D) -> y (B, H, Q, D), and with `lse` (B, H, Q) float32."""
    if has_op(q, k, v, scale):
        return _by_op(q, k, v, seen, lse)
    found = [_one(q[b], k[b, :, start:], v[b, :, start:], seen.hidden(b), scale, lse)
             for b, start in enumerate(seen.starts)]
    if not found:
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32) if lse else None
    return _together([y for y, *_ in found]), _together([e for *_, e in found]) if lse else None


def _together(found: list[torch.Tensor]) -> torch.Tensor:
    """(H, Q, ..) of each sequence as (B, H, Q, ..) that lies as (B, Q, H, ..) does: tracing takes PyTorch's layout."""
    return torch.stack([t.transpose(0, 1) for t in found]).transpose(1, 2)


def has_op(q, k, v, scale) -> bool:
    usual = scale is None or math.isclose(scale, 1 / math.sqrt(q.shape[3]), rel_tol=1e-12)  # D ** -0.5 may differ
    return q.dtype != torch.float32 and q.shape[3] <= WIDEST and v.shape == k.shape and usual


def _by_op(q, k, v, seen, lse):
    """This suite's attention on one row a query, (B * Q, H, D)."""
    if not seen.keys:
        sums = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device) if lse else None
        return torch.zeros_like(q), sums
    rows = as_rows(q, seen.shifted(k), seen.shifted(v))
    found = how(q, attention_prefill)(*rows, seen.sequences, seen.window, lse)
    return with_nothing(seen, *of_rows(*(found if lse else (found, None)), q.shape[0], q.shape[2]))


def _weights(q, k, hidden, scale):
    """q (H, Q, D), k (H, K, D) float32 -> scores and softmax's results, (H, Q, K)."""
    root = math.sqrt(1 / math.sqrt(q.shape[2]) if scale is None else abs(scale))
    q = q * (-root if scale is not None and scale < 0 else root)
    scores = how(q, bmm)(q, k * root, Order(1, q.shape[2])).masked_fill(hidden, -math.inf)
    return scores, seen_softmax(scores, -1).masked_fill(hidden, 0.0)


def _for_heads(t, heads: int, hidden):
    """k or v (KV, K, D), each repeated for the heads that share it, in float32; 0 for keys that no query sees."""
    return t.float().masked_fill(hidden.all(0)[:, None], 0.0).repeat_interleave(heads // len(t), 0)


def _one(q, k, v, hidden, scale, lse):
    """One sequence: q (H, Q, D), k and v (KV, K, D) -> y (H, Q, D), its weights, lse (H, Q)."""
    k_, v_ = (_for_heads(t, len(q), hidden) for t in (k, v))
    scores, p = _weights(q.float(), k_, hidden, scale)
    y = how(q, bmm)(p, v_.transpose(1, 2), Order(1, k.shape[1])).to(q.dtype)
    if not lse:
        return y, p, None
    top = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    none = hidden.all(-1)
    rest = how(q, log_softmax)(scores, -1).amax(-1) if scores.shape[-1] else top
    return y, p, torch.where(none, top, top - rest)


def _backward(dy, q, k, v, out, seen: Seen, scale):
    """The gradients (dq, dk, dv) of `attend`."""
    results = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    product, add = how(q, bmm), how(q, sum)
    for b, start in enumerate(seen.starts):
        hidden = seen.hidden(b)
        q_, dy_, y = (t[b].float().masked_fill(hidden.all(1)[:, None], 0.0) for t in (q, dy, out))
        k_, v_ = (_for_heads(t[b, :, start:], len(q_), hidden) for t in (k, v))
        _, p = _weights(q_, k_, hidden, scale)
        over_keys, over_queries = Order(1, p.shape[2]), Order(1, p.shape[1])
        d = p * (product(dy_, v_, Order(1, v_.shape[2])) - add(dy_ * y, -1, True))
        d = d * torch.full((), scale, dtype=torch.float32, device=q.device)
        results[0][b] = product(d, k_.transpose(1, 2), over_keys).to(q.dtype)
        for result, left, right in ((results[1], d, q_), (results[2], p, dy_)):
            each = product(left.transpose(1, 2), right.transpose(1, 2), over_queries).unflatten(0, (k.shape[1], -1))
            total = each[:, 0]
            for head in range(1, each.shape[1]):
                total = total + each[:, head]
            result[b, :, start:] = total.to(q.dtype)
    return results


def _forward(query, key, value, mask, dropout_p, is_causal, scale, lse=True):
    if not _check(query, key, value, dropout_p):
        return NotImplemented
    seen = _seen(query, key, mask, is_causal)
    read = None if mask is None else seen
    made = keep_attention(query, key, value, (is_causal, scale, lse, read), seen) \
        if has_op(query, key, value, scale) else None
    y, sums = attend(query, key, value, seen, scale, lse) if made is None else made.results(query, key, value)
    return y, nothing(query, torch.float32) if sums is None else sums


def _gradients(dy, query, key, value, out, mask, dropout_p, is_causal, scale):
    if not _check(query, key, value, dropout_p):
        return NotImplemented
    return _backward(dy, query, key, value, out, _seen(query, key, mask, is_causal), scale)


@rule("_scaled_dot_product_flash_attention_for_cpu")
def _cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return _forward(query, key, value, attn_mask, dropout_p, is_causal, scale)


@rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def _cpu_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return _gradients(grad_out, query, key, value, out, attn_mask, dropout_p, is_causal, scale)


@rule("_scaled_dot_product_efficient_attention")
def _efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    return as_efficient(query, key, _forward(query, key, value, attn_bias, dropout_p, is_causal, scale,
                                             compute_log_sumexp))


@rule("_scaled_dot_product_efficient_attention_backward")
def _efficient_backward(grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
                        grad_input_mask, is_causal=False, *, scale=None):
    if grad_input_mask[3]:
        raise Unsupported("has an order for masks without a gradient, and attn_mask needs one")
    found = _gradients(grad_out_, query, key, value, out, attn_bias, dropout_p, is_causal, scale)
    return found if found is NotImplemented else (*found, None)


@rule("_scaled_dot_product_flash_attention")
def _flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    return as_flash(query, key, _forward(query, key, value, None, dropout_p, is_causal, scale))


@rule("_scaled_dot_product_cudnn_attention")
def _cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False,
           *, scale=None):
    return as_cudnn(query, key, _forward(query, key, value, attn_bias, dropout_p, is_causal, scale,
                                         compute_log_sumexp))


@rule("_scaled_dot_product_cudnn_attention_backward")
def _cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                    cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None):
    mask = attn_bias if isinstance(attn_bias, Read) or attn_bias is not None and attn_bias.numel() else None
    return _gradients(grad_out, query, key, value, out, mask, dropout_p, is_causal, scale)


@rule("_scaled_dot_product_flash_attention_backward")
def _flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                    is_causal, philox_seed, philox_offset, *, scale=None):
    return _gradients(grad_out, query, key, value, out, None, dropout_p, is_causal, scale)
