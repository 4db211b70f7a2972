"""Ahead-of-time compilation of the matrix product, as ops/matmul launches it; generated_code.py calls it.

Triton is told of a GPU that is not there, so this runs in aot's worker processes alone.
"""
from __future__ import annotations

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ...op import DTYPES, Shape
from ...ops.matmul.op import order
from ...ops.matmul.plan import OPTIONS, bulk_launch, pointer_constants
from ...ops.matmul.pointer import pointer_kernel
from ...ops.matmul.schedule import Schedule


class _Absent:
    """A GPU to compile for."""

    def __init__(self, target: int):
        self.target = target

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target  # Triton keeps one compiler a device

    def get_current_stream(self, device):
        return 0


def compile_schedule(shape: str, dtype: str, schedule: str, target: int, tokens: int = 300):
    """The compiled kernel of one schedule for contiguous, aligned arguments of `N=...,K=...[,bias]`."""
    driver.set_active(_Absent(target))
    sizes, s = Shape.parse(shape), Schedule.parse(schedule)
    n, k, kind = sizes["N"], sizes["K"], DTYPES[dtype]
    plan = SimpleNamespace(dtype=kind, m=tokens, n=n, k=k, x_strides=(k, 1), weight_strides=(k, 1), cut=order(n, k),
                           bias=bool(sizes.get("bias")), index=0)
    if s.kind != "pointer":
        kernel, given, arguments, options = bulk_launch(plan, s, torch.empty(16, dtype=kind))
        return kernel.warmup(*given, *arguments, grid=(1,), **options)
    options = {**OPTIONS, "launch_pdl": target >= 90, "num_warps": s.warps, "num_stages": s.stages}
    scalars = (tokens, n, k, *plan.x_strides, *plan.weight_strides, *plan.cut)
    pointers = (*4 * (kind,), torch.float32, torch.int32)
    return pointer_kernel.warmup(*pointers, *scalars, *pointer_constants(plan, s), target >= 90, grid=(1,), **options)
