"""What shapes decide of a product, and what every kind of schedule asks of it."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from . import order as orders
from .order import Order
from .schedule import Schedule, Unsuitable

LINE = 128  # bytes


@dataclass(frozen=True)
class Product:
    """y (m, n) = x (m, k) @ weight (n, k).T + bias, in an order.

    x_strides, weight_strides  in elements
    bias                       whether there is one
    multiprocessors            of the GPU
    adder                      in Triton's interpreter, whose product has NumPy's order: the dtype to add as, else ""
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    x_strides: tuple[int, int]
    weight_strides: tuple[int, int]
    order: Order
    bias: bool
    multiprocessors: int = 132
    adder: str = ""

    @classmethod
    def of(cls, x, weight, bias, order, multiprocessors: int = 132, adder: str = "") -> Product:
        """The product of these arguments; an x of more or fewer dimensions than two is read as contiguous rows."""
        n, k = weight.shape
        return cls(math.prod(x.shape[:-1]), n, k, x.dtype, x.stride() if x.dim() == 2 else (k, 1), weight.stride(),
                   orders.checked(order, n, k), bias is not None, multiprocessors, adder)

    @property
    def cut(self) -> bool:
        """Whether the order has more than one segment."""
        return self.order.segments > 1

    def carried_out(self, schedule: Schedule) -> Schedule:
        """The schedule without switches that say nothing here: of one segment, of rows in line.

        Raises Unsuitable if it cannot carry out the order.
        """
        length = self.order.length
        if self.cut and (length % schedule.block_k or length < 2 * schedule.block_k and not schedule.split):
            raise Unsuitable(f"block_k must divide the order's segments of {length}, at least twice in sequence, got "
                             f"{schedule}")
        split = schedule.split and self.cut
        return replace(schedule, split=split, reduce=schedule.reduce and split, copy=schedule.copy and any(self.apart))

    @property
    def apart(self) -> tuple[bool, bool]:
        """Whether the rows of x, and those of the weight, do not begin at whole lines of memory."""
        return self._begin_elsewhere(LINE)

    @property
    def followed(self) -> bool:
        """Whether bulk copies can follow the rows."""
        return not any(self._begin_elsewhere(16))

    def _begin_elsewhere(self, size: int) -> tuple[bool, bool]:
        """Whether rows are not contiguous, overlap, or begin elsewhere than at multiples of so many bytes."""
        x, weight = (step != 1 or stride * self.dtype.itemsize % size != 0 or stride < self.k
                     for stride, step in (self.x_strides, self.weight_strides))
        return x, weight

    def tiles(self, schedule: Schedule) -> int:
        """How many tiles of y there are."""
        return -(-self.m // schedule.block_m) * -(-self.n // schedule.block_n)

    def units(self, schedule: Schedule) -> int:
        """How many chains there are: tiles, or segments of tiles."""
        return self.tiles(schedule) * (self.order.segments if schedule.split else 1)

    def programs(self, schedule: Schedule) -> int:
        """How many programs to launch; in lockstep as many for each tile of tokens."""
        units = self.units(schedule)
        if schedule.lockstep:
            abreast = -(-self.m // schedule.block_m)
            return max(self.multiprocessors // abreast, 1) * abreast
        return min(units, self.multiprocessors) if schedule.persistent else units

    @property
    def sizes(self) -> dict[str, int]:
        """The kernels' run-time sizes."""
        return {"M": self.m, "N": self.n, "K": self.k}

    @property
    def segments(self) -> dict[str, int]:
        """The order as the kernels take it."""
        return {"segments": self.order.segments, "length": self.order.length}


def product_of(x, weight, bias, order, multiprocessors: int = 132, adder: str = "") -> Product:
    """`Product.of`, whose order may be a tree."""
    tree = orders.is_tree(order)
    product = Product.of(x, weight, bias, None if tree else order, multiprocessors, adder)
    return replace(product, order=orders.asked(order, product.n, product.k)) if tree else product
