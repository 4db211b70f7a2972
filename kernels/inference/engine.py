"""An engine that serves many requests at once: continuous batching over a paged cache.

    from kernels.inference import Engine, Sampler
    engine = Engine(model, pages=512, page_size=16, max_batch=32, budget=256, chunk=64)   # a kernels.model.Llama
    first = engine.submit(b"def f(x):", 32)                        # greedy
    other = engine.submit(b"import ", 32, Sampler(temperature=0.8, seed=7))
    for token in first:                                            # streams; each step serves all requests
        print(token)
    engine.run()                                                   # until nothing is left to do
    other.answer, other.state, other.error                         # tokens, 'done', None
    first.cancel(); engine.stop(); engine.counts()                 # at any time

A step is one forward: a token (with drafts) for each request that has begun to answer, and chunks of prompts as far as
the budget reaches. The model decides the ops. With `invariant` or `tiled` ones a request's answer depends on its
prompt, its sampler and nothing else: not on the requests beside it, chunks, page sizes, hits, preemptions or drafts.

One thread: whoever calls `step`, `run` or iterates over a request makes the engine go on, for all. A forward that
raises (memory that runs out, Ctrl-C) has changed no request, and the step may be tried again.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from ..model.llama import Llama
from ..model.sampling import NONE, Sampler
from ..model.steps import encode
from .graphs import DecodeGraphs
from .pages import PagedCache
from .request import CANCELLED, DONE, FAILED, Request, rows_of
from .scheduler import Part, Scheduler

GREEDY = Sampler()


class Engine:
    """Serves requests to one model.

    model      a Llama; its ops are the engine's
    pages      of the KV cache, each of `page_size` tokens
    max_batch  the most requests that run at once
    budget     the most tokens of a forward; at least max_batch. chunk: the most of one prompt
    sharing    whether requests that begin alike share pages (the prefix cache)
    speculate  the most drafts of a request that are verified in one forward; 0 for none
    graphs     whether decode steps are CUDA graphs; by default on a GPU
    digests    whether each request's `logit_digest` is kept, which reads all its logits back

    Raises TypeError or ValueError that names the argument, MemoryError, before anything is allocated, for a cache
    that cannot fit.
    """

    def __init__(self, model: Llama, *, pages: int = 512, page_size: int = 16, max_batch: int = 32, budget: int = 256,
                 chunk: int = 128, sharing: bool = True, speculate: int = 0, graphs: bool | None = None,
                 digests: bool = False):
        for name, value, least in (("max_batch", max_batch, 1), ("chunk", chunk, 1), ("speculate", speculate, 0),
                                   ("budget", budget, max_batch)):
            if type(value) is not int or value < least:
                also = " = max_batch" if name == "budget" else ""
                raise ValueError(f"{name} must be a whole number of at least {least}{also}, got {value!r}")
        gpu = model.device.type == "cuda"
        if graphs and not gpu:
            raise ValueError(f"graphs must be False or None without a GPU, got {graphs!r} for a model on "
                             f"{model.device}")
        self.model, self.digests, self.stopped, self.stepping = model, digests, False, False
        self.cache = PagedCache(model, pages, page_size, sharing)
        self.scheduler = Scheduler(self.cache, max_batch, budget, chunk, speculate)
        self.graphs = DecodeGraphs(model, self.cache, max_batch) if gpu and graphs is not False else None
        self.number = self.steps = self.tokens = self.drafted = self.accepted = 0

    def submit(self, prompt: bytes | str | Iterable[int], count: int, sampler: Sampler = GREEDY, *,
               stop: Iterable[int] = (), buffer: int | None = None, patience: int | None = None,
               on_token: Callable[[Request, int], None] | None = None) -> Request:
        """A request for up to `count` tokens behind a prompt; it begins when there is a place for it.

        stop      tokens that end the answer, and are its last
        buffer    the most tokens that wait unread; then the request pauses. None: no limit
        patience  steps that a paused request is waited for; then it fails with TimeoutError. None: for ever
        on_token  called with the request and each token; if it raises, this request fails with what it raised

        Raises TypeError or ValueError that names the argument, RuntimeError once the engine is stopped; nothing
        else changes then.
        """
        if self.stopped:
            raise RuntimeError("the engine was stopped and takes no more requests")
        for name, value in (("count", count), ("buffer", buffer), ("patience", patience)):
            if (value is not None or name == "count") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, got {type(sampler).__name__}")
        tokens = encode(self.model.config, prompt, count)
        needed = self.cache.needed(len(tokens) + count - 1)
        if needed > self.cache.pages:
            raise ValueError(f"prompt of {len(tokens)} tokens and the {count} to follow need {needed} pages of "
                             f"{self.cache.page_size} tokens, and the engine has {self.cache.pages}")
        self.number += 1
        request = Request(self, self.number, tokens, count, sampler, frozenset(stop), buffer, patience, on_token)
        self.scheduler.waiting.append(request)
        return request

    def step(self) -> int:
        """One forward. Returns how many tokens went through it: 0 if all requests have ended or wait for clients."""
        if self.stepping:
            raise RuntimeError("a step is under way: on_token may read, cancel and submit, and not make the engine go "
                               "on")
        self.stepping = True
        try:
            self._lose_patience()
            parts = self.scheduler.plan()
            if parts:
                self._go(parts)
            return sum(part.size for part in parts)
        finally:
            self.stepping = False

    def _go(self, parts: list[Part]) -> None:
        rows = self._forward(parts)
        chosen = self._chosen(parts, rows)
        bits = rows_of(rows) if self.digests else [None] * len(rows)
        self.steps += 1
        self.tokens += sum(part.size for part in parts)
        begin = 0
        for part in parts:
            end = begin + part.wanted
            self._commit(part, chosen[begin:end], bits[begin:end])
            begin = end

    def warm_up(self) -> None:
        """Capture every graph of decode now, so that no request waits for one. Without graphs nothing happens."""
        if self.graphs is not None:
            self.graphs.capture()

    def run(self) -> None:
        """Steps until every request has ended, or waits for a client that does not read."""
        while self.step() or any(request.paused and request.patience for request in self.scheduler.requests):
            pass

    def cancel(self, request: Request) -> None:
        """End a request now; its pages are given back. Nothing happens to one that has ended."""
        self._end(request, CANCELLED)

    def stop(self) -> None:
        """End every request: those that are not done fail with RuntimeError. Nothing is accepted any more."""
        self.stopped = True
        for request in list(self.scheduler.requests):
            self._end(request, FAILED, RuntimeError(f"the engine was stopped before request {request.number} was done"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def check(self) -> None:
        """Count the pages. Raises RuntimeError if one is lost or held by a request that has ended."""
        self.cache.check(request.pages for request in self.scheduler.requests)

    def counts(self) -> dict[str, int]:
        """What has happened so far: forwards, tokens that went through them, and so on."""
        return {"requests": self.number, "steps": self.steps, "tokens": self.tokens,
                "preemptions": self.scheduler.preemptions, "tokens found in the cache": self.scheduler.hits,
                "pages taken again": self.cache.evictions, "drafts": self.drafted, "drafts accepted": self.accepted}

    def _forward(self, parts: list[Part]) -> torch.Tensor:
        """The logits that the parts want, in their order."""
        tokens = [token for part in parts for token in part.tokens]
        given = ([part.size for part in parts], [part.request.held for part in parts],
                 [part.request.pages for part in parts])
        if self.graphs is not None and len(tokens) == len(parts) == sum(part.wanted for part in parts):
            return self.graphs(tokens, *given)
        batch = self.cache.batch(*given, [part.wanted for part in parts])
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.model.device)
        return self.model.forward(ids, batch, self.cache)

    def _chosen(self, parts: list[Part], rows: torch.Tensor) -> list[int]:
        """The token chosen from each row of logits: one call for each kind of sampler."""
        kinds, places = defaultdict(list), []
        for part in parts:
            for behind in range(part.wanted):
                kinds[_kind(part.request.sampler)].append(len(places))
                places.append((part.request.held + part.count + behind, part.request.sampler.seed))
        if list(kinds) == [GREEDY]:
            return GREEDY(rows).tolist()
        chosen = [NONE] * len(places)
        for kind, which in kinds.items():
            index, positions, seeds = torch.tensor([(i, *places[i]) for i in which], dtype=torch.int64,
                                                   device=rows.device).unbind(1)
            for i, token in zip(which, kind(rows[index], positions, seeds).tolist(), strict=True):
                chosen[i] = token
        return chosen

    def _commit(self, part: Part, chosen: list[int], bits: list[bytes | None]) -> None:
        """A part went through: its tokens are held, and those chosen are appended as far as the drafts agree."""
        request = part.request
        if request.finished:
            return None  # cancelled by another's on_token, a moment ago
        if not chosen:
            return self.scheduler.advance(request, request.held + part.count)
        self.drafted += len(part.drafts)
        for number, (token, row) in enumerate(zip(chosen, bits, strict=True)):
            if token == NONE:
                error = RuntimeError(f"request {request.number} has no next token behind {len(request.tokens)}: its "
                                     "logits are not numbers")
                return self._end(request, FAILED, error, spoiled=True)
            error = request.append(token, row)
            if request.finished:
                return None  # cancelled by its own on_token
            if error is not None or not request.left or token in request.stop:
                self.scheduler.advance(request, len(request.tokens) - 1)
                return self._end(request, DONE if error is None else FAILED, error)
            if part.drafts[number : number + 1] != [token]:
                break
            self.accepted += 1
        return self.scheduler.advance(request, len(request.tokens) - 1)

    def _lose_patience(self) -> None:
        for request in self.scheduler.requests:
            request.waited = request.waited + 1 if request.paused else 0
            if request.patience is not None and request.waited > request.patience:
                error = TimeoutError(f"request {request.number} was given up: its client left {request.buffer} tokens "
                                     f"unread for {request.patience} steps")
                self._end(request, FAILED, error)

    def _end(self, request: Request, state: str, error: Exception | None = None, spoiled: bool = False) -> None:
        if not request.finished:
            self.scheduler.drop(request, spoiled)
            request.state, request.error = state, error


def _kind(sampler: Sampler) -> Sampler:
    """The sampler without its seed: requests of one kind are one call."""
    return GREEDY if sampler.temperature == 0 else Sampler(sampler.temperature, sampler.top_k, sampler.top_p)
