"""linear and matmul of rows in more than two dimensions and a matrix: one product of all rows, with its bias."""
from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from ..call import Plans
from .kept import can_keep, form, leave_product

LINEAR = Plans()  # key -> step

_view = torch.ops.aten._unsafe_view.default  # as PyTorch does: its result is no view, so it may be changed in place


def linear(op, input, weight, bias=None):
    """`op`, which is linear, of x (.., K), weight (N, K) and bias (N) in two dimensions; of all else as it is."""
    if _can_fold(input, weight) and input.dim() not in (0, 2) and weight.dim() == 2 and (
            input.shape[-1] == weight.shape[1]) and (
            bias is None or bias.dim() == 1 and bias.shape[0] == weight.shape[0]):
        return _view(op(_rows(input), weight, bias), (*input.shape[:-1], weight.shape[0]))
    return op(input, weight, bias)


def matmul(op, self, other):
    """`op`, which is matmul, of one factor of three and more dimensions and one of fewer, in two; else as it is."""
    if not _can_fold(self, other) or min(self.dim(), other.dim()) not in (1, 2) or max(self.dim(), other.dim()) < 3:
        return op(self, other)
    if self.dim() > 2 and self.shape[-1] == other.shape[0]:
        return _view(op(_rows(self), other), (*self.shape[:-1], *other.shape[1:]))
    if other.dim() > 2 and self.shape[-1] == other.shape[-2]:
        columns = other.transpose(-2, -1)
        y = _view(op(_rows(columns), self.t()), (*columns.shape[:-1], *self.shape[:-1]))
        return y if self.dim() == 1 else y.transpose(-2, -1).contiguous()  # as PyTorch's lies
    return op(self, other)


def _can_fold(*tensors: torch.Tensor) -> bool:
    """Whether they have strides. A trace keeps calls as they are: numbers of rows would be constants in it."""
    return all(t.layout is torch.strided and not t.is_nested for t in tensors) and not torch._C._get_tracing_state()


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def linear_key(input, weight, bias=None) -> tuple | None:
    """What decides a step; None where something needs a gradient."""
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad
                                    or bias is not None and bias.requires_grad):
        return None
    # written out: `form` would look again for what the call's keys have ruled out
    key = input.shape, input.stride(), input.dtype, input.get_device(), weight.shape, weight.stride(), weight.dtype, \
        weight.get_device()
    return key if bias is None else (*key, bias.shape, bias.stride(), bias.dtype, bias.get_device())


def leave_linear(key, input, weight, bias=None) -> Callable | None:
    """A step of a linear, if the rule for its product left a plan."""
    if weight.dim() != 2 or not input.dim() or not can_keep(form(input, weight)):
        return None
    rows, (name, *more) = _rows(input), ("mm",) if bias is None else ("addmm", bias)
    if rows.data_ptr() != input.data_ptr() or more and not bias.is_contiguous():
        return None  # copied at each call
    return leave_product(name, (rows, weight.t(), *more), (*input.shape[:-1], weight.shape[0]), LINEAR, key)
