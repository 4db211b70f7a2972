"""A reader's function, looked at: is it a stub, does it return, what did it raise, and which sums did it borrow."""
from __future__ import annotations

import dis
import traceback
from collections.abc import Callable
from types import FunctionType

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_DOES_NOTHING = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE", "COPY_FREE_VARS"}
# ATen's functions in which a library adds many numbers, so that the library chooses the order
_SUMS = {"sum", "nansum", "mean", "nanmean", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot",
         "addr", "cumsum", "logsumexp", "_logcumsumexp", "logcumsumexp", "norm", "linalg_vector_norm", "var", "std",
         "var_mean", "std_mean", "trace", "index_add", "scatter_add", "scatter_reduce", "index_put", "_index_put_impl",
         "segment_reduce", "bincount", "histc", "convolution", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d",
         "_softmax", "_log_softmax", "einsum", "sum_to_size", "_fft_r2c", "mkldnn_rnn_layer"}
_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class Raised(Exception):
    """The reader's function raised; the message says what and where."""


class Called:
    """The reader's function. What it raises comes as Raised, and so does a None where something is asked for."""

    def __init__(self, function: Callable, name: str, none: bool = False):
        self.function, self.name, self.none, self.last = function, name, none, None

    def __call__(self, *args):
        try:
            self.last = self.function(*args)
        except Exception as error:
            raise Raised(f"your answer raised {type(error).__name__}: {error}{_place(error)}") from error
        if self.last is None and not self.none:
            raise Raised(f"{self.name} returned None here: does every way through it end with `return`?")
        return self.last


def _place(error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)[1:2]]
    return f" (line {lines[0]} of the cell)" if lines else ""


def describe(value) -> str:
    """A value for a message: what it is, and what it holds if that is short."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    name = type(value).__name__
    kind = "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return kind if value is None or callable(value) else f"{kind}: {text if len(text) <= 60 else text[:57] + '...'}"


def is_stub(answer) -> bool:
    """Whether this is the stub: an Ellipsis, or a function that does nothing but return None or an Ellipsis."""
    if not isinstance(answer, FunctionType):
        return answer is ...
    constants = set(answer.__code__.co_consts) - {answer.__doc__}
    return constants <= {None, ...} and {i.opname for i in dis.get_instructions(answer)} <= _DOES_NOTHING


def has_no_return(answer) -> bool:
    """Whether this is a function in which every `return` is one of None."""
    if not isinstance(answer, FunctionType) or answer.__code__.co_flags & 0x20:  # a generator
        return False
    found, before = [], None
    for step in dis.get_instructions(answer):
        if step.opname == "RETURN_CONST":
            found.append(step.argval)
        elif step.opname == "RETURN_VALUE":  # where two ways meet, one of them may bring a value
            known = before is not None and before.opname == "LOAD_CONST" and not step.is_jump_target
            found.append(before.argval if known else ...)
        before = step
    return bool(found) and all(value is None for value in found)


class _NotesSums(TorchDispatchMode):
    """Notes which of ATen's sums are called."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "overloadpacket", func).__name__.rstrip("_")
        if name in _SUMS and _adds_many(name, args):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _adds_many(name: str, args: tuple) -> bool:
    """index_put adds only if it is told to accumulate."""
    return "index_put" not in name or len(args) > 3 and bool(args[3])


class _NotesNumpy(TorchFunctionMode):
    """Notes where tensors are handed to NumPy, whose sums nobody sees from here."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _NUMPY:
            self.found.append("NumPy")
        return func(*args, **(kwargs or {}))


def library_sums(function: Callable, *args) -> tuple[object, list[str]]:
    """What function(*args) returns, and the library's sums that it called, without repeats."""
    found: list[str] = []
    with _NotesNumpy(found), _NotesSums(found):
        result = function(*args)
    return result, list(dict.fromkeys(found))


def refuse_library_sums(function: Callable, *args) -> None:
    """Raise AssertionError if function(*args) lets a library add many numbers."""
    _, found = library_sums(function, *args)
    if found:
        raise AssertionError(f"{found[0]} adds in an order that the library chooses, and another machine's may choose "
                             "another: write every addition out.")


def number(value, wants: str = "a number") -> float:
    """The value as a float. AssertionError that says what is asked for if it is no single number."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise AssertionError(f"{wants} is asked for, and this is {describe(value)}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{wants} is asked for, and this is {describe(value)}.") from None


def numbers(value, count: int, wants: str) -> tuple[float, ...]:
    """The values as floats. AssertionError that says what is asked for unless there are `count`."""
    if not isinstance(value, (tuple, list, torch.Tensor)) or len(value) != count:
        raise AssertionError(f"{wants} is asked for, and this is {describe(value)}.")
    return tuple(number(part, f"a number in each place of {wants}") for part in value)
