"""Whose call an op is: what makes weights, inputs or measurements is no row of a batch."""
from __future__ import annotations

import os
import sys

import torch
from torch import nn

_TORCH, _MODE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_INIT, _DATA = nn.init.__file__, os.path.join(_TORCH, "utils", "data") + os.sep
_BETWEEN = _MODE, os.path.join(_TORCH, "_ops.py"), os.path.join(_TORCH, "_library"), os.path.join(_TORCH, "library.py")
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


def measures() -> bool:
    """Whether torch.compile itself makes the call: numbers to time its kernels with."""
    caller = next((name for frame in _frames() if not (name := frame.f_code.co_filename).startswith(_BETWEEN)), "")
    return caller.startswith(_COMPILERS)
