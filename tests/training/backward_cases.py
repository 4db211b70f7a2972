"""What tests of training share: where they run, portable numbers, and how near a gradient must come to float64's."""
import math

import pytest
import torch

from kernels import runtime
from kernels.bits import portable

HERE = runtime.device()
BF16, F32 = torch.bfloat16, torch.float32
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
# of a number's own size, for the last rounding, and of the largest in the tensor, for all roundings before
NEAR = {torch.float32: (2.0**-20, 2.0**-20), torch.bfloat16: (2.0**-8, 2.0**-18)}


def numbers(shape, dtype=BF16, seed=0, scale=0, device=HERE):
    """Portable numbers of any shape."""
    return portable(1, math.prod(shape), dtype, device, seed, scale).view(shape)


def farthest(found, wanted, dtype=None, more=1.0):
    """How far `found` is from float64's `wanted`, as a share of what is allowed: at most 1 is near enough."""
    own, all_ = NEAR[dtype or found.dtype]
    allowed = own * wanted.abs() + all_ * wanted.abs().max()
    return float(((found.double() - wanted).abs() / (more * allowed)).max())


def float64(*tensors):
    """Copies in float64 that require a gradient."""
    return [t.detach().double().requires_grad_() for t in tensors]
