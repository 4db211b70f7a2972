"""The gradient of RMSNorm y = x * r * weight where r is kept from the forward pass, for ATen's backward op.

    g = dy * weight,  n = x * r
    dx = (g - n * ((sum(g * x) * r) * float32(1 / D))) * r,    dweight = the sum of dy * n over the tokens

Every step is one float32 operation, the sums are those of ops/mean/order.py, and each result is rounded once. The order
of dx names one row; dweight adds over the tokens, in their order.
"""
from __future__ import annotations

from collections.abc import Callable

import torch


def rms_norm_gradient(dy, x, rstd, weight, add: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """dy, x (T, D), rstd (T, 1) float32, weight (D,) or None -> dx (T, D), dweight (D,); `add` is `sum`'s."""
    h, g = x.float(), dy.float()
    n = h * rstd
    along = g * n
    if weight is not None:
        g = g * weight.float()
    k = (add(g * h, -1, True) * rstd) * torch.full_like(rstd, 1.0 / x.shape[1])
    return ((g - n * k) * rstd).to(x.dtype), add(along, 0, False).to(x.dtype)
