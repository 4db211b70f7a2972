"""The matrix product y = x @ weight.T + bias, in F.linear's layout, in one order at every token count.

Its order is in order.py beside this file. A kind of schedule is one file: pointer.py, tma.py and hopper.py;
for an order that is a tree, tree.py and hopper_tree.py. Rows and sizes that suit no GPU have copies.py and units.py;
choice.py chooses a schedule, and tuning.py while products run.
"""
from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from ... import bits
from ...op import Op, Shape, Work
from ...runtime import HAS_GPU, current_device, has_pdl
from . import copies, gradients
from . import order as orders
from .call import CALL
from .choice import choose, tested
from .contenders import cublas_no_split_k, frozen, tiled
from .product import product_of
from .schedule import Schedule
from .shared_schedule import choose_shared, tested_shared


def _cuda(x, weight, bias=None):
    """The default: F.linear."""
    return F.linear(x, weight, bias)


def _python(x, weight, bias=None, order=None):
    """The specification: x (..., K), weight (N, K), bias (N,) or None -> (..., N) in x's dtype.

    float32, float16 or bfloat16, all of one dtype. `order` is (segments, length) of k, a tree of `shared_order(N, K)`,
    or None for the one that N and K decide. Raises TypeError or ValueError for anything else. Differentiable, once.
    """
    if gradients.needed(x, weight, bias):
        return gradients.Linear.apply(x, weight, bias, order, orders.specified)
    return orders.specified(x, weight, bias, order)


def _spread(width: int, step: int, dtype, device) -> torch.Tensor:
    """2**-4 to 2**4 over the columns: 8-bit numbers of one size have sums that are exact, and so no order."""
    exponent = torch.arange(width, dtype=torch.int64, device=device) * step % 9
    return ((torch.ones_like(exponent) << exponent).float() * 2.0**-4).to(dtype)


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    shape = Shape.parse(shape, "N", "K")
    x = bits.portable(tokens, shape["K"], dtype, device, seed) * _spread(shape["K"], 7, dtype, device)
    weight = bits.portable(shape["N"], shape["K"], dtype, device, seed + 1) * _spread(shape["K"], 5, dtype, device)
    bias = bits.portable(1, shape["N"], dtype, device, seed + 2)[0] if shape.get("bias") else None
    return (x, weight, bias, *_order(shape))


def _order(shape: Shape) -> tuple:
    """(the order that a shape such as N=4096,K=4096,gpus=8 names,), or () for the one of N and K."""
    return (orders.shared_order(shape["N"], shape["K"], shape["gpus"]),) if "gpus" in shape else ()


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    shape = Shape.parse(shape, "N", "K")
    n, k = shape["N"], shape["K"]
    bias = n if shape.get("bias") else 0
    return Work(bytes=(tokens * (n + k) + n * k + bias) * dtype.itemsize, flops=2 * tokens * n * k)


def _index() -> int:
    return current_device() if HAS_GPU else -1


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    shape = Shape.parse(shape, "N", "K")
    n, k = shape["N"], shape["K"]
    every = tested_shared if _of_tree(shape) else tested
    bulk, copied = HAS_GPU and has_pdl(_index()), k * dtype.itemsize % 16 != 0
    return [s if s.kind == "pointer" else replace(s, copy=copied) for s in every(n, k, dtype, {-1, _index()})
            if s.kind == "pointer" or bulk]


def _schedule(tokens, shape, dtype) -> str:
    shape = Shape.parse(shape, "N", "K")
    found = (choose_shared(shape, dtype, tokens, _index()) if _of_tree(shape) else
             choose("matmul", shape, dtype, tokens, _index()))
    if shape["K"] * dtype.itemsize % 16:  # rows that bulk copies cannot follow
        x, weight, _, *named = _inputs(tokens, Shape(**{**shape, "bias": False}), dtype, "meta")
        found = iter(copies.offered(product_of(x, weight, None, named[0] if named else None), found))
    return str(next(found))


def _of_tree(shape: Shape) -> bool:
    return any(map(orders.is_tree, _order(shape)))


_LLAMA_8B = ("N=6144,K=4096", "N=4096,K=4096", "N=28672,K=4096", "N=4096,K=14336", "N=128256,K=4096")
_SHARDS = ("N=1280,K=8192", "N=7168,K=8192", "N=8192,K=1024", "N=8192,K=3584", "N=1024,K=4096", "N=512,K=4096")

matmul = Op(
    name="matmul",
    title="Matrix product",
    order="a chain over k; small or deep weights: k in segments of fixed length, added in sequence; "
          "shared by GPUs: in eight leaves, added in pairs",
    cuda=_cuda,
    python=CALL.specification(_python),
    triton=CALL.triton,
    inputs=_inputs,
    work=_work,
    per_token=(0,),
    shapes=_LLAMA_8B + _SHARDS,
    schedules=_schedules,
    schedule=_schedule,
    extras={"tiled": tiled, "frozen": frozen, "cublas_no_split_k": cublas_no_split_k},
    call=CALL,
)
