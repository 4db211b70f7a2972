"""The gradient of LayerNorm where the mean and rstd = 1 / sqrt(variance + eps) are kept from the forward pass.

    n = (x - middle) * rstd,  g = dy * weight
    dx = ((g - mean(g)) - n * mean(g * n)) * rstd,    dweight and dbias: the sums of dy * n and of dy over the tokens

Every step is one float32 operation, the sums are those of ops/mean/order.py, a mean is a sum times float32(1 / D), and
each result is rounded once. The order of dx names one row; dweight and dbias add over the tokens, in their order.
"""
from __future__ import annotations

from collections.abc import Callable

import torch


def layer_norm_gradient(dy, x, middle, rstd, weight, add: Callable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, x (T, D), middle and rstd (T, 1) float32, weight (D,) or None -> dx (T, D), dweight, dbias (D,).

    `add` is an implementation of `sum`.
    """
    n, dy_, share = (x.float() - middle) * rstd, dy.float(), torch.full_like(rstd, 1.0 / x.shape[1])
    along = dy_ * n
    g = dy_ if weight is None else dy_ * weight.float()
    dx = ((g - add(g, -1, True) * share) - n * (add(g * n, -1, True) * share)) * rstd
    return dx.to(x.dtype), add(along, 0, False).to(x.dtype), add(dy_, 0, False).to(x.dtype)
