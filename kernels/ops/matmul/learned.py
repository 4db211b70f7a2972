"""What was learned of products' forms while they were called, and a reader's own table of it.

A table has the form of those in data/schedules (kernels/tables.py says which); a number beside a schedule is the
largest token count of the forms that it was fastest for.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ...op import DTYPES, Shape, dtype_name
from ...runtime import HAS_GPU, WHY_NOT, current_device, triton
from . import order as orders
from .order import Order, Tree
from .product import Product
from .schedule import Schedule
from .shared_schedule import SECTION

_ORDERS = {"matmul": orders.order, SECTION: orders.shared_order}  # a table's sections


class Form(NamedTuple):
    """Products for which one schedule is kept: on GPU `index` (-1: none), of `tokens` rows or somewhat fewer."""

    index: int
    dtype: torch.dtype
    n: int
    k: int
    tokens: int
    order: Order | Tree
    followed: bool

    @classmethod
    def of(cls, product: Product, index: int) -> Form:
        """The form of a product."""
        p = product
        return cls(index, p.dtype, p.n, p.k, up_to(p.m), p.order, p.followed)


LEARNED: dict[Form, Schedule] = {}


def up_to(tokens: int) -> int:
    """The largest token count of the same form: 16, then four between a power of two and the next."""
    step = max(16, 1 << max((tokens - 1).bit_length() - 3, 0))
    return tokens + -tokens % step


def save(path) -> Path:
    """Write what is known of this GPU to a table, whole or not at all; a named order of the caller's own is left out.

    Raises OSError where it cannot be written.
    """
    path, version = Path(path), "" if WHY_NOT else triton.__version__
    table = {"machine": _machine(), "triton": version, "torch": torch.__version__}
    for form, schedule in sorted(LEARNED.items(), key=lambda pair: pair[0].tokens):
        section = next((s for s, of in _ORDERS.items() if of(form.n, form.k) == form.order), None)
        if section and form == _plain(section, form.dtype, form.n, form.k, form.tokens):
            shapes = table.setdefault(section, {}).setdefault(dtype_name(form.dtype), {})
            shapes.setdefault(str(Shape(N=form.n, K=form.k)), {})[str(form.tokens)] = str(schedule)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def load(path) -> dict[Form, Schedule]:
    """What a table says, kept for products to come on this GPU. Any table leaves the bits as they are.

    Raises FileNotFoundError, or ValueError that names the file and what in it cannot be read.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"an object is needed, got {type(raw).__name__}")
        found = {_plain(section, DTYPES[dtype], *_sizes(shape), _tokens(tokens)): Schedule.parse(text)
                 for section in _ORDERS if section in raw for dtype, shapes in raw[section].items()
                 for shape, column in shapes.items() for tokens, text in column.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of schedules ({type(error).__name__}: {error}): delete it, and tune "
                         "again") from error
    LEARNED.update(found)
    return found


def _plain(section: str, dtype: torch.dtype, n: int, k: int, tokens: int) -> Form:
    """The form of contiguous tensors in a section's order, on the current GPU."""
    return Form(_index(), dtype, n, k, tokens, _ORDERS[section](n, k), k * dtype.itemsize % 16 == 0)


def _sizes(text: str) -> tuple[int, int]:
    shape = Shape.parse(text, "N", "K")
    if set(shape) != {"N", "K"} or min(shape.values()) < 1:
        raise ValueError(f"a shape must read like 'N=4096,K=4096', got {text!r}")
    return shape["N"], shape["K"]


def _tokens(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"a token count must be at least 1, got {text}")
    return up_to(int(text))


def _index() -> int:
    return current_device() if HAS_GPU else -1


def _machine() -> str:
    return torch.cuda.get_device_name(_index()) if HAS_GPU else "CPU"
