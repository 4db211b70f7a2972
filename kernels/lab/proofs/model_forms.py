"""What of a model two machines compare: a prompt of real text in several forms, from the weights to the logits.

    window  the first bytes of held-out text that are not blank as one window of 64 tokens, and as one of 8
    decode  the same bytes, token by token, with a cache: the same digests as the window's
    greedy  the 64 likeliest bytes behind these 64: a window, then cached decode steps
    layer   one token behind 16 through one layer of Llama 3.1 8B's sizes, whose weights and cache are portable numbers

All but the last are of the trained byte model. Each is there for `shared` = 1 and 8, the most GPUs that may ever share
the model, for that decides the order of some products. The ops are the invariant ones: a GPU's schedules, a CPU's
specification.
"""
from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import bits
from ...model import folder as folders
from ...model import steps
from ...model.config import SHARED, Config, preset
from ...model.llama import Llama
from ...model.weights import Weights

FOLDER = Path(__file__).resolve().parents[3] / "data" / "models" / "byte"
TEXT = "held_out.txt"
FORMS = ("window", "decode", "greedy", "layer")
PROMPT, FEW, CHOSEN, BEHIND = 64, 8, 64, 16
_POOL = 1 << 20  # portable numbers that the rows of the large layer's weights are windows of


@dataclass(frozen=True)
class Case:
    """One run: the fields are columns of model_digests.csv. `tokens` are the rows in each digest."""

    model: str
    shared: int
    form: str
    tokens: int

    def __str__(self):
        return f"{self.model}, shared={self.shared}, {self.form} of {self.tokens} token{'s' * (self.tokens > 1)}"


_RUNS = (("byte", "window", FEW), ("byte", "window", PROMPT), ("byte", "decode", FEW), ("byte", "decode", PROMPT),
         ("byte", "greedy", CHOSEN), ("llama-3.1-8b layer", "layer", 1))
CASES = tuple(Case(model, shared, form, tokens) for model, form, tokens in _RUNS for shared in SHARED)


@dataclass(frozen=True)
class Run:
    """What a run gave: the digest of each part in the order of the forward, of `greedy` its text, and the seconds."""

    digests: dict[str, str]
    text: str
    seconds: float


def run(case: Case, device="cpu", folder=FOLDER) -> Run:
    """Carry out one case. `folder` holds the byte model and its text.

    Raises ValueError for a case that there is not, and what `folder.load` raises for a model that cannot be read.
    """
    if case not in CASES:
        raise ValueError(f"there is no such run as {case}; have: {'; '.join(map(str, CASES))}")
    start, text = time.perf_counter(), ""
    model = _large_layer(case.shared, device) if case.form == "layer" else _byte_model(folder, case.shared, device)
    found = {"weights": bits.digest(model.weights())}
    if case.form == "layer":
        found |= _token_behind(model)
    elif case.form == "greedy":
        chosen, parts = _greedy(model, prompt_in(folder))
        found, text = found | parts, written(chosen)
    else:
        chunks = [case.tokens] if case.form == "window" else [1] * case.tokens
        found |= _window(model, prompt_in(folder)[: case.tokens], chunks)
    return Run(found, text, time.perf_counter() - start)


def prompt_in(folder=FOLDER) -> bytes:
    """The first bytes, blanks left out, of the text beside the byte model. Raises ValueError if it is too short."""
    path = Path(folder) / TEXT
    prompt = path.read_bytes().lstrip()[:PROMPT]
    if len(prompt) < PROMPT:
        raise ValueError(f"{path} must hold at least {PROMPT} bytes behind its first blanks, got {len(prompt)}")
    return prompt


def written(tokens: list[int]) -> str:
    """Bytes as one printable line: a JSON string of the characters of Latin-1."""
    return json.dumps(bytes(tokens).decode("latin-1"))


def _byte_model(folder, shared: int, device) -> Llama:
    """The stored weights under either order."""
    stored = folders.load(folder, ops="invariant", device=device)
    weights = stored.weights()
    return Llama(dataclasses.replace(stored.config, shared=shared), ops="invariant", dtype=stored.dtype, device=device,
                 weights=lambda name, _: weights[name])


def _window(model: Llama, prompt: bytes, chunks: list[int]) -> dict[str, str]:
    model, heard = _listened(model)
    found = {"prompt": _of_tokens(prompt), **steps.layer_digests(model, prompt, chunks)}
    last = found.pop("logits")
    return {**found, "final norm": _joined(heard, 0), "logits": last}


def _greedy(model: Llama, prompt: bytes) -> tuple[list[int], dict[str, str]]:
    model, heard = _listened(model)
    chosen = steps.greedy(model, prompt, CHOSEN)
    return chosen, {"prompt": _of_tokens(prompt), "final norm": _joined(heard, 0), "logits": _joined(heard, 1),
                    "tokens": _of_tokens(chosen)}


def _token_behind(model: Llama) -> dict[str, str]:
    """One token behind a cache of portable numbers."""
    model, heard = _listened(model)
    cache, streams = model.cache(1, BEHIND + 1), []
    held = cache.kv[0, 0, :BEHIND]
    held.copy_(bits.portable(BEHIND, held[0].numel(), model.dtype, model.device, seed=1).view(held.shape))
    token = torch.tensor([ord("a")], dtype=torch.int64, device=model.device)
    model.forward(token, cache.batch([1], [BEHIND]), cache, streams=streams)
    return {"cache": bits.digest(cache.kv), "embedding": bits.digest(streams[0]), "layer 0": bits.digest(streams[1]),
            "final norm": _joined(heard, 0), "logits": _joined(heard, 1)}


def _large_layer(shared: int, device) -> Llama:
    config = dataclasses.replace(preset("llama-3.1-8b"), name="llama-3.1-8b layer", layers=1, vocab_size=256,
                                 shared=shared)
    return Llama(config, ops="invariant", dtype=torch.bfloat16, device=device, weights=_windows(config, device))


def _windows(config: Config, device) -> Weights:
    """Weights whose rows are windows of one pool of portable numbers: a CPU would make each for minutes."""
    pool = bits.portable(1, _POOL, torch.bfloat16, device, seed=2)[0]

    def weight(name, shape):
        if len(shape) == 1:
            return 1 + pool[: shape[0]] / 4
        row = torch.arange(shape[0], dtype=torch.int64, device=device)
        begin = bits.hashed(row, zlib.crc32(name.encode()) >> 1) % (_POOL - shape[1])
        scale = 2.0 ** round(math.log2(3 / math.sqrt(shape[1])))  # keeps its input's size
        return pool.unfold(0, shape[1], 1)[begin] * scale
    return weight


def _listened(model: Llama) -> tuple[Llama, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The model, and a list that gets what goes into its head and comes out of it, forward by forward."""
    heard: list[tuple[torch.Tensor, torch.Tensor]] = []
    linear, other = model.ops.linear, copy.copy(model)

    def listening(x, weight, order):
        y = linear(x, weight, order)
        if weight is model.head:
            heard.append((x, y))
        return y

    other.ops = dataclasses.replace(model.ops, linear=listening)
    return other, heard


def _joined(heard, place: int) -> str:
    return bits.digest(torch.cat([pair[place] for pair in heard]))


def _of_tokens(tokens) -> str:
    return bits.digest(torch.tensor(list(tokens), dtype=torch.int64, device="cpu"))
