"""The shape and the dtype that a sweep's controls open on, and the shapes that they take."""
from __future__ import annotations

from ... import runtime
from ...op import Op, Shape

LONGEST = 80  # characters
FOR_A_CPU = {"rms_norm": "D=1024,residual", "matmul": "N=32,K=64",  # quick in Triton's interpreter
             "rotary": "H=8,D=64,context=64", "swiglu": "F=256",
             "attention_prefill": "H=2,KV=1,D=16", "attention_chunk": "H=2,KV=1,D=16,context=32",
             "attention_decode": "H=2,KV=1,D=16,context=32"}


def first_shape(op: Op) -> str:
    """The shape the controls open on."""
    return op.shapes[0] if runtime.HAS_GPU else FOR_A_CPU.get(op.name, op.shapes[0])


def first_dtype(op: Op) -> str:
    """The dtype the controls open on. Triton's interpreter is wrong for bfloat16, which attention works around."""
    return "bfloat16" if runtime.HAS_GPU or op.name.startswith("attention") else "float32"


def shape_for(op: Op, text: str) -> str:
    """The shape as data/ writes it. ValueError unless it has the op's sizes, once and at least 1, and no others."""
    if len(text) > LONGEST:
        raise ValueError(f"{op.name} needs a shape like {op.shapes[0]!r}, got {len(text)} characters")
    names = [part.partition("=")[0].strip() for part in text.split(",")]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"a shape has each size once, got {twice!r} more than once in {text!r}")
    shape, own = Shape.parse(text.strip()), [Shape.parse(s) for s in op.shapes]
    sizes = {name for name, value in own[0].items() if value is not True}
    known = {name for s in own for name in s}
    good = {name for name, value in shape.items() if (value is True) != (name in sizes) and value > 0}
    if not sizes <= good or good != set(shape) or not good <= known:
        raise ValueError(f"{op.name} needs a shape like {' or '.join(map(repr, op.shapes[:2]))}, got {text!r}")
    return str(shape)
