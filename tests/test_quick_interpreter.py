"""The interpreter that tests use gives every number that Triton's own gives, and refuses what that refuses."""
import pytest
import quick_interpreter
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from kernels import OPS, runtime
from kernels.bits import digest
from kernels.op import DTYPES
from kernels.runtime import tl, triton

pytestmark = pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="kernels are compiled here")

POINTS = (("rms_norm", 3, "D=70,residual", "bfloat16"), ("softmax", 2, "D=70", "float32"),
          ("log_softmax", 2, "D=70", "float16"), ("mean", 3, "D=33", "float32"), ("sum", 2, "D=6,inner=5", "bfloat16"),
          ("matmul", 3, "N=5,K=70,bias", "bfloat16"), ("matmul", 2, "N=4,K=40", "float32"),
          ("swiglu", 3, "F=20", "bfloat16"), ("rotary", 2, "H=2,D=8,context=9", "bfloat16"),
          ("attention_prefill", 3, "H=2,KV=1,D=16", "bfloat16"))


def digests() -> dict:
    return {point: digest(OPS[op].triton(*OPS[op].inputs(rows, shape, DTYPES[dtype])))
            for point in POINTS for op, rows, shape, dtype in [point]}


def test_every_op_has_the_bits_of_tritons_own():
    parts = (interpreter._get_np_dtype, interpreter._patch_lang, tl.block_type.__init__, tl.tensor.__init__)
    assert {part.__module__ for part in parts} == {"quick_interpreter"}
    quick = digests()
    with quick_interpreter.as_triton_has_it():
        assert tl.block_type.__init__.__module__ == "triton.language.core"
        assert interpreter.interpreter_builder.options.sanitize_overflow
        assert digests() == quick
    assert tl.block_type.__init__.__module__ == "quick_interpreter"


@triton.jit
def _numbers(x, y, n, STEP: tl.constexpr):
    """Integers that overflow, are shifted, compared and made floats; scalars beside blocks, columns beside rows."""
    at = tl.arange(0, 4)
    i = tl.load(x + at, mask=at < n, other=-3)
    wide = i[:, None] * 1_000_003 + (i * i)[None, :] - STEP
    logical = (wide.to(tl.uint32, bitcast=True) >> 3) ^ tl.cdiv(n, 2)
    y += at[:, None] * 4 + at[None, :]
    tl.store(y, logical.to(tl.float32) + tl.where(wide > 0, 1.5, -2.5) + tl.sum(wide // 7, 1)[:, None])


def test_integers_scalars_and_broadcasts_are_tritons_own():
    x, y = torch.tensor([2**30, -7, 3, 9], dtype=torch.int32), torch.zeros(2, 4, 4)
    _numbers[(1,)](x, y[0], 3, 5)
    with quick_interpreter.as_triton_has_it():
        _numbers[(1,)](x, y[1], 3, 5)
    assert digest(y[0]) == digest(y[1]) and len(y[0].unique()) > 4


@triton.jit
def _of_size(y, SIZE: tl.constexpr):
    tl.store(y + tl.arange(0, 4), tl.zeros([4], tl.float32) + tl.full([SIZE], 0, tl.float32))


@pytest.mark.parametrize("size", [3, 8, True, 4.0])
def test_sizes_that_do_not_fit_are_refused_as_by_tritons_own(size):
    def said():
        with pytest.raises(InterpreterError) as caught:
            _of_size[(1,)](torch.zeros(4), size)
        return str(caught.value)
    quick = said()
    with quick_interpreter.as_triton_has_it():
        assert said() == quick


@pytest.mark.parametrize("size", [4.0, tl.constexpr(4.0)])
def test_a_size_that_is_no_integer_is_refused_also_where_an_equal_one_is_known(size):
    assert tl.block_type(tl.float32, [4]).shape[0] == 4
    with pytest.raises(TypeError, match="must have type"):
        tl.block_type(tl.float32, [size])
