"""Time and bits of `all_reduce` over token counts: rows of token_sweep.csv, measured by ranks that torchrun started.

    torchrun --standalone --nproc-per-node 2 -m kernels parallel --sums --record

The shape names the number of ranks, such as N=4096,gpus=2. Clock `graph` on GPUs: a CUDA graph of 20 calls on warm
inputs, divided; `call` on a CPU. Contenders take turns, and a round begins on all ranks together.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ... import bits
from ...model.parallel import Ranks
from ...op import dtype_name
from ...ops.all_reduce import all_reduce, call
from ...ops.all_reduce import ranks as words
from .. import provenance, records
from ..bench import PERCENTILES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CALLS = 20  # in a graph


def measured(ranks: Ranks, shape: str = "N=4096", tokens=TOKENS, repeats: int = 21, dtype=torch.bfloat16, *,
             done=frozenset()) -> Iterator[list[dict]]:
    """Every word's rows at each token count, on every rank alike; times are the slowest rank's.

    done  keys of TOKEN_SWEEP: a count of which all words are among them is left out
    """
    tokens = sorted(tokens)
    contenders = {name: word for name, word in all_reduce.implementations.items()
                  if not (name == "triton" and ranks.device.type == "cpu")}  # an interpreter's time says nothing
    wanted = [count for count in tokens
              if not all(tuple(_key(ranks, shape, name, count, dtype).values()) in done for name in contenders)]
    if not wanted:
        return
    largest = all_reduce.inputs(tokens[-1], shape, ranks.device, ranks.rank)[0]
    whole = {name: word(largest, None, dtype, ranks.group) for name, word in contenders.items()}
    for count in wanted:
        yield _at(ranks, shape, largest[:count], contenders, whole, repeats, dtype)


def _at(ranks, shape, part, contenders, whole, repeats, dtype) -> list[dict]:
    runs = {name: _run(word, part, dtype, ranks) for name, word in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, (run, calls) in runs.items():
            samples[name].append(_wall(run, ranks) / calls)
    made = []
    for name, word in contenders.items():
        us = np.max(words.told_objects(samples[name][1:], ranks.group), axis=0)  # the first round warms up
        y = word(part, None, dtype, ranks.group)
        moved = bits.elements_differ(y, whole[name][: len(part)])
        made.append(_row(ranks, shape, name, part, us, y, moved, dtype))
    return made


def _row(ranks, shape, name, part, us, y, moved, dtype) -> dict:
    work, p50 = all_reduce.work(len(part), shape, dtype), float(np.percentile(us, 50))
    percentiles = {f"us_p{p:02d}": float(np.percentile(us, p)) for p in PERCENTILES}
    return {**_key(ranks, shape, name, len(part), dtype), **percentiles, "repeats": len(us),
            "gbytes_per_s": work.bytes / p50 / 1e3, "tflops": work.flops / p50 / 1e6, "same_bits": moved == 0,
            "elements_differ": moved, "digest": bits.digest(y)[:16],
            "schedule": all_reduce.schedule(len(part), shape, ranks.device, ranks.group) if name == "triton" else "",
            "recorded_at": records.now(), "source": source()}


def _key(ranks, shape, name, tokens, dtype) -> dict:
    return {"op": all_reduce.name, "implementation": name, "dtype": dtype_name(dtype),
            "shape": f"{shape},gpus={ranks.size}", "tokens": tokens,
            "clock": "graph" if ranks.device.type == "cuda" else "call"}


def source() -> str:
    """Which code decides a row: all that a call of `all_reduce` imports."""
    return provenance.source(call.__file__)


def _run(word, part, dtype, ranks: Ranks) -> tuple[Callable[[], object], int]:
    """(something to time, how many calls it is)."""
    if ranks.device.type != "cuda":
        return (lambda: word(part, None, dtype, ranks.group)), 1
    word(part, None, dtype, ranks.group)  # compiles, and makes memory that GPUs share, before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            word(part, None, dtype, ranks.group)

    def replay(_held=part):  # which the graph reads
        graph.replay()
    return replay, CALLS


def _wall(run, ranks: Ranks) -> float:
    """Microseconds from a common start until this rank is done."""
    words.gathered(torch.zeros(1, dtype=torch.float32, device=ranks.device), ranks.group)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start)
