"""A deterministic request, the windows of it that a verifier replays, and its place in the scheduler.

Of its tokens the first `verified` are final: the prompt, and what a verify pass has chosen. Those behind them are
drafts that decode chose, and no reader sees them. Keys and values of the first `sure` tokens are the verifier's; what
decode wrote behind them is overwritten.
"""
from __future__ import annotations

import time
from dataclasses import dataclass

from .request import RUNNING, Request
from .scheduler import Part, Scheduler

ROOT = -1  # the number before a deterministic request's first page: it shares none with requests that nobody verifies


class Verified(Request):
    """What `submit(..., verify=True)` returns. `answer` and the tokens it streams are verified ones alone.

    flipped_at  which tokens of the answer the verifier put in a draft's place; `flips` is their number
    recomputed  drafts behind those, which were dropped and had to be decoded again
    held_back   of each token that decode had drafted: seconds from its draft until it left
    """

    def __init__(self, of: Request, window: int):
        super().__init__(of.engine, of.number, of.prompt, of.count, of.sampler, frozenset(), of.buffer, of.patience,
                         of.on_token)
        self.ends, self.window = of.stop, window  # the engine sees no stop: what it chooses is a draft
        self.verified, self.sure = len(self.prompt), 0
        self.drafted: list[tuple[int, float]] = []  # of each draft: the engine's step, and the time
        self.recomputed = self.ripe_for = 0
        self.flipped_at: list[int] = []
        self.held_back: list[float] = []

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) : self.verified]

    @property
    def drafts(self) -> list[int]:
        return self.tokens[self.verified :]

    @property
    def left(self) -> int:
        return self.count - (self.verified - len(self.prompt))

    @property
    def flips(self) -> int:
        return len(self.flipped_at)

    @property
    def replaying(self) -> bool:
        """Whether tokens that are final wait for the verifier's keys and values: a prompt, or after a preemption."""
        return self.sure < self.verified - 1

    @property
    def full(self) -> bool:
        """Whether it has a window of drafts, or all that it will have."""
        drafts = self.drafts
        return len(drafts) >= min(self.window, self.left) or not self.ends.isdisjoint(drafts)

    @property
    def ripe(self) -> bool:
        """Whether it waits for a verify pass."""
        return self.state == RUNNING and (self.replaying or self.full)

    @property
    def room(self) -> int:
        if self.full:
            return 0
        read = self.window if self.buffer is None else self.buffer - len(self.unread)
        return max(min(self.window, self.left, read) - len(self.drafts), 0)

    @property
    def paused(self) -> bool:
        return not self.full and not self.room

    def append(self, token: int, row: bytes | None) -> None:
        """One more draft; its logits count for nothing."""
        self.tokens.append(self.engine.perturbed(token))
        self.drafted.append((self.engine.steps, time.perf_counter()))

    def release(self, token: int, row: bytes | None) -> Exception | None:
        """One more token of the answer, chosen by the verifier. Returns what `on_token` raised, if it did."""
        self.verified += 1
        return super().append(token, row)


@dataclass
class Window:
    """Tokens of a deterministic request that a verify pass replays, from position `begin`.

    They are the last verified token and the drafts but the last, or final tokens that the verifier has not seen yet.
    An engine chooses from the logits behind the last `wanted` of them, as it does for a Part.
    """

    request: Verified
    begin: int
    tokens: list[int]

    @classmethod
    def of(cls, request: Verified) -> Window:
        begin, known = request.sure, len(request.tokens)
        end = min(begin + request.window, known if known == request.verified else known - 1)
        return cls(request, begin, request.tokens[begin:end])

    @property
    def skipped(self) -> int:
        """Tokens whose successors are final already."""
        return min(self.request.verified - 1 - self.begin, len(self.tokens))

    @property
    def wanted(self) -> int:
        return len(self.tokens) - self.skipped

    @property
    def count(self) -> int:
        """So that held + count is the position of the first token that is chosen."""
        return self.request.verified - self.request.held


class VerifyScheduler(Scheduler):
    """Requests that wait for the verifier keep their pages, and go into no other forward."""

    def plan(self) -> list[Part]:
        """The parts of the next forward. Who came behind a deterministic request that waits for its place waits too."""
        aside = [request for request in self.running if isinstance(request, Verified) and request.ripe]
        first = next(iter(self.verified_waiting()), None)
        behind = [request for request in self.waiting
                  if isinstance(request, Verified) or first is not None and request.number > first.number]
        self.running = [request for request in self.running if request not in aside]
        self.waiting = [request for request in self.waiting if request not in behind]
        self.max_batch -= len(aside)
        try:
            return super().plan()
        finally:
            self.max_batch += len(aside)
            for place, back in ((self.running, aside), (self.waiting, behind)):
                place.extend(back)
                place.sort(key=lambda request: request.number)

    def verified_waiting(self) -> list[Verified]:
        return [request for request in self.waiting if isinstance(request, Verified) and not request.paused]

    def admit(self) -> None:
        """Give waiting deterministic requests their place and all their pages, in the order in which they came."""
        for request in [request for request in self.waiting if not request.paused]:
            if not isinstance(request, Verified) or not self._admitted(request):
                return

    def _admitted(self, request: Verified) -> bool:
        while (found := self._room(request)) is None:
            paused = [other for other in self.running if other.paused]
            if not paused:
                return False
            self.preempt(paused[-1])
        self.cache.hold(found)
        needed = self.cache.needed(len(request.tokens)) - len(found)
        self.waiting.remove(request)
        self.running.append(request)
        self.running.sort(key=lambda request: request.number)
        request.state, request.pages = RUNNING, found + self.cache.take(needed)
        request.chain = [ROOT, *map(self.cache.number, found)]
        request.sure = request.held = len(found) * self.cache.page_size
        self.hits += request.sure
        return True

    def _room(self, request: Verified) -> list[int] | None:
        """The verified pages that it begins with, if there is a place for it and pages for all its tokens."""
        found = self._find(request.tokens[: request.verified])
        spare = self.cache.spare - sum(page in self.cache.idle for page in found)
        enough = self.cache.needed(len(request.tokens)) - len(found) <= spare
        return found if enough and len(self.running) < self.max_batch else None

    def _find(self, tokens: list[int]) -> list[int]:
        found: list[int] = []
        number, size = ROOT, self.cache.page_size
        for begin in range(0, len(tokens) - size, size):
            page = self.cache.known.get((number, tuple(tokens[begin : begin + size])))
            if page is None:
                break
            found.append(page)
            number = self.cache.number(page)
        return found

    def advance(self, request: Request, held: int) -> None:
        """What decode wrote for a deterministic request becomes known to nobody."""
        if isinstance(request, Verified):
            request.held = held
        else:
            super().advance(request, held)

    def settle(self, request: Verified, sure: int) -> None:
        """The verifier's keys and values of so many tokens lie in the pages; decode goes on behind them."""
        request.sure, request.ripe_for = sure, 0
        super().advance(request, sure)

    def preempt(self, request: Request) -> None:
        super().preempt(request)
        if isinstance(request, Verified):
            request.sure = request.ripe_for = 0
