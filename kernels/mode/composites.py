"""linear and scaled_dot_product_attention in one step on a GPU, where PyTorch takes several.

Both are composite: above the rules they make views, ask autograd about each part and, for attention, choose a kernel,
which takes the host longer than a launch. So a second key of the dispatcher stands above autograd and sees the whole
call. It acts where nothing comes between it and the GPU's kernels: no gradient, autocast, transform, tracing or lazy
negation, all of which are in the call's own keys. The first call of a form goes the long way. If rules took its parts
and left plans (kept.py), the whole gets a plan too, and the next such call launches it.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from ..ops.matmul.call import CALL as MATMUL
from ..ops.matmul.plan import Plan
from .attention import has_op
from .kept import can_keep, form
from .kept_attention import ATTENTION, Few, keep_attention
from .masks import without_mask
from .switch import EARLY, KEYS

_TO_EARLY = torch._C.DispatchKeySet(EARLY)
WHOLE = Few()
COMPOSITES: dict[str, tuple[Callable, Callable]] = {}  # the op -> its short way or None, and what leaves a plan for it
_MATH = 0  # what torch._fused_sdp_choice says of a product, a softmax and a product
_flags = (torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled, torch._C._get_cudnn_sdp_enabled,
          torch._C._get_math_sdp_enabled)


def keys(*names: str) -> int:
    found = _TO_EARLY
    for name in names:
        found = found | torch._C.DispatchKeySet(torch._C._dispatch_key_parse(name))
    return found.raw_repr()


USUAL = {keys("CUDA", "AutogradCUDA"), keys("CUDA")}  # inference tensors have no second one


def composite(op, short: Callable, leave: Callable) -> Callable:
    """The early key's kernel of an op, which is given the call's keys."""
    def kernel(given, *arguments, **named):
        usual = given.raw_repr() in USUAL and forward_ad._current_level < 0
        if usual and (found := short(*arguments, **named)) is not None:
            return found
        with torch._C._ExcludeDispatchKeyGuard(_TO_EARLY):
            result = op(*arguments, **named)
        if usual and not result.requires_grad:
            with torch._C._ExcludeDispatchKeyGuard(KEYS):
                leave(*arguments, **named)
        return result
    return kernel


def _form_of_linear(x, weight, bias) -> tuple:
    found = x.shape, x.stride(), x.dtype, x.get_device(), weight.shape, weight.stride(), weight.dtype, \
        weight.get_device()
    return found if bias is None else (*found, bias.shape, bias.stride(), bias.dtype, bias.get_device())


def _gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _linear(input, weight, bias=None):
    plan = MATMUL.plans.get(("linear", _form_of_linear(input, weight, bias)))
    if plan is None or plan.launch is not Plan.on_gpu or _gradient(input, weight, bias):
        return None
    return plan.launch(plan, input, weight, bias, None)


def _leave_linear(input, weight, bias=None):
    """Where rows lie together, PyTorch made one product of them, and its rule left a plan."""
    if weight.dim() != 2 or input.dim() < 2 or not input.is_contiguous() or not can_keep(form(input, weight)):
        return
    rows, key = input.view(-1, input.shape[-1]), ("linear", _form_of_linear(input, weight, bias))
    part = ("mm", (), form(rows, weight.t())) if bias is None else ("addmm", (), form(rows, weight.t(), bias))
    if part in MATMUL.plans and key not in MATMUL.plans:
        MATMUL.plans.keep(key, MATMUL.plan((input, weight, bias, None)))


def _key_of_attention(q, k, v, causal, scale, grouped) -> tuple:
    return (causal, scale, grouped, *[flag() for flag in _flags], q.shape, q.stride(), q.dtype, q.get_device(),
            k.shape, k.stride(), k.dtype, k.get_device(), v.shape, v.stride(), v.dtype, v.get_device())


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if attn_mask is not None or dropout_p or _gradient(query, key, value):
        return None
    found = WHOLE.get(_key_of_attention(query, key, value, is_causal, scale, enable_gqa))
    ready = None if found is None else found.launched(query, key, value)
    if found is None or ready is not None:
        return ready and ready[0]
    with torch._C._ExcludeDispatchKeyGuard(KEYS):
        return found.looked_at(query, key, value)[0]


def _leave_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                     enable_gqa=False):
    """Where PyTorch chose one of its kernels, and the rule for that kernel left this suite's attention."""
    given = query, key, value
    if attn_mask is not None or dropout_p or query.dim() != 4 or not has_op(*given, scale) or torch._fused_sdp_choice(
            *given, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa) == _MATH:
        return
    said = [(is_causal, s, sums, None) for s in (scale, 1 / math.sqrt(query.shape[3])) for sums in (True, False)]
    if any((numbers, form(*given)) in ATTENTION for numbers in said):
        seen = without_mask(query.shape[0], query.shape[2], key.shape[2], is_causal, query.device)
        made = keep_attention(*given, (is_causal, scale, False, None), seen)
        if made is not None:
            WHOLE.keep(_key_of_attention(*given, is_causal, scale, enable_gqa), made)


COMPOSITES |= {"linear": (_linear, _leave_linear), "scaled_dot_product_attention": (_attention, _leave_attention)}
