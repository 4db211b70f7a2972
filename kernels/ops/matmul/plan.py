"""How a matrix product is called: what shapes decide is worked out once, then a call only launches.

A `Plan` belongs to one form of a call, a `Chosen` to one schedule made ready for it. A schedule that does not
compile or fit gives way to the next; all have the same bits.
"""
from __future__ import annotations

import warnings
from functools import cache

import torch

from ...launch import Launch
from ...op import Shape, dtype_name
from ...runtime import contiguous_strides, current_device, current_stream, has_pdl, require_triton
from . import copies
from . import order as orders
from .choice import choose
from .counters import COUNTERS, Counters
from .descriptors import leading, made_at
from .product import Product, product_of
from .schedule import Unsuitable
from .shared_schedule import choose_shared
from .steps import memory, steps


class Plan:
    """Everything about a call that shapes and strides decide, kept so that the next such call only launches."""

    def __init__(self, x, weight, bias, order, schedule=None):
        orders.check_call(x, weight, bias, order)
        require_triton("matmul")
        self.index = x.get_device()
        on_gpu = self.index >= 0
        if on_gpu and x.dtype != torch.float32:
            _add_otherwise(self.index)
        self.product = p = product_of(x, weight, bias, order, multiprocessors(self.index) if on_gpu else 132,
                                      adder="" if on_gpu else dtype_name(x.dtype))
        self.shape, self.dtype = (*x.shape[:-1], p.n), x.dtype
        self.strides = contiguous_strides(self.shape)
        self.copies_x, self.copies_bias = x.dim() != 2 and not x.is_contiguous(), bias is not None
        self.forced, self.wanted = schedule is not None, [schedule]
        self.ready: dict[bool, Chosen] = {}
        if not (p.m and p.n and p.k):
            self.launch = Plan.nothing
            return
        if not self.forced:
            shape, of_tree = Shape(N=p.n, K=p.k), orders.is_tree(p.order)
            self.wanted = copies.offered(p, choose_shared(shape, p.dtype, p.m, self.index) if of_tree else
                                         choose("matmul", shape, p.dtype, p.m, self.index))
        self.launch = Plan.on_gpu if on_gpu else Plan.interpret

    def nothing(self, x, weight, bias, order):
        """No tokens, no weight rows, or a sum of no products: +0, and the bias added to it."""
        zeros = torch.zeros(self.shape, dtype=torch.float32, device=x.device)
        return (zeros if bias is None else zeros + bias.float()).to(x.dtype)

    def on_gpu(self, x, weight, bias, order):
        """One call."""
        if current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.on_gpu(x, weight, bias, order)
        if self.copies_x:
            x = x.contiguous()
        if self.copies_bias:
            bias = bias.contiguous()
        device = x.device
        y = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        px, pw, py = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        pb = px if bias is None else bias.data_ptr()
        low = (px | pw | pb) & 15
        chosen = self.ready.get(low == 0)
        if chosen is None:
            self.ready[low == 0] = self._first_that_runs(low, px, pw, pb, py, device)
        else:
            chosen(low, px, pw, pb, py, device)
        return y

    def _first_that_runs(self, *call):
        """The first schedule that compiles and fits this GPU, after its first launch; any other has the same bits."""
        failures = []
        for schedule in self.wanted:
            try:
                chosen = Chosen(self.product, schedule, self.index)
                chosen(*call)
                return chosen
            except torch.OutOfMemoryError:  # there may be memory at the next call
                raise
            except Exception as error:  # noqa: BLE001 - compilers raise what they like
                failures.append(error)
                if not self.forced and not isinstance(error, Unsuitable):
                    _passed_over(str(schedule), str(error).splitlines()[0] if str(error) else type(error).__name__)
        if self.forced:
            raise failures[0]
        raise RuntimeError(f"no schedule of this product runs on this GPU; {self.wanted[0]} says: {failures[0]}")

    def interpret(self, x, weight, bias, order):
        """Triton's interpreter is wrong for bfloat16: it gets float32 copies, and torch rounds."""
        orders.check_call(x, weight, bias, order)  # a key does not tell a CPU from other devices without an index
        x, weight = x.reshape(-1, self.product.k).float(), weight.float()
        bias = None if bias is None else bias.contiguous().float()
        p = product_of(x, weight, bias, self.product.order, adder=self.product.adder)
        schedule = self._first_to_interpret(p)
        needs, y = memory(schedule, p), torch.empty(self.shape, dtype=torch.float32, device="cpu")
        held = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": x if bias is None else bias, "y_ptr": y,
                "partial_ptr": torch.empty(max(needs.floats, 1), dtype=torch.float32, device="cpu"),
                "counter_ptr": torch.zeros(max(needs.counters, 1), dtype=torch.int32, device="cpu"),
                **{name: torch.empty(max(size, 1), dtype=torch.float32, device="cpu") for name, size in
                   zip(("x_copy_ptr", "weight_copy_ptr"), copies.sizes(p), strict=True)}}
        for step in steps(schedule, p):
            step.interpret(held)
        return y.to(self.product.dtype)

    def _first_to_interpret(self, product):
        """The first schedule that the interpreter runs, and that suits the product."""
        failures = []
        for schedule in self.wanted:
            try:
                if schedule.kind != "pointer":
                    raise Unsuitable(f"the interpreter runs schedules of kind pointer alone, got {schedule}")
                return product.carried_out(schedule)
            except Unsuitable as error:
                failures.append(error)
        raise failures[-1]


class Chosen:
    """One schedule made ready for one product on GPU `index`."""

    def __init__(self, product: Product, schedule, index: int):
        self.schedule = s = product.carried_out(schedule)
        self.index, self.bulk = index, s.kind != "pointer"
        self.work, self.counters = memory(s, product)
        if self.counters > Counters.SLICE:
            raise Unsuitable(f"{product.tiles(s)} tiles are too many to split, got {s}")
        self.steps = steps(s, product)
        self.copies = copies.Copies(product, index) if s.copy else None
        self.first = self.steps[s.copy]
        if self.bulk:
            self._describe()
        else:
            self.launch = Launch(self.first, index)
        if s.reduce:
            self.reduce = Launch(self.steps[-1], index)
            self.partial = 4 * (self.work - product.order.segments * product.m * product.n)  # bytes before them

    def __call__(self, low, px, pw, pb, py, device):
        index, at, count = self.index, py, py
        if self.copies:
            held, px, pw = self.copies(px, pw, device)  # noqa: F841 - held until all is launched
            low = (px | pw | pb) & 15
        if self.counters:
            count = COUNTERS.take(index, current_stream(index), self.counters)
            if not count:  # captured, and none left: zeros of the graph's own, set again at each replay
                counters = torch.zeros(self.counters, dtype=torch.int32, device=device)
                count = counters.data_ptr()
        if self.work:
            work = torch.empty(self.work, dtype=torch.float32, device=device)
            at = work.data_ptr()
        if self.bulk:
            self._launch_bulk(low, px, pw, pb, py, at, count)
        else:
            self.launch(low, px, pw, pb, py, at, count)
        if self.schedule.reduce:
            self.reduce((pb | py) & 15, at + self.partial, pb, py)

    def _launch_bulk(self, low, px, pw, pb, py, at, count):
        if low & 15:
            raise Unsuitable("bulk copies need tensors aligned to 16 bytes")
        stored = py if self.schedule.store and self.schedule.kind == "tma" else 0
        described = self.described.get((px, pw, stored)) or self._described_at(px, pw, stored)
        stream = current_stream(self.index)
        if stored:
            self.launch(stream, *described, pb, at, count)
        else:
            self.launch(stream, *described, py, pb, at, count)

    def _described_at(self, px, pw, stored) -> tuple:
        """The descriptors at these addresses, kept: a loop comes back to the same few."""
        if len(self.described) >= 1024:
            self.described.clear()
        descriptors = made_at(self.leading, {"x": px, "weight": pw, "y": stored})
        self.described[px, pw, stored] = described = self.launch.described(descriptors)
        return described

    def _describe(self):
        """Compile for bulk copies. Raises Unsuitable on a GPU that has none."""
        s = self.schedule
        if not has_pdl(self.index) or s.kind == "hopper" and torch.cuda.get_device_capability(self.index) != (9, 0):
            raise Unsuitable(f"this GPU cannot run schedules of kind {s.kind}")
        self.leading = leading(self.first)
        self.described: dict[tuple[int, int, int], tuple] = {}
        self.launch = self.first.compiled(self.index)


@cache
def _passed_over(schedule: str, why: str) -> None:
    """Say once that a schedule does not run here."""
    warnings.warn(f"schedule {schedule} does not run here ({why}): the next one is used, which may be slower and has "
                  "the same bits", RuntimeWarning, stacklevel=2)


@cache
def _add_otherwise(index: int) -> None:
    """Say once that a GPU's tensor cores are not those of the specification."""
    if torch.cuda.get_device_capability(index) < (9, 0):
        warnings.warn(f"GPU {index} is older than Hopper and its tensor cores add in another way: products of 16-bit "
                      "numbers are batch-invariant here, but have other bits than the specification", RuntimeWarning,
                      stacklevel=2)


def multiprocessors(index: int) -> int:
    """The number of multiprocessors of GPU `index`."""
    return torch.cuda.get_device_properties(index).multi_processor_count
