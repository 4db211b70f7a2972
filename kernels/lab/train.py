"""Train the byte model: a GPU takes a minute, and every run on every Hopper GPU gives the same weights.

    python -m kernels train --out data/models/byte --twice
    python -m kernels train --out somewhere --model tiny --steps 2 --batch 2 --length 32 --scored 1    on a CPU

The text is the standard library's source of the Python that runs. The folder gets config.json and model.safetensors
(bfloat16, as transformers reads them), loss.csv, training.json, model_card.md, held_out.txt and Python's licence.
On one H200 a run takes about half a minute. A CPU runs the specification, which gives the same bits and is slow: take
sizes like those of the second command. --twice trains a second time and compares the weights' digests.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from .. import runtime
from ..model import folder as folders
from ..model.config import PRESETS, Config, preset
from ..model.llama import Llama
from ..training.card import card
from ..training.corpus import PIECES, Corpus, gather
from ..training.recipe import Recipe
from ..training.trainer import Row, Trainer
from . import records
from .table import made, write_atomic

LICENCE = "LICENSE-PYTHON.txt"
_HELP = {"steps": "steps of training", "batch": "windows a step", "length": "bytes a window", "seed": "of weights and "
         "windows", "rate": "the highest learning rate", "warmup": "steps until it is reached",
         "scored": "windows of held-out text that are scored"}


def _arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the folder that the model is written into")
    parser.add_argument("--model", choices=sorted(PRESETS), default="byte")
    defaults = Recipe()
    for name, what in _HELP.items():
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{what} (default: {value})")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of loss.csv (default: 100)")
    parser.add_argument("--twice", action="store_true", help="train twice, and compare the digests")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--stdlib", help="folder of another Python's standard library (default: of the one that runs)")
    parser.add_argument("--version", help="that Python's version, such as 3.11.7")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a = _arguments(argv)
    try:
        recipe = Recipe(**{name: getattr(a, name) for name in _HELP})
        corpus, device = gather(a.stdlib, a.version), _device(a.device)
        trained = train(preset(a.model), recipe, corpus, device, 1 + a.twice, a.every, made(a.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    digests = [run["digest"] for run in trained["runs"]]
    print("\n".join(f"weights {digest}" for digest in digests))
    if len(set(digests)) > 1:
        print("error: two runs gave other weights", file=sys.stderr)
        return 1
    return 0


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name) if name else runtime.device()
        return torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must name a CPU or a GPU that is here, got {name!r}: {error}") from None


def train(config: Config, recipe: Recipe, corpus: Corpus, device: torch.device, runs: int, every: int,
          out: Path) -> dict:
    """Train `runs` times and write the model into `out`; returns what training.json holds.

    config, recipe, corpus, machine, command, recorded_at   what decided the run
    parameters   how many numbers the model holds
    curve        rows of loss.csv, of the first run
    runs         each run's seconds, last losses, and digest of its bfloat16 weights
    """
    curves, done, weights = [], [], None
    for run in range(runs):
        trainer = Trainer(config, recipe, corpus, device)
        curves.append(trainer.run(every, lambda row, run=run: _say(row, recipe, run)))
        done.append({"seconds": curves[-1][-1].seconds, "loss": curves[-1][-1].loss,
                     "held_out_loss": curves[-1][-1].held_out_loss, "digest": trainer.parameters.digest()})
        weights = weights or {name: w.detach().clone() for name, w in trainer.parameters.weights.items()}
        del trainer  # its memory is the next one's
    facts = {"config": asdict(config), "parameters": config.parameters, "recipe": asdict(recipe),
             "corpus": _described(corpus), "machine": records.this_machine(), "device": str(device),
             "command": records.command(), "recorded_at": records.now(), "curve": [asdict(row) for row in curves[0]],
             "runs": done}
    folders.save(Llama(config, dtype=torch.bfloat16, device=device, weights=lambda name, _: weights[name]), out)
    _write(out, facts, corpus)
    return facts


def _say(row: Row, recipe: Recipe, run: int) -> None:
    left = row.seconds / row.step * (recipe.steps - row.step)
    print(f"run {run + 1}  step {row.step}/{recipe.steps}  loss {row.loss:.4f}  held out {row.held_out_loss:.4f}  "
          f"{row.seconds:.1f} s, {left:.0f} s to go", flush=True)


def _described(corpus: Corpus) -> dict:
    return {"python": corpus.python, "files": corpus.files, "bytes": len(corpus.text), "sha256": corpus.sha256,
            "held_out_files": corpus.held_out_files, "held_out_sha256": corpus.held_out_sha256, "pieces": PIECES}


def _write(out: Path, facts: dict, corpus: Corpus) -> None:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(facts["curve"])
    write_atomic(out / "loss.csv", lines.getvalue())
    write_atomic(out / "training.json", json.dumps(facts, indent=2) + "\n")
    write_atomic(out / "model_card.md", card(facts))
    write_atomic(out / "held_out.txt", corpus.excerpt)
    if corpus.licence:
        write_atomic(out / LICENCE, corpus.licence)
    else:
        print(f"note: this Python's library has no LICENSE.txt: put Python's licence into {out / LICENCE}",
              file=sys.stderr)
