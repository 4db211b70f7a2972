"""One prompt through a model in any form, as one window, in chunks or token by token, and what is to be compared of it.

A form is a list of chunk sizes: [64] is one window of 64 tokens, [1] * 64 are 64 cached decode steps. With invariant
ops every form has the same bits, and so the same digests.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..bits import digest
from .config import Config
from .llama import Llama
from .sampling import Sampler


def encode(config: Config, prompt: bytes | str | Iterable[int], more: int = 0) -> list[int]:
    """A prompt as token numbers, checked on the host. Text is its UTF-8 bytes, for a model whose tokens are bytes.

    `more` tokens are to follow it in the context. Raises TypeError for what is no prompt, ValueError for an empty one,
    one that is too long, or tokens that the vocabulary has not.
    """
    if isinstance(prompt, (str, bytes)) and config.vocab_size != 256:
        raise TypeError(f"prompt must be token numbers, for the {config.vocab_size} tokens of {config.name} are no "
                        f"bytes, got {type(prompt).__name__}")
    tokens = prompt.tolist() if isinstance(prompt, torch.Tensor) else \
        list(prompt.encode() if isinstance(prompt, str) else prompt)
    if not tokens:
        raise ValueError("prompt must have at least one token, got an empty one")
    for i, token in enumerate(tokens):
        if type(token) is not int:
            raise TypeError(f"prompt must be integers, got {token!r} at {i}")
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"prompt must hold tokens from 0 to {config.vocab_size - 1}, the vocabulary of "
                             f"{config.name}, got {token} at {i}")
    if len(tokens) + more > config.context:
        behind = f" and {more} to follow" if more else ""
        raise ValueError(f"prompt must fit in {config.name}'s context of {config.context} tokens, got {len(tokens)}"
                         f"{behind}")
    return tokens


def logits(model: Llama, prompt: bytes | str | Iterable[int], chunks: Sequence[int] | None = None) -> torch.Tensor:
    """(T, vocab_size): the logits after each token of a prompt, taken in chunks of these sizes, by default as one."""
    return _run(model, prompt, chunks)[-1]


def layer_digests(model: Llama, prompt: bytes | str | Iterable[int], chunks: Sequence[int] | None = None
                  ) -> dict[str, str]:
    """What to compare between machines: 'embedding', 'layer 0' and so on, 'logits' -> the digest of all rows' bits.

    Of a layer it is the residual stream (T, hidden_size) behind it.
    """
    names = ["embedding", *(f"layer {i}" for i in range(model.config.layers)), "logits"]
    return {name: digest(rows) for name, rows in zip(names, _run(model, prompt, chunks), strict=True)}


def greedy(model: Llama, prompt: bytes | str | Iterable[int], count: int) -> list[int]:
    """The `count` likeliest tokens behind a prompt: the prompt as one window, then cached decode steps.

    Raises RuntimeError if a row of logits has no choice (sampling.py says when).
    """
    if type(count) is not int or count < 1:
        raise ValueError(f"count must be a whole number of at least 1, got {count!r}")
    chosen, window = [], encode(model.config, prompt, count)
    cache, held, sampler = model.cache(1, len(window) + count), 0, Sampler()
    while len(chosen) < count:
        token = int(sampler(model(_tensor(model, window), cache, prefix=held)))
        if token < 0:
            raise RuntimeError(f"{model} has no next token behind {held + len(window)}: its logits are not numbers")
        chosen.append(token)
        held, window = held + len(window), [token]
    return chosen


@torch.no_grad()
def _run(model: Llama, prompt, chunks) -> list[torch.Tensor]:
    """The residual streams (T, hidden_size) of the embedding and of each layer, then the logits."""
    tokens = encode(model.config, prompt)
    chunks = [len(tokens)] if chunks is None else list(chunks)
    if sum(chunks) != len(tokens) or min(chunks) < 1:
        raise ValueError(f"chunks must be sizes of at least 1 that make up the prompt's {len(tokens)}, got {chunks}")
    cache, held, parts = model.cache(1, len(tokens)), 0, []
    for size in chunks:
        streams: list[torch.Tensor] = []
        window = _tensor(model, tokens[held : held + size])[0]
        last = model.forward(window, cache.batch([size], [held]), cache, logits="all", streams=streams)
        parts.append([*streams, last])
        held += size
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def _tensor(model: Llama, tokens: list[int]) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int64, device=model.device)
