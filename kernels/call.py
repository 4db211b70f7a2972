"""How every op is called: what ops repeat, made from the few functions in which they differ.

A call looks up a plan under all that its arguments' shapes decide, and the plan launches:

    plan = plans.get(key) or plans.keep(key, Plan(...))    checks, schedule and steps: once a key
    plan.launch(plan, ...)                                 memory and the launches: every call

The launches are data (`Step`), which plans, Triton's interpreter, ahead-of-time compilation and tests all read.
"""
from __future__ import annotations

import inspect
import linecache
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch.autograd import forward_ad

from .launch import Launch, Step
from .op import DTYPES
from .runtime import contiguous_strides, modes_are_asked, require_subnormals, require_triton


class Call(ABC):
    """How one op is called: a look-up of a plan, and the custom op that torch.compile sees. A subclass gives

    name        the op's
    parameters  its arguments as torch.library writes them, tensors first: "Tensor x, Tensor? residual=None"
    Schedule    the class of its schedules
    kernel      the kernel that a notebook shows for `op.triton`

    and the methods below, which take the op's own arguments.
    """

    name: str
    parameters: str
    Schedule: type
    kernel: Any

    def __init__(self):
        self.plans = Plans()
        self.triton = _straight(self, "triton")
        self.run_schedule = _straight(self, "run_schedule")
        self.custom = self._custom_op(self.name, self.triton)

    def _custom_op(self, name: str, function: Callable) -> Any:
        """`function` as one op of torch.library; without defaults, which it would leave out of a call."""
        schema = re.sub(r"=[^,]+", "", self.parameters)
        custom = torch.library.custom_op(f"same_bits::{name}", lambda *given: _listed(function(*given)),
                                         mutates_args=(), schema=f"({schema}) -> Tensor[]")
        custom.register_fake(lambda *given: list(self.outputs(*given)))
        return custom

    def specification(self, function: Callable) -> Callable:
        """`function`, the op's specification, which torch.compile sees as one op: fusion would change its bits."""
        self.specified = self._custom_op(f"{self.name}_python", function)
        self.specified.register_autograd(partial(_backward, function), setup_context=_keep_inputs)
        return update_wrapper(_straight(self, "python", function), function)

    @abstractmethod
    def check(self, *arguments: Any, **named: Any) -> Any:
        """Raise TypeError or ValueError that names the argument, what it was and what it may be."""

    @abstractmethod
    def outputs(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        """The results, not filled. torch.compile sees no more of the op."""

    @abstractmethod
    def steps(self, schedule: Any, *arguments: Any, **named: Any) -> list[Step]:
        """The launches that carry out a schedule: one, or two."""

    @abstractmethod
    def make_plan(self, arguments: tuple, schedule: Any) -> Any:
        """A call of these arguments made ready: `plan.launch(plan, ...)` is one call."""

    def launches(self, schedule: Any, *arguments: Any, **named: Any) -> list[Step]:
        """The launches of a schedule for these arguments, which may be meta tensors."""
        return self.steps(schedule, *self.readable(*self.bound(*arguments, **named)))

    def bound(self, *arguments: Any, **named: Any) -> tuple:
        """The op's arguments with the defaults filled in."""
        given = inspect.signature(self.triton).bind(*arguments, **named)
        given.apply_defaults()
        return given.args

    def readable(self, *arguments: Any, **named: Any) -> tuple:
        """The arguments as `steps` takes them: the same objects, or copies where strides do not allow it."""
        return arguments

    def plan(self, arguments: tuple, schedule: Any = None) -> Any:
        """`make_plan` with this schedule, or one of choice. Raises TypeError for a schedule of another op."""
        if schedule is not None and not isinstance(schedule, self.Schedule):
            raise TypeError(f"schedule must be a Schedule of {self.name}, got {type(schedule).__name__} {schedule!r}")
        return self.make_plan(arguments, schedule)

    def differentiate(self, *arguments: Any) -> Any:
        """The call where autograd would record it. Raises RuntimeError for an op without a backward pass."""
        raise RuntimeError(f"{self.name}.triton has no backward yet: call it under torch.no_grad()")

    def unusual(self, schedule: Any, *arguments: Any) -> Any:
        """The call for tensors of other classes, or under a transform or a dispatch mode: right, or refused by name."""
        if torch.compiler.is_compiling():  # an export that Dynamo does not trace
            return self.traced(self.custom, *arguments)
        given = dict(zip(_names(self.parameters), arguments, strict=True))
        for name, argument in given.items():
            if isinstance(argument, torch.Tensor):
                refuse_foreign(f"{self.name}.triton", name, argument)
        if modes_are_asked():
            return self.traced(self.custom, *arguments)
        arguments = tuple(a.as_subclass(torch.Tensor) if isinstance(a, torch.Tensor) else a for a in arguments)
        if schedule is None and torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in arguments):
            return self.differentiate(*arguments)
        plan = self.plan(tuple(map(_resolved, arguments)), schedule)
        return plan.launch(plan, *arguments)

    def traceable(self, *arguments: Any) -> tuple:
        """The arguments in the form that `parameters` has for torch.compile."""
        return arguments

    def traced(self, custom: Callable, *arguments: Any) -> Any:
        """The call that torch.compile sees: a custom op, of the schedules or of the specification."""
        results = custom(*self.traceable(*arguments))
        return results[0] if len(results) == 1 else tuple(results)


class KernelCall(Call):
    """A call whose shapes decide its schedule, launches and memory at once."""

    def make_plan(self, arguments: tuple, schedule: Any) -> Plan:
        return Plan(self, arguments, schedule)

    def outputs(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        """One result of x's shape, unless a subclass says otherwise."""
        return (torch.empty_like(arguments[0], memory_format=torch.contiguous_format,
                                 dtype=self.result_dtype(*arguments)),)

    def result_dtype(self, *arguments: Any) -> torch.dtype:
        """The dtype of what is returned: x's, unless a subclass says otherwise."""
        return arguments[0].dtype

    @abstractmethod
    def schedule(self, *arguments: Any, **named: Any) -> Any:
        """The schedule of choice."""

    @abstractmethod
    def launch(self, plan: Any, *arguments: Any, **named: Any) -> Any:
        """One call on a GPU, by the plan's launches `first` and `second`."""

    @abstractmethod
    def memory(self, plan: Any, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        """What the steps' pointers point to, by name, for readable float32 arguments; the result is y_ptr's."""

    def prepare(self, plan: Plan, *arguments: Any) -> None:
        """Put on the plan what else `launch` would work out at each call."""

    def finish(self, y: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """The result from what the kernels wrote for readable arguments."""
        return y

    def empty(self, plan: Plan, *arguments: Any) -> Any:
        """The call for an x without numbers."""
        results = self.outputs(*arguments)
        return results[0] if len(results) == 1 else results

    def in_float32(self, *arguments: Any) -> tuple:
        """Readable arguments for Triton's interpreter, which is wrong for bfloat16."""
        return tuple(a.float() if isinstance(a, torch.Tensor) else a for a in arguments)

    def interpret(self, plan: Plan, *arguments: Any) -> Any:
        """One call in Triton's interpreter: it gets float32 copies, and torch rounds."""
        self.check(*arguments)  # a key does not tell a CPU from other devices without an index
        memory = self.memory(plan, *self.in_float32(*self.readable(*arguments)))
        for step in plan.steps:
            step.interpret(memory)
        return self.finish(memory["y_ptr"].to(plan.dtype), *arguments)


class Plan:
    """All of a call that its shapes decide, kept so that the next such call only launches."""

    def __init__(self, call: KernelCall, arguments: tuple, schedule: Any = None):
        call.check(*arguments)
        require_triton(call.name)
        index = arguments[0].get_device()
        if not arguments[0].numel():
            self.launch = call.empty
            return
        schedule = schedule or call.schedule(*arguments)
        readable = call.readable(*arguments)
        self.copies = any(a is not b for a, b in zip(arguments, readable, strict=True))
        self.launch, self.dtype = call.launch, call.result_dtype(*arguments)
        self.like = _like(readable[0], self.dtype)
        if index < 0:
            readable, self.launch = call.in_float32(*readable), call.interpret
        self.steps = call.steps(schedule, *readable)
        self.first, self.second = ([Launch(step, index) for step in self.steps] + [None])[:2]
        self.scratch = self.steps[0].leaves
        call.prepare(self, *arguments)


def _like(x: torch.Tensor, dtype: torch.dtype) -> Callable:
    """x -> memory of x's shape, contiguous; named arguments would cost a quarter of a microsecond a call."""
    if x.stride() == contiguous_strides(x.shape) and dtype == x.dtype:
        return torch.empty_like
    return partial(torch.empty_like, memory_format=torch.contiguous_format, dtype=dtype)


class Plans(dict):
    """key -> plan. Emptied when full, so that ever new shapes cannot fill the memory."""

    LARGEST = 4096

    def keep(self, key, plan):
        """Put a plan under its key and return it."""
        if len(self) >= self.LARGEST:
            self.clear()
        self[key] = plan
        return plan


def check_tensors(**tensors) -> None:
    """Each is a strided tensor of the first one's dtype and device, which the kernels can work on.

    Raises TypeError or ValueError that names the argument, what it was and what it may be.
    """
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
        if tensor.dtype not in DTYPES.values():
            raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have {first}'s dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {first}'s device {x.device}, got {tensor.device}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{first} must be on a CPU or a CUDA GPU, got {x.device}")
    if x.is_cpu:
        require_subnormals()


def refuse_foreign(what: str, name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError or RuntimeError for a tensor whose numbers a kernel cannot read, or whose derivative it drops."""
    kind = type(tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise RuntimeError(f"{what} cannot run under a transform of torch.func (vmap, grad, jvp), and {name} is part "
                           "of one: call .python there")
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name} is a {kind.__name__}, whose memory a kernel cannot read: for a DTensor call "
                        f".to_local() first; under a FakeTensor or other tracing use torch.compile, or {what} on real "
                        "tensors, or .python")
    refuse_dual(what, name, tensor)


def refuse_dual(what: str, name: str, tensor: torch.Tensor) -> None:
    """Raise RuntimeError for a tensor with a forward-mode derivative, which would be lost."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(f"{what} has no forward-mode derivative, and {name} carries one")


def row_stride(x: torch.Tensor) -> int | None:
    """The one stride between the rows of x (..., D), each contiguous; None if there is none."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x.stride(0)
    return x.shape[-1] if x.dim() and x.is_contiguous() else 1 if x.is_contiguous() else None


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, torch.Tensor)))
    ctx.inputs = tuple(None if isinstance(i, torch.Tensor) else (i,) for i in inputs)


def _backward(function: Callable, ctx, gradients) -> tuple:
    """The derivative of a specification, which is run again, as PyTorch works it out."""
    saved = iter(ctx.saved_tensors)
    with torch.enable_grad():
        given = [next(saved).detach().requires_grad_() if held is None else held[0] for held in ctx.inputs]
        tensors = [g for g in given if isinstance(g, torch.Tensor)]
        found = iter(torch.autograd.grad(_listed(function(*given)), tensors, gradients, allow_unused=True))
    return tuple(next(found) if isinstance(g, torch.Tensor) else None for g in given)


def _listed(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _resolved(argument):
    """A lazily negated tensor's memory holds the opposite."""
    return argument.resolve_neg() if isinstance(argument, torch.Tensor) else argument


def _integers(values: list | tuple) -> tuple[int, ...]:
    """A list or tuple as a key may hold it: (True,) would equal (1,). TypeError if one is no plain integer."""
    if any(type(value) is not int for value in values):
        raise TypeError(f"integers are needed, got {values!r}")
    return tuple(values)


_TRITON = """\
def triton({head}):
    if is_dynamo_compiling():
        return call.traced(call.custom, {names})
{guard}
{look_up}
    if grad_enabled() and ({gradient}):
        return call.differentiate({names})
    return plan.launch(plan, {names})
"""
_PYTHON = """\
def python({head}):
    if is_compiling():
        return call.traced(call.specified, {names})
    return function({names})
"""
_RUN_SCHEDULE = """\
def run_schedule(schedule, {head}):
{guard}
{look_up}
    return plan.launch(plan, {names})
"""
_GUARD = """\
    if {foreign} or level() is not None or forward._current_level >= 0 or modes():
        return call.unusual({schedule}, {names})"""
_LOOK_UP = """\
    try:
        if {negative}:
            {names}, = map(resolved, ({names},))
{lists}        key = ({key})
{optional}        plan = plans.get(key)
    except (AttributeError, RuntimeError, TypeError):  # not tensors, without strides, no hash: say so by name
        call.check({names})
        raise
    if plan is None:
        plan = plans.keep(key, call.plan(({names},){schedule}))"""
_KEY = "{0}.shape, {0}.stride(), {0}.dtype, {0}.get_device()"


_PARAMETER = re.compile(r"(\S+) (\w+)(?:=(\S+))?(?:, |$)")


def _names(parameters: str) -> list[str]:
    return [name for _, name, _ in _PARAMETER.findall(parameters)]


_TEMPLATES = {"triton": _TRITON, "run_schedule": _RUN_SCHEDULE, "python": _PYTHON}


def _straight(call: Call, name: str, function: Callable | None = None) -> Callable:
    """One of _TEMPLATES for a call, written out: a loop over its arguments would cost a microsecond a call."""
    given = _PARAMETER.findall(call.parameters)
    names = ", ".join(_names(call.parameters))
    always, optional = ([n for kind, n, _ in given if kind == wanted] for wanted in ("Tensor", "Tensor?"))
    values = [n for kind, n, _ in given if not kind.startswith("Tensor")]
    chosen = ["schedule"] if name == "run_schedule" else []

    def any_of(attribute: str) -> str:
        return " or ".join([f"{n}.{attribute}" for n in always]
                           + [f"{n} is not None and {n}.{attribute}" for n in optional])

    # of other arguments the class too: True and 1.0 equal 1, and are no dimension
    key = [*chosen, *map(_KEY.format, always), *(f"{n}, {n}.__class__" for n in values)]
    lists = "".join(f"        if {n}.__class__ is tuple or {n}.__class__ is list:\n            {n} = integers({n})\n"
                    for kind, n, _ in given if kind.startswith("int["))
    look_up = _LOOK_UP.format(
        names=names, lists=lists, negative=any_of("is_neg()"), key=", ".join(key),
        schedule=", schedule" if chosen else "",
        optional="".join(f"        if {n} is not None:\n            key += ({_KEY.format(n)})\n" for n in optional))
    other = "{0}.__class__ is not plain and {0}.__class__ is not parameter"  # faster than a set of both
    foreign = " or ".join([*map(other.format, always), *(f"{n} is not None and {other.format(n)}" for n in optional)])
    guard = _GUARD.format(foreign=foreign, names=names, schedule="schedule" if chosen else "None")
    source = _TEMPLATES[name].format(
        names=names, guard=guard, look_up=look_up, gradient=any_of("requires_grad"),
        head=", ".join(f"{n}={default}" if default else n for _, n, default in given))
    file = f"<{name} of {call.name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks and inspect
    scope: dict[str, Any] = {
        "call": call, "function": function, "plans": call.plans, "plain": torch.Tensor,
        "parameter": torch.nn.Parameter, "resolved": _resolved, "integers": _integers, "forward": forward_ad,
        "grad_enabled": torch.is_grad_enabled, "is_compiling": torch.compiler.is_compiling,
        "is_dynamo_compiling": torch.compiler.is_dynamo_compiling, "modes": torch._C._len_torch_dispatch_stack,
        "level": torch._C._functorch.maybe_current_level}
    exec(compile(source, file, "exec"), scope)  # noqa: S102 - this file's text and a class's parameter names alone
    written = scope[name]
    written.__doc__, written.__qualname__ = call.__doc__, f"{call.name}.{name}"
    if function is None:
        written.shows = call.kernel
    return written
