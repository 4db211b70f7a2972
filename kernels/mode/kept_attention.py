"""The short way of attention: its plan and what it reads of a mask, kept under what decides them (kept.py).
"""
from __future__ import annotations

import math

import torch

from ..call import Plans
from ..ops.attention.op import attention_prefill
from ..runtime import current_device, current_stream
from .kept import can_keep, form, shortened
from .seen import Read, Seen


class Few(Plans):
    LARGEST = 64  # each holds tables on a GPU


ATTENTION = Few()
_PLANS = Plans()  # masks come and go


class _Attention:
    """Attention of tensors that lie as its op wants them: their addresses are all that it needs."""

    __slots__ = ("plan", "seen", "sequences", "shape", "strides", "lse")

    def __init__(self, plan, seen: Seen, shape: tuple, lse: bool):
        _, heads, queries, width = self.shape = shape
        self.plan, self.seen, self.sequences, self.lse = plan, seen, seen.sequences, lse
        self.strides = queries * heads * width, width, heads * width, 1

    def launched(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor] | None:
        """y (B, H, Q, D) and its sums (B, H, Q), or y twice, of tensors of the form; None on a stream or alignment that
        is new, and where another GPU is the current one."""
        device, (_, heads, queries, _) = q.device, self.shape
        pq, pk, pv = q.data_ptr(), k.data_ptr(), v.data_ptr()
        ready = self.sequences.ready.get((self.plan, current_stream(self.plan.index), not (pq | pk | pv) & 15))
        if ready is None or current_device() != self.plan.index:
            return None
        y = torch.empty_strided(self.shape, self.strides, dtype=q.dtype, device=device)
        sums = torch.empty_strided(self.shape[:3], (queries * heads, 1, heads), dtype=torch.float32,
                                   device=device) if self.lse else y
        ready(pq, pk, pv, y.data_ptr(), sums.data_ptr(), device)
        return y, sums

    def y(self, q, k, v, *settings, **named) -> torch.Tensor | None:
        """y alone, as scaled_dot_product_attention gives it."""
        found = self.launched(q, k, v)
        return None if found is None else found[0]

    def at_once(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same as PyTorch's kernels give it: sums that are not wanted are an empty tensor."""
        found = self.launched(q, k, v)
        return found if found is None or self.lse else (found[0], nothing(q, torch.float32))

    def results(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and None or its sums, also where something is new."""
        found = self.launched(q, k, v)
        return self.looked_at(q, k, v) if found is None else (found[0], found[1] if self.lse else None)

    def looked_at(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, made ready first."""
        found = self.plan.launch(self.plan, *as_rows(q, k, v), self.sequences.handle, self.seen.window,
                                 self.lse)
        return of_rows(*(found if self.lse else (found, None)), q.shape[0], q.shape[2])


class _Padded(_Attention):
    """The same where sequences begin behind their first keys, or queries see nothing."""

    __slots__ = ()

    def launched(self, q, k, v):
        found = super().launched(q, self.seen.shifted(k), self.seen.shifted(v))
        if found is not None:
            with_nothing(self.seen, found[0], found[1] if self.lse else None)
        return found

    def looked_at(self, q, k, v):
        return with_nothing(self.seen, *super().looked_at(q, self.seen.shifted(k), self.seen.shifted(v)))


def nothing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What PyTorch's ops give for a result that is not wanted."""
    return torch.empty(0, dtype=dtype, device=x.device)


def as_rows(q, k, v) -> tuple[torch.Tensor, ...]:
    """q (B, H, Q, D) as (B * Q, H, D), k and v (B, KV, K, D) as (B, K, KV, D), which is how the op takes them."""
    batch, heads, queries, width = q.shape
    return q.transpose(1, 2).reshape(batch * queries, heads, width), k.transpose(1, 2), v.transpose(1, 2)


def of_rows(y, sums, batch: int, queries: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op's y (B * Q, H, D) as (B, H, Q, D), and if there are any its sums (B * Q, H) as (B, H, Q)."""
    return tuple(t if t is None else t.view(batch, queries, *t.shape[1:]).transpose(1, 2) for t in (y, sums))


def with_nothing(seen: Seen, y, sums) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (B, H, Q, D), and if there are any its sums (B, H, Q), with what queries get that see nothing: 0 and -inf."""
    if seen.empty is not None:
        y.masked_fill_(seen.empty, 0.0)
        if sums is not None:
            sums.masked_fill_(seen.empty[..., 0], -math.inf)
    return y, sums


def keep_attention(q, k, v, numbers: tuple, seen: Seen) -> _Attention | None:
    """Leave a call of this suite's attention, or find it; None where queries must be copied.

    numbers  is_causal, scale, whether the logarithms of the sums are wanted, and what a mask said if there is one
    """
    key = numbers, form(q, k, v)
    if (known := ATTENTION.get(key)) is not None:
        return known
    if not can_keep(key[-1]) or as_rows(q, k, v)[0].data_ptr() != q.data_ptr():
        return None
    lse, (k, v) = numbers[2], (seen.shifted(t) for t in (k, v))
    of_form = numbers[:3], seen.window, form(q, k, v)
    plan = _PLANS.get(of_form) or _PLANS.keep(of_form, attention_prefill.call.plan(
        (*as_rows(q, k, v), seen.sequences.handle, seen.window, lse)))
    kind = _Attention if seen.empty is None and not any(seen.starts) else _Padded
    return None if plan.copies else ATTENTION.keep(key, kind(plan, seen, tuple(q.shape), lse))


def _attention(q, k, v, *numbers) -> tuple | None:
    found = ATTENTION.get((numbers, form(q, k, v)))
    return None if found is None else found.at_once(q, k, v)


def _is_unread(mask) -> bool:
    return mask is not None and mask.__class__ is not Read


@shortened("_scaled_dot_product_flash_attention")
def _flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    return None if dropout_p else as_flash(query, key, _attention(query, key, value, is_causal, scale, True, None))


@shortened("_scaled_dot_product_cudnn_attention")
def _cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False,
           *, scale=None):
    return None if dropout_p or _is_unread(attn_bias) else as_cudnn(
        query, key, _attention(query, key, value, is_causal, scale, compute_log_sumexp, attn_bias and attn_bias.seen))


@shortened("_scaled_dot_product_efficient_attention")
def _efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    return None if dropout_p or _is_unread(attn_bias) else as_efficient(
        query, key, _attention(query, key, value, is_causal, scale, compute_log_sumexp, attn_bias and attn_bias.seen))


def as_flash(query, key, found):
    """(y, the logarithms of its sums) as flash's op returns them; None or NotImplemented as it is.

    Random state that nobody asks for has a shape all the same, and no two results share memory: torch.compile wants so.
    """
    if found is None or found is NotImplemented:
        return found
    return (*found, None, None, query.shape[2], key.shape[2], _state(query, 2), _state(query),
            nothing(query, query.dtype))


def as_cudnn(query, key, found):
    """(y, the logarithms of its sums) as cuDNN's op returns them; None or NotImplemented as it is."""
    if found is None or found is NotImplemented:
        return found
    return *found, None, None, query.shape[2], key.shape[2], *_scalars(query), None


def as_efficient(query, key, found):
    """(y, the logarithms of its sums) as the memory-efficient op returns them; None or NotImplemented as it is."""
    return found if found is None or found is NotImplemented else (*found, *_scalars(query))


def _state(x: torch.Tensor, *shape: int, dtype: torch.dtype = torch.uint64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _scalars(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _state(x, dtype=torch.int64), _state(x, dtype=torch.int64)
