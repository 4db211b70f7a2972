"""Which implementation each step of a decoder uses: three sets by name."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import runtime
from ..ops.attention.op import attention_prefill
from ..ops.matmul.op import matmul
from ..ops.rms_norm import rms_norm
from ..ops.rotary import rotary_into, rotary_into_default
from ..ops.swiglu import swiglu
from . import attend
from .tiled_attention import tiled

NAMES = ("default", "invariant", "tiled")


@dataclass(frozen=True)
class Ops:
    """The steps of a decoder. Every sum of a forward is in one of them; the others look up and copy.

    rms_norm   (x, weight, residual=None, eps=) -> y, or (y, x + residual)
    linear     (x, weight, order) -> x @ weight.T; `order` is where k is cut, None for the op's own choice
    rotary     (qkv, table, positions, slots, kv, heads): turns queries and keys in place, writes keys and values
    attention  Sequences -> attend(q, k, v), which each layer calls
    swiglu     gate_up (T, 2F) -> (T, F)
    """

    rms_norm: Callable
    linear: Callable
    rotary: Callable
    attention: Callable
    swiglu: Callable


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """One of three sets.

    default    what PyTorch calls today
    invariant  this suite's, every step: its schedules on a GPU; on a CPU the specifications, which have the same bits,
               for the interpreter would give them a thousand times slower. bfloat16 or float16
    tiled      batch-invariant in plain PyTorch, at a CPU's speed and in float32 too, in the library's order and
               *certified by test*: for timing where the specification is too slow. Its bits are no other machine's

    Raises ValueError for another name, TypeError for a dtype that tensor cores do not multiply exactly.
    """
    if name not in NAMES:
        raise ValueError(f"ops must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "default":
        return Ops(rms_norm.cuda, _default_linear, rotary_into_default, attend.default, swiglu.cuda)
    if name == "tiled":
        return Ops(rms_norm.python, _tiled_linear, rotary_into, tiled, swiglu.python)
    if dtype == torch.float32:
        raise TypeError("ops='invariant' need bfloat16 or float16, which tensor cores multiply exactly, got "
                        "torch.float32: give dtype=torch.bfloat16, or ops='tiled'")
    if device.type != "cuda":
        return Ops(rms_norm.python, _specified_linear, rotary_into, _specified_attention, swiglu.python)
    runtime.require_triton("llama")
    return Ops(rms_norm.triton, _triton_linear, rotary_into, _triton_attention, swiglu.triton)


def _default_linear(x, weight, order: Sequence[int] | None):
    return F.linear(x, weight)


def _tiled_linear(x, weight, order: Sequence[int] | None):
    return matmul.extras["tiled"](x, weight)


def _specified_linear(x, weight, order: Sequence[int] | None):
    return matmul.python(x, weight, None, order)


def _triton_linear(x, weight, order: Sequence[int] | None):
    return matmul.triton(x, weight, None, order)


# The three attention ops differ in the inputs of their sweeps alone: any of them takes any mix of requests.

def _specified_attention(sequences):
    return lambda q, k, v: attention_prefill.python(q, k, v, sequences)


def _triton_attention(sequences):
    return lambda q, k, v: attention_prefill.triton(q, k, v, sequences)
