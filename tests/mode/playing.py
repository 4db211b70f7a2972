"""A CPU that plays GPU 0: what would be launched is written down, and the specification gives the numbers."""
from __future__ import annotations

import builtins
import ctypes
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.bits import portable
from kernels.mode import batch_invariant, compiled_products, composites, kept, kept_attention, steps
from kernels.ops.attention import call as attention_call
from kernels.ops.attention.sequences import Sequences
from kernels.ops.layer_norm import layer_norm
from kernels.ops.matmul import plan as plan_module
from kernels.ops.matmul.call import CALL
from kernels.ops.matmul.op import matmul
from kernels.ops.matmul.plan import Plan
from kernels.ops.mean import mean, sum
from kernels.ops.softmax import log_softmax, softmax

X, MAT, BIAS = portable(6, 40), portable(24, 40, seed=1).t(), portable(1, 24, seed=2)[0]
Q, K = (portable(5 * heads, 8, torch.bfloat16).view(1, 5, heads, 8).transpose(1, 2) for heads in (4, 2))
CPU = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("CPU"))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        self.ops.append(op)
        return op(*arguments, **(named or {}))


def read(address: int, shape, strides, dtype=torch.float32) -> torch.Tensor:
    """The tensor that lies at an address."""
    count = 1 + builtins.sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def played(plan: Plan, steps: list) -> SimpleNamespace:
    """A schedule of a product made ready, which writes down each launch as (x's address, weight's address)."""
    p, dtype = plan.product, plan.dtype  # a step must not keep the plan

    def launch(stream, px, pw, pb, py, at, count):
        steps.append((px, pw))
        y = matmul.python(read(px, (p.m, p.k), p.x_strides, dtype), read(pw, (p.n, p.k), p.weight_strides, dtype),
                          read(pb, (p.n,), (1,), dtype) if p.bias else None)
        read(py, (p.m, p.n), (p.n, 1), dtype).copy_(y)
    return SimpleNamespace(copies=None, bulk=False, work=0, counters=0, schedule=SimpleNamespace(reduce=False),
                           first=SimpleNamespace(compiled=lambda index: launch))


@pytest.fixture
def gpu(monkeypatch):
    """Makes tensors say that they are on GPU 0. -> the calls of products' plans, as (weight, bias), and their steps, as
    (x's address, weight's address)."""
    if torch.cuda.is_available():
        pytest.skip("a CPU plays the GPU")
    launched = []

    def on_gpu(plan, x, weight, bias, order):
        launched.append((weight, bias))
        plan.ready[True] = played(plan, launched)
        return matmul.python(x, weight.t() if weight.shape == (40, 24) else weight, bias, order)
    with batch_invariant():
        pass  # the rules are registered before a tensor says so
    ops = (CALL, *(op.call for op in (mean, sum, softmax, log_softmax, layer_norm)))
    known = [(op.plans, set(op.plans)) for op in ops]
    monkeypatch.setattr(Plan, "on_gpu", on_gpu)
    monkeypatch.setattr(plan_module, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "a GPU without a table")
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda index=0: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(composites, "_CUDA", CPU)
    monkeypatch.setattr(composites, "USUAL", composites.usual("CPU"))
    monkeypatch.setattr(kept, "of_reduction", lambda plan, index: partial(plan.launch, plan))
    monkeypatch.setattr(steps, "current_stream", lambda index: 7)
    monkeypatch.setattr(steps, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    yield launched
    for plans, before in known:
        for key in set(plans) - before:
            del plans[key]
    kept_attention.ATTENTION.clear()
    kept_attention._PLANS.clear()
    for way in composites.COMPOSITES.values():
        way.steps.clear()
    compiled_products.STEPS.clear()


@pytest.fixture
def attention(gpu, monkeypatch):
    """-> what attention launched: ("looked at", shapes) at a first call, then ("launched", addresses)."""
    launched = []

    def on_gpu(plan, q, k, v, handle, window, lse):
        sequences = Sequences.of(handle)
        launched.append(("looked at", tuple(q.shape), tuple(k.shape), lse))
        sequences.ready[plan, 7, not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15] = ready
        y, sums = attention_call.order.specified(q, k, v, sequences, window, True)
        return (y, sums) if lse else y

    def ready(q, k, v, y, sums, device):
        launched.append(("launched", q, k, v))
        (ctypes.c_uint16 * 160).from_address(y)[:] = range(160)
        if sums != y:
            (ctypes.c_float * 20).from_address(sums)[:] = range(20)
    monkeypatch.setattr(attention_call.Plan, "on_gpu", on_gpu)
    monkeypatch.setattr(kept_attention, "current_stream", lambda index: 7)
    monkeypatch.setattr(kept_attention, "current_device", lambda: 0)
    return launched
