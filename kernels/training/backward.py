"""What backward passes share: two names for one order, and how their kernels are called.

A backward pass here has a specification, `python`, and a schedule with its bits, `triton`, as an op has. Each module
beside this one states the order of its sums at its top.
"""
from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch

from ..call import Call, KernelCall, Plan

DTYPE = torch.bfloat16  # of weights, of what flows forward, and of what flows back


@dataclass(frozen=True)
class Pass:
    """A backward pass under two names of the same bits: `python`, the specification, and `triton`, a schedule."""

    name: str
    order: str
    python: Callable
    triton: Callable
    call: Call

    def implementation(self, name: str) -> Callable:
        """`python` or `triton`. Raises ValueError for another name."""
        if name not in ("python", "triton"):
            raise ValueError(f"{self.name} has python and triton, got {name!r}")
        return getattr(self, name)


def implementation_on(device: torch.device) -> str:
    """What a trainer calls on this device: schedules on a GPU, elsewhere the specification, which has their bits."""
    return "triton" if device.type == "cuda" else "python"


class BackwardCall(KernelCall):
    """A call whose kernels' pointers have the names of its arguments and results, and _ptr behind them."""

    @abstractmethod
    def results(self, *arguments) -> dict[str, torch.Tensor]:
        """The results by name, not filled."""

    def scratch(self, *arguments) -> dict[str, torch.Tensor]:
        """What the first launch leaves for the second, by name, not filled."""
        return {}

    def outputs(self, *arguments) -> tuple[torch.Tensor, ...]:
        return tuple(self.results(*arguments).values())

    def empty(self, plan, *arguments):
        """No tokens: each sum over them is 0."""
        return _one_or_all(tuple(y.zero_() for y in self.outputs(*arguments)))

    def memory(self, plan: Plan, *arguments) -> dict[str, torch.Tensor]:
        """Arguments by their pointers' names; what is None is never read, and has the first one's address."""
        named = zip(inspect.signature(self.check).parameters, arguments, strict=True)
        return {f"{name}_ptr": arguments[0] if a is None else a for name, a in named
                if a is None or isinstance(a, torch.Tensor)}

    def launch(self, plan, *arguments):
        arguments = self.readable(*arguments)
        results, scratch = self.results(*arguments), self.scratch(*arguments)
        memory = {**self.memory(plan, *arguments), **{f"{n}_ptr": t for n, t in (results | scratch).items()}}
        for launch in (plan.first, plan.second):
            if launch is not None:
                pointers = [memory[name].data_ptr() for name in launch.step.pointers]
                launch(reduce(or_, pointers), *pointers)
        return _one_or_all(tuple(results.values()))

    def in_float32(self, *arguments) -> tuple:
        return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)

    def interpret(self, plan, *arguments):
        """Triton's interpreter is wrong for bfloat16: it gets float32 copies, and torch rounds."""
        self.check(*arguments)
        arguments = self.readable(*arguments)
        wanted, copies = self.results(*arguments), self.in_float32(*arguments)
        made = {name: y.float() for name, y in (wanted | self.scratch(*arguments)).items()}
        memory = {**self.memory(plan, *copies), **{f"{n}_ptr": t for n, t in made.items()}}
        for step in plan.steps:
            step.interpret(memory)
        return _one_or_all(tuple(made[name].to(y.dtype) for name, y in wanted.items()))


def _one_or_all(results: tuple):
    return results[0] if len(results) == 1 else results


def check_tokens(name: str, tensor, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` has this shape and dtype, on the device of `like`."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
