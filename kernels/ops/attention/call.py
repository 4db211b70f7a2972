"""How attention is called: the look-up of a plan under the tensors' shapes, and what each `Sequences` adds to it.

A `Plan` belongs to one form of q, k and v. For each `Sequences` it makes a `Ready` call once: checked, with tables on
the device and kernels loaded; the other layers of the step find it there.
"""
from __future__ import annotations

import warnings
from functools import cache, wraps

import torch

from ...call import Call
from ...launch import Launch, Step
from ...op import dtype_name
from ...runtime import contiguous_strides, current_device, current_stream, require_triton
from . import blocks, order, spread, walk
from .choice import choose, shares
from .form import Form
from .ready import Both, Ready, pointers
from .schedule import ON_HOPPER, Schedule, is_hopper, suits_hopper
from .sequences import Sequences
from .work import Work, work_of

KINDS = {"walk": walk, "spread": spread, "blocks": blocks}


class Attention(Call):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it.

    On a Hopper GPU. Older tensor cores add in another way, which is warned about.
    """

    parameters = "Tensor q, Tensor k, Tensor v, Tensor sequences, int window=0, bool lse=False"
    Schedule, kernel = Schedule, walk.walk_kernel

    def __init__(self, name: str, leaf: int = order.LEAF):
        """`leaf` keys a leaf are part of the order: other numbers are for tests, which cannot wait for long leaves."""
        self.name, self.leaf = name, leaf
        super().__init__()
        self.by_handle, self.schedule_by_handle = self.triton, self.run_schedule
        self.triton, self.run_schedule = self._public(), self._public_schedule()

    def _public(self):
        call = self.by_handle

        def triton(q, k, v, sequences, window=0, lse=False):
            return call(q, k, v, handle(sequences), window, lse)
        triton.__doc__, triton.shows = self.__doc__, self.kernel
        return triton

    def _public_schedule(self):
        call = self.schedule_by_handle

        def run_schedule(schedule, q, k, v, sequences, window=0, lse=False):
            return call(schedule, q, k, v, handle(sequences), window, lse)
        run_schedule.__doc__, run_schedule.shows = self.__doc__, self.kernel
        return run_schedule

    def specification(self, function):
        """`function`, which takes Sequences; torch.compile sees it as one op that takes their handle."""
        @wraps(function)
        def by_handle(q, k, v, sequences, window=0, lse=False):
            return function(q, k, v, Sequences.of(sequences), window, lse)
        inner = super().specification(by_handle)

        @wraps(function)
        def python(q, k, v, sequences, window=0, lse=False):
            return inner(q, k, v, handle(sequences), window, lse)
        return python

    def check(self, q, k, v, sequences, window=0, lse=False):
        order.check(q, k, v, held(sequences), window, lse)

    def outputs(self, q, k, v, sequences, window=0, lse=False):
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        return (y, q.new_empty(q.shape[:2], dtype=torch.float32)) if lse else (y,)

    def readable(self, q, k, v, sequences, window, lse):
        return (*(t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)), sequences, window, lse)

    def steps(self, schedule, q, k, v, sequences, window, lse):
        form = Form.of(q, k, v, held(sequences), window, lse)
        if schedule.kind == "hopper":
            return _hopper().steps(form, held(sequences), *k.shape[:2])
        if schedule.kind == "hopper_spread":
            return _hopper_spread().planned(schedule, form, held(sequences), *k.shape[:2], self.leaf)[0]
        return launches(schedule, form, held(sequences), self.leaf)[0]

    def make_plan(self, arguments, schedule):
        return Plan(self, *arguments, schedule)


def handle(sequences) -> torch.Tensor:
    """What stands for `sequences` in the machinery, which takes tensors. TypeError for anything else."""
    if not isinstance(sequences, Sequences):
        raise TypeError(f"sequences must be Sequences, got {type(sequences).__name__}")
    return sequences.handle


def held(sequences: Sequences | torch.Tensor) -> Sequences:
    """Sequences, given as such or by their handle."""
    return sequences if isinstance(sequences, Sequences) else Sequences.of(sequences)


def _hopper():
    """Written in Gluon, which is there if Triton is."""
    from . import hopper

    return hopper


def _hopper_spread():
    from . import hopper_spread

    return hopper_spread


def launches(schedule: Schedule, form: Form, sequences: Sequences, leaf: int) -> tuple[list[Step], Work]:
    """The launches of a schedule of kind walk, spread or blocks, and the tables that they read."""
    work = work_of(sequences, schedule.rows, form.group, form.window, schedule.kind != "walk", leaf)
    return KINDS[schedule.kind].steps(schedule, form, work), work


class Plan:
    """Everything about a call that shapes and strides decide."""

    def __init__(self, call: Attention, q, k, v, sequences, window, lse, schedule=None):
        call.check(q, k, v, sequences, window, lse)
        require_triton(call.name)
        self.call, self.schedule = call, schedule
        self.index = q.get_device()
        self.shape, self.strides = q.shape, contiguous_strides(q.shape)
        self.copies = any(t.stride(-1) != 1 for t in (q, k, v))
        self.made: dict[tuple, tuple[Launch, Launch | None]] = {}
        if self.index >= 0:
            _add_otherwise(self.index)
        self.launch = Plan.on_gpu if self.index >= 0 else Plan.interpret

    def on_gpu(self, q, k, v, sequences, window, lse):
        """One call."""
        if current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.on_gpu(q, k, v, sequences, window, lse)
        sequences = Sequences.of(sequences)
        if self.copies:
            q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        addresses, device = (q.data_ptr(), k.data_ptr(), v.data_ptr()), q.device
        key = self, current_stream(self.index), not (addresses[0] | addresses[1] | addresses[2]) & 15
        ready = sequences.ready.get(key) or self._ready(key, q, k, v, sequences, window, lse)
        y = torch.empty_strided(self.shape, self.strides, dtype=q.dtype, device=device)
        sums = torch.empty_strided(self.shape[:2], (self.shape[1], 1), dtype=torch.float32, device=device) if lse else y
        if ready is not _NOTHING:
            ready(*addresses, y.data_ptr(), sums.data_ptr(), device)
        return (y, sums) if lse else y

    def _ready(self, key, q, k, v, sequences, window, lse):
        """The call of these sequences made ready, and kept with them under (plan, stream, are addresses aligned?)."""
        self.call.check(q, k, v, sequences, window, lse)  # the plan was made with others
        if not sequences.tokens:
            ready = _NOTHING
        else:
            form = Form.of(q, k, v, sequences, window, lse)
            bulk = key[-1] and self.call.leaf == order.LEAF
            made = [self._ready_by(schedule, chosen, form, k, sequences, bulk) for schedule, chosen in
                    ([(self.schedule, None)] if self.schedule else shares(form, sequences, self.index, bulk))]
            ready = made[0] if len(made) == 1 else Both(*made)
        sequences.ready[key] = ready
        return ready

    def _ready_by(self, schedule, chosen, form, k, sequences, bulk):
        if schedule.kind not in ON_HOPPER:
            return self._ready_to_launch(schedule, form, sequences)
        if not (bulk and is_hopper(self.index) and suits_hopper(form, schedule.kind)):
            raise ValueError(f"schedules of kind {schedule.kind} need a GPU of sm_90, no window, pages of 16, 32, .. "
                             "keys if any, a group of heads that divides 64 to spread them, and strides and addresses "
                             f"that are multiples of 16 bytes, got {form} on GPU {self.index}")
        if schedule.kind == "hopper":
            return _hopper().HopperReady(form, sequences, *k.shape[:2], self.index, chosen)
        return _hopper_spread().SpreadReady(schedule, form, sequences, *k.shape[:2], self.call.leaf, self.index, chosen)

    def _ready_to_launch(self, schedule, form, sequences):
        steps, work = launches(schedule, form, sequences, self.call.leaf)
        made = (schedule, form.table, *(step.programs for step in steps), work.slots, work.most, len(work.tiles))
        if made not in self.made:
            self.made[made] = tuple((Launch(step, self.index), pointers(step)) for step in steps)
        return Ready(self.made[made], sequences, work, steps[0].leaves)

    def interpret(self, q, k, v, sequences, window, lse):
        """Triton's interpreter is wrong for bfloat16: it gets float32 copies, and torch rounds."""
        sequences = Sequences.of(sequences)
        self.call.check(q, k, v, sequences, window, lse)  # the plan was made with others
        memory = {"o_ptr": torch.empty(q.shape, dtype=torch.float32, device="cpu"),
                  "lse_ptr": torch.empty(q.shape[:2], dtype=torch.float32, device="cpu")}
        if sequences.tokens:
            dtype = dtype_name(q.dtype)
            read = [t.float() for t in self.call.readable(q, k, v, sequences, window, lse)[:3]]
            form = Form.of(*read, sequences, window, lse, adder=dtype)
            schedule = self.schedule or choose(form, sequences)
            if schedule.kind in ON_HOPPER:
                raise ValueError(f"schedules of kind {schedule.kind} need a GPU of sm_90: the interpreter runs walk, "
                                 "spread and blocks")
            steps, work = launches(schedule, form, sequences, self.call.leaf)
            memory |= dict(zip(("q_ptr", "k_ptr", "v_ptr"), read, strict=True))
            pages = work.tiles if sequences.table is None else sequences.put(sequences.table)
            memory |= {"pages_ptr": pages, "work_ptr": work.tiles, "leaves_ptr": work.leaves,
                       "part_ptr": torch.empty(max(steps[0].leaves, 1), dtype=torch.float32, device="cpu")}
            for step in steps:
                step.interpret(memory)
        y = memory["o_ptr"].to(q.dtype)
        return (y, memory["lse_ptr"]) if lse else y


_NOTHING = object()  # no queries: nothing to launch


@cache
def _add_otherwise(index: int) -> None:
    """Say once that a GPU's tensor cores are not those of the specification."""
    if torch.cuda.get_device_capability(index) < (9, 0):
        warnings.warn(f"GPU {index} is older than Hopper and its tensor cores add in another way: attention is "
                      "batch-invariant here, but has other bits than the specification", RuntimeWarning, stacklevel=2)
