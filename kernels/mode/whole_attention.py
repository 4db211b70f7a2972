"""scaled_dot_product_attention seen whole, so that PyTorch chooses one kernel for a sequence alone and in a batch.

PyTorch asks how tensors lie. Keys that a batch shares, three dimensions or five, and heads whose numbers lie apart it
multiplies itself, in other orders than its kernels have. Here all come to it in four dimensions, of one batch size and
with the numbers of a head together.

WHOLE has steps of whole calls (composites.py), under the settings too by which PyTorch chooses a kernel. A mask is read
as the reader gave it, so that layers that share one wait for it once: PyTorch makes a copy of it for each.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend

from .attention import attend, has_op
from .kept import can_keep, form
from .kept_attention import ATTENTION, Few, keep_attention
from .masks import of_mask
from .switch import KEYS, Unsupported

WHOLE, HALVES = Few(), (torch.bfloat16, torch.float16)


def attention(op, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """`op`, which is scaled_dot_product_attention, in one form. y lies as PyTorch's, where queries are
    contiguous."""
    given, mask, shape = (query, key, value), attn_mask, None
    if any(t.layout is not torch.strided or t.is_nested for t in given) or torch._C._get_tracing_state():
        return op(*given, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if not _is_usual(given, enable_gqa):
        given, mask, shape = _in_one_form(given, mask, enable_gqa)
    y = op(*given, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    y = y if shape is None else y.reshape(shape)
    return y.contiguous() if shape is not None or query.is_contiguous() else y


def _is_usual(given, shared_heads: bool) -> bool:
    q, k, v = given
    return q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0] and all(
        t.stride(3) == 1 for t in given) and (shared_heads or q.shape[1] == k.shape[1] == v.shape[1])


def _in_one_form(given, mask, shared_heads: bool):
    """q, k and v (B, H, L, D), a mask that fits them, and the result's shape; all as it is for PyTorch to refuse."""
    own = 3 if shared_heads else 2  # of the last dimensions, how many are not broadcast
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-own] for t in given))
    except RuntimeError:
        return given, mask, None
    if min(t.dim() for t in given) < own or mask is not None and not 2 <= mask.dim() <= len(batch) + own:
        return given, mask, None
    shape = *batch, *given[0].shape[-own:-1], given[2].shape[-1]
    four = [_four(t.expand(*batch, *t.shape[-own:])) for t in given]
    if mask is not None:
        mask = mask[(None,) * (len(shape) - mask.dim())]
        mask = _four(mask if len(shape) <= 4 else mask.expand(*shape[:-3], *mask.shape[-3:]))
    return [t if t.stride(3) == 1 else t.contiguous() for t in four], mask, shape


def _four(t: torch.Tensor) -> torch.Tensor:
    """(L, D) or (.., H, L, D) as (B, H, L, D)."""
    return t[(None,) * (4 - t.dim())] if t.dim() <= 4 else t.flatten(0, -4)


_settings = (torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled, torch._C._get_cudnn_sdp_enabled,
             torch._C._get_math_sdp_enabled)


def attention_key(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """What decides a step; None for dropout, or where something needs a gradient."""
    if dropout_p or torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    step = (is_causal, scale, enable_gqa, *[setting() for setting in _settings], *torch._C._get_sdp_priority_order(),
            query.shape, query.stride(), query.dtype, query.get_device(), key.shape, key.stride(), key.dtype,
            key.get_device(), value.shape, value.stride(), value.dtype, value.get_device())
    if attn_mask is None:
        return step
    wants_gradient = attn_mask.requires_grad and torch.is_grad_enabled()
    return None if wants_gradient else (*step, attn_mask.shape, attn_mask.stride(), attn_mask.dtype,
                                        attn_mask.get_device())


def leave_attention(_, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                    enable_gqa=False) -> Callable | None:
    """A step of a call for which PyTorch chose one of its kernels, whose rules all do the same."""
    given = query, key, value
    if query.dim() != 4 or query.shape[3] % 8 or not _is_usual(given, enable_gqa) \
            or torch._fused_sdp_choice(  # other widths are padded before the rule
                *given, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa) == SDPBackend.MATH.value:
        return None
    lies, scales = form(*given), (scale, 1 / math.sqrt(query.shape[3]))
    if attn_mask is not None:
        known = can_keep(lies) and query.dtype in HALVES and query.dtype == key.dtype == value.dtype
        return _masked if known and not is_causal and has_op(*given, scale) else None
    for numbers in ((is_causal, s, sums, None) for s in scales for sums in (False, True)):
        if (numbers, lies) in ATTENTION:
            return ATTENTION[numbers, lies].y
    return None


def _masked(query, key, value, attn_mask, *settings, scale=None, **named) -> torch.Tensor | None:
    """y of a call with a mask; None for one without an order, which its rule refuses."""
    with torch._C._ExcludeDispatchKeyGuard(KEYS):
        try:
            seen = of_mask(attn_mask, query.shape[0], query.shape[2], key.shape[2], query.device)
        except Unsupported:
            return None
        made = keep_attention(query, key, value, (False, scale, False, seen), seen)
        y, _ = attend(query, key, value, seen, scale, False) if made is None else made.results(query, key, value)
    return y.contiguous() if query.is_contiguous() else y
