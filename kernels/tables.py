"""Measured schedules of a GPU, read from data/schedules/<gpu>.json.

    {"machine": "NVIDIA H200", "triton": "3.6.0", "torch": "2.11.0",
     "matmul": {"bfloat16": {"N=4096,K=4096": {"16": "pointer ...", "64": "tma ..."}}},
     "matmul_shared": the same for the order that several GPUs can share}

A number beside a schedule is the largest token count it was measured best for. A table that cannot be used costs speed
and is warned about; the bits stay those of the order.
"""
from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .op import Shape
from .runtime import slug

FOLDER = Path(__file__).resolve().parents[1] / "data" / "schedules"
RELATED = {"h100": ("h200",), "h200": ("h100",), "gh200": ("h200", "h100")}  # whose table serves where there is none


def load(name: str, read: Callable[[str], Any], folder=None) -> dict:
    """The table of one GPU: {op: {dtype: {(N, K): {tokens: schedule}}}}; {} and a warning if it cannot be used.

    `read` makes a schedule of a line, or raises ValueError.
    """
    path = Path(folder or FOLDER) / f"{name}.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {op: {dtype: {_sizes(shape): _column(choices, read) for shape, choices in shapes.items()}
                     for dtype, shapes in dtypes.items()}
                for op, dtypes in raw.items() if isinstance(dtypes, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        warnings.warn(f"{path} cannot be used ({error}): products take schedules of a general rule, which may be "
                      "slower. Their bits do not change. Run `python -m kernels tune` to measure new ones.",
                      RuntimeWarning, stacklevel=2)
        return {}


def _sizes(shape: str) -> tuple[int, int]:
    sizes = Shape.parse(shape)
    if set(sizes) != {"N", "K"} or not all(type(v) is int and v > 0 for v in sizes.values()):
        raise ValueError(f"a shape must read like 'N=4096,K=4096', got {shape!r}")
    return sizes["N"], sizes["K"]


def _column(choices, read) -> dict[int, Any]:
    if not isinstance(choices, dict) or not choices:
        raise ValueError(f"a shape needs at least one schedule, got {choices!r}")
    column = dict(sorted((int(tokens), read(text)) for tokens, text in choices.items()))
    if min(column) < 1:
        raise ValueError(f"a token count must be at least 1, got {min(column)}")
    return column


@cache
def of_gpu(index: int, read: Callable[[str], Any]) -> dict:
    """The table for GPU `index`: its own, or a near relative's; {} if there is none."""
    if index < 0:
        return {}
    name = slug(index)
    return next((table for table in (load(n, read) for n in (name, *RELATED.get(name, ()))) if table), {})


def forget() -> None:
    """Read the tables again at the next choice; the tuner calls it after writing one."""
    of_gpu.cache_clear()
