"""Which implementation each step of a decoder uses: five sets by name."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import runtime
from ..ops.attention.op import attention_prefill
from ..ops.matmul.op import matmul
from ..ops.matmul.order import order as matmul_order
from ..ops.rms_norm import rms_norm
from ..ops.rotary import rotary_into, rotary_into_default
from ..ops.swiglu import swiglu
from . import attend
from .specified_attention import specified
from .threads import on_cores
from .tiled_attention import tiled

NAMES = ("default", "invariant", "tiled", "fused")
FROZEN = "frozen"  # not among NAMES: a GPU's alone


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
    """One of five sets.

    default    what PyTorch calls today
    invariant  this suite's, every step: its schedules on a GPU; on a CPU the specifications, which have the same bits,
               for the interpreter would give them a thousand times slower. bfloat16 or float16
    tiled      batch-invariant in plain PyTorch, at a CPU's speed and in float32 too, in the library's order and
               *certified by test*: for timing where the specification is too slow. Its bits are no other machine's
    fused      default products and attention, and this suite's ops that fuse several steps; not invariant. For timing:
               what of a difference is fusion
    frozen     invariant as it is usually had: one schedule of the product and one of attention for all batches. A GPU's

    Raises ValueError for another name or for `frozen` without a GPU, TypeError for a dtype that tensor cores do not
    multiply exactly.
    """
    if name == FROZEN:
        return _frozen(device)
    if name not in NAMES:
        raise ValueError(f"ops must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "default":
        return Ops(rms_norm.cuda, _default_linear, rotary_into_default, attend.default, swiglu.cuda)
    if name == "tiled":
        return Ops(rms_norm.python, _tiled_linear, rotary_into, tiled, swiglu.python)
    if name == "fused":
        return _fused(device)
    if dtype == torch.float32:
        raise TypeError("ops='invariant' need bfloat16 or float16, which tensor cores multiply exactly, got "
                        "torch.float32: give dtype=torch.bfloat16, or ops='tiled'")
    if device.type != "cuda":
        return Ops(rms_norm.python, _specified_linear, rotary_into, specified, swiglu.python)
    runtime.require_triton("llama")
    return Ops(rms_norm.triton, _triton_linear, rotary_into, _triton_attention, swiglu.triton)


def _fused(device: torch.device) -> Ops:
    if device.type != "cuda":
        return Ops(rms_norm.python, _default_linear, rotary_into, attend.default, swiglu.python)
    runtime.require_triton("llama")
    return Ops(rms_norm.triton, _default_linear, rotary_into, attend.default, swiglu.triton)


def _frozen(device: torch.device) -> Ops:
    if device.type != "cuda":
        raise ValueError(f"ops='frozen' are one schedule each of a GPU's kernels and need a CUDA GPU, got {device}")
    runtime.require_triton("llama")
    return Ops(rms_norm.triton, _frozen_linear, rotary_into, _frozen_attention, swiglu.triton)


def _default_linear(x, weight, order: Sequence[int] | None):
    return F.linear(x, weight)


def _tiled_linear(x, weight, order: Sequence[int] | None):
    return matmul.extras["tiled"](x, weight)


def _specified_linear(x, weight, order: Sequence[int] | None):
    """On each core some of the weight's rows, in the order of the whole weight."""
    if (threads := torch.get_num_threads()) == 1:
        return matmul.python(x, weight, None, order)
    order = order or matmul_order(*weight.shape)
    return torch.cat(on_cores(lambda part: matmul.python(x, part, None, order), weight.chunk(threads)), -1)


def _triton_linear(x, weight, order: Sequence[int] | None):
    return matmul.triton(x, weight, None, order)


def _triton_attention(sequences):
    """The three attention ops differ in the inputs of their sweeps alone: any of them takes any mix of requests."""
    return lambda q, k, v: attention_prefill.triton(q, k, v, sequences)


def _frozen_linear(x, weight, order: Sequence[int] | None):
    return matmul.extras["frozen"](x, weight)


def _frozen_attention(sequences):
    return lambda q, k, v: attention_prefill.extras["frozen"](q, k, v, sequences)
