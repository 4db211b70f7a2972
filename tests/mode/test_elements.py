"""Functions of one number and of two on a CPU: a number's result is the same wherever it lies, whatever writes it."""
from __future__ import annotations

import pytest
import torch

from kernels.bits import same_bits
from kernels.mode import Refused, batch_invariant, elements, overloads
from kernels.mode.names import op_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's loops")
COUNT = 1037  # not whole vectors
PLACES = (slice(0, 1), slice(3, 9), slice(500, 501), slice(1030, None))
SEED = torch.Generator().manual_seed(3)
UNIT = torch.rand(COUNT, generator=SEED) * 1.9 - 0.95
WIDE = torch.randn(COUNT, generator=SEED) * 3
VALUES = {"unit": UNIT, "wide": WIDE, "positive": WIDE.abs() + 0.01}
NUMBERS = {"pow.Tensor_Scalar": (2.5,)}


def _same(call, *tensors) -> bool:
    """Whether an op that is given slices of tensors gives slices of its result."""
    whole = call(*(t.clone() for t in tensors))
    return all(same_bits(call(*(t[place].clone() for t in tensors)), whole[place]) for place in PLACES)


def _given(name: str, x: torch.Tensor) -> tuple[tuple, tuple]:
    """The tensors of a call and what follows them."""
    two = name in (*elements.PAIRS, *elements.TWO)
    return (x, x.flip(0).abs() + 0.25) if two else (x,), NUMBERS.get(name, (1.0, 20.0) if "softplus_b" in name else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in elements.EVERY if name != elements.OF_A_NUMBER])
def test_a_numbers_result_is_the_same_wherever_it_lies(name, dtype):
    op = op_of(name)
    with batch_invariant(strict=True):
        for values in VALUES.values():
            tensors, more = _given(name, values.to(dtype))
            assert _same(lambda *given, more=more: op(*given, *more), *tensors)
            assert _same(lambda *given: torch.pow(2.0, given[0]), *tensors)


WRITES = {name: of for name, of in (overloads._ELEMENTS_OUT | overloads._ELEMENTS_IN_PLACE).items()
          if op_of(name) is not None}


@pytest.mark.parametrize("name", WRITES)
def test_what_writes_its_result_has_the_same_bits(name):
    op, of = op_of(name), op_of(WRITES[name])
    with batch_invariant(strict=True):
        for values in VALUES.values():
            tensors, more = _given(WRITES[name], values)
            if WRITES[name] == elements.OF_A_NUMBER:
                tensors, more = (2.0, values), ()
            wanted = of(*tensors, *more)
            if name.endswith("out"):
                out = torch.empty(0)
                assert op(*tensors, *more, out=out) is out and same_bits(out, wanted)
            else:
                first = tensors[0].clone()
                assert op(first, *tensors[1:], *more) is first and same_bits(first, wanted)


def test_without_the_mode_some_of_them_move():
    """The inverse: the comparison above fails where it should."""
    moved = [name for name in (*elements.ONE, *elements.PAIRS)
             if not all(_same(lambda *given, name=name, more=more: op_of(name)(*given, *more), *tensors)
                        for tensors, more in (_given(name, values) for values in VALUES.values()))]
    assert {"gelu", "atanh", "softshrink", "igamma", "pow.Tensor_Scalar"} & set(moved)


def test_a_recurrent_layer_in_one_kernel_and_a_matrix_exponential_are_refused():
    layer, x = torch.nn.LSTM(96, 32, 2, batch_first=True), torch.randn(4, 5, 96, generator=SEED)
    with torch.no_grad(), batch_invariant(strict=True):
        with torch.backends.mkldnn.flags(enabled=False):
            assert same_bits(layer(x)[0][1:2], layer(x[1:2])[0])
        if torch.backends.mkldnn.is_available():
            with pytest.raises(Refused, match="mkldnn_rnn_layer is a whole layer .* torch.backends.mkldnn.flags"):
                layer(x)
        with pytest.raises(Refused, match="linalg_matrix_exp takes other steps for one matrix than for several"):
            torch.matrix_exp(x[:, :, :5])
        with pytest.raises(Refused, match="_standard_gamma draws from one stream"):
            torch._standard_gamma(x.abs())


def _functions():
    """ATen's functions of a tensor, or of two, whose other arguments have defaults: name, op, how many tensors."""
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        space, _, name = full.partition("::")
        op = op_of(name) if space == "aten" else None
        if op is None:
            continue
        given, results = op._schema.arguments, op._schema.returns
        needed = [str(a.type) for a in given if not a.has_default_value() and not a.kwarg_only]
        if [str(r.type) for r in results] == ["Tensor"] and needed in (["Tensor"], ["Tensor", "Tensor"]) \
                and not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags \
                and not name.startswith("empty"):
            yield name, op, len(needed)


def _is_of_one_place(call, *tensors) -> bool:
    """Whether a number changes one result alone, in its own place."""
    changed = [t.clone() for t in tensors]
    for t in changed:
        t[3] = -t[3] * 0.5
    before, after = call(*(t.clone() for t in tensors)), call(*changed)
    return same_bits(before[:3], after[:3]) and same_bits(before[4:], after[4:])


ON_EVERY_WAY = {"mul.Tensor", "multiply.Tensor", "div.Tensor", "divide.Tensor", "true_divide.Tensor"}  # have no rules


def _numbers(values, dtype):
    return torch.complex(values, values.roll(7)).to(dtype) if dtype.is_complex else values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_no_function_of_atens_moves_a_number_unnoticed(dtype):
    compared, moved = 0, []
    with batch_invariant(strict=True):
        for name, op, tensors in _functions():
            for values in (UNIT, WIDE.abs() + 0.01):
                given = [_numbers(t, dtype) for t in (values, values.flip(0).abs() + 0.25)[:tensors]]
                try:
                    whole = op(*(t.clone() for t in given))
                    if whole.shape != values.shape or not (whole.is_floating_point() or whole.is_complex()) or \
                            not _is_of_one_place(op, *given):
                        continue
                    same = _same(lambda *given, op=op: op(*given).view(len(given[0])), *given)
                except (RuntimeError, TypeError, IndexError, ValueError):  # refused by name, or not for such tensors
                    continue
                compared += 1
                moved += [] if same else [name]
    assert compared > (100 if dtype.is_complex else 150)
    assert set(moved) <= (ON_EVERY_WAY if dtype.is_complex else set())
