"""Whose call an op is: what makes weights, inputs or measurements is no row of a batch."""
from __future__ import annotations

import os
import sys

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TORCH, _MODE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_INIT, _DATA = nn.init.__file__, os.path.join(_TORCH, "utils", "data") + os.sep
_BETWEEN = _MODE, *(os.path.join(_TORCH, *name.split("/")) for name in (  # on the way of a call to its rule
    "_ops.py", "_library", "library.py", "_compile.py", "_dynamo/eval_frame.py",
    "_functorch/_aot_autograd/runtime_wrappers.py"))
_COMPILERS = tuple(os.path.join(_TORCH, name) + os.sep for name in ("_inductor", "_dynamo"))


def _frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def makes_weights() -> bool:
    """Whether the call comes out of torch.nn.init, or of a module's __init__."""
    return any(frame.f_code.co_filename == _INIT or frame.f_code.co_name == "__init__" and
               isinstance(frame.f_locals.get("self"), nn.Module) for frame in _frames())


def makes_inputs() -> bool:
    """Whether a DataLoader makes the call: it draws which rows come, in which order."""
    return any(frame.f_code.co_filename.startswith(_DATA) for frame in _frames())


def _caller() -> str:
    """The file that makes the call."""
    return next((name for frame in _frames() if not (name := frame.f_code.co_filename).startswith(_BETWEEN)), "")


def measures() -> bool:
    """Whether torch.compile itself makes the call: numbers to time its kernels with."""
    return _caller().startswith(_COMPILERS)


def called_by_pytorch() -> bool:
    """Whether PyTorch makes the call for itself, and no layer of it."""
    caller = _caller()
    return caller.startswith(_TORCH) and not caller.startswith(os.path.join(_TORCH, "nn") + os.sep)


def is_fake() -> bool:
    """Whether tensors that are made now have no numbers."""
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
