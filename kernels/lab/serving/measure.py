"""The trained byte model completes one request beside others, and what of it moves is counted.

The request is the first of a batch, and its neighbours are pieces of held-out text. The default ops are PyTorch's.
The ops with a fixed order are `invariant` on a GPU; on a CPU `tiled`, in float32, for the specification is slow there.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd
import torch

from ... import bits, runtime
from ...arithmetic.elementary import exp
from ...model.folder import load
from ...model.llama import Llama
from ...model.sampling import BITS, Sampler, log_probs, noise
from ...model.steps import encode
from ..proofs.model_forms import FOLDER, TEXT

SIZES = (1, 2, 8, 64)
COUNT = 12  # bytes of a completion
TRIES = 1 << 22  # seeds
_PIECE = 4096  # bytes of held-out text from one file


def held_out() -> bytes:
    """The held-out text that comes with the byte model, 64 KiB."""
    return (FOLDER / TEXT).read_bytes()


REQUEST = b"    def __init__(self, name):\n        self."


def fixed_ops() -> str:
    """The name of the ops whose order no batch changes and that are quick here."""
    return "invariant" if runtime.HAS_GPU else "tiled"


def byte_model(ops: str = "default", dtype: torch.dtype | None = None, device=None) -> Llama:
    """The byte model with these ops; weights are loaded once. By default bfloat16 on a GPU, float32 on a CPU.

    Raises what `folder.load` and `ops.choose` raise.
    """
    device = torch.device(device or runtime.device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return _loaded(dtype, str(device)).using(ops)


@cache
def _loaded(dtype, device) -> Llama:
    return load(FOLDER, dtype=dtype, device=device)


def requests(size: int, prompt: bytes = REQUEST) -> list[bytes]:
    """A batch of `size` prompts: the given one, then pieces of held-out text, each as long as it.

    Raises ValueError for an empty or too long prompt, for a size below 1 or more than the text has pieces for.
    """
    if not 1 <= len(prompt) <= _PIECE:
        raise ValueError(f"prompt must have 1 to {_PIECE} bytes, got {len(prompt)}")
    text, length = held_out(), len(prompt)
    most = 1 + (len(text) // _PIECE) * (_PIECE // length)
    if type(size) is not int or not 1 <= size <= most:
        raise ValueError(f"size must be a whole number from 1 to {most}, got {size!r}")
    files = len(text) // _PIECE
    begins = (_PIECE * (i % files) + length * (i // files) for i in range(size - 1))
    return [prompt, *(text[begin : begin + length] for begin in begins)]


@torch.no_grad()
def generate(model: Llama, prompts: Sequence[bytes], count: int, sampler: Sampler = Sampler(),  # noqa: B008
             seeds: Iterable[int] | None = None) -> tuple[list[bytes], torch.Tensor]:
    """`count` bytes behind each prompt, all prompts in one batch: a forward over them, then one token each a forward.

    seeds   one for each prompt, in place of the sampler's

    Returns the texts, and the logits (requests, count, vocab_size) that each byte was chosen from.
    Raises as `steps.encode` does, and ValueError for a count below 1 or no prompt.
    """
    if type(count) is not int or count < 1:
        raise ValueError(f"count must be a whole number of at least 1, got {count!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    windows = [encode(model.config, prompt, count) for prompt in prompts]
    seeds = None if seeds is None else torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
    kv = model.cache(len(prompts), max(map(len, windows)) + count)
    new, held = [len(window) for window in windows], [0] * len(windows)
    tokens = torch.tensor(sum(windows, []), dtype=torch.int64, device=model.device)
    chosen, seen = [], []
    for _ in range(count):
        seen.append(model.forward(tokens, kv.batch(new, held), kv))
        held, new = [a + b for a, b in zip(held, new, strict=True)], [1] * len(windows)
        tokens = sampler(seen[-1], torch.tensor(held, dtype=torch.int64, device=model.device), seeds)
        chosen.append(tokens)
    return [bytes(row) for row in torch.stack(chosen, 1).tolist()], torch.stack(seen, 1)


@dataclass(frozen=True)
class Answer:
    """What one request got in a batch of `size`: its text, and the logits (count, vocab_size) it was chosen from."""

    ops: str
    size: int
    text: bytes
    logits: torch.Tensor

    @property
    def digest(self) -> str:
        return bits.digest(self.logits)

    def differs_from(self, other: Answer) -> int | None:
        """The first byte in which the texts differ; None if they are the same."""
        return next((i for i, (a, b) in enumerate(zip(self.text, other.text, strict=True)) if a != b), None)


@cache
def answer(ops: str, size: int, prompt: bytes = REQUEST, count: int = COUNT, seed: int | None = None) -> Answer:
    """The first request's answer in a batch of `size`, with these ops, on this machine; kept.

    seed   of temperature 1; None for greedy
    """
    sampler = Sampler() if seed is None else Sampler(temperature=1.0, seed=seed)
    texts, logits = generate(byte_model(ops), requests(size, prompt), count, sampler)
    return Answer(ops, size, texts[0], logits[0].cpu())


def answers(ops: str, sizes: Iterable[int] = SIZES, prompt: bytes = REQUEST, count: int = COUNT,
            seed: int | None = None) -> list[Answer]:
    """`answer` in batches of these sizes."""
    return [answer(ops, size, prompt, count, seed) for size in sizes]


def flipping_seeds(alone: torch.Tensor, beside: torch.Tensor, position: int, tries: int = TRIES) -> torch.Tensor:
    """Of the seeds below `tries`, those with which two rows of logits (V,) give two tokens, at temperature 1.

    The token is the Sampler's, whose noise is worked out here for all seeds at once.
    """
    seeds = torch.arange(tries, dtype=torch.int64, device="cpu")
    drawn = noise(seeds, torch.full_like(seeds, position)) >> 1
    one, other = (_chosen(row.cpu(), drawn) for row in (alone, beside))
    return seeds[one != other]


def _chosen(row, drawn):
    every = torch.arange(len(row), dtype=torch.int64, device=row.device)
    edges = (exp(log_probs(row.expand(len(row), -1), every)) * 2.0**BITS).to(torch.int64).cumsum(0)
    return torch.searchsorted(edges, drawn * edges[-1] >> BITS, right=True)


def flipping_seed(size: int = SIZES[-1], prompt: bytes = REQUEST) -> int:
    """The first seed whose first byte is another in a batch of `size` than alone, default ops; 0 if none is found."""
    alone, beside = (answer("default", n, prompt, 1).logits[0] for n in (1, size))
    found = flipping_seeds(alone, beside, len(prompt))
    return int(found[0]) if len(found) else 0


def smallest_lead(answer: Answer) -> float:
    """The least by which a chosen byte led the second: what a logit must move by, about, before the text flips."""
    best = answer.logits.float().topk(2).values
    return (best[:, 0] - best[:, 1]).min().item()


@torch.no_grad()
def rows_by_layer(model: Llama, prompts: Sequence[bytes]) -> dict[str, torch.Tensor]:
    """The first prompt's last byte as a decode step of the batch: 'embedding', 'layer 0' and so on, 'logits' -> (1, n).

    All bytes before each prompt's last one are read first, in one window. Raises ValueError for a prompt below 2 bytes.
    """
    windows = [encode(model.config, prompt) for prompt in prompts]
    behind, streams = [len(window) - 1 for window in windows], []
    if min(behind) < 1:
        raise ValueError(f"prompts must have at least 2 bytes each, got {min(behind) + 1}")
    kv = model.cache(len(windows), max(behind) + 1)
    read, last = (torch.tensor(part, dtype=torch.int64, device=model.device)
                  for part in (sum((window[:-1] for window in windows), []), [window[-1] for window in windows]))
    model.forward(read, kv.batch(behind, [0] * len(behind)), kv)
    logits = model.forward(last, kv.batch([1] * len(behind), behind), kv, logits="all", streams=streams)
    names = ["embedding", *(f"layer {i}" for i in range(model.config.layers)), "logits"]
    return {name: rows[:1] for name, rows in zip(names, [*streams, logits], strict=True)}


def layer_table(ops: str, sizes: Iterable[int] = SIZES, prompt: bytes = REQUEST) -> pd.DataFrame:
    """The first eight digits of the digest of each part of `rows_by_layer`: a line a part, a column a batch size."""
    model = byte_model(ops)
    return pd.DataFrame({size: {name: bits.digest(rows)[:8] for name, rows
                                in rows_by_layer(model, requests(size, prompt)).items()} for size in sizes})
