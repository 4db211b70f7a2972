"""How much is decoded again, on the byte model: flips that this machine's default ops make, over windows of W tokens.

    python -m kernels rollbacks --windows 4 8 16 32 64 128

Requests of real text, of lengths that differ, each drawn with its own seed, are served together by a VerifyingEngine
whose verifier is the paper's: default ops at one shape. Nothing is perturbed: a flip is a draft of decode that the
verifier's pass, in another shape, does not choose.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pandas as pd
import torch

from ... import runtime
from ...inference import Sampler
from ...inference.verify import VerifyingEngine
from ...op import DTYPES, dtype_name
from .. import provenance, records
from ..serving.measure import byte_model, requests

WINDOWS = (4, 8, 16, 32, 64, 128)
GROUP, REQUESTS, COUNT, TEMPERATURE = 4, 16, 256, 1.0
PAGE = 16
ROLLBACKS = records.Table(
    "rollbacks.csv",
    ("model", "verifier", "dtype", "temperature", "window", "group", "requests", "tokens", "drafts", "flips",
     "recomputed", "share", "first_tokens", "first_flips", "later_tokens", "later_flips", "recorded_at", "source"),
    ("model", "verifier", "dtype", "temperature", "window", "group"))


def served(window: int, *, group: int = GROUP, size: int = REQUESTS, count: int = COUNT,
           temperature: float = TEMPERATURE, dtype: torch.dtype | None = None, verifier: str = "default",
           flip_every: int | None = None) -> tuple[VerifyingEngine, list]:
    """`size` verified requests of held-out text, served together to their end: the engine, and the requests.

    Their lengths differ, or all would attend to as many keys at each step, which no server's do. Raises ValueError
    that names the argument.
    """
    prompts = [prompt[: len(prompt) - 7 * i % 31] for i, prompt in enumerate(requests(size + 1)[1:])]
    reach = len(prompts[0]) + count
    pages = size * -(-reach // PAGE)
    engine = VerifyingEngine(byte_model("default", dtype), window=window, group=group, verifier=verifier, pages=pages,
                             page_size=PAGE, max_batch=size, reach=reach, flip_every=flip_every)
    answers = [engine.submit(prompt, count, Sampler(temperature=temperature, seed=seed), verify=True)
               for seed, prompt in enumerate(prompts)]
    engine.run()
    return engine, answers


def rollbacks(windows: Sequence[int] = WINDOWS, *, progress: bool = False, **of) -> pd.DataFrame:
    """ROLLBACKS' columns, a row for each window; `of` as in `served`."""
    rows = []
    for window in windows:
        engine, answers = served(window, **of)
        rows.append(_row(engine, answers, of.get("temperature", TEMPERATURE)))
        if progress:
            print(f"W={window}: {engine.flips} flips, {rows[-1]['share']:.1%} of {engine.verified} tokens decoded "
                  "again", file=sys.stderr, flush=True)
    return pd.DataFrame(rows, columns=list(ROLLBACKS.columns))


def _row(engine: VerifyingEngine, answers, temperature: float) -> dict:
    first = [request.flipped_at[0] + 1 if request.flips else len(request.answer) for request in answers]
    return {"model": engine.model.config.name, "verifier": engine.verifier.ops_name,
            "dtype": dtype_name(engine.model.dtype), "temperature": temperature, "window": engine.window,
            "group": engine.group, "requests": len(answers), "tokens": engine.verified, "drafts": engine.drafts,
            "flips": engine.flips, "recomputed": engine.recomputed, "share": engine.recomputed / engine.verified,
            "first_tokens": sum(first), "first_flips": sum(request.flips > 0 for request in answers),
            "later_tokens": engine.verified - sum(first),
            "later_flips": sum(max(request.flips - 1, 0) for request in answers),
            "recorded_at": records.now(), "source": source()}


def source() -> str:
    """The code that decides a row: this file, the engine, the model and its ops."""
    return provenance.source(__file__)


def predicted_share(flip: float, window: int) -> float:
    """Tokens decoded again for one that is kept, where each draft flips by itself with this probability."""
    kept = sum((1 - flip) ** i for i in range(window))
    return (window - kept) / kept


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels rollbacks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--group", type=int, default=GROUP)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--tokens", type=int, default=COUNT, help="of each answer")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="serve windows that are recorded already")
    return parser.parse_args(argv)


def _recorded(folder, a: argparse.Namespace, model) -> frozenset[int]:
    """Windows of which this very code has recorded as many of the same requests."""
    rows = ROLLBACKS.read(folder)
    same = rows[rows.source.isin(provenance.known_as(source()))] if len(rows) else rows
    asked = {"model": model.config.name, "verifier": "default", "dtype": dtype_name(model.dtype),
             "temperature": a.temperature, "group": a.group, "requests": a.requests, "tokens": a.requests * a.tokens}
    return frozenset(row["window"] for row in same.to_dict("records")
                     if all(row[name] == value for name, value in asked.items()))


def main(argv=None) -> int:
    a = _arguments(argv)
    of = {"group": a.group, "size": a.requests, "count": a.tokens, "temperature": a.temperature,
          "dtype": DTYPES[a.dtype] if a.dtype else None}
    folder = records.open_machine(a.out, a.machine)
    records.note_machine(folder, ROLLBACKS.file)
    done = frozenset() if a.again else _recorded(folder, a, byte_model("default", of["dtype"]))
    for window in a.windows:
        if window in done:
            continue
        ROLLBACKS.merge(folder, rollbacks([window], progress=True, **of))
    print(f"{folder / ROLLBACKS.file} is written, on {runtime.where()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
