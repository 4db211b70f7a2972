"""One GPU's part of a shared product: its own leaves of k, added up in float32, and no further.

The specification is `matmul.shared.shared_part`. A schedule is one of the matrix product's, of kind pointer or hopper;
the kernels are beside this file, for the product's own round their result and add all eight leaves.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch

from ...call import check_tensors
from ...launch import Launch
from ...op import Shape, dtype_name
from ...runtime import current_device, current_stream, has_pdl, require_triton
from ..matmul.descriptors import leading, made_at
from ..matmul.order import LEAVES, Order, Tree
from ..matmul.product import Product
from ..matmul.schedule import Schedule, Unsuitable
from ..matmul.shared import SHARES, shared_part
from ..matmul.shared_schedule import choose_shared, suits_leaves
from . import part_kernel

specified = shared_part
_FIRST = Schedule("pointer", 32, 32, 32, warps=4, stages=2)  # runs anywhere


def part(x, weight, order: Tree, gpus: int, out: torch.Tensor | None = None, schedule: Schedule | None = None):
    """A schedule of choice, or the one given: x (..., K of its share), weight (N, the same) -> (..., N) float32.

    order  of the whole weight, `shared_order(N, K)`
    out    contiguous float32 memory to write into, by default new

    The bits of `specified` but for the sign of a zero, which the last addition to +0 takes. Raises as that does, and
    Unsuitable for a schedule that cannot carry it out.
    """
    count = check(x, weight, order, gpus)
    require_triton("part")
    x, weight = x.detach(), weight.detach()
    shape = (*x.shape[:-1], len(weight))
    out = torch.empty(shape, dtype=torch.float32, device=x.device) if out is None else _checked(out, shape, x.device)
    if not out.numel() or not x.shape[-1]:
        return out.zero_()
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    product = product_of(x, weight, Order(count, order.length))
    if x.is_cpu:
        _interpret(schedule or _FIRST, product, x, weight, out)
    else:
        _on_gpu(schedule, product, x, weight, out)
    return out


def check(x, weight, order: Tree, gpus: int) -> int:
    """How many leaves a GPU has. Raises TypeError or ValueError for arguments that are no part of a product."""
    check_tensors(x_part=x, weight_part=weight)
    if not isinstance(order, Tree):
        raise TypeError(f"order must be a Tree, as shared_order(n, k) of the whole weight gives, got {order!r}")
    if gpus not in SHARES[1:]:
        raise ValueError(f"gpus must be 2, 4 or 8, for on one a part is the whole product, got {gpus!r}")
    count = LEAVES // gpus
    if weight.dim() != 2 or weight.shape[1] > count * order.length or not x.dim() or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight_part must be (N, K) with K up to {count} leaves of {order.length}, and x_part "
                         f"(..., K), got {tuple(weight.shape)} and {tuple(x.shape)}")
    return count


def product_of(x, weight, order: Order, adder: str = "") -> Product:
    """What a schedule has to carry out; `order` are the leaves of this GPU."""
    n, k = weight.shape
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    return Product(math.prod(x.shape[:-1]), n, k, x.dtype, x.stride(), weight.stride(), order, False, multiprocessors,
                   adder)


def choose(product: Product, index: int = -1) -> Iterator[Schedule]:
    """Schedules for GPU `index`, best first: those that were measured for the whole weight, then a rule."""
    whole = Shape(N=product.n, K=LEAVES * product.order.length)
    for schedule in choose_shared(whole, product.dtype, product.m, index):
        schedule = replace(schedule, store=False, split=False, reduce=False)
        if schedule.kind in ("pointer", "hopper") and suits_leaves(schedule, product.order.length):
            yield schedule
    yield _FIRST


def step(schedule: Schedule, product: Product):
    """The launch of a schedule. Raises Unsuitable if it cannot carry out the product."""
    s = schedule
    if s.kind not in ("pointer", "hopper") or s.split or s.reduce or s.store:
        raise Unsuitable(f"a part has schedules of kind pointer or hopper, without split, reduce and store, got {s}")
    if not suits_leaves(s, product.order.length):
        raise Unsuitable(f"block_k must divide leaves of {product.order.length} at least twice, got {s}")
    kind = _kind(s)
    if kind is not part_kernel:
        kind.suits(s, product)
    return kind.step(s, product)


def _kind(schedule: Schedule) -> ModuleType:
    if schedule.kind == "hopper":  # written in Gluon, which is there if Triton is
        from . import hopper_part

        return hopper_part
    return part_kernel


def _checked(out, shape, device):
    if out.dtype != torch.float32 or out.shape != shape or out.device != device or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 {shape} on {device}, got {out.dtype} {tuple(out.shape)} on "
                         f"{out.device}")
    return out


def _interpret(schedule, product, x, weight, out) -> None:
    """Triton's interpreter is wrong for 16-bit numbers: it gets float32 copies, and adds as the dtype's chain does."""
    adder, x, weight = dtype_name(product.dtype), x.contiguous().float(), weight.float()
    made = product_of(x, weight, product.order, adder)
    step(schedule, made).interpret({"x_ptr": x, "weight_ptr": weight, "y_ptr": out})


def _on_gpu(schedule, product, x, weight, out) -> None:
    index = x.get_device()
    if current_device() != index:
        with torch.cuda.device(index):
            return _on_gpu(schedule, product, x, weight, out)
    px, pw, py = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    return _ready(product, schedule, index, not (px | pw | py) & 15)(px, pw, py)


@cache
def _ready(product: Product, schedule: Schedule | None, index: int, aligned: bool):
    """The first schedule that compiles and fits this GPU; any other has the same bits."""
    failures: list[Exception] = []
    for wanted in [schedule] if schedule else choose(product, index):
        try:
            if wanted.kind == "hopper" and not (aligned and has_pdl(index)
                                                and torch.cuda.get_device_capability(index) == (9, 0)):
                raise Unsuitable(f"bulk copies need a Hopper GPU and tensors aligned to 16 bytes, got {wanted}")
            return (_Bulk if wanted.kind == "hopper" else _Plain)(step(wanted, product), index)
        except torch.OutOfMemoryError:  # there may be memory at the next call
            raise
        except Exception as error:  # noqa: BLE001 - compilers raise what they like
            failures.append(error)
    raise failures[0]


class _Plain:
    """A launch by pointers."""

    def __init__(self, made, index):
        self.launch = Launch(made, index)

    def __call__(self, px, pw, py):
        self.launch((px | pw | py) & 15, px, pw, py)


class _Bulk:
    """A launch by bulk copies; a loop comes back to the same few addresses, whose descriptors are kept."""

    def __init__(self, made, index):
        self.index, self.leading, self.compiled = index, leading(made), made.compiled(index)
        self.described: dict[tuple[int, int], tuple] = {}

    def __call__(self, px, pw, py):
        found = self.described.get((px, pw))
        if found is None:
            if len(self.described) >= 1024:
                self.described.clear()
            found = self.compiled.described(made_at(self.leading, {"x": px, "weight": pw}))
            self.described[px, pw] = found
        self.compiled(current_stream(self.index), *found, py)
