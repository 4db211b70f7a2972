"""model_card.md of a trained model: what training.json holds, in words and tables."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_TEXT = """\
# {name}: a small model of bytes, the same bits on every run

A Llama of {parameters:,} parameters whose tokens are the 256 bytes, trained on the Python standard library's source.
Every sum of its training has an order, so the command below gives these weights again, bit for bit. It is here so that
the suite has text that a model really predicts; it is good for nothing else.

| size | |
| --- | --- |
{sizes}

## Text

| | |
| --- | --- |
{text}

A zero byte begins each file. Held out is every tenth file. `held_out.txt` holds 64 KiB of that text in {pieces} pieces
of 4096 bytes, each from the middle of another file; the scores below are of {scored} windows of {length} bytes of it.

## Training

    {command}

Where CPython {python} runs, `--stdlib` and `--version` may be left out: they say where else its library lies.

{steps:,} steps of {batch} windows of {length} bytes, drawn by an integer hash of (seed {seed}, step). AdamW in float32:
rate {rate:g} after {warmup} steps, then falling to {last:g} of that along a cubic; decay {decay:g}; gradients clipped
at a norm of {clip:g}. What flows forward and back is bfloat16; sums are float32.

| | |
| --- | --- |
{training}

{curve}

The whole curve is in `loss.csv`: natural units a byte, means since the line before; `seconds` since the begin.

## Licence

The weights and this text: the suite's MIT licence. `held_out.txt` is part of Python's standard library, Copyright (c)
2001 Python Software Foundation; All Rights Reserved, under the licence in `LICENSE-PYTHON.txt`.
"""


def card(facts: Mapping[str, Any]) -> str:
    """The card of what training.json holds; `kernels/lab/train.py` says which fields those are."""
    recipe, corpus, machine, runs = (facts[name] for name in ("recipe", "corpus", "machine", "runs"))
    return _TEXT.format(
        name=facts["config"]["name"], parameters=facts["parameters"], sizes=_sizes(facts["config"]),
        text=_table({"CPython": corpus["python"], "files to train on": f"{corpus['files']:,}",
                     "bytes": f"{corpus['bytes']:,}", "their SHA-256": f"`{corpus['sha256']}`",
                     "files held out": f"{corpus['held_out_files']:,}",
                     "their SHA-256, joined alike": f"`{corpus['held_out_sha256']}`"}),
        pieces=corpus["pieces"], command=facts["command"], python=corpus["python"],
        training=_table({"machine": f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}",
                         "seconds a run": ", ".join(f"{run['seconds']:.0f}" for run in runs),
                         "digest of the weights, a line a run": "<br>".join(f"`{run['digest']}`" for run in runs),
                         "recorded at": facts["recorded_at"]}),
        curve=_curve(facts["curve"]), **recipe)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _sizes(config: Mapping[str, Any]) -> str:
    named = {"layers": "layers", "hidden_size": "width", "intermediate_size": "width inside the MLP",
             "heads": "query heads", "kv_heads": "key and value heads", "head_dim": "width of a head",
             "context": "context, bytes"}
    return _table({words: str(config[field]) for field, words in named.items()})


def _curve(rows: list[Mapping[str, float]]) -> str:
    """About ten lines of the loss curve, the last among them."""
    step = max(1, len(rows) // 9)
    some = [*rows[: len(rows) - 1 : step], rows[-1]]
    lines = [f"| {row['step']:,} | {row['loss']:.4f} | {row['held_out_loss']:.4f} | "
             f"{row['held_out_loss'] / math.log(2):.3f} |" for row in some]
    return "\n".join(["| step | loss | held-out loss | held-out bits a byte |", "| --- | --- | --- | --- |", *lines])
