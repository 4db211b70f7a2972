"""What a sweep will take, in bytes and in seconds, from its shapes alone: nothing is allocated and nothing measured.

Bytes. At a point there are the inputs (on a GPU under the clock `cold` many sets of them), the results of every
contender at the largest count, and what one call needs beyond its results: copies in float32 and float64. The last is
a multiple, measured on a CPU and rounded up, of the rows in float32, a row's inputs and results together. A test holds
the sum against a process' real peak.

Seconds are rough. Once points are measured, a sweep's own times count.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import torch

from ... import runtime
from ...model.cache import free_memory
from ...op import DTYPES, Op, Shape
from .. import bench
from .options import Sweep

# a call's copies beside its results, as a multiple of its rows in float32
PYTHON = {"rms_norm": 1.6, "softmax": 2.4, "log_softmax": 2.4, "sum": 2.4, "mean": 2.4}
PYTHON_OF_ANOTHER, OTHERS = 3.0, 1.5
COMPARING = 4.6  # results, while their bits are compared with those at the largest count
MAKING = 52  # bytes an element that is being made: hashes are int64
MADE_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}
COUNTED = {"page", "mixed"}  # of a shape: pages and sequences are no sizes with names
FIXED = 64 << 20  # what slices, code and an allocator's gaps add


class _Tensor(NamedTuple):
    """A tensor among an op's arguments, which is not made; places and tables have dtypes of their own."""

    sizes: tuple
    dtype: torch.dtype


def input_bytes(op: Op, tokens: int, shape: str, dtype: torch.dtype) -> int:
    """Bytes of one set of inputs."""
    return sum(math.prod(argument.sizes) * argument.dtype.itemsize for argument in _arguments(op, tokens, shape, dtype)
               if isinstance(argument, _Tensor))


def _arguments(op: Op, tokens: int, shape: str, dtype: torch.dtype) -> list:
    """Each tensor among an op's arguments as a _Tensor, the others as they are."""
    sizes = dict(Shape.parse(shape)) | {"tokens": tokens}
    if COUNTED & sizes.keys():
        return [_Tensor(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a
                for a in op.inputs(tokens, shape, dtype, "meta")]
    sizes |= {f"2 * {name}": 2 * size for name, size in sizes.items()} | {
        f"tokens + {name}": tokens + size for name, size in sizes.items()}
    return [a._replace(sizes=tuple(sizes.get(size, size) for size in a.sizes)) if isinstance(a, _Tensor) else a
            for a in _form(op.inputs, shape, dtype)]


@lru_cache
def _form(inputs: Callable, shape: str, dtype: torch.dtype) -> list:
    """`_arguments` with names for sizes, read off a small example in which each size is another prime number.

    Meta tensors would tell as well, and take a second to import what they need.
    """
    named = [name for name, size in Shape.parse(shape).items() if size is not True]
    primes = dict(zip(("tokens", *named), (5, 7, 11, 13, 17, 19, 23, 29), strict=False))
    small = Shape(**{name: primes.get(name, size) for name, size in Shape.parse(shape).items()})
    names = {2 * prime: f"2 * {name}" for name, prime in primes.items()}  # two halves side by side
    names |= {primes["tokens"] + prime: f"tokens + {name}" for name, prime in primes.items()}  # keys behind a context
    names |= {prime: name for name, prime in primes.items()}
    return [_Tensor(tuple(names.get(size, size) for size in a.shape), a.dtype) if isinstance(a, torch.Tensor) else a
            for a in inputs(5, str(small), dtype, "cpu", 0)]


def call_bytes(op: Op, name: str, tokens: int, shape: str, dtype: torch.dtype) -> int:
    """What one call of a contender takes: its results, and copies of rows and, in Triton's interpreter, of weights."""
    wide, weights = (op.work(count, shape, torch.float32).bytes for count in (tokens, 0))
    factor = PYTHON.get(op.name, PYTHON_OF_ANOTHER) if name == "python" else OTHERS
    copied = weights if name not in ("cuda", "python") and dtype != torch.float32 else 0
    return result_bytes(op, tokens, shape, dtype) + math.ceil(factor * (wide - weights)) + copied


def result_bytes(op: Op, tokens: int, shape: str, dtype: torch.dtype) -> int:
    return max(op.work(tokens, shape, dtype).bytes - input_bytes(op, tokens, shape, dtype), 0)


def bytes_needed(wanted: Sweep, point: tuple[str, str, int], largest: int = 0) -> int:
    """Bytes a point takes at its peak. `largest` is the count whose rows its rows are compared with, if it is larger
    than all that are wanted.
    """
    (name, shape, tokens), op, kind = point, wanted.op, wanted.device.type
    dtype, counts = DTYPES[name], (max(largest, *wanted.tokens), tokens)
    inputs, results = ([of(op, count, shape, dtype) for count in counts] for of in (input_bytes, result_bytes))
    calls = [[call_bytes(op, who, count, shape, dtype) for who in wanted.implementations] for count in counts]
    making = MAKING * min(inputs[0] // dtype.itemsize, MADE_AT_ONCE.get(kind, 1 << 18))
    checking = max(inputs[0] + max(making, *calls[0]), math.ceil((1 + COMPARING) * results[1]))
    timing = max(_clock_bytes(wanted, clock, op.work(tokens, shape, dtype).bytes, inputs[1], calls[1])
                 for clock in wanted.clocks)
    return FIXED + len(wanted.implementations) * results[0] + max(checking, timing)


def _clock_bytes(wanted, clock, touched, inputs, calls) -> int:
    if clock == "call":
        return inputs + max(calls)
    evict = 3 * bench.l2_bytes(wanted.device) if clock == "cold" else 0
    return (bench.sets(clock, touched, wanted.device) + 1) * inputs + sum(calls) + evict  # a graph keeps what it took


def refuse_too_large(wanted: Sweep, points=None, largest: int = 0, beside: int = 0) -> None:
    """Raise MemoryError that names bytes needed and free, if one of these points (default: all) cannot fit.

    beside  bytes that are needed besides
    """
    free = free_memory(wanted.device)
    for dtype, shape, tokens in wanted.points() if points is None else points:
        needed = bytes_needed(wanted, (dtype, shape, tokens), largest) + beside
        if free is not None and needed > free:
            most = max(wanted.tokens)
            besides = f", which are compared with the {largest} on record," if largest > most else ""
            raise MemoryError(f"{most} tokens of {shape} in {dtype}{besides} need about {bench.gigabytes(needed)}, "
                              f"and {bench.gigabytes(free)} are free: choose fewer tokens or contenders, or a smaller "
                              "shape")


# --- seconds

BYTES_A_SECOND = {"softmax": 4e6, "log_softmax": 6e6, "swiglu": 5e7}  # rows in float32 through a specification on a CPU
MULTIPLICATIONS_A_SECOND = {torch.float32: 8e6}  # of a specification's product on a CPU
SIXTEEN_BITS, OF_ANOTHER = 8e7, 2e8
DEFAULT_BYTES, DEFAULT_FLOPS = 2e9, 2e10
A_PROGRAM, A_CHUNK = 0.004, {"rms_norm": 0.003, "sum": 0.001, "mean": 0.001}  # seconds in Triton's interpreter
A_TILE = {"rotary": 0.003, "swiglu": 0.012}  # whose programs take one tile each, however long a row is
A_CHUNK_OF_ANOTHER, A_PRODUCT = 0.02, {torch.float32: 0.002}
A_PRODUCT_OF_16_BITS = 0.0005
ON_A_GPU = 0.3  # seconds a contender: compiling, loading and capturing take longer than running


def seconds(wanted: Sweep) -> list[float]:
    """Seconds of each point, pass after pass, in the order of a sweep."""
    found = []
    for number in range(wanted.passes):
        for place, point in enumerate(wanted.points()):
            first = place % len(wanted.tokens) == 0
            found.append(sum(_of_contender(wanted, name, point, number == 0, first)
                             for name in wanted.implementations))
    return found


def _of_contender(wanted, name, point, checked, first) -> float:
    if wanted.device.type == "cuda":
        return ON_A_GPU * len(wanted.clocks) / (1 if checked else 3)
    dtype, shape, tokens = point
    call = call_seconds(wanted.op, name, tokens, shape, DTYPES[dtype])
    timing = 2 * call + wanted.repeats * max(call, min(0.02, 200 * call))
    largest = max(wanted.tokens)
    at_largest = call_seconds(wanted.op, name, largest, shape, DTYPES[dtype]) if first else 0.0
    return timing + checked * (at_largest + call * (tokens != largest))


def call_seconds(op: Op, name: str, tokens: int, shape: str, dtype: torch.dtype) -> float:
    """About how long a call takes on a CPU."""
    work = op.work(tokens, shape, torch.float32)
    if name in ("triton", "frozen"):
        return sum(_of_program(op, shape, dtype) * programs for programs in interpreted(op, tokens, shape, dtype))
    if name != "python":
        return 2e-5 + work.bytes / DEFAULT_BYTES + work.flops / DEFAULT_FLOPS
    if "K" in Shape.parse(shape):
        return 1e-3 + work.flops / 2 / MULTIPLICATIONS_A_SECOND.get(dtype, SIXTEEN_BITS)
    return 2e-4 + work.bytes / BYTES_A_SECOND.get(op.name, OF_ANOTHER)


def interpreted(op: Op, tokens: int, shape: str, dtype: torch.dtype) -> Iterator[int]:
    """How many programs each launch of a call has in Triton's interpreter; none where Triton cannot run."""
    if runtime.WHY_NOT:
        return
    known, chosen = _schedules(op.schedules, shape, dtype), op.schedule(tokens, shape, dtype)
    arguments = (torch.empty(a.sizes, dtype=a.dtype, device="meta") if isinstance(a, _Tensor) else a
                 for a in _arguments(op, tokens, shape, dtype))
    with suppress(TypeError, RuntimeError, OverflowError):  # sizes that no tensor can have
        for step in op.call.launches(known.get(chosen, next(iter(known.values()))), *arguments):
            yield step.programs


@lru_cache
def _schedules(schedules: Callable, shape: str, dtype: torch.dtype) -> dict:
    return {str(s): s for s in schedules(shape, dtype)}


def _of_program(op, shape, dtype) -> float:
    sizes = Shape.parse(shape)
    if "K" in sizes:
        return A_PROGRAM + sizes["K"] * A_PRODUCT.get(dtype, A_PRODUCT_OF_16_BITS)
    if op.name in A_TILE:
        return A_PROGRAM + A_TILE[op.name]
    chunks = -(-max(sizes.values()) // 1024)
    return A_PROGRAM + chunks * A_CHUNK.get(op.name, A_CHUNK_OF_ANOTHER)
