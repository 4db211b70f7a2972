"""A kernel bound to its arguments, and a launch with nothing in between.

A `Step` is a launch written down as data; a `Launch` is a step made ready for one GPU, or for Triton's interpreter.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock
from typing import Any

import numpy as np
import torch

from .runtime import Compiled, current_device, current_stream, has_pdl


@dataclass(frozen=True)
class Tiles:
    """A tensor that a kernel reads or writes by bulk copies, in tiles of the shape `block`.

    shape, strides  of the tensor, in elements
    layout          given a Triton descriptor, the same with what Gluon must know of shared memory
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Callable[[Any], Any] = lambda descriptor: descriptor

    def descriptor(self, base: torch.Tensor):
        """A descriptor of such a tensor that begins where `base` does."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return self.layout(TensorDescriptor(base, list(self.shape), list(self.strides), list(self.block)))


@dataclass(frozen=True)
class Step:
    """One launch as data: the kernel, how many programs, and its arguments by name, in the kernel's order.

    pointers   name -> dtype of the numbers there, Tiles for bulk copies, None for what this launch has not
    scalars    run-time numbers
    constants  what the code is compiled for; the kernel's last argument, PDL, is not among them
    options    num_warps and the like
    named      pointer -> the name of the memory it points to, where that is another
    leaves     how many float32 numbers it leaves for the next launch
    """

    kernel: Any
    programs: int
    pointers: Mapping[str, torch.dtype | Tiles | None]
    scalars: Mapping[str, int | float]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    named: Mapping[str, str] = field(default_factory=dict)
    leaves: int = 0

    def __post_init__(self):
        named = (*self.pointers, *self.scalars, *self.constants, "PDL")
        if named != tuple(wanted := getattr(self.kernel, "arg_names", named)):
            raise TypeError(f"{self.kernel} takes {', '.join(wanted)}, got {', '.join(named)}")

    def examples(self, device, aligned: tuple[bool, ...] | None = None) -> tuple:
        """Arguments to compile for: pointers that are multiples of 16 or not (by default, all are)."""
        dtypes = {p.dtype if isinstance(p, Tiles) else p for p in self.pointers.values() if p is not None}
        memory = {dtype: torch.empty(16, dtype=dtype, device=device) for dtype in dtypes}
        fits = aligned or (True,) * len(self.pointers)
        return tuple(pointer.descriptor(memory[pointer.dtype]) if isinstance(pointer, Tiles)
                     else None if pointer is None else memory[pointer][0 if fit else 1:]
                     for pointer, fit in zip(self.pointers.values(), fits, strict=True))

    def arguments(self, pdl: bool) -> tuple:
        """The kernel's arguments behind its pointers; `pdl`: may its programs start while the launch before ends?"""
        return *self.scalars.values(), *self.constants.values(), pdl

    def compile_options(self, pdl: bool) -> dict[str, Any]:
        """Triton's options: nothing is fused that is not written so."""
        return {"enable_fp_fusion": False, "launch_pdl": pdl, **self.options}

    def compiled(self, index: int, aligned: tuple[bool, ...] | None = None) -> Compiled:
        """The step's code for GPU `index`, ready to launch."""
        pdl = has_pdl(index)
        return Compiled(self.kernel, self.programs, self.examples(f"cuda:{index}", aligned), self.arguments(pdl),
                        **self.compile_options(pdl))

    def interpret(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Run in Triton's interpreter on tensors by the pointers' names.

        Raises TypeError for bfloat16, for which the interpreter is silently wrong.
        """
        tensors = [memory[self.named.get(name, name)] for name in self.pointers]
        for tensor in tensors:
            if tensor.dtype == torch.bfloat16:
                raise TypeError("Triton's interpreter is wrong for bfloat16: give it float32")
        # overflow and 0 / 0 give inf and NaN, as on a GPU; the interpreter patches triton.language while it runs
        with np.errstate(all="ignore"), _INTERPRETER:
            self.kernel[(self.programs,)](*tensors, *self.arguments(False))


_INTERPRETER = Lock()  # one thread at a time


class Launch:
    """A step on GPU `index`; it is compiled once for each alignment of its pointers."""

    __slots__ = ("step", "_index", "_compiled", "_aligned")

    def __init__(self, step: Step, index: int):
        self.step, self._index = step, index
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
        if aligned not in self._compiled:
            self._compiled[aligned] = self.step.compiled(self._index, aligned)
        if all(aligned):
            self._aligned = self._compiled[aligned]
        return self._compiled[aligned]


def compiled(function: Callable) -> Callable:
    """torch.compile of a default, one specialised kernel a shape; nothing is compiled before the first call."""
    made: list[Callable] = []

    @wraps(function)
    def call(*arguments, **options):
        if not made:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments, **options)
    return call
