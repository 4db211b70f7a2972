"""Other implementations of our ops, to be measured beside ours."""
from __future__ import annotations

import torch

from ..arithmetic.sums import ordered_sum
from ..call import check_tensors
from ..launch import Step
from ..runtime import Unavailable, require_triton, tl, triton


def flashinfer_rms_norm(x, weight, residual=None, eps=1e-6):
    """FlashInfer's kernel; with a residual it overwrites x and residual, as its API does."""
    try:
        from flashinfer import norm
    except ImportError as error:
        raise Unavailable(f"flashinfer: {error}") from None
    if residual is None:
        return norm.rmsnorm(x, weight, eps)
    norm.fused_add_rmsnorm(x, residual, weight, eps)
    return x, residual


def split_rms_norm(x, weight, residual=None, eps=1e-6, parts=None):
    """How bits move: the row's sum is cut into parts, as many as leave no core idle, so *the batch* decides the order.

    For teaching. With few rows each is cut in up to 128 parts; with many it stays whole. Same arguments and
    result as the specification, same accuracy, other bits for other batches.
    """
    check_tensors(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    rows, width = max(x.numel() // x.shape[-1], 1), x.shape[-1]
    parts = parts or min(width, max(1, 128 // rows))
    square = stream.float() ** 2
    total = sum(ordered_sum(piece) for piece in square.tensor_split(parts, dim=-1))
    y = (stream.float() * torch.rsqrt(total / width + eps) * weight.float()).to(x.dtype)
    return y if residual is None else (y, stream)


def eager_rms_norm(x, weight, residual=None, eps=1e-6):
    """RMSNorm as serving engines write it in plain PyTorch, step by step in float32; LLM-42's "Python"."""
    check_tensors(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    h = x.float() if residual is None else x.float() + residual.float()
    y = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)
    y = y.to(x.dtype) * weight
    return y if residual is None else (y, h.to(x.dtype))


BLOCK = 1024


@triton.jit
def _two_pass_kernel(x_ptr, weight_ptr, y_ptr, x_stride, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row a program, read twice: its squares are added block by block, then each number is scaled."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + column, mask=start + column < width, other=0.0).to(tl.float32)
        total += tl.sum(x * x)
    scale = 1.0 / tl.sqrt(total / width + eps)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * width + start + column, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)


def two_pass_rms_norm(x, weight, residual=None, eps=1e-6):
    """An addition by PyTorch, then a Triton kernel that reads each row twice; LLM-42's "Triton"."""
    check_tensors(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    require_triton("two_pass")
    stream = x if residual is None else x + residual
    width, weight = stream.shape[-1], weight.contiguous()
    read = stream.contiguous().view(-1, width)
    if read.is_cuda:
        y = torch.empty_like(read)
        _two_pass_kernel[(len(read),)](read, weight, y, read.stride(0), width, eps, BLOCK=BLOCK, PDL=False)
    else:
        read, weight, y = read.float(), weight.float(), torch.empty(read.shape, dtype=torch.float32, device="cpu")
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), torch.float32)
        Step(_two_pass_kernel, len(read), pointers, {"x_stride": read.stride(0), "width": width, "eps": eps},
             {"BLOCK": BLOCK}, {}).interpret({"x_ptr": read, "weight_ptr": weight, "y_ptr": y})
    y = y.view(stream.shape).to(x.dtype)
    return y if residual is None else (y, stream)
