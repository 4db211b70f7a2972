"""Rules for functions of one number whose bits a CPU's loops move.

PyTorch's loops on a CPU take a vector of numbers at a time, and the last few one by one with another routine; threads
cut a tensor where its size says. So the bits of silu, gelu or a sigmoid depend on where an element lies. Here every
element goes through the vector's routine: the numbers are laid side by side, padded to whole vectors and handed over
in pieces that one thread takes. The values are the library's: no other machine's, *certified by test, not by
construction*. On a GPU one thread computes one element, and PyTorch's op stays.
"""
from __future__ import annotations

import torch

from .names import op_of, overloads_of
from .switch import Unsupported, rule

VECTORS = 256  # numbers: a multiple of every vector and of every unrolling of it
PIECE = 1 << 14  # numbers: below what PyTorch gives to a second thread

ONE = ("silu", "gelu", "sigmoid", "softplus", "elu", "mish", "exp2", "rsqrt", "tanh", "erf", "exp", "log", "sin",
       "cos", "pow.Tensor_Scalar", "expm1", "log1p", "selu", "celu", "hardswish", "sinh", "cosh", "atanh", "softshrink",
       "special_i0e")
TWO = ("silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward", "mish_backward", "softplus_backward")
PAIRS = ("atan2", "logaddexp", "logaddexp2", "pow.Tensor_Tensor", "igamma", "igammac")  # of two, which may broadcast
OF_A_NUMBER = "pow.Scalar"  # and a tensor
EVERY = (*ONE, *TWO, *PAIRS, OF_A_NUMBER)
COMPLEX = tuple(name for packet in ("sgn", "sgn_", "angle", "addcmul", "addcmul_", "lerp", "lerp_")
                for name in overloads_of(packet))  # real numbers keep their bits


def steady(name: str, tensors: int):
    """The rule of an op whose first arguments are `tensors` tensors of one shape."""
    def call(*arguments, **named):
        given, rest = arguments[:tensors], arguments[tensors:]
        first = given[0]
        if not first.is_cpu or any(t.shape != first.shape or t.dtype != first.dtype for t in given):
            return NotImplemented
        if first.layout != torch.strided:
            raise Unsupported(f"has no fixed place in a CPU's loops for {first.layout}")
        if first.is_complex():
            raise Unsupported(f"has no fixed place in a CPU's loops for {first.dtype}")
        if not first.is_floating_point() or not first.numel():
            return NotImplemented
        op, count = op_of(name), first.numel()
        flat = [torch.nn.functional.pad(t.reshape(-1), (0, -count % VECTORS), value=1.0) for t in given]
        pieces = [op(*piece, *rest, **named) for piece in zip(*(t.split(PIECE) for t in flat), strict=True)]
        return _laid((pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:count].view(first.shape), given)
    return call


def _laid(y: torch.Tensor, given) -> torch.Tensor:
    """y that lies as the first tensor which was not broadcast, as PyTorch's loops write it."""
    like = next((t for t in given if 0 not in t.stride()), y)
    return y if like.is_contiguous() else torch.empty_like(like).copy_(y)


def _pairwise(name: str):
    """The rule of an op of PAIRS: both tensors as the result is, then as for one shape."""
    of_one_shape = steady(name, 2)

    def call(a, b):
        if not (a.is_cpu and b.is_cpu):
            return NotImplemented
        dtype = torch.result_type(a, b)
        return of_one_shape(*(t.to(dtype) for t in torch.broadcast_tensors(a, b)))
    return call


@rule(OF_A_NUMBER)
def _power(self, exponent):
    base = torch.full((), self, dtype=torch.result_type(self, exponent), device=exponent.device)
    return _pairwise("pow.Tensor_Tensor")(base, exponent)


def _of_complex(*arguments, **named):
    first = next((t for t in arguments if isinstance(t, torch.Tensor) and t.is_complex()), None)
    if first is not None and first.is_cpu:
        raise Unsupported(f"has no fixed place in a CPU's loops for {first.dtype}")
    return NotImplemented


rule(*COMPLEX)(_of_complex)
for _name in PAIRS:
    rule(_name)(_pairwise(_name))
for _name in ONE:
    rule(_name)(steady(_name, 1))
for _name in TWO:
    rule(_name)(steady(_name, 2))
