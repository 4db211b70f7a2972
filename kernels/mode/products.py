"""Rules for matrix products: mm, addmm, mv, dot, and bmm and baddbmm as one product for each matrix.

linear, matmul and einsum are made of these.
A row of the first factor is a token's, a column of the second a row of the weight, whose N and K decide the order
(ops/matmul/order.py). Of bmm both factors may be as long as the data, keys of attention above all: k is one chain.
With beta, alpha, or something else than a bias to add, the product is rounded to the dtype first; then
alpha * product + beta * self are three float32 operations, rounded once more.
"""
from __future__ import annotations

import torch

from ..op import DTYPES
from ..ops.bmm import bmm
from ..ops.matmul.op import matmul
from ..ops.matmul.order import Order
from .kept import keep
from .switch import Unsupported, rule

_DTYPES = frozenset(DTYPES.values())


def how(x: torch.Tensor, op):
    """A schedule on a GPU; on a CPU the specification, for the interpreter is a thousand times slower still."""
    return op.triton if x.is_cuda else op.python


def supported(**tensors: torch.Tensor) -> bool:
    """False for integers, whose sums have no order. Raises Unsupported for what no op here takes."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise Unsupported(f"has no order for sparse tensors, and {name} has layout {tensor.layout}")
        if tensor.dtype not in _DTYPES:
            if not tensor.is_floating_point() and not tensor.is_complex():
                return False
            raise Unsupported(f"has an order for {', '.join(DTYPES)}, and {name} is {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise Unsupported(f"has an order for one dtype, and {name} is {tensor.dtype} beside {first.dtype}")
        if not (tensor.is_cuda or tensor.is_cpu):
            raise Unsupported(f"has an order on a CPU and on CUDA GPUs, and {name} is on {tensor.device}")
    return True


@rule("mm")
def _mm(self, mat2):
    if not _fits(self, mat2, 2) or not supported(self=self, mat2=mat2):
        return NotImplemented
    weight = mat2.t()
    y = how(self, matmul)(self, weight)
    keep("mm", (self, mat2), (), matmul.call, (self, weight, None, None))
    return y


def _fits(left, right, dimensions: int) -> bool:
    """Whether there is such a product; if not, PyTorch says so."""
    return left.dim() == right.dim() == dimensions and left.shape[:-2] == right.shape[:-2] and \
        left.shape[-1] == right.shape[-2]


@rule("bmm")
def _bmm(self, mat2):
    if not _fits(self, mat2, 3) or not supported(self=self, mat2=mat2):
        return NotImplemented
    return how(self, bmm)(self, mat2.transpose(1, 2), Order(1, self.shape[2]))


def _expands(self, shape) -> bool:
    """Whether a tensor can be added to a product of this shape."""
    return self.dim() <= len(shape) and all(n in (1, m) for n, m in zip(self.shape[::-1], shape[::-1], strict=False))


def combined(self, product, beta, alpha) -> torch.Tensor:
    """beta * self + alpha * product, each operation rounded once; beta = 0 leaves self out, NaN and all."""
    y = product.float() if alpha == 1 else product.float() * alpha
    if beta != 0:
        y = y + (self.float() if beta == 1 else self.float() * beta)
    return y.to(product.dtype)


@rule("addmm")
def _addmm(self, mat1, mat2, *, beta=1, alpha=1):
    if not _fits(mat1, mat2, 2) or not _expands(self, mat1.shape[:1] + mat2.shape[1:]) \
            or not supported(mat1=mat1, mat2=mat2, self=self):
        return NotImplemented
    if beta == alpha == 1 and self.shape == mat2.shape[1:]:
        weight = mat2.t()
        y = how(mat1, matmul)(mat1, weight, self)
        keep("addmm", (mat1, mat2, self), (), matmul.call, (mat1, weight, self, None))
        return y
    return combined(self, how(mat1, matmul)(mat1, mat2.t()), beta, alpha)


@rule("baddbmm")
def _baddbmm(self, batch1, batch2, *, beta=1, alpha=1):
    if not _fits(batch1, batch2, 3) or not _expands(self, (*batch1.shape[:2], batch2.shape[2])) \
            or not supported(batch1=batch1, self=self):
        return NotImplemented
    product = _bmm(batch1, batch2)
    return NotImplemented if product is NotImplemented else combined(self, product, beta, alpha)


@rule("addbmm")
def _addbmm(self, batch1, batch2, *, beta=1, alpha=1):
    raise Unsupported("adds over its matrices too, which has no order here: use baddbmm")


@rule("mv")
def _mv(self, vec):
    if vec.dim() != 1 or not _fits(self, vec[:, None], 2) or not supported(self=self, vec=vec):
        return NotImplemented
    return how(self, matmul)(self, vec[None])[:, 0]


@rule("addmv")
def _addmv(self, mat, vec, *, beta=1, alpha=1):
    if not _expands(self, mat.shape[:1]) or not supported(mat=mat, self=self):
        return NotImplemented
    product = _mv(mat, vec)
    return NotImplemented if product is NotImplemented else combined(self, product, beta, alpha)


@rule("dot", "vdot")
def _dot(self, other):
    if self.dim() != 1 or self.shape != other.shape or not supported(self=self, other=other):
        return NotImplemented
    return how(self, matmul)(self[None], other[None])[0, 0]


@rule("_addmm_activation")
def _addmm_activation(self, mat1, mat2, *, beta=1, alpha=1, use_gelu=False):
    y = _addmm(self, mat1, mat2, beta=beta, alpha=alpha)
    if y is NotImplemented:
        return y
    return torch.nn.functional.gelu(y, approximate="tanh") if use_gelu else y.relu()


@rule("mm.dtype", "addmm.dtype", "bmm.dtype", "baddbmm.dtype")
def _other_dtype(*arguments, **named):
    raise Unsupported("rounds its sum to its factors' dtype here, and another one was asked for: convert the result")


@rule("_grouped_mm", "_scaled_mm")
def _no_order(*arguments, **named):
    raise Unsupported("has no order here")
