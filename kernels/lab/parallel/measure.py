"""One model on several GPUs, or processes of a CPU: its digest, its text, its time. Started by torchrun.

    torchrun --standalone --nproc-per-node 2 -m kernels parallel --record

Every rank runs this; rank 0 speaks and records. On GPUs a forward is replayed as a CUDA graph, as an engine does.
Without --folder the model is a preset with random weights; the byte model in data/models/byte is 'byte'.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ... import bits
from ...model import parallel, steps
from ...model.config import PRESETS, preset
from ...model.parallel import Ranks, Sharded
from ...model.parallel.join import TIMEOUT
from ...ops.all_reduce import ranks as words
from .. import provenance, records
from ..proofs.model_forms import FOLDER, prompt_in, written

TENSOR_PARALLEL = records.Table(
    "tensor_parallel.csv",
    ("model", "ops", "gpus", "phase", "batch", "context", "ms_p05", "ms_p50", "ms_p95", "logit_digest", "recorded_at",
     "source"),
    ("model", "ops", "gpus", "phase", "batch", "context"),
)
PHASES, OPS = ("prefill", "decode"), ("default", "invariant")
BYTE = "byte"
PROMPT = 64


class Point(NamedTuple):
    """One cell of the record. prefill: `batch` prompts of `context` tokens; decode: a token each behind as many."""

    phase: str
    batch: int
    context: int


def model_of(name: str, ranks: Ranks, ops: str, folder=None) -> Sharded:
    """This rank's piece of a folder's model, of the byte model, or of a preset with random weights."""
    if folder or name == BYTE:
        return parallel.load(folder or FOLDER, ranks, ops=ops)
    return Sharded(dataclasses.replace(preset(name), shared=8), ranks, ops=ops)


def prompt_of(model: Sharded, count: int = PROMPT) -> list[int]:
    """The byte model's own prompt, for any other model numbers that differ everywhere."""
    if model.whole.name == BYTE and count == PROMPT:
        return list(prompt_in(FOLDER))
    return [(37 * i + i * i % 11) % model.whole.vocab_size for i in range(count)]


def forward_of(model: Sharded, point: Point) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """(the forward to time, the logits to compare) of one point: a prompt of PROMPT tokens is compared token by token.
    """
    batch, context = point.batch, point.context
    cache = model.cache(batch, context + 1)
    row = torch.tensor(prompt_of(model, context), dtype=torch.int64, device=model.device)
    prompt = torch.cat([row.roll(i) for i in range(batch)])
    step = cache.batch([context] * batch, [0] * batch)
    if point.phase == "prefill":
        every = "all" if batch * context <= 4096 else "last"
        return lambda: model.forward(prompt, step, cache), lambda: model.forward(prompt, step, cache, logits=every)
    model.forward(prompt, step, cache)
    last, behind = prompt.view(batch, context)[:, -1].clone(), cache.batch([1] * batch, [context] * batch)
    return (lambda: model.forward(last, behind, cache),) * 2


def measure(model: Sharded, point: Point, repeats: int) -> dict:
    """One row, on every rank; the time is the slowest rank's. Raises RuntimeError if ranks have other logits."""
    forward, whole = forward_of(model, point)
    digest = bits.digest(whole())
    if len(set(words.told_objects(digest, model.ranks.group))) > 1:
        raise RuntimeError(f"ranks have other logits of {point}: the residual streams differ")
    run = _graph(forward) if model.device.type == "cuda" else forward
    ms = [_wall(run, model) for _ in range(repeats + 1)][1:]  # the first one warms up
    slowest = np.max(words.told_objects(ms, model.ranks.group), axis=0)
    p05, p50, p95 = np.percentile(slowest, (5, 50, 95))
    return {"model": model.whole.name, "ops": model.ops_name, "gpus": model.ranks.size, **point._asdict(),
            "ms_p05": p05, "ms_p50": p50, "ms_p95": p95, "logit_digest": digest, "recorded_at": records.now(),
            "source": provenance.source(__file__)}


def _graph(forward) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and makes memory that GPUs share
            forward()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


def _wall(run, model: Sharded) -> float:
    """Milliseconds from a common start until this rank is done."""
    words.gathered(torch.zeros(1, dtype=torch.float32, device=model.device), model.ranks.group)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def points(a: argparse.Namespace) -> Iterator[Point]:
    for phase in a.phases:
        for batch in a.batches if phase == "decode" else [1]:
            for context in a.contexts:
                yield Point(phase, batch, context)


def _told(ranks: Ranks, a: argparse.Namespace, ops: str) -> list[dict]:
    """Measure one set of ops; rank 0 prints."""
    model = model_of(a.model, ranks, ops, a.folder)
    said = print if ranks.first else (lambda *_, **__: None)
    said(model, flush=True)
    prompt = prompt_of(model)
    digest = bits.digest(steps.logits(model, prompt))
    said(f"  logits of {len(prompt)} tokens  {digest}")
    chosen = steps.greedy(model, prompt, a.tokens) if a.tokens else []
    if chosen:
        said(f"  {a.tokens} likeliest behind them  {written(chosen) if model.whole.vocab_size == 256 else chosen}")
    rows = []
    for point in points(a):
        row = measure(model, point, a.repeats)
        said(f"  {point.phase:8} batch {point.batch:4} context {point.context:5}  {row['ms_p50']:9.2f} ms  "
             f"{row['logit_digest'][:16]}", flush=True)
        rows.append(row)
    return rows


def _sums(ranks: Ranks, a: argparse.Namespace) -> list[dict]:
    """`all_reduce` alone; rank 0 prints."""
    from . import sums

    rows = sums.rows(ranks, a.shape, a.counts or sums.TOKENS)
    for row in rows if ranks.first else []:
        print(f"{row['implementation']:7} {row['shape']} {row['tokens']:5} tokens  {row['us_p50']:9.1f} us  "
              f"{row['digest']}  {row['schedule']}")
    return rows


def _record(rows: list[dict], table: records.Table, a: argparse.Namespace) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    folder = records.open_machine(a.out, a.machine)  # a rank has one thread; the machine's name says how many there are
    table.merge(folder, rows)
    records.note_machine(folder, table.file)
    print(f"recorded {len(rows)} rows in {folder / table.file}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun ... -m kernels parallel", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PRESETS), default=BYTE)
    parser.add_argument("--folder", help="a Hugging Face folder in place of --model")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--batches", nargs="+", type=_at_least_one, default=[1, 8], help="of decode")
    parser.add_argument("--contexts", nargs="+", type=_at_least_one, default=[PROMPT],
                        help="tokens of a prompt, and behind which one is decoded")
    parser.add_argument("--tokens", type=int, default=16, help="likeliest tokens to show; 0 for none")
    parser.add_argument("--repeats", type=_at_least_one, default=5)
    parser.add_argument("--device", help="cpu, or cuda: a GPU for each rank (default: cuda where there is one)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT,
                        help="seconds that ranks wait for one another")
    parser.add_argument("--sums", action="store_true", help="measure all_reduce alone, for token_sweep.csv")
    parser.add_argument("--shape", default="N=4096", help="of --sums: the result's width")
    parser.add_argument("--counts", nargs="+", type=_at_least_one, help="of --sums: token counts")
    parser.add_argument("--record", action="store_true", help=f"write {TENSOR_PARALLEL.file}")
    parser.add_argument("--machine", help="the folder's name to record into")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    a = parser.parse_args(argv)
    ranks = parallel.join(a.device, a.timeout)
    try:
        if a.sums:
            rows, table = _sums(ranks, a), records.TOKEN_SWEEP
        else:
            rows, table = [row for ops in a.ops for row in _told(ranks, a, ops)], TENSOR_PARALLEL
        if a.record and ranks.first:
            _record(rows, table, a)
    finally:
        parallel.leave()
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
