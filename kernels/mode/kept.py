"""The short way of a call on a GPU whose like was made before: from the dispatcher to the launch.

A rule checks its arguments, takes views of them and finds a plan, inside the guards of switch.py. All of it follows
from the tensors' classes, shapes, strides, dtypes and GPU, and from the numbers beside them. Under these a rule leaves
the plan of a call that it took, and the next such call launches it: `SHORT` says how, and gives None where nothing was
left. Whatever is unusual (another class, a dispatch mode, a transform, a plan whose schedules are being tried) goes to
the rule as first calls do, so that no refusal is left out.

Functions of one number have rules on a CPU alone: tensors of a GPU go to its kernel at once.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..call import Plans
from ..ops.attention.op import attention_prefill
from ..ops.layer_norm import layer_norm
from ..ops.matmul.call import CALL as MATMUL
from ..ops.matmul.plan import Plan
from ..ops.mean import mean, sum
from ..ops.softmax import log_softmax, softmax
from ..runtime import current_device, current_stream
from .masks import Read, Seen
from .overloads import ON_A_CPU_ALONE

_TENSOR, _PARAMETER = torch.Tensor, torch.nn.Parameter
_modes, _level = torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level
_CUDA = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("CUDA"))
SHORT: dict[str, Callable] = {}  # the op -> its arguments -> its result, or None


class _Few(Plans):
    LARGEST = 64  # each holds tables on a GPU


ATTENTION = _Few()
_PLANS = Plans()  # masks come and go


def form(*tensors: torch.Tensor) -> tuple | None:
    """Shape, strides, dtype and GPU of each, which decide a plan; None where a rule must look."""
    if _modes() or _level() is not None or forward_ad._current_level >= 0:
        return None
    found: tuple = ()
    try:
        for t in tensors:
            if t.__class__ is not _TENSOR and t.__class__ is not _PARAMETER or t.layout is not torch.strided:
                return None
            found += t.shape, t.stride(), t.dtype, t.get_device()
    except RuntimeError:  # a nested tensor has no one shape
        return None
    return found


def _can_keep(found: tuple | None) -> bool:
    """Whether tensors of this form are on a GPU and have numbers, and nothing about them is unusual."""
    return found is not None and found[3] >= 0 and all(map(math.prod, found[::4]))


def keep(name: str, tensors: tuple, numbers: tuple, call: Any, arguments: tuple) -> None:
    """Leave the plan of a call that a rule took with these tensors and numbers, if there is something to launch."""
    key = name, numbers, form(*tensors)
    if _can_keep(key[-1]) and key not in call.plans:
        call.plans.keep(key, call.plan(arguments))


def _short(*names: str) -> Callable:
    def add(function: Callable) -> Callable:
        SHORT.update(dict.fromkeys(names, function))
        return function
    return add


@_short("mm")
def _mm(self, mat2):
    plan = MATMUL.plans.get(("mm", (), form(self, mat2)))
    if plan is not None and plan.launch is Plan.on_gpu:  # which asks a weight for its address alone
        return plan.launch(plan, self, mat2, None, None)
    return None


@_short("addmm")
def _addmm(self, mat1, mat2, **scales):
    plan = None if scales else MATMUL.plans.get(("addmm", (), form(mat1, mat2, self)))
    if plan is not None and plan.launch is Plan.on_gpu:
        return plan.launch(plan, mat1, mat2, self, None)
    return None


def _reduction(op) -> Callable:
    name, find = op.name, op.call.plans.get

    def reduced(self, dim, keepdim=False, **named):
        plan = None if named or dim is None else find((name, (*dim, keepdim), form(self)))
        return None if plan is None else plan.launch(plan, self, dim, keepdim)
    return reduced


def _over(op) -> Callable:
    name, find = op.name, op.call.plans.get

    def over(self, dim, half_to_float):
        plan = find((name, (dim, half_to_float), form(self)))
        return None if plan is None else plan.launch(plan, self, dim, torch.float32 if half_to_float else None)
    return over


SHORT |= {"sum.dim_IntList": _reduction(sum), "mean.dim": _reduction(mean), "_softmax": _over(softmax),
          "_log_softmax": _over(log_softmax)}


@_short("native_layer_norm")
def _layer_norm(input, normalized_shape, weight, bias, eps):
    plan = None if weight is None or bias is None else layer_norm.call.plans.get(
        ("native_layer_norm", (eps, *normalized_shape), form(input, weight, bias)))
    return None if plan is None else plan.launch(plan, input, weight, bias, eps)


class _Attention:
    """Attention of tensors that lie as its op wants them: their addresses are all that it needs."""

    __slots__ = ("plan", "sequences", "shape", "strides", "lse")

    def __init__(self, plan, sequences, shape: tuple, lse: bool):
        _, heads, queries, width = self.shape = shape
        self.plan, self.sequences, self.lse = plan, sequences, lse
        self.strides = queries * heads * width, width, heads * width, 1

    def at_once(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor] | None:
        """y (B, H, Q, D) and its sums (B, H, Q) of tensors of the form; None on a stream or alignment that is new, and
        where another GPU is the current one."""
        device, (_, heads, queries, _) = q.device, self.shape
        pq, pk, pv = q.data_ptr(), k.data_ptr(), v.data_ptr()
        ready = self.sequences.ready.get((self.plan, current_stream(self.plan.index), not (pq | pk | pv) & 15))
        if ready is None or current_device() != self.plan.index:
            return None
        y = torch.empty_strided(self.shape, self.strides, dtype=q.dtype, device=device)
        sums = torch.empty_strided(self.shape[:3], (queries * heads, 1, heads), dtype=torch.float32,
                                   device=device) if self.lse else y
        ready(pq, pk, pv, y.data_ptr(), sums.data_ptr(), device)
        return y, sums if self.lse else nothing(q, torch.float32)

    def looked_at(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, made ready where it is new; without its sums if they are not wanted."""
        found = self.plan.launch(self.plan, *as_rows(q, k, v), self.sequences.handle, 0, self.lse)
        return of_rows(*(found if self.lse else (found, None)), q.shape[0], q.shape[2])


def nothing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What PyTorch's ops give for a result that is not wanted."""
    return torch.empty(0, dtype=dtype, device=x.device)


def as_rows(q, k, v) -> tuple[torch.Tensor, ...]:
    """q (B, H, Q, D) as (B * Q, H, D), k and v (B, KV, K, D) as (B, K, KV, D), which is how the op takes them."""
    return q.transpose(1, 2).reshape(-1, q.shape[1], q.shape[3]), k.transpose(1, 2), v.transpose(1, 2)


def of_rows(y, sums, batch: int, queries: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op's y (B * Q, H, D) as (B, H, Q, D), and if there are any its sums (B * Q, H) as (B, H, Q)."""
    return tuple(t if t is None else t.view(batch, queries, *t.shape[1:]).transpose(1, 2) for t in (y, sums))


def keep_attention(q, k, v, numbers: tuple, seen: Seen) -> _Attention | None:
    """Leave a call of this suite's attention, or find it; None where tensors must be copied or a window is seen.

    numbers  is_causal, scale, whether the logarithms of the sums are wanted, and what a mask said if there is one
    """
    key, rows = (numbers, form(q, k, v)), as_rows(q, k, v)
    if (known := ATTENTION.get(key)) is not None:
        return known
    if not _can_keep(key[-1]) or seen.window or any(seen.starts) or seen.rows is not None \
            or rows[0].data_ptr() != q.data_ptr():
        return None
    lse = numbers[2]
    of_form = numbers[:3], key[1]
    plan = _PLANS.get(of_form) or _PLANS.keep(of_form, attention_prefill.call.plan(
        (*rows, seen.sequences.handle, 0, lse)))
    return None if plan.copies else ATTENTION.keep(key, _Attention(plan, seen.sequences, tuple(q.shape), lse))


def _attention(q, k, v, *numbers) -> tuple | None:
    found = ATTENTION.get((numbers, form(q, k, v)))
    return None if found is None else found.at_once(q, k, v)


def _is_unread(mask) -> bool:
    return mask is not None and mask.__class__ is not Read


@_short("_scaled_dot_product_flash_attention")
def _flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    return None if dropout_p else as_flash(query, key, _attention(query, key, value, is_causal, scale, True, None))


@_short("_scaled_dot_product_cudnn_attention")
def _cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False,
           *, scale=None):
    return None if dropout_p or _is_unread(attn_bias) else as_cudnn(
        query, key, _attention(query, key, value, is_causal, scale, compute_log_sumexp, attn_bias and attn_bias.seen))


@_short("_scaled_dot_product_efficient_attention")
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


def short(name: str, op) -> Callable:
    """The short way of an op, a function of its arguments; of most ops one that gives None."""
    return _of_gpu(op) if name in ON_A_CPU_ALONE else SHORT.get(name, _none)


def _none(*arguments, **named) -> None:
    return None


def _of_gpu(op) -> Callable:
    """Of a function of one number: the GPU's own kernel."""
    kernel = op._handle.redispatch_boxed

    def element(first, *rest, **named):
        if not first.is_cuda or first.__class__ is not _TENSOR and first.__class__ is not _PARAMETER or _modes() \
                or first.layout is not torch.strided or first.is_nested or first.is_quantized \
                or forward_ad._current_level >= 0:
            return None
        return kernel(_CUDA, first, *rest, **named)
    return element
