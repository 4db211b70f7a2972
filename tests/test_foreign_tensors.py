"""Tensors whose memory a kernel cannot read, and programs that watch, trace or differentiate: right, or refused."""
import copy
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from kernels import OPS, matmul, mean, rms_norm, runtime, softmax
from kernels.bits import check_invariance, digest, elements_differ, portable, same_bits

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
# attention takes Sequences and has no derivative, rotary takes places: what they refuse is tested in tests/ops
ROW_OPS = {name: op for name, op in OPS.items() if not name.startswith(("attention", "rotary"))}
every_op = pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
SHAPES = {"matmul": "N=5,K=64", "swiglu": "F=64"}
FIRST = {"swiglu": "gate_up"}  # what the first argument is called where it is not x


def arguments(op, dtype=torch.float32):
    return op.inputs(3, SHAPES.get(op.name, "D=64"), dtype, runtime.device())


def with_x(op, given, x):
    return op.triton(x, *given[1:])


@needs_triton
@every_op
def test_a_transform_of_torch_func_is_refused_by_name(op):
    given = arguments(op)
    with_x(op, given, given[0])  # a plan is kept: it must not serve
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda v: f(v).sum())):
        with pytest.raises(RuntimeError, match=rf"{op.name}.triton cannot run under a transform.*\.python"):
            transform(lambda v: with_x(op, given, v))(given[0] if transform is not torch.func.vmap else given[0][None])


@every_op
def test_torch_func_differentiates_a_specification_as_autograd_does(op):
    """Also for each row of a batch of arguments."""
    given = arguments(op)

    def total(x):
        result = op.python(x, *given[1:])
        return ((result[0] if isinstance(result, tuple) else result) * 3).sum()

    leaf = given[0].clone().requires_grad_()
    total(leaf).backward()
    assert same_bits(torch.func.grad(total)(given[0]), leaf.grad)
    batch = torch.stack([given[0] * 2, given[0]])
    assert same_bits(torch.func.vmap(torch.func.grad(total))(batch)[1], leaf.grad)


@every_op
@pytest.mark.parametrize("how", ["python", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_derivative_is_kept_or_refused(op, how, dtype):
    if how == "triton" and runtime.WHY_NOT:
        pytest.skip(runtime.WHY_NOT)
    given = arguments(op, dtype)
    call = op.implementation(how)
    call(*given)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        try:
            result = call(dual, *given[1:])
        except RuntimeError as error:
            assert "forward-mode" in str(error) and op.name in str(error)
        else:
            wanted = forward_ad.unpack_dual(op.cuda(dual, *given[1:])).tangent
            assert torch.allclose(forward_ad.unpack_dual(result).tangent.float(), wanted.float(), rtol=0.02, atol=0.02)
        assert same_bits(call(*given), op.python(*given))  # plain tensors beside it are as ever


@needs_triton
@every_op
def test_a_fake_tensor_is_refused_by_name(op):
    from torch._subclasses import FakeTensorMode

    given = arguments(op)
    mode = FakeTensorMode()
    with pytest.raises(TypeError, match=f"{FIRST.get(op.name, 'x')} is a FakeTensor.*torch.compile"):
        with_x(op, given, mode.from_tensor(given[0]))


class Wrapper(torch.Tensor):
    """A tensor as DTensor is one: no memory of its own, every op goes through __torch_dispatch__."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device,
                                                   strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map(lambda a: a.inner if isinstance(a, Wrapper) else a, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@needs_triton
@every_op
def test_a_tensor_without_memory_is_refused_before_a_launch(op):
    given = arguments(op)
    with_x(op, given, given[0])
    with pytest.raises(TypeError, match=rf"{FIRST.get(op.name, 'x')} is a Wrapper.*to_local"):
        with_x(op, given, Wrapper(given[0]))


@needs_triton
def test_every_tensor_argument_is_looked_at():
    x, weight, residual = rms_norm.inputs(3, "D=64,residual", torch.float32, runtime.device())
    for place, name in enumerate(("x", "weight", "residual")):
        given = [x, weight, residual]
        given[place] = Wrapper(given[place])
        with pytest.raises(TypeError, match=f"^{name} is a Wrapper"):
            rms_norm.triton(*given)
    with pytest.raises(TypeError, match="^bias is a Wrapper"):
        matmul.triton(x, x, Wrapper(portable(1, 3, device=runtime.device())[0]))


@needs_triton
@every_op
def test_a_subclass_with_memory_has_the_bits_of_its_numbers(op):
    given = arguments(op)
    tagged = given[0].as_subclass(type("Tagged", (torch.Tensor,), {}))
    assert same_bits(with_x(op, given, tagged), op.python(*given))


@needs_triton
def test_a_meta_tensor_is_refused_after_a_kept_plan():
    x, weight = (portable(rows, 64, device=runtime.device()) for rows in (3, 1))
    weight = weight[0]
    rms_norm.triton(x, weight)
    with pytest.raises(ValueError, match=f"weight must be on x's device {x.device}, got meta"):
        rms_norm.triton(x, weight.to("meta"))
    with pytest.raises(ValueError, match="on a CPU or a CUDA GPU"):
        rms_norm.triton(x.to("meta"), weight.to("meta"))
    with pytest.raises(ValueError, match="meta"):
        softmax.triton(x.to("meta"))


@needs_triton
@every_op
def test_a_dispatch_mode_sees_the_op(op):
    """FlopCounterMode and tracing by make_fx watch what PyTorch dispatches; a bare launch would pass them by."""
    given = arguments(op)
    with FlopCounterMode(display=False):
        assert same_bits(op.triton(*given), op.python(*given))
    traced = make_fx(lambda x: op.triton(x, *given[1:]))(given[0])
    assert any(f"same_bits.{op.name}" in str(node.target) for node in traced.graph.nodes)
    assert same_bits(traced(given[0].flip(0)), op.python(given[0].flip(0), *given[1:]))


@needs_triton
@every_op
def test_a_call_that_no_mode_is_asked_of_is_launched(op):
    """PyTorch's key for modes is off where a class of tensors computes its own op."""
    given = arguments(op)
    with FlopCounterMode(display=False), torch._C._DisableTorchDispatch():
        assert same_bits(op.triton(*given), op.python(*given))


@every_op
def test_torch_compile_keeps_a_specifications_bits(op):
    """Inductor would fuse what the order keeps apart; the compiled graph calls the specification as one op."""
    torch._dynamo.reset()
    given = arguments(op)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: op.python(x, *given[1:]), fullgraph=True, backend=backend)
    assert same_bits(compiled(given[0]), op.python(*given))
    assert any(f"same_bits.{op.name}_python" in target for target in seen)


@pytest.mark.parametrize("op", [rms_norm, softmax, mean, matmul], ids=lambda op: op.name)
def test_a_compiled_specification_has_its_gradient(op):
    torch._dynamo.reset()
    given = arguments(op)
    x = given[0].requires_grad_()
    weights = portable(1, op.python(*given).numel(), seed=9, device=x.device)[0]

    def loss(v):
        return (op.python(v, *given[1:]).flatten() * weights).sum()

    wanted, = torch.autograd.grad(loss(x), x)
    got, = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(x), x)
    assert same_bits(got, wanted) and wanted.any()


# ops as objects, and bits of what models return


@every_op
def test_an_op_says_which_three_names_it_has(op):
    with pytest.raises(TypeError, match=rf"{op.name}\.cuda.*{op.name}\.python.*{op.name}\.triton"):
        op(*arguments(op))


@every_op
def test_an_op_can_be_pickled_and_copied(op):
    assert pickle.loads(pickle.dumps(op)) is op and copy.deepcopy(op) is op


def test_bits_of_dicts_lists_and_arrays():
    x, y = portable(2, 3), portable(2, 3, seed=1)
    assert digest([x, y]) == digest((x, y)) and digest(x.numpy()) == digest(x)
    assert same_bits({"a": x, "b": [y]}, {"b": (y,), "a": x.numpy()})
    assert not same_bits({"a": x}, {"b": x}) and not same_bits({"a": x}, {"a": y}) and not same_bits([x], [x, y])
    assert digest({"a": x}) != digest({"b": x}) and digest({"a": x, "b": y}) == digest({"b": y, "a": x})
    assert elements_differ({"a": x}, {"a": torch.nextafter(x, torch.full_like(x, 9.0))}) == 6
    assert same_bits(torch.complex(x, y), torch.complex(x, y))
    assert not same_bits(torch.complex(x, y), torch.complex(y, x))
    assert len(digest(torch.ones(2, dtype=torch.complex128))) == 64
    assert same_bits(np.float32([1, -0.0]), torch.tensor([1, -0.0]))
    assert not same_bits(np.float32([0.0]), np.float32([-0.0]))
    for wrong in ("text", 3, None, {"a": None}, [1.0]):
        with pytest.raises(TypeError, match="tensor, a NumPy array, or a tuple, list or dict"):
            digest(wrong)


def test_a_model_that_returns_a_dict_or_a_list_is_checked():
    x = portable(6, 40)
    assert check_invariance(lambda v: {"logits": v * 2, "hidden": [v, v + 1]}, (x,))
    report = check_invariance(lambda v: {"a": v, "b": v + len(v)}, (x,))
    assert not report and report.first.output == 1


@pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="the interpreter does not run here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_the_interpreter_add_as_a_tensor_core(dtype):
    """NumPy's product has an order of its own, which follows the batch; the chain is written out instead."""
    x, weight = portable(24, 200, dtype), portable(16, 200, dtype, seed=1)
    assert same_bits(matmul.triton(x, weight), matmul.python(x, weight))
    assert check_invariance(lambda v: matmul.triton(v, weight), (x,))
