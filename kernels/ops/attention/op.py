"""Causal attention as three ops that share one call and one order: decode, prefill, and a chunk behind a context.

The order is in order.py beside this file; a kind of schedule is one file: walk.py, spread.py and hopper.py.
"""
from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ... import bits
from ...op import Op, Shape, Work
from ...runtime import HAS_GPU, current_device
from . import contenders, order
from .call import Attention
from .choice import choose
from .form import Form
from .schedule import tested
from .sequences import Sequences, chosen_rows


class Queries(Sequences):
    """One sequence, k[0], whose rows are its queries: neighbours that are taken together stay one sequence.

    So `[:100]` is a prefill of 100, `[7:8]` a decode at position 7, and rows in any order are as many sequences on the
    same keys.
    """

    def __init__(self, first: int, queries: int, device=None):
        self.first = first
        super().__init__([queries], [first + queries], device, slots=[0])

    def __getitem__(self, rows) -> Sequences:
        position = self.first + chosen_rows(rows, self.tokens)
        cuts = np.flatnonzero(np.diff(position) != 1) + 1
        runs = np.split(position, cuts) if len(position) else []
        return Sequences([len(run) for run in runs], [int(run[-1]) + 1 for run in runs], self.device,
                         slots=[0] * len(runs))


def numbers(rows: int, heads: int, width: int, dtype, device, seed: int, step: int = 0, scale: int = 0) -> torch.Tensor:
    """Portable numbers (rows, heads, width). With a `step`, columns of sizes from 2**-4 to 2**4, which it mixes.

    Without them scores of 8-bit numbers would be exact, and so would have no order.
    """
    if torch.device(device).type == "meta":  # arithmetic there would import torch's compiler first
        return torch.empty(rows, heads, width, dtype=dtype, device=device)
    made = bits.portable(rows, heads * width, dtype, device, seed, scale).view(rows, heads, width)
    exponent = torch.arange(width, dtype=torch.int64, device=device) * step % 9 - 4 * (step > 0)
    return made * (exponent + 127 << 23).to(torch.int32).view(torch.float32).to(dtype)


def _sizes(shape) -> tuple[int, int, int]:
    shape = Shape.parse(shape, "H", "KV", "D")
    return shape["H"], shape["KV"], shape["D"]


def _decode_inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """One query for each of `tokens` sequences, all of `context` keys."""
    (heads, kv_heads, width), context = _sizes(shape), Shape.parse(shape, "context")["context"]
    q = numbers(tokens, heads, width, dtype, device, seed, 7, -1)
    k, v = (numbers(tokens * context, kv_heads, width, dtype, device, seed + i, step).unflatten(0, (tokens, context))
            for i, step in ((1, 5), (2, 0)))
    return q, k, v, Sequences([1] * tokens, [context] * tokens, device)


def _one_inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """`tokens` queries of one sequence, behind a context if the shape has one; row i does not depend on `tokens`."""
    (heads, kv_heads, width), context = _sizes(shape), Shape.parse(shape).get("context", 0)
    q = numbers(tokens, heads, width, dtype, device, seed, 7, -1)
    k, v = (numbers(context + tokens, kv_heads, width, dtype, device, seed + i, step)[None]
            for i, step in ((1, 5), (2, 0)))
    return q, k, v, Queries(context, tokens, device)


def _work(tokens: int, shape, dtype=torch.bfloat16, one: bool = True) -> Work:
    (heads, kv_heads, width), context = _sizes(shape), Shape.parse(shape).get("context", 0)
    keys = context + tokens if one else tokens * context
    pairs = tokens * context + tokens * (tokens + 1) // 2 if one else tokens * context
    return Work(bytes=(2 * tokens * heads + 2 * keys * kv_heads) * width * dtype.itemsize,
                flops=4 * pairs * heads * width)


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


attention_decode = _op("attention_decode", "Attention, decode", _decode_inputs, False,
                       tuple(f"H=32,KV=8,D=128,context={n}" for n in (4096, 1024, 8192)))
attention_prefill = _op("attention_prefill", "Attention, prefill", _one_inputs, True, ("H=32,KV=8,D=128",))
attention_chunk = _op("attention_chunk", "Attention, a chunk behind a context", _one_inputs, True,
                      ("H=32,KV=8,D=128,context=4096",))
