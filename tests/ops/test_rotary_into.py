"""`rotary_into`, the form of the rotation that models call: in place, with the cache, on a CPU and in one kernel."""
import json
import os
import subprocess
import sys

import pytest
import torch
from common import HERE, INF, every_dtype, exchanged, needs_compiler, rounds_every_product, waits_first

from kernels import OPS, runtime
from kernels.bits import elements_differ, same_bits
from kernels.lab.proofs.generated_code import TARGETS, Code, Job
from kernels.lab.records import ROOT
from kernels.ops.rotary import rotary_into, rotary_into_default
from kernels.ops.rotary.into import into_step
from kernels.ops.rotary.op import Schedule

OP = OPS["rotary"]
needs_interpreter = pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="the interpreter does not run here")


def layer(heads=4, kv_heads=2, width=16, tokens=5, slots=9, dtype=torch.float32, device=HERE):
    """(qkv, table, positions, slots, kv, heads): a layer's arguments, the cache full of ones."""
    x, table, positions = OP.inputs(tokens, f"H={heads + 2 * kv_heads},D={width},context=50", dtype, device)
    x[-1, -1, :2] = torch.tensor([-0.0, INF])  # a value is copied, not multiplied
    places = (torch.arange(tokens, dtype=torch.int64, device=device) * 5 + 2) % slots
    return x, table, positions, places, torch.ones(slots, 2 * kv_heads, width, dtype=dtype, device=device), heads


def wanted_of(qkv, table, positions, slots, kv, heads):
    """(qkv, kv) as they must be, by the op and one assignment a token."""
    kv_heads = kv.shape[1] // 2
    turned = OP.python(qkv[:, : heads + kv_heads], table, positions)
    qkv, kv = torch.cat([turned, qkv[:, heads + kv_heads :]], 1), kv.clone()
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < len(kv):
            kv[slot] = qkv[row, heads:]
    return qkv, kv


def interpreted(qkv, table, positions, slots, kv, heads, schedule=None):
    """The kernel that a GPU runs, in Triton's interpreter."""
    into_step(qkv, table, positions, slots, kv, heads, schedule).interpret(
        {"qkv_ptr": qkv, "table_ptr": table, "positions_ptr": positions, "slots_ptr": slots, "kv_ptr": kv})


LAYERS = {"small": {}, "one head": {"heads": 1, "kv_heads": 1, "width": 2}, "80 wide": {"width": 80, "heads": 6},
          "an 8B model's": {"heads": 32, "kv_heads": 8, "width": 128, "tokens": 2}, "no group": {"kv_heads": 4}}
every_layer = pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
BADLY_PLACED = torch.tensor([3, -1, 9, 0, 2**40])


@every_dtype
@every_layer
def test_a_layer_has_the_bits_of_the_op(sizes, dtype):
    given_ = layer(**sizes, dtype=dtype)
    wanted = wanted_of(*given_)
    assert rotary_into(*given_) is None
    assert same_bits((given_[0], given_[4]), wanted)


@needs_interpreter
@every_layer
@pytest.mark.parametrize("schedule", [None, Schedule(1, 1), Schedule(16, 8)], ids=str)
def test_the_kernel_of_a_layer_has_the_bits_of_the_op(sizes, schedule):
    for dtype in (torch.float32, torch.float16):
        given_ = layer(**sizes, dtype=dtype)
        wanted = wanted_of(*given_)
        interpreted(*given_, schedule)
        assert same_bits((given_[0], given_[4]), wanted), dtype


@pytest.mark.parametrize("call", [rotary_into, pytest.param(interpreted, marks=needs_interpreter)])
def test_a_slot_outside_the_cache_writes_nothing(call):
    around = torch.ones(11, 4, 16, device=HERE)
    given_ = (*layer()[:3], BADLY_PLACED.to(HERE), around[1:10], 4)
    wanted = wanted_of(*given_)
    call(*given_)
    assert same_bits((given_[0], given_[4]), wanted)
    assert (around[[0, 2, 3, 5, 6, 7, 8, 9, 10]] == 1).all() and (around[[1, 4]] != 1).any()


@needs_interpreter
def test_a_position_outside_the_table_gives_nan_in_the_kernel_and_reads_nothing():
    """As it does on a GPU. A value is not turned, so it stays."""
    places = exchanged(layer(), 2, torch.tensor([7, -1, 50, 2**40, 0]))
    values, keep = places[0][:, 6:].clone(), [0, 4]
    wanted = wanted_of(*exchanged(layer(), 2, torch.tensor([7, 1, 1, 1, 0])))
    interpreted(*places)
    assert same_bits(places[0][keep], wanted[0][keep]) and same_bits(places[0][:, 6:], values)
    assert places[0][1:4, :6].isnan().all()


@pytest.mark.parametrize("call", [rotary_into, pytest.param(interpreted, marks=needs_interpreter)])
def test_slots_may_lie_apart(call):
    """A cache whose slots are parts of a wider tensor: what lies between them stays."""
    qkv, table, positions, slots, kv, heads = layer()
    wide = torch.full((9, 7, 16), 3.0, device=HERE)
    wide[:, 2:6] = kv
    wanted = wanted_of(qkv, table, positions, slots, kv, heads)
    call(qkv, table, positions, slots, wide[:, 2:6], heads)
    assert same_bits(wide[:, 2:6].contiguous(), wanted[1]) and (wide[:, [0, 1, 6]] == 3).all()


def test_no_tokens_write_nothing():
    given_ = layer()
    few = tuple(t[:0] for t in given_[:1]) + (given_[1],) + tuple(t[:0] for t in given_[2:4]) + given_[4:]
    rotary_into(*few)
    assert (few[4] == 1).all()


INTO_BAD = {
    "no qkv": ({0: None}, TypeError, "qkv must be a tensor, got NoneType"),
    "qkv of integers": ({0: layer()[0].clamp(0, 1).long()}, TypeError, "qkv .*int64"),
    "qkv of two dimensions": ({0: layer()[0][0]}, ValueError, r"qkv .*\(T, heads, D\).*\(8, 16\)"),
    "qkv strided": ({0: layer()[0].transpose(0, 1).contiguous().transpose(0, 1)}, ValueError, "qkv must be contiguous"),
    "qkv negated": ({0: torch._neg_view(layer()[0])}, ValueError, "qkv must be contiguous and not negated"),
    "qkv of other heads": ({0: layer(heads=5)[0]}, ValueError, "qkv must hold heads .* got 9 and heads = 4"),
    "kv of another dtype": ({4: layer()[4].half()}, TypeError, "kv .*float32.*float16"),
    "kv of another width": ({4: layer(width=8)[4]}, ValueError, r"kv .*2 \* kv_heads, 16\), got \(9, 4, 8\)"),
    "kv of odd heads": ({4: layer()[4][:, :3]}, ValueError, r"kv .*\(9, 3, 16\)"),
    "kv strided": ({4: layer(width=32)[4][..., ::2]}, ValueError, "kv must be contiguous"),
    "kv elsewhere": ({4: layer()[4].to("meta")}, ValueError, "kv .*meta"),
    "table of another width": ({1: layer(width=8)[1]}, ValueError, r"table .*\(context, 16\), as wide as qkv"),
    "table strided": ({1: layer(width=32)[1][:, ::2]}, ValueError, "table must be contiguous"),
    "positions of int32": ({2: layer()[2].int()}, TypeError, "positions .*int32"),
    "slots too few": ({3: layer()[3][:2]}, ValueError, r"slots .*\(5,\).*\(2,\)"),
    "slots a number": ({3: 3}, TypeError, "slots .*int"),
    "slots strided": ({3: torch.arange(10, device=HERE)[::2]}, ValueError, "slots must be contiguous"),
    "heads a bool": ({5: True}, TypeError, "heads must be an int, got True"),
    "heads a float": ({5: 4.0}, TypeError, "heads must be an int, got 4.0"),
    "no heads": ({5: 0}, ValueError, "heads = 0"),
    "a gradient": ({0: layer()[0].requires_grad_()}, RuntimeError, "qkv requires a gradient.*no_grad")}


@pytest.mark.parametrize("case", INTO_BAD)
def test_a_layer_that_cannot_be_is_named_and_left_alone(case):
    changes, error, message = INTO_BAD[case]
    given_ = layer()
    rotary_into(*layer())  # what is kept for good arguments must not serve bad ones
    for i, argument in changes.items():
        given_ = exchanged(given_, i, argument)
    with pytest.raises(error, match=message):
        rotary_into(*given_)
    assert not isinstance(given_[4], torch.Tensor) or given_[4].is_meta or (given_[4] == 1).all()


@pytest.mark.skipif(runtime.HAS_GPU, reason="a GPU's host does not look")
def test_a_position_outside_the_table_is_an_error_in_a_layer_on_a_cpu():
    with pytest.raises(ValueError, match=r"positions must lie in 0\.\.49"):
        rotary_into(*exchanged(layer(), 2, torch.tensor([1, 2, 3, 4, 50])))


def test_tensors_without_memory_are_refused_in_a_layer():
    from torch._subclasses import FakeTensorMode

    for i in range(5):
        given_ = layer()
        with pytest.raises(TypeError, match="is a FakeTensor"):
            rotary_into(*exchanged(given_, i, FakeTensorMode().from_tensor(given_[i])))


def test_torch_compile_of_a_layer_keeps_the_bits(monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    torch.library.opcheck(torch.ops.same_bits.rotary_into.default, layer())

    def half(qkv, table, positions, slots, kv, heads):
        qkv = qkv * 2
        rotary_into(qkv, table, positions, slots, kv, heads)
        return qkv + 1

    eager, compiled = layer(dtype=torch.bfloat16), layer(dtype=torch.bfloat16)
    result = torch.compile(half, fullgraph=True, backend="aot_eager")(*compiled)
    assert same_bits((result, compiled[4]), (half(*eager), eager[4]))


@every_dtype
def test_the_default_of_a_layer_is_near(dtype):
    given_ = layer(dtype=dtype)
    qkv, kv = wanted_of(*given_)
    rotary_into_default(*given_)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-22
    close = {"rtol": rounding, "atol": rounding}
    torch.testing.assert_close(given_[0], qkv, **close)
    torch.testing.assert_close(given_[4], kv, **close)
    assert same_bits(given_[0][:, 6:], qkv[:, 6:])


def test_the_default_of_a_layer_reads_nothing_back():
    """On the meta device there is nothing to read."""
    given_ = layer(device="cpu")
    rotary_into_default(*(t.to("meta") for t in given_[:5]), 4)


# the code that a compiler makes of it

INTO = """
import json
import torch
from triton.runtime import driver
from kernels.lab.proofs.generated_code import Absent, bare_ptx
from kernels.ops.rotary.into import into_step

def meta(*shape, dtype=torch.int64): return torch.empty(shape, dtype=dtype, device="meta")

found = []
for target in (80, 90, 100):
    driver.set_active(Absent(target))
    step = into_step(meta(64, 48, 128, dtype=torch.bfloat16), meta(4096, 128, dtype=torch.float32), meta(64), meta(64),
                     meta(8192, 16, 128, dtype=torch.bfloat16), 32)
    kernel = step.kernel.warmup(*step.examples("cpu"), *step.arguments(target >= 90), grid=(1,),
                                **step.compile_options(target >= 90))
    found.append((target, bare_ptx(kernel.asm["ptx"])))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def layers():
    """8 heads a program in 4 warps, compiled in a process of its own: one cannot interpret and compile."""
    done = subprocess.run([sys.executable, "-c", INTO], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return [Code(Job("rotary", "H=48,D=128", "bfloat16", "heads=8 warps=4", target), ptx)
            for target, ptx in json.loads(done.stdout.splitlines()[-1])]


@needs_compiler
def test_every_product_of_a_layer_is_rounded_before_the_sum(layers):
    for code in layers:
        rounds_every_product(code, 8 * 64 // 128)
        assert max(code.global_loads) == 16 and not code.barriers, code.job
    assert {c.job.target for c in layers} == set(TARGETS)


@needs_compiler
def test_the_kernel_of_a_layer_waits_for_the_one_before_it(layers):
    assert [c.job for c in layers if not waits_first(c)] == []


# on a GPU


@pytest.mark.gpu
@every_dtype
@every_layer
def test_a_layer_has_the_bits_of_the_op_on_a_gpu(sizes, dtype):
    """And those of a CPU, in every call of a kept launch; bad slots write nothing."""
    for tokens in (1, 5, 64):
        given_, here = (layer(**{**sizes, "tokens": tokens, "slots": 97}, dtype=dtype, device=d) for d in (HERE, "cpu"))
        for slots in (given_[3], torch.where(given_[3] % 3 == 0, -1 - given_[3], given_[3]), given_[3] + 90):
            gpu = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in exchanged(given_, 3, slots))
            cpu = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in exchanged(here, 3, slots.cpu()))
            wanted = wanted_of(*gpu)
            rotary_into(*gpu)
            rotary_into(*cpu)
            assert same_bits((gpu[0], gpu[4]), wanted), (tokens, elements_differ((gpu[0], gpu[4]), wanted))
            assert same_bits((gpu[0].cpu(), gpu[4].cpu()), (cpu[0], cpu[4])), tokens


@pytest.mark.gpu
def test_a_graph_of_a_layer_replays_the_same_bits_on_a_gpu():
    given_ = layer(32, 8, 128, 16, 64, torch.bfloat16)
    fresh = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in given_)
    rotary_into(*(t.clone() if isinstance(t, torch.Tensor) else t for t in given_))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotary_into(*given_)
    for shift in (0, 3):
        for place, new in zip(given_[:5], fresh[:5], strict=True):
            place.copy_(new)
        given_[2].copy_((fresh[2] + shift) % 50)
        wanted = wanted_of(fresh[0], fresh[1], given_[2], fresh[3], fresh[4], 32)
        graph.replay()
        assert same_bits((given_[0], given_[4]), wanted)


@pytest.mark.gpu
def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = layer(device="cuda:1")
    wanted = wanted_of(*there)
    rotary_into(*there)
    assert same_bits((there[0], there[4]), wanted) and torch.cuda.current_device() == 0
