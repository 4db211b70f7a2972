"""One request: a prompt, how many tokens may follow it and how they are chosen, and what has become of it so far."""
from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from .. import bits
from ..model.sampling import Sampler
from .lookup import Lookup
from .pages import ROOT

if TYPE_CHECKING:
    from .engine import Engine

WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"


class Request:
    """What `Engine.submit` returns. Iterate over it to get the answer's tokens as they come; the engine goes on then.

    state         'waiting' (also after a preemption), 'running', 'done', 'cancelled' or 'failed'
    error         why it failed; iterating over it raises this
    answer        the tokens that follow the prompt, so far
    times         time.perf_counter() at each of them; `arrived` is that of the request
    logit_digest  of the logits that they were chosen from, if the engine keeps digests (`digest_of` says how)
    preemptions   how often its pages were taken away, and its tokens computed again
    """

    def __init__(self, engine: Engine, number: int, prompt: list[int], count: int, sampler: Sampler,
                 stop: frozenset[int], buffer: int | None, patience: int | None,
                 on_token: Callable[[Request, int], None] | None):
        self.engine, self.number, self.prompt, self.count = engine, number, prompt, count
        self.sampler, self.stop, self.buffer, self.patience, self.on_token = sampler, stop, buffer, patience, on_token
        self.state, self.error = WAITING, None
        self.tokens = list(prompt)
        self.unread: deque[int] = deque()
        self.pages: list[int] = []
        self.held = 0  # tokens whose keys and values lie in the pages
        self.chain = [ROOT]  # the numbers of its full pages, behind that of the beginning
        self.waited = 0  # steps that a full buffer has been left full
        self.preemptions = 0
        self.lookup = Lookup(self.tokens)
        self.arrived, self.times = time.perf_counter(), []
        self._digest = hashlib.sha256()

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt):]

    @property
    def left(self) -> int:
        """Tokens that may still follow."""
        return self.count - (len(self.tokens) - len(self.prompt))

    @property
    def pending(self) -> int:
        """Tokens that are to go through the model before another one can be chosen."""
        return len(self.tokens) - self.held

    @property
    def finished(self) -> bool:
        return self.state in (DONE, CANCELLED, FAILED)

    @property
    def room(self) -> int:
        """How many tokens its buffer still takes."""
        return self.left if self.buffer is None else min(self.left, self.buffer - len(self.unread))

    @property
    def paused(self) -> bool:
        """Whether it waits for its client to read."""
        return not self.room

    @property
    def logit_digest(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[int]:
        """The tokens that are not read yet, and those to come. Raises `error` behind the last one if it failed."""
        while True:
            while self.unread:
                yield self.unread.popleft()
            if self.finished:
                break
            self.engine.step()
        if self.error is not None:
            raise self.error

    def read(self, most: int | None = None) -> list[int]:
        """Tokens that are there and were not read yet, at most so many; the engine does not go on."""
        count = len(self.unread) if most is None else min(most, len(self.unread))
        return [self.unread.popleft() for _ in range(count)]

    def cancel(self) -> None:
        """End it now, wherever it is; its pages are given back. Nothing happens to one that has ended."""
        self.engine.cancel(self)

    def append(self, token: int, row: bytes | None) -> Exception | None:
        """One more token of the answer, and the bits of its logits. Returns what `on_token` raised, if it did."""
        self.tokens.append(token)
        self.unread.append(token)
        self.times.append(time.perf_counter())
        if row is not None:
            self._digest.update(row)
        try:
            if self.on_token is not None:
                self.on_token(self, token)
        except Exception as error:  # noqa: BLE001 - a client's, of any kind: it ends this request alone
            return error
        return None

    def __repr__(self):
        return (f"<Request {self.number}: {self.state}, {len(self.answer)} of {self.count} tokens behind "
                f"{len(self.prompt)}>")


def rows_of(logits: torch.Tensor) -> list[bytes]:
    """The bits of each row of logits (R, V), as bytes."""
    return [row.tobytes() for row in bits.bits(logits).cpu().numpy()]


def digest_of(logits: torch.Tensor) -> str:
    """What `logit_digest` is where an answer's tokens were chosen from these rows (R, V): SHA-256 of their bits."""
    total = hashlib.sha256()
    for row in rows_of(logits):
        total.update(row)
    return total.hexdigest()
