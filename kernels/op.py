"""Op: the vocabulary every op speaks. Three names on one object, and what a sweep must know of it."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16', the name used in data/ and in widgets."""
    return str(dtype).removeprefix("torch.")


class Shape(Mapping):
    """The sizes of one experiment, written as in data/: ``D=8192,residual``.

    A bare word is a switch (True). Raises ValueError for text that is not of that form.
    """

    def __init__(self, **sizes: int | bool):
        self._sizes = sizes

    @classmethod
    def parse(cls, text: str | Shape, *needed: str) -> Shape:
        """The shape that `text` writes. ValueError if it lacks one of the sizes `needed`."""
        shape = text if isinstance(text, Shape) else cls._read(text)
        lacking = [name for name in needed if shape.get(name, True) is True]
        if lacking:
            raise ValueError(f"shape must give {' and '.join(f'{name}=...' for name in lacking)}, got {str(text)!r}")
        return shape

    @classmethod
    def _read(cls, text: str) -> Shape:
        sizes: dict[str, int | bool] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not name.isidentifier() or (equals and not value.isdigit()):
                raise ValueError(f"shape must read like 'D=8192,residual', got {text!r}")
            sizes[name] = int(value) if equals else True
        return cls(**sizes)

    def __getitem__(self, name):
        return self._sizes[name]

    def __iter__(self):
        return iter(self._sizes)

    def __len__(self):
        return len(self._sizes)

    def __str__(self):
        return ",".join(name if value is True else f"{name}={value}" for name, value in self._sizes.items())

    __repr__ = __str__


@dataclass(frozen=True)
class Work:
    """The least a call can do: bytes each input and output crosses memory once, and arithmetic operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Op:
    """One operation under its three names.

    cuda      the default: what PyTorch calls today (on a CPU, PyTorch's CPU default)
    python    the specification: the order of every sum in plain PyTorch
    triton    a schedule of choice; the same bits as ``python``
    order     the order of the sum in one sentence
    inputs    (tokens, shape, dtype, device, seed) -> arguments; row i does not depend on ``tokens``
    work      (tokens, shape, dtype) -> Work
    per_token which arguments hold one row a token
    schedules (shape, dtype) -> every schedule that must give the same bits
    schedule  (tokens, shape, dtype) -> the name of the one ``triton`` picks
    extras    further contenders by name, such as ``compile`` or ``flashinfer``
    mutates   extras that overwrite their arguments, so a bits check hands them copies
    call      how the schedules are called and what they launch: a kernels.call.Call
    """

    name: str
    title: str
    order: str
    cuda: Callable
    python: Callable
    triton: Callable
    inputs: Callable[..., tuple]
    work: Callable[..., Work]
    per_token: tuple[int, ...]
    shapes: tuple[str, ...]
    schedules: Callable[..., list]
    schedule: Callable[..., str]
    extras: Mapping[str, Callable] = field(default_factory=lambda: MappingProxyType({}))
    mutates: frozenset[str] = frozenset()
    call: Any = None

    @property
    def implementations(self) -> dict[str, Callable]:
        """Every contender by name: cuda, python, triton, then the extras."""
        return {"cuda": self.cuda, "python": self.python, "triton": self.triton, **self.extras}

    def implementation(self, name: str) -> Callable:
        """One contender. Raises ValueError that lists the names there are."""
        try:
            return self.implementations[name]
        except KeyError:
            names = ", ".join(self.implementations)
            raise ValueError(f"{self.name} has no implementation {name!r}; it has {names}") from None

    def run_schedule(self, schedule, *arguments, **named):
        """One given schedule, with the arguments, results and bits of the rest. TypeError for another op's."""
        return self.call.run_schedule(schedule, *arguments, **named)

    def take(self, arguments: tuple, rows) -> tuple:
        """The same arguments with only these rows (an index tensor or a slice) of every per-token one."""
        return tuple(a[rows] if i in self.per_token and a is not None else a for i, a in enumerate(arguments))

    def __call__(self, *_, **__):
        name = self.name
        raise TypeError(f"{name} is an op with three names: call {name}.cuda (the default), {name}.python (the "
                        f"specification) or {name}.triton (a schedule)")

    def __reduce__(self):  # pickled and copied by name: what closures hold cannot travel
        return _named, (self.python.__module__, self.name)

    def __repr__(self):
        return f"<Op {self.name}: {self.title}>"


def _named(module: str, name: str) -> Op:
    return getattr(import_module(module), name)
