"""Time schedules of attention beside each other: which one should a GPU choose for few requests on few keys?

    python -m kernels.lab.attention.schedules --requests 1 2 4 --contexts 512 1024 2048 4096 8192 --heads 32/8 8/1

Contenders of a point are interleaved. Each gets a line of CSV with its time, and with whether its bits are those of the
schedule of choice. A schedule that cannot do a point says why, and the others go on. Nothing is recorded.
"""
from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial

import torch

from ... import bits, runtime
from ...op import Op
from ...ops.attention import schedule as schedules
from ...ops.attention.op import attention_chunk, attention_decode
from ...ops.attention.schedule import Schedule
from .. import bench

COLUMNS = ("heads", "queries", "requests", "context", "page", "clock", "contender", "us_p20", "us_p50", "us_p80",
           "same_bits")
DEFAULT = (schedules.BLOCKS, Schedule("spread", 16, 4, 3), schedules.HOPPER_FEW)


def shape_of(heads: str, context: int, page: int = 0, width: int = 128) -> str:
    """The op's shape for heads such as 32/8. ValueError for other texts."""
    many, _, few = heads.partition("/")
    if not (many.isdigit() and few.isdigit()):
        raise ValueError(f"heads must read like 32/8, got {heads!r}")
    return f"H={many},KV={few},D={width},context={context}" + (f",page={page}" if page else "")


def contenders(op: Op, wanted: list[Schedule], others: list[str]) -> dict[str, Callable]:
    """Each by its name: schedules, and implementations of the op."""
    return {str(s): partial(op.run_schedule, s) for s in wanted} | {name: op.implementation(name) for name in others}


def measured(op: Op, tokens: int, shape: str, found: dict[str, Callable], clock: str, repeats: int) -> list[dict]:
    """A row for each contender at one point; one that fails has its words in the place of its bits."""
    device = runtime.device()
    given = op.inputs(tokens, shape, torch.bfloat16, device)
    chosen = op.triton(*given)
    timings = bench.measure(found, lambda i: op.inputs(tokens, shape, torch.bfloat16, device, i), clock, device=device,
                            set_bytes=op.work(tokens, shape, torch.bfloat16).bytes, repeats=repeats)
    rows = []
    for name in found:
        if isinstance(timings[name], Exception):
            rows.append({"contender": name, "same_bits": str(timings[name]).splitlines()[0]})
        else:
            rows.append({"contender": name, "same_bits": bits.same_bits(found[name](*given), chosen),
                         **{k: round(v, 2) for k, v in timings[name].percentiles().items()}})
    return rows


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.lab.attention.schedules", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--queries", type=int, default=0, help="of one sequence behind the context, not of requests")
    parser.add_argument("--heads", nargs="+", default=["32/8", "8/1"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--page", type=int, default=0, help="keys a page (default: no pages)")
    parser.add_argument("--schedules", type=Schedule.parse, nargs="+", default=list(DEFAULT))
    parser.add_argument("--contenders", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--clock", default=bench.clocks(runtime.device())[0], choices=bench.known(runtime.device()))
    parser.add_argument("--repeats", type=int, default=21)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a = _arguments(argv)
    op, tokens = (attention_chunk, [a.queries]) if a.queries else (attention_decode, a.requests)
    table = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for heads in a.heads:
        for context in a.contexts:
            for count in tokens:
                point = {"heads": heads, "queries": a.queries or 1, "requests": 1 if a.queries else count,
                         "context": context, "page": a.page, "clock": a.clock}
                for row in measured(op, count, shape_of(heads, context, a.page, a.width),
                                    contenders(op, a.schedules, a.contenders), a.clock, a.repeats):
                    table.writerow(point | row)
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
