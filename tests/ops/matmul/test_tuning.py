"""Schedules chosen while products run: no bit moves, budgets hold, captures and exceptions leave things in order."""
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import HERE, dtypes, needs_triton, whole_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import OPS, runtime
from kernels.bits import same_bits
from kernels.lab.proofs.certificates import TRUSTED
from kernels.ops.matmul import learned, trial
from kernels.ops.matmul import tuning as module
from kernels.ops.matmul.call import CALL
from kernels.ops.matmul.plan import Plan
from kernels.ops.matmul.schedule import Schedule, Unsuitable

OP = OPS["matmul"]
THREE = [Schedule("pointer", 16, 16, 16, 1, 2, 1), Schedule("pointer", 16, 32, 32, 4, 3, 2, swap=True), TRUSTED]
pytestmark = [needs_triton, pytest.mark.usefixtures("nothing_learned")]


class Clock(trial.GpuClock):
    """Times that a test writes down: of each timed call in turn, in microseconds; None until `ended`."""

    def __init__(self, *us, host=0.0):
        self.times, self.host, self.ended, self.free, self.marks = itertools.cycle(us), host, True, True, 0
        self.seconds = 0.0

    def now(self):
        self.seconds += self.host
        return self.seconds

    def begin(self):
        self.marks += 1
        return next(self.times)

    def end(self, mark):
        pass

    def us(self, mark):
        return mark if self.ended else None

    def usable(self, index):
        return self.free


@pytest.fixture
def nothing_learned():
    module.forget()
    yield
    assert not module._THREAD.entered and not module._TRIALS
    module.forget()


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(module, "candidates", lambda plan, count: THREE[:count])


def product(tokens=2, n=8, k=32, dtype=torch.float32):
    given_ = whole_inputs(tokens, n, k, dtype)
    return given_, OP.python(*given_)


def plans():
    return [plan for plan in CALL.plans.values() if not plan.forced]


def run(times, given_, wanted):
    for _ in range(times):
        assert same_bits(OP.triton(*given_), wanted)


# what is chosen


@settings(max_examples=4, deadline=None)
@given(tokens=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 40), dtype=dtypes)
def test_turning_it_on_changes_no_bit(tokens, n, k, dtype):
    """Exact and inexact sums: a call that is tried, one that is chosen for, and one outside have the bits of before."""
    given_ = OP.inputs(tokens, f"N={n},K={k},bias", dtype, HERE, k)
    wanted = OP.triton(*given_)
    with kernels.tuning(calls=1, clock=Clock(3, 2, 1)):
        run(8, given_, wanted)
    run(1, given_, wanted)


def test_the_fastest_is_kept_and_then_nothing_is_in_the_way(three):
    given_, wanted = product()
    with kernels.tuning(calls=2, clock=Clock(9, 1, 5)) as block:
        run(9, given_, wanted)
        assert block.clock.marks == 6 and block.began == 1
        run(1, given_, wanted)  # learns that all times are in
        (plan,) = plans()
        assert plan.wanted[0] == THREE[1] and plan.launch in (Plan.interpret, Plan.on_gpu)
        run(3, given_, wanted)
        assert block.clock.marks == 6
    assert list(learned.LEARNED.values()) == [THREE[1]]
    assert block.tried == {form: dict(zip(THREE, (9, 1, 5), strict=True)) for form in learned.LEARNED}


def test_one_slow_call_does_not_decide(three):
    given_, wanted = product()
    with kernels.tuning(calls=3, clock=Clock(5, 900, 5, 5, 1, 5, 5, 1, 5)):
        run(13, given_, wanted)
    assert list(learned.LEARNED.values()) == [THREE[1]]


def test_a_form_is_tried_once_whatever_its_tokens(three):
    with kernels.tuning(calls=1, clock=Clock(9, 9, 1)) as block:
        for tokens in (2, 3, 16, 1, 2, 5, 7, 9):
            run(1, *product(tokens))
        run(1, *product(17))
        run(1, *product(2, n=9))
        assert block.began == 3
    assert {plan.wanted[0] for plan in plans() if plan.product.n == 8 and plan.product.m <= 16} == {THREE[2]}


@pytest.mark.parametrize("tokens, n, k", [(0, 8, 32), (2, 0, 32), (2, 8, 0)])
def test_plans_of_empty_products_are_forgotten_as_others(tokens, n, k):
    """They want no schedule, which is not the one that was learned of them: none was."""
    run(1, *product(tokens, n, k))
    assert plans()
    module.forget()
    assert not plans()


@pytest.mark.parametrize("tokens, largest", [(1, 16), (16, 16), (17, 32), (33, 48), (64, 64), (65, 80), (128, 128),
                                             (129, 160), (1025, 1280), (8192, 8192)])
def test_forms_are_four_a_doubling(tokens, largest):
    assert learned.up_to(tokens) == largest


def test_the_candidates_are_the_choice_and_others_that_run_here():
    plan = Plan(*whole_inputs(2, 40, 64, torch.bfloat16), None)
    found = module.candidates(plan, 4)
    assert found[0] == plan.wanted[0] and 2 <= len(found) <= 4 and module.candidates(plan, 1) == found[:1]
    assert len({plan.product.carried_out(s) for s in found}) == len(found)
    assert runtime.HAS_GPU or all(s.kind == "pointer" for s in found)


@pytest.mark.parametrize("tokens, k, copied", [(2048, 1016, 1), (2047, 1016, 0), (2048, 1024, 0)])
def test_for_very_many_tokens_copies_are_tried(tokens, k, copied, monkeypatch):
    """Of rows that bulk copies can follow, but that begin amid lines of memory."""
    monkeypatch.setattr(trial, "_runs", lambda schedule, p, index: True)
    plan = Plan(*(torch.empty(rows, k, dtype=torch.bfloat16, device=HERE) for rows in (tokens, 8)), None, None)
    plan.wanted = [Schedule("tma", 64, 16, 128), TRUSTED]
    found = trial.candidates(plan, 4)
    assert found[0] == plan.wanted[0] and sum(s.copy for s in found[:2]) == copied == sum(s.copy for s in found)


def test_where_there_is_no_choice_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(module, "candidates", lambda plan, count: THREE[:1])
    with kernels.tuning(clock=Clock(1)) as block:
        run(2, *product())
    assert not block.began and not learned.LEARNED


def test_a_candidate_that_does_not_run_is_left_out(three, monkeypatch):
    broken = Schedule("pointer", 16, 16, 64)
    monkeypatch.setattr(module, "candidates", lambda plan, count: [broken, *THREE])

    monkeypatch.setattr(module, "Plan", failing(broken, Unsuitable("not here")))
    with kernels.tuning(calls=1, clock=Clock(9, 1, 5)):
        run(7, *product())
    assert list(learned.LEARNED.values()) == [THREE[1]]


def test_no_memory_is_the_callers_to_know(three, monkeypatch):
    given_, wanted = product()
    with kernels.tuning(calls=1, clock=Clock(9, 1, 5)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "Plan", failing(THREE[0], torch.OutOfMemoryError("CUDA out of memory")))
            with pytest.raises(torch.OutOfMemoryError):
                OP.triton(*given_)
        run(7, given_, wanted)
    assert list(learned.LEARNED.values()) == [THREE[1]]


def failing(schedule, error):
    """Plans that cannot be made with this schedule."""
    class Failing(Plan):
        def __init__(self, *arguments):
            if arguments[-1] == schedule:
                raise error
            super().__init__(*arguments)
    return Failing


# budgets


@pytest.mark.parametrize("candidates, calls", [(2, 1), (3, 2)])
def test_the_budget_of_calls_is_kept(three, candidates, calls):
    clock = Clock(1)
    with kernels.tuning(candidates, calls, clock=clock):
        run(20, *product())
    assert clock.marks == candidates * calls


def test_the_budget_of_time_is_kept(three):
    """Each call takes the host a second."""
    clock = Clock(9, 1, 5, host=1.0)
    with kernels.tuning(calls=5, seconds=4.5, clock=clock) as block:
        given_, wanted = product()
        run(12, given_, wanted)
        assert clock.marks == 2 and block.spent == 5
        run(3, *product(n=9))
        assert block.began == 1
    assert list(learned.LEARNED.values()) == [THREE[1]]  # of what was measured by then


def test_nobody_waits_for_times_that_are_not_in(three):
    clock = Clock(9, 1, 5)
    clock.ended = False
    given_, wanted = product()
    with kernels.tuning(calls=1, clock=clock):
        run(10, given_, wanted)
        assert clock.marks == 3 and not learned.LEARNED
        clock.ended = True
        run(1, given_, wanted)
        assert list(learned.LEARNED.values()) == [THREE[1]]


@pytest.mark.parametrize("name, value", [("candidates", 0), ("calls", 0), ("calls", 1.5), ("seconds", 0),
                                         ("seconds", "3"), ("candidates", True)])
def test_numbers_that_cannot_be_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        kernels.tuning(**{name: value})


# captures, exceptions, nesting, threads


def test_nothing_is_tried_where_times_cannot_be_taken(three):
    """As while a graph is captured: a new form, and one that is being tried."""
    clock = Clock(9, 1, 5)
    given_, wanted = product()
    with kernels.tuning(calls=1, clock=clock) as block:
        clock.free = False
        run(3, given_, wanted)
        assert not block.began
        clock.free = True
        other, of_other = product(n=9)
        run(5, other, of_other)
        marks = clock.marks
        clock.free = False
        run(5, other, of_other)
        assert clock.marks == marks == 2 and len(module._TRIALS) == 1


def test_an_exception_leaves_everything_in_order(three):
    given_, wanted = product()
    with pytest.raises(KeyError), kernels.tuning(calls=2, clock=Clock(9, 1, 5)):
        run(5, given_, wanted)
        raise KeyError
    (plan,) = plans()
    assert plan.launch in (Plan.interpret, Plan.on_gpu) and plan.wanted[0] == THREE[1]
    run(2, given_, wanted)


def test_a_form_of_which_nothing_was_measured_is_tried_again(three):
    given_, wanted = product()
    with kernels.tuning(calls=1, clock=Clock(9, 1, 5)):
        run(2, given_, wanted)
    assert not learned.LEARNED
    with kernels.tuning(calls=1, clock=Clock(9, 1, 5)) as block:
        run(7, given_, wanted)
        assert block.began == 1
    assert list(learned.LEARNED.values()) == [THREE[1]]


def test_what_was_learned_is_not_tried_again(three):
    given_, wanted = product()
    block = kernels.tuning(calls=1, clock=Clock(9, 1, 5))
    for _ in range(3):
        with block:
            run(7, given_, wanted)
    assert block.clock.marks == 3 and block.began == 1


def test_nested_the_innermost_numbers_hold(three):
    outer, inner = Clock(9, 1, 5), Clock(9, 5, 1)
    with kernels.tuning(calls=1, clock=outer):
        run(1, *product())
        with kernels.tuning(calls=2, clock=inner):
            run(11, *product(n=9))
            run(7, *product())  # its own block is still on
        assert (outer.marks, inner.marks) == (3, 6)
    assert {form.n: s for form, s in learned.LEARNED.items()} == {8: THREE[1], 9: THREE[2]}


def test_it_is_left_as_it_was_entered():
    one, two = kernels.tuning(), kernels.tuning()
    with one, two, pytest.raises(RuntimeError, match="the innermost one first"):
        one.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="by the thread that entered it"):
        one.__exit__(None, None, None)


def test_a_decorated_function_is_tuned(three):
    given_, wanted = product()
    function = kernels.tuning(calls=1, clock=Clock(9, 1, 5))(lambda: run(7, given_, wanted))
    function()
    assert list(learned.LEARNED.values()) == [THREE[1]]


def test_another_thread_does_not_take_part(three):
    given_, wanted = product()
    clock = Clock(9, 1, 5)
    with kernels.tuning(calls=1, clock=clock), ThreadPoolExecutor(1) as other:
        run(1, given_, wanted)
        other.submit(run, 9, given_, wanted).result()
        assert not clock.marks and len(module._TRIALS) == 1
        run(6, given_, wanted)
    assert clock.marks == 3


def test_threads_that_tune_at_once_keep_bits_and_budgets(three):
    given_, wanted = product()
    clocks, barrier = [Clock(9, 1, 5) for _ in range(3)], threading.Barrier(3)

    def work(clock):
        with kernels.tuning(calls=2, clock=clock):
            barrier.wait()
            run(10, given_, wanted)
            barrier.wait()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, clocks))
    assert sum(clock.marks for clock in clocks) <= 3 * 6 and len(learned.LEARNED) == 1


# the reader's own table


def test_what_was_learned_is_saved_and_read_back(three, tmp_path):
    table = tmp_path / "mine.json"
    for dtype in (torch.float32, torch.bfloat16):
        with kernels.tuning(calls=1, table=table, clock=Clock(9, 1, 5)):
            run(7, *product(dtype=dtype))
    raw = json.loads(table.read_text())
    assert raw["matmul"] == {name: {"N=8,K=32": {"16": str(THREE[1])}} for name in ("float32", "bfloat16")}
    assert raw["torch"] == torch.__version__ and raw["machine"]
    module.forget()
    run(1, *product(dtype=torch.bfloat16))
    assert kernels.tuning.load(table) == 2
    with kernels.tuning(clock=Clock(1)) as block:
        run(2, *product(dtype=torch.bfloat16))
        assert not block.began and [plan.wanted[0] for plan in plans()] == [THREE[1]]


def test_orders_that_a_table_can_name_are_saved(tmp_path):
    x, weight, bias = whole_inputs(2, 8, 128)
    for order, tokens in ((None, 16), ((2, 64), 32), ((8, 64, 3), 48)):
        plan = Plan(x, weight, bias, order)
        learned.LEARNED[learned.Form.of(plan.product, plan.index)._replace(tokens=tokens)] = TRUSTED
    raw = json.loads(kernels.tuning.save(tmp_path / "mine.json").read_text())
    of = {section: raw[section]["bfloat16"] for section in ("matmul", "matmul_shared")}
    assert of == {"matmul": {"N=8,K=128": {"16": str(TRUSTED)}}, "matmul_shared": {"N=8,K=128": {"48": str(TRUSTED)}}}
    kept = {form: s for form, s in learned.LEARNED.items() if form.order != (2, 64)}
    module.forget()
    assert learned.load(tmp_path / "mine.json") == kept


BROKEN = ["{\"matmul\": ", "[1, 2]", "7", "{\"matmul\": 3}", "[" * 100_000,
          json.dumps({"matmul": {"bfloat16": {"N=8,K=32": {"16": "fast"}}}}),
          json.dumps({"matmul": {"bfloat16": {"M=8": {"16": str(TRUSTED)}}}}),
          json.dumps({"matmul": {"bfloat16": {"N=0,K=4": {"16": str(TRUSTED)}}}}),
          json.dumps({"matmul": {"bfloat16": {"N=8,K=32": {"0": str(TRUSTED)}}}}),
          json.dumps({"matmul": {"bfloat16": {"N=8,K=32": [str(TRUSTED)]}}}),
          json.dumps({"matmul": {"int8": {"N=8,K=32": {"16": str(TRUSTED)}}}})]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_table_is_named(text, tmp_path):
    table = tmp_path / "mine.json"
    table.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json is no table of schedules.*delete it"), \
            kernels.tuning(table=table):
        raise AssertionError
    assert not learned.LEARNED and table.read_text() == text


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    table = kernels.tuning.save(tmp_path / "mine.json")
    before = table.read_text()
    monkeypatch.setattr(learned.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"), kernels.tuning(table=table):
        pass
    assert table.read_text() == before


# warming a model


def test_warm_runs_a_model_until_all_is_tried(three):
    weights = [whole_inputs(1, n, 8, torch.float32)[1] for n in (8, 9)]
    seen = []

    def model(ids):
        seen.append(ids.shape)
        x = torch.ones(ids.shape[1], 8, dtype=torch.float32, device=ids.device)
        return [OP.triton(x, w) for w in weights]

    assert kernels.warm(model, (2, 20), candidates=3, calls=1, clock=Clock(9, 1, 5)) == 4
    assert len(learned.LEARNED) == 4 and set(seen) == {(1, 2), (1, 20)} and len(seen) == 2 * 7  # the last learns
    assert kernels.warm(model, (2,), clock=Clock(1)) == 0


def test_warm_takes_a_model_of_this_suite():
    from kernels.model.llama import Llama

    model = Llama("tiny", ops="invariant")
    before = model(torch.zeros(1, 3, dtype=torch.int64, device=HERE), model.cache(1, 3))
    tuned = kernels.warm(model, (3,), candidates=2, calls=1, clock=Clock(2, 1))
    assert (tuned > 0) == (model.device.type == "cuda")  # its products on a CPU are the specification's
    assert same_bits(model(torch.zeros(1, 3, dtype=torch.int64, device=HERE), model.cache(1, 3)), before)


@pytest.mark.gpu
def test_a_captured_graph_keeps_its_choice():
    """Captured in the middle of a trial: nothing is tried in it, and replays have the bits of all others."""
    x, weight, _ = OP.inputs(300, "N=512,K=1024", torch.bfloat16, HERE)
    wanted = OP.run_schedule(TRUSTED, x, weight)
    with kernels.tuning(calls=2) as block:
        for _ in range(3):
            assert same_bits(OP.triton(x, weight), wanted)
        begun = dict(next(iter(module._TRIALS.values())).trial.begun)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = OP.triton(x, weight)
        assert dict(next(iter(module._TRIALS.values())).trial.begun) == begun
        for _ in range(20):
            assert same_bits(OP.triton(x, weight), wanted)
            torch.cuda.synchronize()
        assert block.began == 1 and len(learned.LEARNED) == 1
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(y, wanted)


@pytest.mark.gpu
def test_real_times_choose_and_a_kept_plan_launches_as_any_other():
    x, weight, _ = OP.inputs(700, "N=1000,K=1016", torch.bfloat16, HERE)
    with kernels.tuning():
        for _ in range(20):
            OP.triton(x, weight)
            torch.cuda.synchronize()
    (plan,) = [plan for plan in plans() if plan.product.n == 1000]
    assert plan.launch == Plan.on_gpu and plan.ready[True].schedule == plan.product.carried_out(plan.wanted[0])


def test_a_real_clock_asks_nothing_while_a_graph_is_captured(monkeypatch):
    """CUDA ends a capture in which an event is asked for."""
    class Event:
        def query(self):
            asked.append(self)
            return True

        def elapsed_time(self, other):
            return 0.25

    asked, capturing = [], [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(trial, "current_device", lambda: 1)
    clock = trial.GpuClock()
    assert clock.us((Event(), Event())) is None and not asked and not clock.usable(1)
    capturing[0] = False
    assert clock.us((Event(), Event())) == 250 and len(asked) == 1
    assert clock.usable(1) and not clock.usable(0)
