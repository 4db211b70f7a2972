"""Random sequences, each in seven ways on this machine: does one bit of one row move?

    python -m kernels attention                    60 sequences into data/<machine>/attention_ways.csv
    python -m kernels attention --count 10 --most 300

The ways are those of notebook 05: whole prefill, chunks, prefill then decode, shuffled pages, among strangers in both
orders, and after a prefix-cache hit. A case is one query, of all heads, in one of the six other ways beside the whole
prefill. The digest is the whole prefill's, so any machine can redo it.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from random import Random

import torch

from ... import bits, runtime
from ...op import DTYPES
from ...ops.attention.op import attention_prefill
from .. import provenance, records
from ..attention.measure import seven_ways

WAYS = records.Table("attention_ways.csv", ("seed", "implementation", "dtype", "shape", "keys", "prompt", "chunks",
                                            "page", "cases", "differ", "digest", "recorded_at", "source"),
                     ("seed", "implementation"))
FORMS = ("H=8,KV=2,D=128", "H=4,KV=4,D=64", "H=6,KV=1,D=80")


def drawn(seed: int, most: int) -> dict:
    """What `seed` stands for: a form, a length up to `most`, where the prompt ends, and how it is cut."""
    draw = Random(seed)
    keys = draw.choice([draw.randint(40, most), min(most, draw.choice([128, 1024, 2048]) + draw.randint(-1, 1))])
    cuts = sorted(draw.sample(range(1, keys), 3))
    return {"seed": seed, "dtype": draw.choice(["bfloat16", "float16"]), "shape": draw.choice(FORMS), "keys": keys,
            "prompt": keys - draw.randint(1, 20), "chunks": [b - a for a, b in zip([0, *cuts[:-1]], cuts, strict=True)],
            "page": draw.choice([16, 100])}


def measured(case: dict, implementation: str, device) -> dict:
    """One row: how many cases there were, and in how many a bit differed."""
    q, k, v, _ = attention_prefill.inputs(case["keys"], case["shape"], DTYPES[case["dtype"]], device, case["seed"])
    call = attention_prefill.implementation(implementation)
    first, *others = seven_ways(call, q, k, v, case["prompt"], case["chunks"], case["page"])
    whole = bits.bits(first.result).flatten(1)
    differ = sum(int((bits.bits(way.result).flatten(1) != whole).any(1).sum()) for way in others)
    return {**case, "chunks": " ".join(map(str, case["chunks"])), "implementation": implementation,
            "cases": len(others) * case["keys"], "differ": differ, "digest": bits.digest(first.result),
            "recorded_at": records.now(), "source": provenance.of_op(attention_prefill)}


def ways(count: int, most: int, device=None) -> Iterator[dict]:
    """The rows of `count` seeds; a GPU runs `triton`, a CPU `python`."""
    device = device or runtime.device()
    implementation = "triton" if torch.device(device).type == "cuda" else "python"
    yield from (measured(drawn(seed, most), implementation, device) for seed in range(count))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels attention", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="how many sequences (default: 60)")
    parser.add_argument("--most", type=int, default=2500, help="the most keys of one (default: 2500)")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if a.count < 1 or a.most < 41:
        parser.error(f"--count must be at least 1 and --most at least 41, got {a.count} and {a.most}")
    folder = records.open_machine(a.out, a.machine)
    rows = list(ways(a.count, a.most))
    WAYS.merge(folder, rows)
    records.note_machine(folder, WAYS.file)
    cases, differ = sum(row["cases"] for row in rows), sum(row["differ"] for row in rows)
    print(f"{differ} of {cases:,} cases differ, in {len(rows)} sequences ({rows[0]['implementation']})")
    return 1 if differ else 0
