"""The matrix product's backward pass, whose three sums have an order too.

    dx = dy @ weight          as a product by weight.t(): order(K, N)
    dweight = dy.t() @ x      one chain over the tokens, in their order; so it depends on how many there are
    dbias = dy.t() @ ones     the same chain
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .order import Order


class Linear(torch.autograd.Function):
    """`product`, called with x, weight, bias and an order, made differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, order, product):
        return product(x, weight, bias, order)

    @staticmethod
    def setup_context(ctx, inputs, output):  # apart from `forward`, as torch.func needs it
        ctx.save_for_backward(*inputs[:2])
        ctx.product = inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (*gradients(ctx.needs_input_grad, dy, *ctx.saved_tensors, ctx.product), None, None)


def gradients(needs, dy, x, weight, product: Callable) -> tuple:
    """(dx, dweight, dbias), None for those not needed; product(x, weight, bias, order)."""
    tokens = math.prod(x.shape[:-1])
    rows, dy_rows = x.reshape(tokens, x.shape[-1]), dy.reshape(tokens, dy.shape[-1])
    dx = product(dy_rows, weight.t(), None, None).view(x.shape) if needs[0] else None
    one_chain = Order(1, tokens)
    dweight = product(dy_rows.t(), rows.t(), None, one_chain) if needs[1] else None
    dbias = None
    if needs[2]:
        ones = torch.ones(1, tokens, dtype=x.dtype, device=x.device)
        dbias = product(dy_rows.t(), ones, None, one_chain)[:, 0]
    return dx, dweight, dbias


def needed(x, weight, bias) -> bool:
    """Whether autograd would record a product of these."""
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (x, weight, bias))


def register(custom) -> None:
    """Give the custom op `same_bits::matmul` this backward pass."""
    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.has_bias = inputs[2] is not None

    def backward(ctx, dys):
        def product(*arguments):
            return custom(*arguments)[0]

        needs = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
        return (*gradients(needs, dys[0], *ctx.saved_tensors, product), None)

    custom.register_autograd(backward, setup_context=save)
