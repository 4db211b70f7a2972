"""How a matrix product is launched: what shapes decide is worked out once, then a call only launches.

A `Plan` belongs to one form of a call, a `_Chosen` to one schedule made ready for it. A schedule that does not
compile or fit gives way to the next; all have the same bits.
"""
from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from threading import Lock

import torch

from ...launch import Launch
from ...op import Shape
from ...runtime import Compiled, current_device, current_stream, has_pdl, require_triton
from . import schedule as schedules
from .pointer import pointer_kernel, reduce_kernel, tma_kernel


class Counters:
    """Zeros that the programs of a product count up and leave at zero: a slice for each stream, and one for each
    captured call, because a graph may be replayed beside its stream."""

    SLICE, BANK = 4096, 1 << 20

    def __init__(self):
        self.banks: dict[int, list] = {}  # GPU -> [tensor, counters taken]
        self.full: list = []  # kept as long as the process: a captured graph may count in them
        self.streams: dict[tuple[int, int], int] = {}
        self.lock = Lock()  # of everything but a look at a stream's slice

    def take(self, index: int, stream: int, count: int) -> int:
        """The address of `count` counters, or 0 while a graph is captured and there are none left."""
        if torch.cuda.is_current_stream_capturing():
            with self.lock:
                return self._cut(index, count)
        address = self.streams.get((index, stream))
        if address and self.banks[index][1] <= self.BANK // 2:
            return address
        return self._slice(index, stream)

    def _slice(self, index, stream):
        with self.lock:
            self._renew(index)
            if (index, stream) not in self.streams:
                self.streams[index, stream] = self._cut(index, self.SLICE)
            return self.streams[index, stream]

    def _renew(self, index):
        """Make a bank if there is none or it is half taken, while no graph is captured: a capture cannot make one."""
        bank = self.banks.get(index)
        if bank is None or bank[1] > self.BANK // 2:
            with ThreadPoolExecutor(1) as other:  # torch.compile may give this thread's memory to a graph
                made = other.submit(self._make, index).result()
            self.full += [bank] if bank else []
            self.banks[index] = [made, 0]

    def _make(self, index):
        zeros = torch.zeros(self.BANK, dtype=torch.int32, device=f"cuda:{index}")
        torch.cuda.synchronize(index)  # zero before anyone counts
        return zeros

    def _cut(self, index, count):
        count += -count % 4  # addresses that are multiples of 16, as the kernels are told
        bank = self.banks.get(index)
        if bank is None or bank[1] + count > self.BANK:
            return 0
        bank[1] += count
        return bank[0].data_ptr() + 4 * (bank[1] - count)


COUNTERS = Counters()


class Unsuitable(ValueError):
    """This schedule cannot carry out this product."""


class Plan:
    """Everything about a call that shapes and strides decide, kept so that the next such call only launches."""

    def __init__(self, x, weight, bias, cut, schedule=None):
        require_triton("matmul")
        self.n, self.k = weight.shape
        self.shape = (*x.shape[:-1], self.n)
        self.m = math.prod(x.shape[:-1])
        self.index, self.dtype, self.bias = x.get_device(), x.dtype, bias is not None
        self.cut = cut
        if self.index >= 0 and self.dtype != torch.float32:
            _add_otherwise(self.index)
        self.copies = x.dim() != 2 and not x.is_contiguous()
        self.x_strides = x.stride() if x.dim() == 2 else (self.k, 1)
        self.weight_strides = weight.stride()
        self.empty = not (self.m and self.n and self.k)
        self.forced, self.wanted = schedule is not None, [schedule]
        if not (self.forced or self.empty):
            shape = Shape(N=self.n, K=self.k)
            self.wanted = list(schedules.choose("matmul", shape, x.dtype, self.m, self.index))
        self.ready: dict = {}

    def __call__(self, x, weight, bias):
        if self.copies:
            x = x.contiguous()
        if self.empty:
            return self._nothing(x, bias)
        y = torch.empty(self.shape, dtype=self.dtype, device=x.device)
        if self.index < 0:
            self._interpret(x, weight, bias, y)
        elif current_device() == self.index:
            self._launch(x, weight, bias, y)
        else:
            with torch.cuda.device(self.index):
                self._launch(x, weight, bias, y)
        return y

    def _nothing(self, x, bias):
        """No tokens, no weight rows, or a sum of no products: +0, and the bias added to it."""
        zeros = torch.zeros(self.shape, dtype=torch.float32, device=x.device)
        return (zeros if bias is None else zeros + bias.float()).to(x.dtype)

    def _launch(self, x, weight, bias, y):
        px, pw, py = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        pb = px if bias is None else bias.data_ptr()
        low = (px | pw | pb) & 15
        chosen = self.ready.get(low == 0)
        if chosen is None:
            self.ready[low == 0] = self._first_that_runs(low, px, pw, pb, py, y.device)
        else:
            chosen(low, px, pw, pb, py, y.device)

    def _first_that_runs(self, *call):
        """The first schedule that compiles and fits this GPU, after its first launch; any other has the same bits."""
        failures = []
        for schedule in self.wanted:
            try:
                chosen = _Chosen(self, schedule)
                chosen(*call)
                return chosen
            except torch.OutOfMemoryError:  # may be otherwise next time
                raise
            except Exception as error:  # noqa: BLE001 - compilers raise what they like
                failures.append(error)
                if not self.forced and not isinstance(error, Unsuitable):
                    _passed_over(str(schedule), str(error).splitlines()[0] if str(error) else type(error).__name__)
        if self.forced:
            raise failures[0]
        raise RuntimeError(f"no schedule of this product runs on this GPU; {self.wanted[0]} says: {failures[0]}")

    def check(self, schedule) -> None:
        """Raise Unsuitable if this schedule cannot carry out the order."""
        cut, length = self.cut
        if cut > 1 and (length % schedule.block_k or length < 2 * schedule.block_k and not schedule.split):
            raise Unsuitable(f"block_k must divide the order's segments of {length}, at least twice in sequence, got "
                             f"{schedule}")

    def programs(self, schedule) -> tuple[int, int]:
        """Tiles, and programs to launch for them."""
        tiles = -(-self.m // schedule.block_m) * -(-self.n // schedule.block_n)
        units = tiles * self.cut[0] if schedule.split else tiles
        return tiles, min(units, multiprocessors(self.index)) if schedule.persistent else units

    def _interpret(self, x, weight, bias, y):
        """Triton's interpreter is wrong for bf16: it gets float32 copies, and torch rounds."""
        schedule = next(s for s in self.wanted if self.forced or s.kind == "pointer")
        if schedule.kind != "pointer":
            raise Unsuitable(f"the interpreter runs schedules of kind pointer alone, got {schedule}")
        self.check(schedule)
        x, weight, out = x.reshape(-1, self.k).float(), weight.float(), torch.empty(y.shape, dtype=torch.float32)
        bias = x if bias is None else bias.float()
        split = schedule.split and self.cut[0] > 1
        schedule = replace(schedule, split=split, reduce=schedule.reduce and split)
        tiles, programs = self.programs(schedule)
        partial = torch.empty(max(work_size(self, schedule, programs), 1))
        scalars = (self.m, self.n, self.k, *x.stride(), *weight.stride(), *self.cut)
        tensors = (x, weight, bias, out, partial, torch.zeros(tiles, dtype=torch.int32))
        dtypes = tuple(t.dtype for t in tensors)
        Launch(pointer_kernel, programs, dtypes, scalars, pointer_constants(self, schedule), -1).interpret(*tensors)
        if schedule.reduce:
            size = self.m * self.n
            Launch(reduce_kernel, -(-size // 1024), dtypes[:3], (size, self.n), (self.cut[0], 1024, self.bias),
                   -1).interpret(partial, bias, out)
        y.copy_(out.to(y.dtype))


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


class _Chosen:
    """One schedule made ready for one plan."""

    def __init__(self, plan, schedule):
        cut = plan.cut[0] > 1
        self.schedule = s = replace(schedule, split=schedule.split and cut,
                                    reduce=schedule.reduce and schedule.split and cut)
        self.plan, index = plan, plan.index
        plan.check(s)
        self.tiles, self.programs = plan.programs(s)
        self.counters = self._counters()
        self.bulk = s.kind != "pointer"
        self.work = work_size(plan, s, self.programs)
        if self.bulk:
            self._describe()
        else:
            scalars = (plan.m, plan.n, plan.k, *plan.x_strides, *plan.weight_strides, *plan.cut)
            self.launch = Launch(pointer_kernel, self.programs, (*4 * (plan.dtype,), torch.float32, torch.int32),
                                 scalars, pointer_constants(plan, s), index, num_warps=s.warps, num_stages=s.stages)
        if s.reduce:
            size = plan.m * plan.n
            self.reduce = Launch(reduce_kernel, -(-size // 1024), (torch.float32, plan.dtype, plan.dtype),
                                 (size, plan.n), (plan.cut[0], 1024, plan.bias), index)
            self.partial = 4 * (self.work - plan.cut[0] * size)  # bytes before them

    def _counters(self) -> int:
        """How many counters a call needs: of programs that hand a chain on, or of tiles whose segments are added."""
        s = self.schedule
        count = self.programs * s.warps // 4 if s.stream else self.tiles if s.split and not s.reduce else 0
        if count > Counters.SLICE:
            raise Unsuitable(f"{self.tiles} tiles are too many to split, got {s}")
        return count

    def __call__(self, low, px, pw, pb, py, device):
        index, at, count = self.plan.index, py, py
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
        described = self.described.get((px, pw, stored)) or self._describe_at(px, pw, stored)
        stream = current_stream(self.plan.index)
        if stored:
            self.launch(stream, *described, pb, at, count)
        else:
            self.launch(stream, *described, py, pb, at, count)

    def _describe_at(self, px, pw, stored) -> tuple:
        """The descriptors at these addresses, kept: a loop comes back to the same few."""
        if len(self.described) >= 1024:
            self.described.clear()
        at = {"x": px, "weight": pw, "y": stored}
        descriptors = [form and _Descriptor(at[name], form) for name, form in self.forms]
        self.described[px, pw, stored] = described = self.launch.described(descriptors)
        return described

    def _describe(self):
        """Compile for bulk copies of x, the weight and perhaps y. Raises Unsuitable if they cannot be copied so."""
        s, plan = self.schedule, self.plan
        if not has_pdl(plan.index) or s.kind == "hopper" and torch.cuda.get_device_capability(plan.index) != (9, 0):
            raise Unsuitable(f"this GPU cannot run schedules of kind {s.kind}")
        small = torch.empty(16, dtype=plan.dtype, device=f"cuda:{plan.index}")
        kernel, given, arguments, options = bulk_launch(plan, s, small)
        self.forms = forms(s, given)
        self.described: dict[tuple[int, int, int], tuple] = {}
        self.launch = Compiled(kernel, self.programs, given, (), arguments, **options)


def work_size(plan, s, programs: int) -> int:
    """How many float32 of memory a schedule needs besides x, the weight and y."""
    if s.reduce and plan.m * plan.n * plan.cut[0] >= 2**31:
        raise Unsuitable(f"too many sums for a second kernel to count, got {s}")
    tiles = s.stream if s.kind == "hopper" else s.split and not s.reduce
    size = programs * s.block_m * s.block_n if tiles else 0
    return size + (plan.cut[0] * plan.m * plan.n if s.reduce else 0)


def pointer_constants(plan, s) -> tuple:
    """The pointer kernel's constants but PDL, in the order of its arguments."""
    cut = plan.cut[0] > 1
    explicit = plan.index < 0 and plan.dtype == torch.float32
    return (s.block_m, s.block_n, s.block_k, s.group, s.swap, cut, s.split, s.reduce, plan.bias,
            plan.n % s.block_n == 0, plan.k % s.block_k == 0, explicit)


def bulk_launch(plan, s, small) -> tuple:
    """What a schedule with bulk copies compiles: (kernel, run-time examples, other arguments, options).

    `plan` says dtype, m, n, k, x_strides, weight_strides, cut and bias; `small` is a little memory of its dtype.
    """
    if s.kind == "hopper":
        return _hopper_launch(plan, s, small)
    cut = plan.cut[0] > 1
    if s.split and (s.store or s.persistent):
        raise Unsuitable(f"persistent programs and bulk stores walk segments in sequence, got {s}")
    if s.store and s.swap:
        raise Unsuitable(f"a swapped tile has no bulk store, got {s}")
    examples = (_described(small, (plan.m, plan.k), plan.x_strides, s.block_m, s.block_k),
                _described(small, (plan.n, plan.k), plan.weight_strides, s.block_n, s.block_k),
                _described(small, (plan.m, plan.n), (plan.n, 1), s.block_m, s.block_n) if s.store else small)
    given = (*examples, small, small.new_empty(4, dtype=torch.float32), small.new_empty(4, dtype=torch.int32))
    arguments = (plan.m, plan.n, plan.k, *plan.cut, s.block_m, s.block_n, s.block_k, s.group, s.swap, cut,
                 s.split, s.reduce, plan.bias, s.store, s.persistent, s.flatten, s.specialize, True)
    return tma_kernel, given, arguments, {"num_warps": s.warps, "num_stages": s.stages, **OPTIONS}


OPTIONS = {"enable_fp_fusion": False, "launch_pdl": True}


def _hopper_launch(plan, s, small):
    consumers, cut = s.warps // 4, plan.cut[0] > 1
    high, wide = (s.block_n, s.block_m) if s.swap else (s.block_m, s.block_n)
    rows = high if s.pingpong else high // max(consumers, 1)
    most, more = wide_side(wide)
    if (plan.dtype == torch.float32 or s.warps not in (4, 8, 12) or high not in (rows, rows * consumers)
            or rows not in (64, 128) or not 16 <= wide <= 256 or more & (more - 1) or 0 < more < 16):
        raise Unsuitable("schedules of kind hopper take 16-bit numbers, have 4, 8 or 12 warps with 64 or 128 rows for "
                         f"each four, and up to 256 columns, a sum of two powers of 2, got {s}")
    if s.pingpong and (s.warps != 8 or rows * wide > 128 * 128 or cut or s.stream):
        raise Unsuitable(f"two groups of four warps that take turns walk one chain of a tile up to 128x128, got {s}")
    if s.split and (not s.reduce or plan.k % plan.cut[1]):
        raise Unsuitable(f"kind hopper splits into segments of one length, which a second kernel adds, got {s}")
    if s.stream and cut and not s.split:
        raise Unsuitable(f"a chain is handed on where segments have programs of their own, got {s}")
    held = waiting(s) if cut and not s.split else 0
    if held and (more or rows * wide > 64 * 256 or s.shared_bytes + held > SHARED):
        raise Unsuitable(f"there is no room for the sums while the next segment is made, got {s}")
    from .hopper import kernel, with_layout

    x, weight = ((plan.m, plan.k), plan.x_strides), ((plan.n, plan.k), plan.weight_strides)
    a, b = (weight, x) if s.swap else (x, weight)
    examples = [with_layout(_described(small, *side, size, s.block_k))
                for side, size in ((a, rows), (b, most), (b, more)) if size]
    given = (*examples, *[None] * (3 - len(examples)), small, small, small.new_empty(4, dtype=torch.float32),
             small.new_empty(4, dtype=torch.int32))
    arguments = (plan.m, plan.n, plan.k, *plan.cut, rows, most, more, s.block_k, s.group, consumers, s.stages, s.swap,
                 cut, held > 0, plan.bias, s.store, s.pingpong, s.split, s.stream, 160 if consumers == 3 else 232, True)
    return kernel, given, arguments, {"num_warps": 4, **OPTIONS}


SHARED = 227 * 1024  # bytes of shared memory that a block of sm_90 may use


def waiting(s) -> int:
    """Bytes of shared memory in which half of a tile's sums wait while the next segment fills the registers."""
    large = s.kind == "hopper" and s.block_m * s.block_n > 64 * 192 * (s.warps // 4)
    return 2 * s.block_m * s.block_n if large else 0


def wide_side(wide: int) -> tuple[int, int]:
    """A number of columns as its largest power of 2 and the rest."""
    most = 1 << wide.bit_length() - 1
    return most, wide - most


def _described(base, shape, strides, rows, columns):
    """A descriptor of a tensor of this form at another address. Raises Unsuitable if there can be none."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    stride, step = strides
    if step != 1 or stride * base.itemsize % 16 or stride < shape[1]:
        raise Unsuitable(f"bulk copies need contiguous rows aligned to 16 bytes, got strides {strides}")
    return TensorDescriptor(base, list(shape), list(strides), [rows, columns])


def forms(s, given) -> list:
    """(side, form of its descriptor or None) of the first of a kernel's arguments; they keep no memory alive."""
    if s.kind == "hopper":
        names = ("weight", "x", "x") if s.swap else ("x", "weight", "weight")
    else:
        names = ("x", "weight", "y")[: 2 + s.store]
    return [(name, d and _Descriptor(0, d)) for name, d in zip(names, given, strict=False)]


class _Descriptor:
    """What a launch reads of a TensorDescriptor, at another address: it keeps no tensor alive and checks nothing."""

    __slots__ = ("data_ptr", "shape", "strides", "base")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, pointer, like):
        self.data_ptr, self.shape, self.strides, self.base = lambda: pointer, like.shape, like.strides, self


def multiprocessors(index: int) -> int:
    """How many of them GPU `index` has."""
    return torch.cuda.get_device_properties(index).multi_processor_count
