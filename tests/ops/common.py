"""What the tests of every op share: where they run, marks, inputs, and the same numbers behind other strides.

Tests without the mark `gpu` run where they are: on a GPU the compiled kernels, elsewhere Triton's interpreter.
"""
import math
from ast import literal_eval

import pytest
import torch
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.bits import adversarial, portable
from kernels.op import DTYPES

HERE = runtime.device()
INF, NAN = math.inf, math.nan

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
needs_compiler = pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiling ahead of time needs Triton")
# attention's rows are queries that share keys, and rotary's have places in a table: tests of their own hold them to
# the same promises
ROW_OPS = {name: op for name, op in OPS.items() if not name.startswith(("attention", "rotary"))}
every_op = pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
both = pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
dtypes = st.sampled_from(list(DTYPES.values()))
seeds = st.integers(0, 10**6)


def made(op, point, seed=0, device=HERE, kind=None):
    """The arguments that a point such as "7 D=96,residual bfloat16" names: 7 rows; a fourth word is their dim.

    With an adversarial `kind`, every per-token argument is made of it.
    """
    rows, shape, dtype, *dim = point.split(" ", 3)
    arguments = op.inputs(int(rows), shape, DTYPES[dtype], device, seed)
    if kind is not None:
        arguments = tuple(adversarial(kind, len(a), a[0].numel(), a.dtype, device, seed + i).view(a.shape)
                          if i in op.per_token and a is not None else a for i, a in enumerate(arguments))
    return (arguments[0], literal_eval(dim[0])) if dim else arguments


def numbers(shape, dtype=torch.float32, seed=0, device=HERE):
    """Portable numbers of any shape."""
    return portable(1, math.prod(shape), dtype, device, seed).view(shape)


def whole_inputs(tokens, n, k, dtype=torch.bfloat16, bias=True, device=HERE):
    """A product of small whole numbers: every partial sum is exact, so that only a wrong sum differs, not an order."""
    def whole(rows, width, seed):
        return (portable(rows, width, torch.float32, "cpu", seed) * 4).round().to(dtype).to(device)
    return whole(tokens, k, 1), whole(n, k, 2), whole(1, n, 3)[0] if bias else None


def results(value):
    """An op's results as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def tensors(arguments):
    """The arguments that are tensors."""
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def exchanged(arguments, i, argument):
    """The arguments with another one at place i."""
    return (*arguments[:i], argument, *arguments[i + 1:])


def views(x):
    """The same numbers behind other strides: name -> view of a larger, turned or negated tensor."""
    if x.dim() == 1:
        return {how: view[0] for how, view in views(x[None]).items()}
    rows, width = x.shape
    wide, tall, apart, turned, odd, part = (torch.full(size, NAN, dtype=x.dtype, device=x.device) for size in (
        (rows, width + 24), (2 * rows, width), (rows, 2 * width), (width, rows), (rows, width + 3),
        (2 * rows, width + 24)))
    wide[:, 8 : 8 + width], tall[::2], apart[:, ::2], turned[:], odd[:, 1 : 1 + width] = x, x, x, x.t(), x
    part[::2, 8 : 8 + width] = x
    return {"columns of a wider tensor": wide[:, 8 : 8 + width], "every second row": tall[::2],
            "every second column": apart[:, ::2], "transposed": turned.t(), "misaligned": odd[:, 1 : 1 + width],
            "part of a wider tensor": part[::2, 8 : 8 + width], "negated": torch._neg_view(-x),
            "negated part": torch._neg_view(-part)[::2, 8:-16]}


@st.composite
def tensors_and_dims(draw, longest=1500):
    """(shape, dim): up to four dimensions, one of them long, and any way to name some of them."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1, longest))
    every = range(len(shape)) if shape else [0]
    chosen = draw(st.lists(st.sampled_from(every), unique=True))
    named = tuple(d - draw(st.sampled_from([0, max(len(shape), 1)])) for d in chosen)
    return tuple(shape), draw(st.sampled_from([None, named, named[0]] if named else [None, ()]))


def waits_first(code):
    """Where kernels may overlap (sm_90 and later), nothing touches memory before the wait; elsewhere there is none."""
    wait, launch = (code.ptx.find(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
    if code.job.target < 90:
        return wait == launch == -1
    return -1 < wait < min(code.ptx.index("ld.global"), code.ptx.index("st.global"), launch)


def rounds_every_product(code, pairs):
    """A rotation of so many pairs a thread: two sums and four products each, none fused. sm_100 may do two at once."""
    held = max(1, pairs)
    adds, packed = code.count(r"(add|sub)(\.rn)?\.f32"), code.count(r"(add|sub)(\.rn)?\.f32x2")
    products, two = code.count(r"mul(\.rn)?\.f32"), code.count(r"mul(\.rn)?\.f32x2")
    assert adds + packed <= 2 * held <= adds + 2 * packed, code.job
    assert products + two <= 4 * held <= products + 2 * two, code.job
    assert not (code.fused or code.flushes or code.approximate or code.divisions), code.job
