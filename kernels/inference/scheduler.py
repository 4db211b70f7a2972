"""Which requests go into the next forward, with how many tokens, and who gives up pages when there are none.

Every running request that only waits for its next token gets one. What is left of the budget goes to drafts, then to
prompts: a chunk each, the oldest request first; then to requests that wait. When pages run out, the request that
came last gives up its own, those that wait for their clients before others; its tokens are computed again later.
The oldest request that is not paused never gives up pages, so it always ends.
"""
from __future__ import annotations

from dataclasses import dataclass

from .pages import ROOT, PagedCache
from .request import RUNNING, WAITING, Request


@dataclass
class Part:
    """A request's share of a forward: `count` tokens behind those that it holds, then drafts to be verified."""

    request: Request
    count: int
    drafts: list[int]

    @property
    def size(self) -> int:
        return self.count + len(self.drafts)

    @property
    def tokens(self) -> list[int]:
        held = self.request.held
        return self.request.tokens[held : held + self.count] + self.drafts

    @property
    def wanted(self) -> int:
        """Of how many of its last tokens logits are wanted: none in the middle of a prompt."""
        return 1 + len(self.drafts) if self.count == self.request.pending else 0


class Scheduler:
    """The requests that run and that wait, and the pages that they hold."""

    def __init__(self, cache: PagedCache, max_batch: int, budget: int, chunk: int, speculate: int):
        self.cache, self.max_batch, self.budget, self.chunk, self.speculate = cache, max_batch, budget, chunk, speculate
        self.waiting: list[Request] = []  # both in the order in which they came
        self.running: list[Request] = []
        self.preemptions = self.hits = 0  # how often; tokens found in the cache

    @property
    def requests(self) -> list[Request]:
        """All that have not ended."""
        return self.running + self.waiting

    def plan(self) -> list[Part]:
        """The parts of the next forward, pages for them taken; empty if there is nothing to do."""
        parts: dict[int, Part] = {}
        ready = [request for request in self.running if not request.paused]
        left = self._decodes(parts, [request for request in ready if request.pending == 1])
        for request in (request for request in ready if request.pending > 1):
            left -= self._chunk(parts, request, left)
        preempted = any(request.state == WAITING for request in ready)
        while not preempted and left > 0 and (request := self._next()) is not None:
            left -= self._chunk(parts, request, left)
        return list(parts.values())

    def _decodes(self, parts, requests) -> int:
        """One token for each, and drafts as long as the budget reaches. Returns what is left of it."""
        left = self.budget - len(requests)
        for request in requests:
            most = min(self.speculate, left, request.room - 1)
            part = Part(request, 1, request.lookup.draft(most))
            if self._give_pages(parts, part):
                left -= len(part.drafts)
        return left

    def _chunk(self, parts, request: Request, left: int) -> int:
        """A chunk of what is pending, as far as `left` reaches. Returns its size."""
        count = min(request.pending, self.chunk, left)
        return count if count > 0 and self._give_pages(parts, Part(request, count, [])) else 0

    def _next(self) -> Request | None:
        """The next waiting request, made running with what the cache knows of it; None if none can begin."""
        request = next((request for request in self.waiting if not request.paused), None)
        if request is None:
            return None
        while (found := self._fits(request)) is None:
            paused = [other for other in self.running if other.paused]
            if not paused:
                return None
            self.preempt(paused[-1])
        self.cache.hold(found)
        self.waiting.remove(request)
        self.running.append(request)
        self.running.sort(key=lambda request: request.number)
        request.state, request.pages, request.held = RUNNING, found, len(found) * self.cache.page_size
        request.chain = [ROOT, *map(self.cache.number, found)]
        self.hits += request.held
        return request

    def _fits(self, request: Request) -> list[int] | None:
        """The known pages that a waiting request begins with, if there is a place for it, and pages for all its tokens.

        Pages for a chunk would do, but would soon be taken away again.
        """
        found = self.cache.find(request.tokens)
        spare = self.cache.spare - sum(page in self.cache.idle for page in found)
        enough = self.cache.needed(len(request.tokens)) - len(found) <= spare
        return found if enough and len(self.running) < self.max_batch else None

    def _give_pages(self, parts: dict[int, Part], part: Part) -> bool:
        """Pages for a part, others' if none are spare. False if the request itself had to give up its own."""
        request = part.request
        if request.state != RUNNING:
            return False  # it gave up its pages to an older one
        missing = self.cache.needed(request.held + part.size) - len(request.pages)
        while missing > self.cache.spare:
            victim = max(self.running, key=lambda other: (other.paused, other.number))
            self.preempt(victim)
            parts.pop(victim.number, None)
            if victim is request:
                return False
        request.pages += self.cache.take(max(missing, 0))
        parts[request.number] = part
        return True

    def preempt(self, request: Request) -> None:
        """Take a running request's pages away and let it wait; its tokens stay."""
        self.drop(request)
        request.state = WAITING
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.append(request)
        self.waiting.sort(key=lambda request: request.number)

    def advance(self, request: Request, held: int) -> None:
        """So many tokens of a request now lie in its pages; once it has an answer, those that are full become known.

        Not before: a NaN in a prompt reaches the tokens before it in its block (0 x NaN), and would be shared.
        """
        request.held, size = held, self.cache.page_size
        for page in range(len(request.chain) - 1, held // size if request.answer else 0):
            tokens = request.tokens[page * size : (page + 1) * size]
            request.chain.append(self.cache.keep(request.chain[-1], tokens, request.pages[page]))

    def drop(self, request: Request, spoiled: bool = False) -> None:
        """A request is neither running nor waiting any more, and holds nothing."""
        for place in (self.running, self.waiting):
            if request in place:
                place.remove(request)
        self.cache.release(request.pages, spoiled)
        request.pages, request.held, request.chain = [], 0, [ROOT]
