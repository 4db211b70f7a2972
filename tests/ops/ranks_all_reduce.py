"""What ranks do for test_all_reduce.py: it is imported by the processes, under its full name."""
import torch

from kernels.bits import portable, same_bits
from kernels.ops.all_reduce import all_reduce
from kernels.ops.all_reduce.schedule import Schedule


def of_rank(rank, tokens, n, seed=0):
    """A part, and a bias, as any process can make them."""
    return all_reduce.inputs(tokens, f"N={n}", rank=rank, seed=seed)[0], portable(1, n, torch.float32, seed=seed + 7)[0]


def words(ranks, tokens, n, dtype, with_bias):
    """(the specification's result, schedule -> whether it has the same bits, the default's result)."""
    part, bias = of_rank(ranks.rank, tokens, n)
    given = (part, bias.to(dtype) if with_bias else None, dtype, ranks.group)
    expected = all_reduce.python(*given)
    same = {str(s): same_bits(all_reduce.run_schedule(s, *given), expected)
            for s in all_reduce.schedules("cpu", ranks.group)}
    return expected, same | {"of choice": same_bits(all_reduce.triton(*given), expected)}, all_reduce.cuda(*given)


def refused(ranks, kind):
    """What a call of this kind is told."""
    part, _ = of_rank(ranks.rank, 2, 8)
    calls = {
        "bfloat16": lambda: all_reduce.python(part.bfloat16(), group=ranks.group),
        "no tensor": lambda: all_reduce.triton([1.0], group=ranks.group),
        "bias": lambda: all_reduce.triton(part, part[0, :3], group=ranks.group),
        "dtype": lambda: all_reduce.python(part, None, torch.int32, ranks.group),
        "symmetric": lambda: all_reduce.run_schedule(Schedule("one_shot"), part, group=ranks.group),
        "schedule": lambda: all_reduce.run_schedule("gather", part, group=ranks.group)}
    try:
        calls[kind]()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def numbers_only(ranks):
    """A part without a scalar in it, and one without elements."""
    empty = torch.empty(0, 8, dtype=torch.float32)
    return [tuple(word(empty, None, torch.bfloat16, ranks.group).shape)
            for word in (all_reduce.python, all_reduce.triton)]


def leaves(ranks, rank):
    """One rank ends, while the others are in a collective."""
    import os

    if ranks.rank == rank:
        os._exit(3)
    part, _ = of_rank(ranks.rank, 2, 8)
    for _ in range(3):
        all_reduce.python(part, group=ranks.group)


def fails(ranks, what):
    """An error of the work's own."""
    raise KeyError(what)


def sleeps(ranks, rank, seconds):
    """One rank does not come in time."""
    import time

    if ranks.rank == rank:
        time.sleep(seconds)
        return
    part, _ = of_rank(ranks.rank, 2, 8)
    all_reduce.python(part, group=ranks.group)
