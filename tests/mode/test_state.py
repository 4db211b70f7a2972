"""A thread's state: entering the mode and leaving it, in any order, and the mode as a decorator."""
from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from playing import Seen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, active, asked_first, batch_invariant, switch
from kernels.ops.matmul.op import matmul

DEVICE = runtime.device()
X, W = portable(6, 40, device=DEVICE), portable(24, 40, device=DEVICE, seed=1)
PRODUCT = matmul.triton(X, W) if X.is_cuda else matmul.python(X, W)
OUT_OF_ORDER, NOT_ENTERED = "the innermost one first", "by the thread that entered it"


def test_nested_entered_twice_and_left_by_exceptions():
    mode = batch_invariant()
    with mode:
        with mode, batch_invariant(strict=True):
            assert active()
        assert active()
        with pytest.raises(KeyError), batch_invariant():
            raise KeyError
        assert active()
    assert not active()
    with pytest.raises(Refused), batch_invariant(strict=True):
        X.var()
    assert not active()
    with pytest.raises(RuntimeError, match=NOT_ENTERED):
        mode.__exit__(None, None, None)


@pytest.mark.parametrize("order", ["012", "021", "102", "120", "201", "210"])
def test_left_in_any_order_the_thread_is_as_before(order):
    modes = [batch_invariant(strict) for strict in (True, False, True)]
    for mode in modes:
        mode.__enter__()
    left = [0, 1, 2]
    for i in map(int, order):
        assert active() and {True: sum(k != 1 for k in left), False: left.count(1)} == switch._STRICT
        assert switch.strict() == (left[-1] != 1)
        if i == left[-1]:
            modes[i].__exit__(None, None, None)
        else:
            with pytest.raises(RuntimeError, match=OUT_OF_ORDER):
                modes[i].__exit__(None, None, None)
        left.remove(i)
    assert not active() and switch._STRICT == {True: 0, False: 0}


def test_leaving_one_that_is_not_entered_changes_nothing():
    mode, other = batch_invariant(strict=True), batch_invariant()
    said = []

    def elsewhere():
        with pytest.raises(RuntimeError, match=NOT_ENTERED):
            mode.__exit__(None, None, None)
        said.append(active())
    with mode:
        with pytest.raises(RuntimeError, match=NOT_ENTERED):
            other.__exit__(None, None, None)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert active() and switch._STRICT == {True: 1, False: 0} and switch.strict() and said == [False]


def test_tasks_that_await_in_it_are_told_and_leave_nothing():
    async def task():
        with batch_invariant():
            await asyncio.sleep(0)

    async def both():
        return await asyncio.gather(task(), task(), return_exceptions=True)
    found = asyncio.run(both())
    assert [str(e) for e in found if e is not None] == [
        "batch_invariant must be left in the order that it was entered, the innermost one first"]
    assert not active()


def test_the_innermost_strictness_holds():
    with batch_invariant(strict=True):
        with batch_invariant(strict=False), pytest.warns(MovesBits, match="var"):
            X.var()
        with pytest.raises(Refused):
            X.var()


def test_strict_must_be_a_truth():
    with pytest.raises(TypeError, match="strict must be True or False, got 'yes'"):
        batch_invariant(strict="yes")


def test_a_thread_has_its_own():
    seen = {}

    def other(name, enter):
        with batch_invariant(strict=True) if enter else warnings.catch_warnings():
            seen[name] = active(), X @ W.t()
    with batch_invariant(strict=True):
        threads = [threading.Thread(target=other, args=(i, i % 2 == 0)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert active()
    assert [seen[i][0] for i in range(4)] == [True, False, True, False]
    assert same_bits(seen[0][1], PRODUCT) and same_bits(seen[0][1], seen[2][1])


class Rows(torch.utils.data.Dataset):
    """Each row says whether the mode is on where it is read, and that it can be entered and left there."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        before = active()
        with batch_invariant(strict=True):
            inside = active()
        return before, inside, active()


@pytest.mark.parametrize("method, inherits", [("fork", True), ("spawn", False)])
def test_a_forked_worker_inherits_it_and_a_started_one_does_not(method, inherits):
    if method not in multiprocessing.get_all_start_methods() or method == "fork" and DEVICE.type != "cpu":
        pytest.skip("this machine has no such processes, or a GPU whose memory a fork cannot use")
    with batch_invariant():
        rows = list(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=1,
                                                multiprocessing_context=method))
        assert active()
    assert list(map(list, rows)) == [[inherits, True, inherits]] * 4


# The mode as a decorator.

def test_a_decorator_enters_at_each_call():
    @batch_invariant(strict=True)
    def product():
        """A product."""
        assert active() and switch.strict()
        return X @ W.t()
    assert same_bits(product(), PRODUCT) and not active() and product.__doc__ == "A product."


class Steps:
    """A callable whose calls are generators."""

    def __call__(self):
        return (yield active())


def test_a_generators_body_runs_in_it_and_its_caller_does_not():
    seen = []

    @batch_invariant(strict=True)
    def steps(first):
        try:
            sent = yield first, active(), F.linear(X, W)
            seen.append((sent, active()))
            try:
                yield
            except KeyError:
                seen.append(("thrown", active()))
            yield
        finally:
            seen.append(("closed", active()))
        return "done"
    made = steps("given")
    assert not active() and seen == []
    first, inside, product = next(made)
    assert (first, inside) == ("given", True) and same_bits(product, PRODUCT) and not active()
    made.send("sent")
    assert not active()
    made.throw(KeyError())
    assert not active()
    with pytest.raises(StopIteration, match="done"):
        next(made)
    assert seen == [("sent", True), ("thrown", True), ("closed", True)] and not active()
    assert next(batch_invariant()(Steps())()) is True and not active()


@pytest.mark.parametrize("drop", [lambda made: made.close(), lambda made: None])
def test_a_generator_that_is_dropped_cleans_up_in_it(drop: Callable):
    seen = []

    @batch_invariant(strict=True)
    def steps():
        try:
            yield
        finally:
            seen.append(active())
    made = steps()
    next(made)
    drop(made)
    del made
    gc.collect()
    assert seen == [True] and not active()


def test_a_generators_exceptions_leave_it():
    @batch_invariant(strict=True)
    def steps():
        yield
        yield X.var()
    made = steps()
    next(made)
    with pytest.raises(Refused, match="var"):
        next(made)
    assert not active()
    made = steps()
    next(made)
    with batch_invariant(), pytest.raises(KeyError):
        made.throw(KeyError())


def test_generators_take_turns_and_each_has_its_own_strictness():
    def steps():
        while True:
            yield switch.strict()
    a, b = (batch_invariant(strict)(steps)() for strict in (True, False))
    assert [next(made) for made in (a, b, a, b)] == [True, False, True, False] and not active()


async def _waits():
    pass


async def _gives():
    yield


class Waits:
    async def __call__(self):
        pass


@pytest.mark.parametrize("function, name", [(_waits, "_waits"), (_gives, "_gives"), (Waits(), "Waits")])
def test_async_functions_are_refused_where_they_are_decorated(function, name):
    with pytest.raises(TypeError, match=f"cannot decorate .*{name}.*use `with batch_invariant\\(\\):` around code "
                                        "without await"):
        batch_invariant()(function)


def test_a_class_is_refused_where_it_is_decorated():
    with pytest.raises(RuntimeError, match="Cannot decorate classes"):
        batch_invariant()(Rows)


# Tensors whose class computes with others inside.

class Wrapper(torch.Tensor):
    seen: list[tuple] = []

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        cls.seen.append((function, active()))
        found = function(*(a.inner if isinstance(a, Wrapper) else a for a in arguments), **(named or {}))
        return Wrapper(found)


@torch.no_grad()
def test_what_a_wrapper_computes_inside_is_in_the_mode():
    """In torch 2.11 the rule's kernel comes before the class."""
    op, asked = torch.ops.aten.mm.default, []
    kernel = switch.guarded("mm", op, lambda *given: asked.append(given) or NotImplemented, lambda *given: None)
    for call in (kernel, torch.mm):
        Wrapper.seen.clear()
        with batch_invariant(strict=True):
            y = call(Wrapper(X), W.t())
        assert Wrapper.seen == [(op, True)] and not asked and same_bits(y.inner, PRODUCT)
    fake, calls = FakeTensorMode(), []
    kernel = switch.guarded("mm", lambda *given: calls.append(given), lambda *given: None, lambda *given: None)
    given = [fake.from_tensor(t) for t in (X, W)]
    with batch_invariant(strict=True):
        kernel(*given)
    assert len(calls) == 1 and not asked_first.are_asked(given)  # for there are no numbers


@torch.no_grad()
def test_a_dispatch_mode_sees_the_op_and_not_what_its_rule_does():
    op, asked = torch.ops.aten.mm.default, []
    kernel = switch.guarded("mm", op, lambda *given: asked.append(given) or NotImplemented, lambda *given: None)
    for call in (kernel, torch.mm):
        with batch_invariant(strict=True), Seen() as seen:
            y = call(X, W.t())
        assert seen.ops[-1] is op and seen.ops.count(op) == 1 and not asked and same_bits(y, PRODUCT)


@torch.inference_mode()
def test_an_op_that_is_made_of_rules_asks_too():
    """In inference mode linear comes whole to our key, which in torch 2.11 is before classes and modes are asked."""
    op = torch.ops.aten.linear.default
    kernel = switch.made_of_rules("linear", op, lambda made, x, w: made(x, w) + 1.0)
    keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(DEVICE.type.upper()))
    with batch_invariant(strict=True):
        assert same_bits(kernel(keys, X, W), PRODUCT + 1.0)
    for call, first in ((kernel, [keys]), (F.linear, [])):
        Wrapper.seen.clear()
        with batch_invariant(strict=True):
            y = call(*first, Wrapper(X), W)
        assert Wrapper.seen[0] == (op, True) and same_bits(y.inner, PRODUCT)
        with batch_invariant(strict=True), Seen() as seen:
            y = call(*first, X, W)
        assert seen.ops[0] is op and same_bits(y, PRODUCT)


@torch.no_grad()
def test_what_modes_and_classes_do_is_in_the_mode():
    """Two modes, the innermost first; each sees the op once, and what they call has its rule."""
    op, on = torch.ops.aten.mm.default, []
    kernel = switch.guarded("mm", op, lambda *given: NotImplemented, lambda *given: None)

    class Tells(TorchDispatchMode):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            on.append((self.name, function, active()))
            return function(*arguments, **(named or {}))
    transposed = W.t()
    for call in (kernel, torch.mm):
        on.clear()
        with batch_invariant(strict=True), Tells("outer"), Tells("inner"):
            y = call(X, transposed)
        assert on == [("inner", op, True), ("outer", op, True)] and same_bits(y, PRODUCT)


def test_who_is_asked_first_has_the_key_on_and_others_above_pythons_off():
    """As PyTorch's own fallback has it, but for one key; of torch 2.13 the early key alone is above Python's."""
    off = []

    class Asks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            off.extend(torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C._dispatch_key_parse(name))
                       for name in ("DeferredInit", "Python", "AutogradCPU"))
    with batch_invariant(), Asks():
        asked_first.ask(torch.ops.aten.mm.default, [X, W], switch.EARLY, (X, W), {})
    assert off == [False, False, True]


@torch.no_grad()
def test_nobody_is_asked_where_pytorch_asks_nobody():
    op, own = torch.ops.aten.mm.default, []
    kernel = switch.guarded("mm", op, lambda *given: own.append(given) or PRODUCT, lambda *given: None)
    with batch_invariant(strict=True), Seen() as seen, torch._C._DisableTorchDispatch():
        for call in (kernel, torch.mm):
            assert same_bits(call(X, W.t()), PRODUCT)
    assert not seen.ops and len(own) == 1

    class CallsItself(torch.Tensor):
        """It has numbers of its own, and is computed with them."""
        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), named=None):
            with torch._C._DisableTorchDispatch():
                return function(*arguments, **(named or {}))
    x = torch.Tensor._make_subclass(CallsItself, X)
    with batch_invariant(strict=True):
        assert same_bits(x @ W.t(), PRODUCT)
        with torch._C._DisableTorchDispatch():
            assert kernel(x, W.t()) is PRODUCT and all(map(asked_first.is_plain, own[-1]))


@torch.no_grad()
def test_a_class_is_asked_before_those_that_it_inherits_from():
    class Heir(Wrapper):
        pass

    class Apart(Wrapper):
        pass
    kernel = switch.guarded("mm", torch.ops.aten.mm.default, lambda *given: NotImplemented, lambda *given: None)
    for call in (kernel, torch.mm):
        Heir.seen, Apart.seen, Wrapper.seen = [], [], []
        with batch_invariant(strict=True):
            assert same_bits(call(Wrapper(X), Heir(W.t())).inner, PRODUCT)
            assert (len(Wrapper.seen), len(Heir.seen)) == (0, 1)
            call(Apart(X), Heir(W.t()))
        assert (len(Apart.seen), len(Heir.seen)) == (1, 1)


@torch.no_grad()
def test_where_only_pytorch_can_ask_it_is_objected_to_by_name(monkeypatch):
    """As of DTensor in torch 2.11, whose tensors PyTorch computes by code of its own."""
    assert asked_first._computed_by_pytorch() == (DTensor,)
    monkeypatch.setattr(asked_first, "_computed_by_pytorch", lambda: (Wrapper,))
    kernel = switch.guarded("mm", torch.ops.aten.mm.default, lambda *given: NotImplemented, lambda *given: None)
    given, on = (Wrapper(X), W.t()), []
    monkeypatch.setattr(Wrapper, "__torch_dispatch__", classmethod(
        lambda cls, function, types, arguments=(), named=None: on.append(active()) or X))
    with batch_invariant(strict=True), pytest.raises(Refused, match="mm has no order for Wrapper with this release"):
        kernel(*given)
    monkeypatch.setattr(asked_first, "ask_outside", lambda op, tensors, arguments, named: on.append(op) or X)
    monkeypatch.setattr(switch, "ask_outside", asked_first.ask_outside)
    with batch_invariant(), pytest.warns(MovesBits, match="mm has no order for Wrapper with this release"):
        assert kernel(*given) is X and on == [torch.ops.aten.mm.default]


@torch.no_grad()
def test_a_call_that_every_class_gives_up_is_an_error():
    class GivesUp(Wrapper):
        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), named=None):
            return NotImplemented
    kernel = switch.guarded("mm", torch.ops.aten.mm.default, lambda *given: NotImplemented, lambda *given: None)
    for call in (kernel, torch.mm):
        with batch_invariant(strict=True), pytest.raises(TypeError, match="GivesUp"):
            call(GivesUp(X), W.t())
