"""What every op's call shares: checked tensors, plans kept by shape, and a launch with nothing in between.

An eager call looks up a plan under everything that its shapes decide, and the plan launches:

    plan = PLANS.get(key) or PLANS.keep(key, Plan(...))     checks, schedule and grid: once a key
    launch(px, px, py)                                      alignment, stream and the launch: every call
"""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch

from .op import DTYPES
from .runtime import Compiled, current_device, current_stream, has_pdl


def check_tensors(**tensors) -> None:
    """Each is a strided tensor of the first one's dtype and device, which the kernels can work on.

    Raises TypeError or ValueError that names the argument, what it was and what it may be.
    """
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
        if tensor.dtype not in DTYPES.values():
            raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have {first}'s dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {first}'s device {x.device}, got {tensor.device}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{first} must be on a CPU or a CUDA GPU, got {x.device}")


def no_backward(name: str) -> RuntimeError:
    """What `name`.triton raises where autograd would record a call, rather than drop its gradient."""
    return RuntimeError(f"{name}.triton has no backward yet: call it under torch.no_grad()")


class Plans(dict):
    """key -> plan. Emptied when full, so that ever new shapes cannot fill the memory."""

    LARGEST = 4096

    def keep(self, key, plan):
        """Put a plan under its key and return it."""
        if len(self) >= self.LARGEST:
            self.clear()
        self[key] = plan
        return plan


class Launch:
    """A kernel bound to all but its pointers; it is compiled once for each alignment of theirs.

    `fn` is a @triton.jit function whose parameters are pointers (to numbers of these `dtypes`), then `scalars`,
    then `constants`, and last the constant PDL. `index` is the GPU, or -1 for Triton's interpreter. `options` are
    num_warps and the like.
    """

    __slots__ = ("_fn", "_grid", "_dtypes", "_arguments", "_index", "_options", "_compiled", "_aligned")

    def __init__(self, fn, grid: int, dtypes: tuple, scalars: tuple, constants: tuple, index: int, **options):
        pdl = index >= 0 and has_pdl(index)
        self._fn, self._grid, self._dtypes, self._index = fn, grid, dtypes, index
        self._arguments = (*scalars, *constants, pdl)
        self._options = {"enable_fp_fusion": False, "launch_pdl": pdl, **options}
        self._compiled: dict[tuple, Compiled] = {}
        self._aligned: Compiled | None = None

    def __call__(self, low: int, *pointers: int):
        """Launch on the GPU's current stream; `low` is the pointers or-ed together.

        The op asks its tensors for their pointers, and leaves out of `low` what torch has just allocated, which is
        aligned: a loop here would cost half a microsecond a call.
        """
        if current_device() != self._index:
            with torch.cuda.device(self._index):
                return self(low, *pointers)
        compiled = self._aligned
        if low & 15 or compiled is None:
            compiled = self._compile(tuple(p & 15 == 0 for p in pointers))
        return compiled(current_stream(self._index), *pointers)

    def _compile(self, aligned: tuple) -> Compiled:
        """Compile for pointers that are multiples of 16 or not; examples stand for the tensors."""
        if aligned not in self._compiled:
            examples = tuple(torch.empty(2, dtype=dtype, device=f"cuda:{self._index}")[0 if fits else 1:]
                             for dtype, fits in zip(self._dtypes, aligned, strict=True))
            self._compiled[aligned] = Compiled(self._fn, self._grid, examples, (), self._arguments, **self._options)
        if all(aligned):
            self._aligned = self._compiled[aligned]
        return self._compiled[aligned]

    def interpret(self, *tensors):
        """Run in Triton's interpreter, which is silently wrong for bfloat16: TypeError for that."""
        if not tensors[0].is_cpu:  # a plan's key need not tell a CPU from other devices without an index
            raise ValueError(f"x must be on a CPU or a CUDA GPU, got {tensors[0].device}")
        if any(t.dtype == torch.bfloat16 for t in tensors):
            raise TypeError("Triton's interpreter is wrong for bfloat16: give it float32")
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # 1 / 0 is inf, and no mishap
            self._fn[(self._grid,)](*tensors, *self._arguments)


def compiled(function: Callable) -> Callable:
    """torch.compile of a default, one specialised kernel a shape; nothing is compiled before the first call."""
    made = []

    @wraps(function)
    def call(*arguments, **options):
        if not made:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments, **options)
    return call
