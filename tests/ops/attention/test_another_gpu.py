"""Attention of tensors on another GPU than the current one: a kernel is launched where they are."""
from contextlib import contextmanager

import torch

from kernels.bits import portable
from kernels.ops.attention import Sequences
from kernels.ops.attention import call as attention_call


def test_a_call_is_made_on_the_gpu_of_its_tensors(monkeypatch):
    current, seen = [0], []

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    def ready(*addresses):
        seen.append(current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(attention_call, "current_device", lambda: current[0])
    monkeypatch.setattr(attention_call, "current_stream", lambda index: 7)
    q, k = portable(1, 8).view(1, 1, 8), portable(4, 8).view(1, 4, 1, 8)
    plan, sequences = object.__new__(attention_call.Plan), Sequences([1], [4])
    plan.index, plan.copies, plan.shape, plan.strides = 1, False, q.shape, q.stride()
    sequences.ready = {(plan, 7, aligned): ready for aligned in (False, True)}
    y = plan.on_gpu(q, k, k, sequences.handle, 0, False)
    assert seen == [1] and current == [0] and y.shape == q.shape
