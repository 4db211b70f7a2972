"""One model on several GPUs, or processes of a CPU: its digest, its text, its time. Started by torchrun.

    torchrun --standalone --nproc-per-node 2 -m kernels parallel --record

Every rank runs this; rank 0 speaks and records, each row as it is measured: what this code has recorded is skipped
when the command is given again, unless --again. A cell that does not fit on one of the ranks is named and left out.
On GPUs a forward is replayed as a CUDA graph, as an engine does. Without --folder the model is a preset with random
weights; the byte model in data/models/byte is 'byte'.
"""
from __future__ import annotations

import argparse
import dataclasses
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
from . import room
from .record import Record, opened

TENSOR_PARALLEL = records.Table(
    "tensor_parallel.csv",
    ("model", "ops", "gpus", "phase", "batch", "context", "ms_p05", "ms_p50", "ms_p95", "logit_digest", "recorded_at",
     "source"),
    ("model", "ops", "gpus", "phase", "batch", "context"),
)
PHASES, OPS = ("prefill", "decode"), ("default", "invariant")
BYTE = "byte"
PROMPT = 64
AT_ONCE = 8192  # tokens of prompts behind decode, whose parts GPUs share memory for
Forward = Callable[[], torch.Tensor]


class Point(NamedTuple):
    """One cell of the record. prefill: `batch` prompts of `context` tokens; decode: a token each behind as many."""

    phase: str
    batch: int
    context: int

    def __str__(self):
        return f"{self.phase} of batch {self.batch} at context {self.context}"


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


def forward_of(model: Sharded, point: Point, rehearsal: bool = False) -> tuple[Forward, Forward]:
    """(the forward to time, the logits to compare) of one point: a prompt of PROMPT tokens is compared token by token.

    What lies behind decode is read some prompts at a time, in a rehearsal only the first of them.
    """
    batch, context = point.batch, point.context
    cache = model.cache(batch, context + 1)
    row = torch.tensor(prompt_of(model, context), dtype=torch.int64, device=model.device)
    prompts = torch.stack([row.roll(i) for i in range(batch)])
    if point.phase == "prefill":
        step, prompt = cache.batch([context] * batch, [0] * batch), prompts.flatten()
        every = "all" if batch * context <= 4096 else "last"
        return lambda: model.forward(prompt, step, cache), lambda: model.forward(prompt, step, cache, logits=every)
    some = max(1, AT_ONCE // context)
    for first in range(0, some if rehearsal and some < batch else batch, some):
        rows = range(batch)[first : first + some]
        step = cache.batch([context] * len(rows), [0] * len(rows), rows)
        model.forward(prompts[rows.start : rows.stop].flatten(), step, cache)
    last, behind = prompts[:, -1].clone(), cache.batch([1] * batch, [context] * batch)
    return (lambda: model.forward(last, behind, cache),) * 2


def measure(model: Sharded, point: Point, repeats: int) -> dict:
    """One row, on every rank; the time is the slowest rank's.

    Raises MemoryError on every rank where the point does not fit on one, RuntimeError if ranks have other logits.
    """
    if model.ranks.size > 1:  # a rank without room in a forward would keep the others waiting
        room.together(lambda: _rehearse(model, point), model.ranks, point)
        room.emptied()  # GPUs share other memory than a tensor's
    run, digest = room.together(lambda: _ready(model, point), model.ranks, point)
    if len(set(words.told_objects(digest, model.ranks.group))) > 1:
        raise RuntimeError(f"ranks have other logits of {point}: the residual streams differ")
    ms = [_wall(run, model) for _ in range(repeats + 1)][1:]  # the first one warms up
    slowest = np.max(words.told_objects(ms, model.ranks.group), axis=0)
    p05, p50, p95 = np.percentile(slowest, (5, 50, 95))
    return {**_key(model, point), "ms_p05": p05, "ms_p50": p50, "ms_p95": p95, "logit_digest": digest,
            "recorded_at": records.now(), "source": source()}


def _key(model: Sharded, point: Point) -> dict:
    return {"model": model.whole.name, "ops": model.ops_name, "gpus": model.ranks.size, **point._asdict()}


def source() -> str:
    """The code that decides a row: this file, the model that ranks share, and its ops."""
    return provenance.source(__file__)


def _rehearse(model: Sharded, point: Point) -> None:
    _, whole = forward_of(room.alone(model), point, rehearsal=True)
    whole()


def _ready(model: Sharded, point: Point) -> tuple[Callable[[], object], str]:
    """(what is timed, the digest of the logits)."""
    forward, whole = forward_of(model, point)
    digest = bits.digest(whole())
    return _graph(forward) if model.device.type == "cuda" else forward, digest


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

    def replay(_held=forward):  # whose tensors the graph reads and writes
        graph.replay()
    return replay


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


def _introduced(model: Sharded, tokens: int, said) -> None:
    """What the model is, says and has for logits."""
    said(model)
    prompt = prompt_of(model)
    digest = bits.digest(steps.logits(model, prompt))
    said(f"  logits of {len(prompt)} tokens  {digest}")
    if chosen := steps.greedy(model, prompt, tokens) if tokens else []:
        said(f"  {tokens} likeliest behind them  {written(chosen) if model.whole.vocab_size == 256 else chosen}")


def _cells(ranks: Ranks, a: argparse.Namespace, folder, said) -> Record:
    """Measure each point with each of the ops in turns, over the same weights."""
    record = Record(TENSOR_PARALLEL, source(), ranks, folder, a.again)
    first = model_of(a.model, ranks, a.ops[0], a.folder)
    models = [first, *(first.using(ops) for ops in a.ops[1:])]
    for model in models:
        _introduced(model, a.tokens, said)
    lacking = []
    for point in points(a):
        for model in models:
            if tuple(_key(model, point).values()) in record.done:
                continue
            try:
                row = measure(model, point, a.repeats)
            except MemoryError as error:
                said(f"  left out with {model.ops_name} ops: {error}")
                lacking.append(f"{point}, {model.ops_name} ops")
                continue
            finally:
                room.emptied()
            record.keep([row])
            said(f"  {str(point):38} {model.ops_name:9}  {row['ms_p50']:9.2f} ms  {row['logit_digest'][:16]}")
    if lacking:
        said("\n  ".join([f"{len(lacking)} do not fit on {ranks.size}:", *lacking]))
    return record


def _sums(ranks: Ranks, a: argparse.Namespace, folder, said) -> Record:
    """`all_reduce` alone."""
    from . import sums

    record = Record(records.TOKEN_SWEEP, sums.source(), ranks, folder, a.again)
    for rows in sums.measured(ranks, a.shape, a.counts or sums.TOKENS, done=record.done):
        record.keep(rows)
        for row in rows:
            said(f"{row['implementation']:7} {row['shape']} {row['tokens']:5} tokens  {row['us_p50']:9.1f} us  "
                 f"{row['digest']}  {row['schedule']}")
    return record


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
    parser.add_argument("--record", action="store_true", help=f"write {TENSOR_PARALLEL.file}, row by row")
    parser.add_argument("--again", action="store_true", help="with --record: measure what is recorded already")
    parser.add_argument("--machine", help="the folder's name to record into")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    a = parser.parse_args(argv)
    ranks = parallel.join(a.device, a.timeout)
    try:
        folder = opened(a.out, a.machine) if a.record else None
        with parallel.ends_where_lost(ranks):
            record = (_sums if a.sums else _cells)(ranks, a, folder, _say if ranks.first else _nothing)
        if a.record and ranks.first:
            print(record)
    finally:
        parallel.leave()
    return 0


def _say(line) -> None:
    print(line, flush=True)


def _nothing(_) -> None:
    pass


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
