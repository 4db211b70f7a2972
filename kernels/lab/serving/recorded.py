"""One prompt asked for many times among strangers: how many answers there are, and how many digests of their logits.

    python -m kernels answers                        the byte model, 20 random loads, default and invariant ops
    python -m kernels answers --model llama-3.1-8b   a model of that size with random weights
    python -m kernels answers --ops verified         default ops, and a verifier for the requests of the one prompt

bfloat16. Each load is a server with settings of its own (loads.py) and 50 requests for one prompt among 25 others; some
of these share its beginning, some are cancelled. A request's answer and the digest of the logits that it was chosen
from are noted, and counted over each load and over all of them.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from ... import runtime
from ...model.config import PRESETS
from ...model.llama import Llama
from ...model.ops import NAMES
from .. import provenance, records
from . import loads, served
from .measure import byte_model
from .served import Served, sampler_of, serve

LOADS, TEMPERATURES = 20, (0.0, 0.8)
VERIFIED = "verified"  # in place of ops: default ones, and our requests are verified
EVERY = "all"  # loads that are recorded, counted together
OPS = {"cuda": ("default", "invariant"), "cpu": ("default", "tiled")}
ANSWERS = records.Table(
    "answers.csv", ("model", "ops", "load", "temperature", "requests", "answers", "logit_digests", "first_difference",
                    "recorded_at", "source"), ("model", "ops", "load", "temperature"))
TEXTS = records.Table(
    "answer_texts.csv", ("model", "ops", "load", "temperature", "digest", "answer", "requests", "recorded_at",
                         "source"), ("model", "ops", "load", "temperature", "digest"))


def ops_on(device: torch.device) -> tuple[str, ...]:
    """The default, and ops whose order no batch changes at this device's speed."""
    return OPS["cuda" if device.type == "cuda" else "cpu"]


def model_of(name: str, ops: str, device: torch.device) -> Llama:
    """The byte model, or a preset with random weights; bfloat16."""
    if name == "byte":
        return byte_model(ops, torch.bfloat16, device)
    return Llama(name, ops=ops, dtype=torch.bfloat16, device=device)


def source() -> str:
    """The code that decides a row: how a load is served, the loads, the engine, the model and its ops."""
    return provenance.source(served.__file__, loads.__file__)


def spelled(model: str, answer: Sequence[int]) -> str:
    """An answer as data/ has it: a JSON string of the characters of Latin-1 for bytes, else a list of numbers."""
    return json.dumps(bytes(answer).decode("latin-1") if model == "byte" else list(answer))


def read_answer(text: str) -> tuple[int, ...]:
    """The tokens of what `spelled` wrote."""
    value = json.loads(text)
    return tuple(value.encode("latin-1") if isinstance(value, str) else value)


@dataclass(frozen=True)
class Plan:
    """What is served: a model, its ops, the loads, and the temperatures that the prompt is asked for with."""

    model: str
    ops: Sequence[str]
    number: int = LOADS
    copies: int = loads.COPIES
    count: int = loads.COUNT
    temperatures: Sequence[float] = TEMPERATURES

    def __post_init__(self):
        if self.number < 1 or self.copies < 2:
            raise ValueError(f"loads must be at least 1 and requests at least 2 a load, got {self.number} and "
                             f"{self.copies}")
        for temperature in self.temperatures:
            sampler_of(temperature)


def record(plan: Plan, folder, again: bool = False, said: Callable[[str], None] = print) -> pd.DataFrame:
    """Serve random loads with each of these ops, each load written as soon as it is done; returns answers.csv whole.

    Loads that this very code has recorded are skipped, unless `again`. Contenders take turns load by load. Raises what
    `model_of` and `serve` raise.
    """
    made = model_of(plan.model, "default", runtime.device())
    models = {ops: made if ops == VERIFIED else made.using(ops) for ops in plan.ops}
    records.note_machine(folder, ANSWERS.file)
    for temperature in plan.temperatures:
        for seed in range(plan.number):
            for ops, model in models.items():
                load = loads.random_load(model.config, seed, plan.copies, plan.copies // 2, plan.count)
                key = (plan.model, ops, load.name, temperature)
                if again or not _is_done(folder, key):
                    found = serve(model, load, sampler_of(temperature), ops == VERIFIED)
                    _write(folder, key, found)
                    said(f"{ops}, {load.name}, temperature {temperature:g}: {found}; {_told(found.counts)}")
                total = recorded(folder, plan.model, ops, temperature, seed + 1)
                _write_row(folder, (plan.model, ops, EVERY, temperature), total)
        for ops in plan.ops:
            total = recorded(folder, plan.model, ops, temperature, plan.number)
            said(f"{ops}, {plan.number} loads, temperature {temperature:g}: {total}")
    return ANSWERS.read(folder)


def _told(counts: Counter) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number and type(number) is int)


def _is_done(folder, key) -> bool:
    rows = ANSWERS.read(folder)
    same = rows[rows.source.isin(provenance.known_as(source()))]
    return key in set(same[list(ANSWERS.key)].itertuples(index=False, name=None))


def _write(folder, key: tuple, got: Served) -> None:
    """The texts of a load first, then its row, which says that they are whole."""
    base = dict(zip(ANSWERS.key, key, strict=True)) | {"recorded_at": records.now(), "source": source()}
    TEXTS.merge(folder, [base | {"digest": digest[:16], "answer": spelled(key[0], answer), "requests": number}
                         for (answer, digest), number in got.found.items()],
                instead=dict(zip(ANSWERS.key, key, strict=True)))
    _write_row(folder, key, got)


def _write_row(folder, key: tuple, got: Served) -> None:
    first = got.first_difference
    ANSWERS.merge(folder, [dict(zip(ANSWERS.key, key, strict=True)) | {
        "requests": got.requests, "answers": len(got.answers), "logit_digests": len(got.digests),
        "first_difference": "" if first is None else first, "recorded_at": records.now(), "source": source()}])


def recorded(folder, model: str, ops: str, temperature: float, number: int | None = None) -> Served:
    """What was recorded of the first `number` loads (by default of all), counted together."""
    rows = TEXTS.read(folder)
    mine = rows[(rows.model == model) & (rows.ops == ops) & (rows.temperature == temperature)]
    if number is not None:
        mine = mine[mine.load.isin([f"random {seed}" for seed in range(number)])]
    found: Counter = Counter()
    for row in mine.itertuples():
        found[read_answer(row.answer), row.digest] += int(row.requests)
    return Served(found)


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels answers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(dict.fromkeys(["byte", *PRESETS])), default="byte")
    parser.add_argument("--ops", nargs="+", choices=(*NAMES, VERIFIED),
                        help=f"here: {' '.join(ops_on(runtime.device()))}")
    parser.add_argument("--loads", type=int, default=LOADS, help=f"random loads (default: {LOADS})")
    parser.add_argument("--requests", type=int, default=loads.COPIES, help=f"a load (default: {loads.COPIES})")
    parser.add_argument("--count", type=int, default=loads.COUNT, help=f"tokens an answer (default: {loads.COUNT})")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="0 is greedy")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="serve loads that are recorded already")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a, device = _arguments(argv), runtime.device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the steps of a small model are slower with more
    folder = records.open_machine(a.out, a.machine)
    try:
        plan = Plan(a.model, a.ops or ops_on(device), a.loads, a.requests, a.count, a.temperatures)
        record(plan, folder, a.again, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"stopped; what was served is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
