"""Causal attention as three ops that share one call and one order: decode, prefill, and a chunk behind a context.

The order is in order.py beside this file; a kind of schedule is one file, such as walk.py, spread.py and hopper.py.
"""
from __future__ import annotations

from functools import partial

import torch

from ...op import Op, Shape, Work
from ...runtime import HAS_GPU, current_device
from . import contenders, order
from .call import Attention
from .choice import choose
from .form import Form
from .inputs import decode_inputs, keys_and_pairs, query_inputs
from .schedule import tested


def _work(tokens: int, shape, dtype=torch.bfloat16, one: bool = True) -> Work:
    """Each query, result, key and value once; two products for each pair of a query and a key that it sees."""
    shape = Shape.parse(shape, "H", "KV", "D")
    keys, pairs = keys_and_pairs(tokens, shape) if one else (tokens * shape.get("context", 0),) * 2
    return Work(bytes=(2 * tokens * shape["H"] + 2 * keys * shape["KV"]) * shape["D"] * dtype.itemsize,
                flops=4 * pairs * shape["H"] * shape["D"])


def _index() -> int:
    return current_device() if HAS_GPU else -1


def _op(name: str, title: str, inputs, one: bool, shapes: tuple[str, ...]) -> Op:
    call = Attention(name)

    def cuda(q, k, v, sequences, window=0, lse=False):
        """The default: scaled_dot_product_attention."""
        return contenders.sdpa(q, k, v, sequences, window, lse)

    def python(q, k, v, sequences, window=0, lse=False):
        """The specification: q (T, H, D), k and v as `sequences` says -> (T, H, D), with `lse` also (T, H) float32.

        bfloat16 or float16, D up to 128. Raises TypeError or ValueError for anything else, RuntimeError where a
        gradient is asked for.
        """
        return order.specified(q, k, v, sequences, window, lse)

    def schedule(tokens, shape, dtype) -> str:
        q, k, v, sequences = inputs(tokens, shape, dtype, "meta")
        return str(choose(Form.of(q, k, v, sequences, 0, False), sequences, _index(), bulk=True))

    return Op(name=name, title=title,
              order="blocks of 128 keys, the newest first; leaves of 1024 by position, joined from the newest on",
              cuda=cuda, python=call.specification(python), triton=call.triton, inputs=inputs,
              work=partial(_work, one=one), per_token=(0, 3) if one else (0, 1, 2, 3), shapes=shapes,
              schedules=lambda shape, dtype: tested(_index()), schedule=schedule, extras=contenders.extras(call),
              call=call)


attention_decode = _op("attention_decode", "Attention, decode", decode_inputs, False,
                       tuple(f"H=32,KV=8,D=128,context={n}" for n in (4096, 1024, 8192)))
attention_prefill = _op("attention_prefill", "Attention, prefill", query_inputs, True, ("H=32,KV=8,D=128",))
attention_chunk = _op("attention_chunk", "Attention, a chunk behind a context", query_inputs, True,
                      ("H=32,KV=8,D=128,context=4096",))
