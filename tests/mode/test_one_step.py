"""Steps launch what the plans that they stand for launch, and give way where a call is not as its form was."""
from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from playing import BIAS as SUMMAND
from playing import MAT, X

from kernels.bits import same_bits
from kernels.mode import batch_invariant, compiled_products, compiling, folded, steps
from kernels.ops.matmul import plan as plan_module
from kernels.ops.matmul.call import CALL
from kernels.ops.matmul.op import matmul
from kernels.ops.matmul.plan import Chosen
from kernels.ops.mean import mean, sum

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU plays the GPU")
WEIGHT, BIAS = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), torch.ones(24)


class Launched:
    """A launch that writes its addresses down, with the result's and new memory's as names."""

    def __init__(self):
        self.calls, self.made = [], []

    def __call__(self, *addresses):
        self.calls.append(addresses)


class Described(dict):
    """Descriptors, known or not wherever tensors lie; of a result only where bulk copies store it."""

    def __init__(self, stored: bool):
        super().__init__()
        self.stored, self.known = stored, False

    def get(self, key, default=None):
        assert (key[2] != 0) == self.stored
        return ("x", "weight") if self.known else default


def _chosen(monkeypatch, bulk: bool, stored: bool, counters: int, work: int, reduce: bool) -> tuple[Chosen, Launched]:
    """A schedule of the kind, without its compilation, and what it launches."""
    chosen, launched = object.__new__(Chosen), Launched()
    kind = "tma" if stored else "hopper" if bulk else "pointer"
    chosen.schedule = SimpleNamespace(kind=kind, store=stored, reduce=reduce)
    chosen.index, chosen.bulk, chosen.copies, chosen.partial = 0, bulk, None, 64
    chosen.work, chosen.counters, chosen.described = work, counters, Described(stored)
    chosen._described_at = lambda px, pw, stored: launched.made.append(stored) or ("x", "weight")
    chosen.launch = launched if bulk else lambda low, *addresses: launched(7, *addresses)
    chosen.reduce = lambda low, *addresses: launched(7, *addresses)
    step = SimpleNamespace(compiled=lambda index: launched)
    chosen.first, chosen.steps = step, [step, step]
    for module in (steps, plan_module):
        monkeypatch.setattr(module, "current_stream", lambda index: 7)
        monkeypatch.setattr(module, "current_device", lambda: 0)
        monkeypatch.setattr(module.COUNTERS, "take", lambda index, stream, count: 1600 * count)
    return chosen, launched


def _names(calls: list[tuple], y: torch.Tensor, made: list[torch.Tensor]) -> list[tuple]:
    """Launches' addresses, with names for memory that each call makes anew."""
    known = {y.data_ptr(): "y", y.data_ptr() + 64: "y's end"}
    for t in made:
        known |= {t.data_ptr(): "work", t.data_ptr() + 64: "the work's end"}
    return [tuple(known.get(a, a) for a in call) for call in calls]


@pytest.mark.parametrize("bulk, stored, counters, work, reduce, bias", [
    given for given in itertools.product(*[(False, True)] * 6) if given[0] or not given[1]])
def test_a_products_step_launches_what_its_schedule_does(monkeypatch, bulk, stored, counters, work, reduce, bias):
    chosen, launched = _chosen(monkeypatch, bulk, stored, int(counters), 32 * work, reduce)
    plan = SimpleNamespace(ready={True: chosen}, index=0, dtype=X.dtype)
    step = steps.of_product(plan, torch.Size((6, 24)))
    given, made, empty = (X, WEIGHT, BIAS) if bias else (X, WEIGHT), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **named: (made.append(empty(*size, **named)), made[-1])[1])
    y = X.new_empty(6, 24)
    chosen(0, X.data_ptr(), WEIGHT.data_ptr(), (BIAS if bias else X).data_ptr(), y.data_ptr(), X.device)
    wanted = _names(launched.calls, y, made)
    for chosen.described.known in (False, True):
        launched.calls.clear()
        launched.made.clear()
        y = step(*given)
        assert y.shape == (6, 24) and _names(launched.calls, y, made) == wanted
        assert len(launched.made) == (bulk and not chosen.described.known)
    assert len(wanted) == 1 + reduce and bool(made) == bool(work)


def test_a_products_step_gives_way(monkeypatch):
    chosen, launched = _chosen(monkeypatch, False, False, 0, 0, False)
    plan = SimpleNamespace(ready={True: chosen}, index=0, dtype=X.dtype)
    step = steps.of_product(plan, torch.Size((6, 24)))
    assert step(X, WEIGHT) is not None and len(launched.calls) == 1
    apart = torch.zeros(241)[1:].view(6, 40)
    assert step(apart, WEIGHT) is step(X, WEIGHT, torch.ones(25)[1:]) is None
    freed = WEIGHT.clone()
    freed.untyped_storage().resize_(0)
    gives_way = [step(*given) is None for given in ((X, freed), (freed, WEIGHT), (X, WEIGHT, freed))]
    del freed  # pytest would print what it holds
    assert all(gives_way)
    monkeypatch.setattr(steps, "current_device", lambda: 1)
    assert step(X, WEIGHT) is None and len(launched.calls) == 1
    chosen.copies = object()
    assert steps.of_product(plan, torch.Size((6, 24))) is None
    plan.ready = {False: chosen}
    assert steps.of_product(plan, torch.Size((6, 24))) is None


def test_a_capture_without_counters_left_makes_its_own(monkeypatch):
    chosen, launched = _chosen(monkeypatch, False, False, 3, 0, False)
    monkeypatch.setattr(steps.COUNTERS, "take", lambda index, stream, count: 0)
    step = steps.of_product(SimpleNamespace(ready={True: chosen}, index=0, dtype=X.dtype), torch.Size((6, 24)))
    step(X, WEIGHT)
    (*_, count), = launched.calls
    assert count > 0


def test_a_linears_step_goes_with_its_plan(gpu):
    """Its schedule may be learned anew."""
    with batch_invariant(strict=True):
        for _ in range(3):
            F.linear(X, WEIGHT)
        assert any(folded.LINEAR.values())
        for key in [key for key in CALL.plans if key[0] == "mm"]:
            del CALL.plans[key]
        gc.collect()
        assert not folded.LINEAR
        ys = [F.linear(X, WEIGHT) for _ in range(3)]
    assert any(folded.LINEAR.values()) and all(same_bits(y, matmul.python(X, WEIGHT)) for y in ys)


def test_while_schedules_are_tried_there_is_no_step(gpu, monkeypatch):
    with batch_invariant(strict=True):
        F.linear(X, WEIGHT)
        plan, = (plan for key, plan in CALL.plans.items() if key[0] == "mm")
        plan.ready[True] = "a schedule"
        monkeypatch.setattr(plan, "launch", lambda plan, *given: type(plan).on_gpu(plan, *given))
        for _ in range(3):
            F.linear(X, WEIGHT)
        assert not folded.LINEAR
        monkeypatch.undo()


@pytest.mark.parametrize("op, call", [(mean, lambda x: x.mean(-1, keepdim=True)), (sum, lambda x: x.sum(dim=(0, 1)))],
                         ids=["mean", "sum"])
def test_a_reductions_step_launches_what_its_plan_does(monkeypatch, op, call):
    launched = Launched()
    given = (-1, True) if op is mean else ((0, 1), False)
    step = SimpleNamespace(compiled=lambda index: launched)
    plan = SimpleNamespace(copies=False, second=None, steps=[step], shape=torch.Size((6, 1)), strides=(1, 1),
                           dtype=X.dtype, device=X.device, first=lambda low, *addresses: launched(7, *addresses))
    monkeypatch.setattr(steps, "current_stream", lambda index: 7)
    monkeypatch.setattr(steps, "current_device", lambda: 0)
    y = op.call.launch(plan, X, *given)
    wanted = _names(launched.calls, y, [])
    assert wanted == [(7, X.data_ptr(), "y")]
    made = steps.of_reduction(plan, 0)
    launched.calls.clear()
    y = made(X, *given)
    assert y.shape == (6, 1) and _names(launched.calls, y, []) == wanted
    assert made(torch.zeros(241)[1:].view(6, 40), *given) is None
    monkeypatch.setattr(steps, "current_device", lambda: 1)
    assert made(X, *given) is None and len(launched.calls) == 1
    plan.launch = lambda *given: given
    for plan.copies, plan.second in ((True, None), (False, "a second launch")):
        assert steps.of_reduction(plan, 0)(X, *given) == (plan, X, *given)
        assert steps.of_reduction(plan, 0)(X, [-1]) == (plan, X, [-1], False)  # the dispatcher leaves defaults out


@pytest.mark.parametrize("name, given", [("mm", (X, MAT)), ("addmm", (SUMMAND, X, MAT))])
def test_a_product_of_compiled_code_is_a_step_that_goes_with_its_plan(gpu, name, given):
    call, bias = compiling._opaque(name), given[0] if name == "addmm" else None
    with batch_invariant(strict=True):
        ys = [call(*given) for _ in range(4)]
        assert gpu[2:] == [(X.data_ptr(), MAT.data_ptr())] * 2  # the rule, its plan, and then steps
        ys.append(call(*(t.clone() if t is not MAT else t for t in given)))
        assert len(gpu) == 5 and gpu[4][0] != X.data_ptr() and gpu[4][1] == MAT.data_ptr()
        for key in [key for key in CALL.plans if key[0] == name]:
            del CALL.plans[key]
        gc.collect()
        assert not any(compiled_products.STEPS.values())
        ys.append(call(*given))
    assert gpu[5][0].shape == (24, 40) and all(same_bits(y, matmul.python(X, MAT.t(), bias)) for y in ys)


def test_other_products_of_compiled_code_go_the_long_way(gpu):
    apart, calls = torch.ones(48)[::2], compiling._opaque("addmm")
    with batch_invariant(strict=True):
        for _ in range(3):
            assert same_bits(calls(apart, X, MAT), matmul.python(X, MAT.t(), apart))
            assert same_bits(calls(SUMMAND, X, MAT, beta=2.0), matmul.python(X, MAT.t()) + SUMMAND * 2.0)
    assert all(torch.is_tensor(weight) for weight, _ in gpu) and len(gpu) == 6
