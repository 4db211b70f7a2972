"""Rules for sums, means, softmax and the norms, and for those of their gradients that add.

Each is the op of this suite, over the dimensions that the call names. A sum with another dtype converts first, as
PyTorch does. Integers and booleans pass: their sums have no order.

PyTorch runs rms_norm as one op on a GPU, which takes this suite's. On a CPU it takes it apart, into a mean, which has
an order here, and operations on one number: the batch moves no bit there either, but a GPU's are others.
"""
from __future__ import annotations

import math

import torch

from ..ops.embedding_gradient import embedding_gradient
from ..ops.layer_norm import layer_norm
from ..ops.layer_norm_gradient import layer_norm_gradient
from ..ops.mean import mean, sum
from ..ops.mean.order import dims_of, shape_of
from ..ops.rms_norm import rms_norm
from ..ops.rms_norm_gradient import rms_norm_gradient
from ..ops.softmax import log_softmax, softmax
from ..runtime import contiguous_strides
from .elements import steady
from .kept import keep
from .products import how, supported
from .seen_softmax import from_first, may_be_scores, seen_softmax
from .switch import Unsupported, rule

_MOST_DIMENSIONS = 64  # of a tensor whose dimensions are named: PyTorch keeps them as bits of a number
_PYTORCHS = {"sum": torch.ops.aten.sum.dim_IntList, "mean": torch.ops.aten.mean.dim}


def _reduced(op, x, dim, keepdim, dtype):
    if dtype is not None and dtype.is_floating_point and x.dtype != dtype:
        x = x.to(dtype)
    if not supported(self=x):
        return NotImplemented
    if dtype is not None and x.dtype != dtype:
        return NotImplemented  # integers, asked for as such
    if dim is None:
        return how(x, op)(x, None, keepdim)
    dim = tuple(dim)
    if not _can_reduce(x, dim):
        return NotImplemented
    y = how(x, op)(x, dim, keepdim)
    strides = _strides(op, x, dim, keepdim)
    if all(n < 2 or here == there for n, here, there in zip(y.shape, y.stride(), strides, strict=True)):
        keep(op.name, (x,), (*dim, keepdim), op.call, (x, dim, keepdim))
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def _can_reduce(x, dim) -> bool:
    """Whether x has these dimensions, each named once; if not, PyTorch says so."""
    most = max(x.dim(), 1)
    return all(-most <= d < most for d in dim) and len({d % most for d in dim}) == len(dim) \
        and (not dim or x.dim() <= _MOST_DIMENSIONS)


def _strides(op, x, dim, keepdim) -> tuple[int, ...]:
    """PyTorch's for such a result, which follow x's: code behind it may take a view."""
    if x.is_contiguous():
        return contiguous_strides(shape_of(x, dims_of(x, dim), keepdim))
    alike = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return _PYTORCHS[op.name](alike, dim, keepdim).stride()


@rule("sum.dim_IntList")
def _sum(self, dim, keepdim=False, *, dtype=None):
    return _reduced(sum, self, dim, keepdim, dtype)


@rule("sum")
def _sum_all(self, *, dtype=None):
    return _reduced(sum, self, None, False, dtype)


@rule("mean.dim")
def _mean(self, dim, keepdim=False, *, dtype=None):
    return _reduced(mean, self, dim, keepdim, dtype)


@rule("mean")
def _mean_all(self, *, dtype=None):
    return _reduced(mean, self, None, False, dtype)


@rule("_softmax")
def _softmax(self, dim, half_to_float):
    return _over(softmax, self, dim, half_to_float)


@rule("_log_softmax")
def _log_softmax(self, dim, half_to_float):
    return _over(log_softmax, self, dim, half_to_float)


@rule("_softmax_backward_data")
def _softmax_gradient(grad_output, output, dim, input_dtype):
    """y * dy - y * (the sum of y * dy), in float32."""
    if not supported(grad_output=grad_output, output=output):
        return NotImplemented
    y = output.float()
    each = y * grad_output.float()
    row = from_first(each, y == 0.0, dim) if may_be_scores(y, dim) else each
    return (each - y * how(output, sum)(row, dim, True)).to(input_dtype)


@rule("_log_softmax_backward_data")
def _log_softmax_gradient(grad_output, output, dim, input_dtype):
    """dy - exp(y) * (the sum of dy), in float32."""
    if not supported(grad_output=grad_output, output=output):
        return NotImplemented
    dy, p = grad_output.float(), _exp(output.float())
    return (dy - p * how(output, sum)(dy, dim, True)).to(input_dtype)


def _exp(x):
    found = steady("exp", 1)(x)
    return x.exp() if found is NotImplemented else found


@rule("_safe_softmax")
def _safe_softmax(self, dim, dtype=None):
    """Softmax of scores as PyTorch's math backend takes it: 0 where every key is hidden."""
    if not supported(self=self) or not self.dim() or not self.shape[dim]:
        return NotImplemented
    return seen_softmax(self, dim, dtype).masked_fill_((self == -math.inf).all(dim, keepdim=True), 0.0)


def _over(op, x, dim, half_to_float):
    size = max(x.dim(), 1)
    if not supported(self=x) or not -size <= dim < size:
        return NotImplemented
    dtype = torch.float32 if half_to_float else None
    if op is softmax and may_be_scores(x, dim):
        return seen_softmax(x, dim, dtype)
    y = how(x, op)(x, dim, dtype)
    keep(op.name, (x,), (dim, half_to_float), op.call, (x, dim, dtype))
    return y


def _rows(x, normalized_shape, *others):
    """x and the weights beside it as (rows, D) and (D,). What does not fit is PyTorch's to refuse."""
    width, last = math.prod(normalized_shape), torch.Size(normalized_shape)
    if not last or not width:
        return NotImplemented
    if x.shape[x.dim() - len(last) :] != last or any(t is not None and t.shape != last for t in others):
        return NotImplemented
    named = dict(zip(("weight", "bias"), others, strict=False))
    if not supported(input=x, **{name: t for name, t in named.items() if t is not None}):
        return NotImplemented
    return x.reshape(-1, width), *(None if t is None else t.reshape(-1) for t in others)


@rule("_fused_rms_norm")
def _fused_rms_norm(input, normalized_shape, weight, eps):
    given = _rows(input, normalized_shape, weight)
    if given is NotImplemented:
        return given
    x, scale = given
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if eps <= 0:
        raise Unsupported(f"has an order for a positive eps, got {eps}")
    if scale is None:
        scale = torch.ones(x.shape[1:], dtype=x.dtype, device=x.device)
    h = x.float()
    shifted = how(x, mean)(h * h, -1, True) + torch.full((), eps, dtype=torch.float32, device=x.device)
    rstd = 1.0 / shifted.double().sqrt().float()
    kept = input.dim() - len(normalized_shape)
    return how(x, rms_norm)(x, scale, None, eps).view(input.shape), \
        rstd.view(*input.shape[:kept], *[1] * len(normalized_shape))


@rule("_fused_rms_norm_backward")
def _fused_rms_norm_backward(grad_out, input, normalized_shape, rstd, weight, output_mask):
    given = _rows(input, normalized_shape, weight)
    if given is NotImplemented:
        return given
    x, scale = given
    dx, dweight = rms_norm_gradient(grad_out.reshape(x.shape), x, rstd.reshape(-1, 1), scale, how(x, sum))
    return (dx.view(input.shape) if output_mask[0] else None,
            dweight.view(weight.shape) if output_mask[1] and weight is not None else None)


@rule("native_layer_norm")
def _layer_norm(input, normalized_shape, weight, bias, eps):
    given = _rows(input, normalized_shape, weight, bias)
    if given is NotImplemented:
        return given
    if not 0 <= eps < math.inf:
        raise Unsupported(f"has an order for an eps of at least 0, got {eps}")
    kept = input.dim() - len(normalized_shape)
    y, middle, rstd = how(input, layer_norm)(*given, eps)
    if input.is_cpu:  # PyTorch's are float32 on a GPU alone, and compiled code counts on it
        middle, rstd = middle.to(input.dtype), rstd.to(input.dtype)
    if len(normalized_shape) == 1 and weight is not None and bias is not None:
        keep("native_layer_norm", (input, weight, bias), (eps, *normalized_shape), layer_norm.call,
             (input, weight, bias, eps))
    small = (*input.shape[:kept], *[1] * len(normalized_shape))
    return y.view(input.shape), middle.view(small), rstd.view(small)


@rule("native_layer_norm_backward")
def _layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask):
    given = _rows(input, normalized_shape, weight)
    if given is NotImplemented:
        return given
    x, scale = given
    dx, dweight, dbias = layer_norm_gradient(grad_out.reshape(x.shape), x, mean.float().reshape(-1, 1),
                                             rstd.float().reshape(-1, 1), scale, how(x, sum))
    return (dx.view(input.shape) if output_mask[0] else None,
            dweight.view(weight.shape) if output_mask[1] and weight is not None else None,
            dbias.view(bias.shape) if output_mask[2] and bias is not None else None)


@rule("embedding_dense_backward")
def _embedding_backward(grad_output, indices, num_weights, padding_idx, scale_grad_by_freq):
    if not supported(grad_output=grad_output):
        return NotImplemented
    if scale_grad_by_freq:
        raise Unsupported("has no order with scale_grad_by_freq")
    return embedding_gradient(grad_output, indices, num_weights, padding_idx)
