"""What a server is given: its settings, and who asks when, for what. One prompt is asked for often, among strangers.

Every choice follows from a seed, so a load is the same on every machine.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...model.config import Config
from .measure import held_out

# a piece of held-out text near a tie: 17 of 63 such pieces got several texts from the default on a CPU, this one three
PROMPT = b"                   behaviour and needn't"
COUNT = 32  # tokens of an answer
COPIES, STRANGERS = 50, 25  # of a random load
_PLACES = {"page_size": (4, 8, 16, 32), "max_batch": (1, 3, 8, 16, 32), "chunk": (5, 16, 33, 64),
           "sharing": (True, True, False), "speculate": (0, 0, 2, 4)}


@dataclass(frozen=True)
class Server:
    """An engine's settings; `Engine` says what they mean."""

    pages: int = 512
    page_size: int = 16
    max_batch: int = 32
    budget: int = 128
    chunk: int = 64
    sharing: bool = True
    speculate: int = 0


@dataclass(frozen=True)
class Call:
    """One request: the step at which it arrives, its tokens, how many may follow, and the step that cancels it.

    seed  None for one of ours, which all ask the same; else a stranger's, drawn at temperature 1 if it is not 0
    """

    arrives: int
    prompt: tuple[int, ...]
    count: int
    seed: int | None = None
    cancelled: int | None = None


@dataclass(frozen=True)
class Load:
    """A server and all that it is asked, in the order of arrival."""

    name: str
    server: Server
    calls: tuple[Call, ...]

    @property
    def copies(self) -> int:
        return sum(call.seed is None for call in self.calls)

    def on(self, **settings) -> Load:
        """The same calls to a server with other settings."""
        return replace(self, server=replace(self.server, **settings))


def prompt_of(config: Config) -> tuple[int, ...]:
    """The prompt that is asked for often: PROMPT of a model of bytes, else as many made-up tokens."""
    return tuple(PROMPT) if config.vocab_size == 256 else _numbers(config, 13, len(PROMPT))


def crowd(config: Config, copies: int = 100, strangers: int = 50, *, count: int = COUNT, spread: int = 100,
          server: Server = Server(), seed: int = 0) -> Load:  # noqa: B008 - frozen
    """`copies` of our prompt among strangers, whose lengths and arrivals, over `spread` steps, follow from `seed`.

    Raises ValueError for numbers below 1, or below 0 of strangers.
    """
    for name, value, least in (("copies", copies, 1), ("strangers", strangers, 0), ("count", count, 1),
                               ("spread", spread, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    draw, ours = random.Random(seed), prompt_of(config)
    calls = [Call(_below(draw, spread), ours, count) for _ in range(copies)]
    calls += [_stranger(draw, config, ours, count, spread) for _ in range(strangers)]
    calls.sort(key=lambda call: call.arrives)
    return Load(f"crowd {seed}", server, tuple(calls))


def random_load(config: Config, seed: int, copies: int = COPIES, strangers: int = STRANGERS,
                count: int = COUNT) -> Load:
    """A load whose server is drawn too: page size, batch limit, chunk, sharing, drafts, and few pages in half of them.

    Few are as many as two of the longest requests need, so that others are preempted.
    """
    draw = random.Random(f"server {seed}")
    server = Server(**{name: _one_of(draw, values) for name, values in _PLACES.items()})
    longest = 3 * len(PROMPT) + count
    few = 2 * -(-longest // server.page_size)
    pages = few if draw.random() < 0.5 else 40 * few
    load = crowd(config, copies, strangers, count=count, spread=count * -(-copies // server.max_batch), seed=seed,
                 server=replace(server, pages=pages, budget=max(server.max_batch, 48)))
    return replace(load, name=f"random {seed}")


def _stranger(draw: random.Random, config: Config, ours: Sequence[int], count: int, spread: int) -> Call:
    """One that begins as our prompt does, so that pages are shared, or with other text; one in five is cancelled."""
    arrives, length = _below(draw, spread), 4 + _below(draw, 2 * len(ours))
    text = _text(draw, config, length)
    if draw.random() < 0.3:
        text = (*ours[: 4 + _below(draw, len(ours) - 4)], *text)
    cancelled = arrives + _below(draw, 8) if draw.random() < 0.2 else None
    return Call(arrives, tuple(text[: 3 * len(ours)]), 1 + _below(draw, count), _below(draw, 1000), cancelled)


def _text(draw: random.Random, config: Config, length: int) -> tuple[int, ...]:
    if config.vocab_size != 256:
        return _numbers(config, _below(draw, 1 << 20), length)
    text = held_out()
    begin = _below(draw, len(text) - length)
    return tuple(text[begin : begin + length])


def _numbers(config: Config, first: int, length: int) -> tuple[int, ...]:
    return tuple((7919 * i + first) % config.vocab_size for i in range(length))


def _below(draw: random.Random, most: int) -> int:
    """Of `random`'s functions only this one's numbers are promised to stay the same in every version of Python."""
    return int(draw.random() * most)


def _one_of(draw: random.Random, values: Sequence):
    return values[_below(draw, len(values))]
