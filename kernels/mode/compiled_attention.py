"""Attention as torch.compile sees it under the mode: one layout of results, and a mask that is read once a forward.

Compiled code trusts what an op says of its results, so whichever op was called, ours or PyTorch's own, they lie alike:

forward   y (B, H, Q, D) as (B, Q, H, D) lies, and the logarithms of the sums (B, H, Q) as (B, Q, H) lies
backward  contiguous gradients

What a mask says decides the launches, so Inductor leaves attention out of CUDA graphs, unless that is known when code
is compiled (known_attention.py). An op of its own reads the mask on the host (read_masks.py) and gives what it says a
number, which attention takes.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from .kept import short
from .kept_attention import nothing
from .masks import READ, of_mask
from .names import op_of
from .opaque import defined, schema_of
from .read_masks import READER
from .seen import Read
from .switch import RULES, guarded

# which of its arguments is the mask, and which are queries and keys
EFFICIENT, _CUDNN = "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"
MASKED = {EFFICIENT: (3, 0, 1), _CUDNN: (3, 0, 1),
          f"{EFFICIENT}_backward": (4, 1, 2), f"{_CUDNN}_backward": (8, 1, 2)}


def traced(name: str) -> Callable:
    """What is traced in the place of an attention op: a function of its arguments."""
    op, own = op_of(name), "aten_" + name
    kernel = kernel_of(name)

    def run(*arguments, **named):
        return laid(name, kernel(*arguments, **named), arguments)

    def run_read(number, *arguments, **named):
        return run(*_with_what_was_read(name, number.item(), arguments), **named)

    def fake(*arguments, **named):
        return said(name, op(*arguments, **named), arguments)
    plain = defined(own, schema_of(op), run, fake, torch.Tag.cudagraph_unsafe)
    if name not in MASKED:
        return plain
    read = defined(f"{own}_read", f"(Tensor number, {schema_of(op)[1:]}", run_read,
                   lambda number, *arguments, **named: fake(*arguments, **named), torch.Tag.cudagraph_unsafe)

    def one_or_other(*arguments, **named):
        mask = arguments[MASKED[name][0]]
        if mask is None or not mask.numel():
            return plain(*arguments, **named)
        return read(READER(mask, *_sizes(name, arguments)), *arguments, **named)
    return one_or_other


@cache
def kernel_of(name: str) -> Callable:
    """The rule of an attention op, with PyTorch's op where it gives way."""
    return guarded(name, _theirs(name), RULES[name], short(name))


def _sizes(name: str, arguments) -> tuple:
    q, k = (arguments[place] for place in MASKED[name][1:])
    return q.shape[0], q.shape[2], k.shape[2]


def _with_what_was_read(name: str, number: int, arguments) -> tuple:
    """The arguments with what their mask says; as they are where it has no order, for the rule to refuse."""
    if not number:
        return arguments
    place = MASKED[name][0]
    mask = arguments[place]
    seen = READ.get(number) or of_mask(mask, *_sizes(name, arguments), mask.device, compare=True)
    return *arguments[:place], Read(seen, mask), *arguments[place + 1 :]


def _theirs(name: str) -> Callable:
    """PyTorch's own op, where a rule gives way to it."""
    op, sums = op_of(name), 6 if name.startswith(EFFICIENT) else 5

    def call(*arguments, **named):
        given = [a.mask if isinstance(a, Read) else a for a in arguments]
        if name.endswith("_backward"):
            given[sums] = _their_sums(name, given[sums])
        return op(*given, **named)
    return call


def _their_sums(name: str, sums: torch.Tensor) -> torch.Tensor:
    """(B, H, Q) in the shape in which a forward op of PyTorch gave it."""
    if name.startswith(EFFICIENT):
        return F.pad(sums, (0, -sums.shape[2] % 32), value=math.inf)
    return sums.unsqueeze(-1).contiguous() if name.startswith(_CUDNN) else sums


def _wanted(name: str, arguments) -> bool:
    return arguments[4] if name in MASKED else True


def laid(name: str, found, arguments):
    """Results as this file's first words say."""
    if name.endswith("_backward"):
        return tuple(t if t is None else t.contiguous() for t in found)
    (y, sums, *rest), q = found, arguments[0]
    if not _wanted(name, arguments):
        return rows(y), nothing(q, torch.float32), *rest
    return rows(y), rows((sums.squeeze(-1) if sums.dim() == 4 else sums)[:, :, : q.shape[2]]), *rest


def rows(t: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, D) or (B, H, Q) that lies as (B, Q, H, ..) does."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def said(name: str, found, arguments):
    """The same of tensors that have shapes alone, of what PyTorch's op says."""
    if name.endswith("_backward"):
        return tuple(t if t is None else t.new_empty(t.shape) for t in found)
    (y, _, *rest), q = found, arguments[0]
    sums = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32).transpose(1, 2)
    return rows(y), sums if _wanted(name, arguments) else nothing(q, torch.float32), *rest
