"""The schedules of all_reduce over symmetric memory, on threads that play its GPUs; and what is kept of such memory.

Every rank is late once and early once, so that a barrier that is not there is a number that is not there yet, or not
there any more. The kernel's additions are the specification's.
"""
from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from common import needs_triton

from kernels.bits import portable, same_bits
from kernels.ops.all_reduce import all_reduce, call, ranks, schedule, symmetric
from kernels.ops.all_reduce.schedule import SYMMETRIC, Schedule
from kernels.ops.matmul.shared import joined

STEP = 0.004  # seconds that a rank is later than its neighbour
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """run(size, work): work(rank, its memory) on `size` threads, with one memory between them; the answers."""
    mine = threading.local()

    def add(schedule, parts, results, start, end, bias, width=0):
        time.sleep(STEP * (mine.size - mine.rank))
        total = joined([p.reshape(-1)[start:end] for p in parts])
        if bias is not None:
            total = total + bias.float()[torch.arange(start, end, dtype=torch.int64) % (width or results[0].shape[-1])]
        for result in results:
            result.view(-1)[start:end] = total.to(result.dtype)

    def run(size, work, nbytes=1 << 14):
        barrier = threading.Barrier(size, timeout=5)
        parts, results = ([torch.full((nbytes,), 255, dtype=torch.uint8, device="cpu") for _ in range(size)]
                          for _ in range(2))

        def one(rank):
            mine.size, mine.rank = size, rank
            mine.memory = SimpleNamespace(parts=parts, results=results, rank=rank, barrier=barrier.wait, nbytes=nbytes)
            return work(rank, mine.memory)
        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(one, range(size)))
    monkeypatch.setattr(ranks, "size", lambda group=None: mine.size)
    monkeypatch.setattr(ranks, "number", lambda group=None: mine.rank)
    monkeypatch.setattr(call, "_add", add)
    monkeypatch.setattr(call, "WORKSPACES", SimpleNamespace(
        can=lambda device, group: True, of=lambda nbytes, device, group: mine.memory))
    return run


@needs_triton
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", SYMMETRIC)
@pytest.mark.parametrize("tokens, dtype, bias", [(5, torch.bfloat16, True), (8, torch.float32, False),
                                                 (1, torch.float16, True)])
def test_every_way_adds_each_row_once_and_waits(kind, size, tokens, dtype, bias, gpus):
    given = [[portable(tokens, 6, torch.float32, "cpu", 8 * turn + rank) for rank in range(size)] for turn in range(3)]
    add = portable(1, 6, dtype, "cpu", 99)[0] if bias else None

    def work(rank, memory):
        time.sleep(STEP * rank)
        return [call.run_schedule(Schedule(kind), parts[rank], add, dtype) for parts in given]
    expected = [joined(parts, add, dtype) for parts in given]
    for answers in gpus(size, work):
        assert all(y.shape == (tokens, 6) and same_bits(y, e) for y, e in zip(answers, expected, strict=True))


@needs_triton
@pytest.mark.parametrize("kind", SYMMETRIC)
@pytest.mark.parametrize("take", [lambda room: room, lambda room: room.t(), lambda room: room[1:]],
                         ids=["whole", "turned", "some rows"])
def test_a_part_may_lie_in_the_memory_itself_unless_it_is_pushed(kind, take, gpus):
    given = [portable(4, 6, torch.float32, "cpu", rank) for rank in range(4)]

    def work(rank, memory):
        room = all_reduce.room((4, 6), "cpu")
        assert room.data_ptr() == memory.parts[rank].data_ptr() and room.shape == (4, 6)
        room.copy_(given[rank])
        time.sleep(STEP * rank)  # others may be done with theirs
        return call.run_schedule(Schedule(kind), take(room))
    if kind == "push":
        with pytest.raises(ValueError, match="another than push for a part that lies in the memory that GPUs share"):
            gpus(4, work)
        return
    expected = joined([take(part) for part in given])
    assert all(same_bits(y, expected) for y in gpus(4, work))


@needs_triton
def test_a_part_that_was_made_where_it_is_read_is_not_copied(gpus, monkeypatch):
    copy, onto = torch.Tensor.copy_, []

    def copied(self, other):
        onto.append(self.data_ptr())
        return copy(self, other)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)

    def work(rank, memory):
        room = all_reduce.room((3, 6), "cpu")
        room.zero_()
        return call.run_schedule(Schedule("one_shot"), room), memory.parts[rank].data_ptr()
    for _, place in gpus(2, work):
        assert place not in onto


@needs_triton
def test_a_part_that_will_be_pushed_is_made_elsewhere(gpus, monkeypatch):
    monkeypatch.setattr(schedule, "PUSH_BYTES", 4 * 24)
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0)

    def work(rank, memory):
        return [all_reduce.room((rows, 6), "cpu").data_ptr() == memory.parts[rank].data_ptr() for rows in (3, 4)]
    assert gpus(2, work) == [[True, False]] * 2


# What is kept.

@pytest.fixture
def kept(monkeypatch):
    """(Workspaces that make no memory, what was asked for)."""
    made = []

    def workspace(nbytes, device, group):
        made.append(nbytes)
        return SimpleNamespace(nbytes=nbytes, group=group)
    monkeypatch.setattr(symmetric, "Workspace", workspace)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ranks, "size", lambda group=None: 2)
    monkeypatch.setattr(ranks, "told_objects", lambda value, group=None: [value, ""])
    return symmetric.Workspaces(), made


def test_memory_is_kept_and_made_anew_where_it_is_too_small(kept, monkeypatch):
    spaces, made = kept
    first = spaces.of(10, GPU, None)
    assert spaces.of(4 << 20, GPU, None) is first and made == [4 << 20]
    second = spaces.of((4 << 20) + 1, GPU, None)
    assert second is not first and made == [4 << 20, 8 << 20] and spaces.of(10, GPU, None) is second
    assert spaces.of(10, torch.device("cuda", 1), None) is not second and spaces.of(10, GPU, object()) is not second
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert spaces.of(8 << 20, GPU, None) is second
    with pytest.raises(RuntimeError, match="no graph can make while it is captured: make one such call before"):
        spaces.of((8 << 20) + 1, GPU, None)


def test_whether_there_is_such_memory_is_asked_once_and_said_by_all(kept, monkeypatch):
    spaces, made = kept
    assert spaces.can(GPU, None) and spaces.can(GPU, None) and made == [4 << 20]
    assert not spaces.can(torch.device("cpu"), None)
    other = symmetric.Workspaces()
    monkeypatch.setattr(ranks, "told_objects", lambda value, group=None: [value, "no NVLink"])  # of another rank
    with pytest.warns(RuntimeWarning, match=r"no symmetric memory \(no NVLink\).*slower and with the same bits"):
        assert not other.can(GPU, None)
    assert not other.can(GPU, None)  # and no second warning
    monkeypatch.setattr(ranks, "size", lambda group=None: 1)
    assert not symmetric.Workspaces().can(GPU, None)
