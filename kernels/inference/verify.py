"""Decode, verify, roll back: an engine whose deterministic requests give one answer under any load.

    from kernels.inference.verify import VerifyingEngine
    engine = VerifyingEngine(model, window=64, group=8, pages=512, max_batch=32)   # an Engine in all else
    sure = engine.submit(b"def f(x):", 32, verify=True)                            # deterministic
    other = engine.submit(b"import ", 32)                                          # as in any engine
    for token in sure: print(token)                                                # verified tokens alone

Decode takes both alike, in whatever batch there is, and what it chooses for a deterministic request is a draft. Once
such a request has W drafts, or all it will have, a verify pass replays a window of W tokens: the last verified token
and the W - 1 behind it. Drafts up to the first that differs are kept, that one is replaced by the verifier's choice,
the rest is dropped and decoded again. The verifier's keys and values take the place of decode's. A prompt is read by
the verifier alone, window by window, for decode's keys would follow the load.

Two verifiers:

default    PyTorch's ops at one shape: a pass is G windows of W tokens, dummies where there are fewer, and each attends
           to `reach` keys, those behind a token masked. One shape calls the same kernels. That they give a row the
           same bits at each place of that shape is *certified by test, not by construction*
invariant  this suite's ops (`tiled` on a CPU in float32): windows as long as they are, nothing padded, for the bits do
           not follow the shape

Source: LLM-42: Enabling Determinism in LLM Inference with Verified Speculation, 2026. There a prompt is read apart from
other requests, and attention's keys are not split; here a prompt is windows too, and keys are padded to one length.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from ..model.llama import Llama
from ..model.sampling import NONE, Sampler
from .engine import GREEDY, Engine
from .lookup import Lookup
from .one_shape import OneShape
from .request import DONE, FAILED, Request, rows_of
from .verified import Verified, VerifyScheduler, Window

VERIFIERS = ("default", "invariant", "tiled")


class VerifyingEngine(Engine):
    """An Engine whose requests may be verified, each by its own wish; the others are served as by any Engine.

    window      W, the tokens of a request that one pass replays
    group       G, the requests of one pass
    verifier    the ops of the verify pass: default, invariant or tiled
    reach       default verifier: the most tokens of a deterministic request; by default what the context and the pages
                allow. Each pass reads so many keys for each of its G windows
    wait        steps that a request with a full window waits for others to fill the group
    flip_every  a fault for tests: each such draft is changed to the token behind it in the vocabulary

    The rest as in Engine. Raises TypeError or ValueError that names the argument, and MemoryError, before anything is
    served, for a pass that cannot fit.
    """

    def __init__(self, model: Llama, *, window: int = 64, group: int = 8, verifier: str = "default",
                 reach: int | None = None, wait: int = 8, flip_every: int | None = None, **engine):
        most = model.config.context if reach is None else reach
        for name, value, least in (("window", window, 1), ("group", group, 1), ("wait", wait, 0), ("reach", most, 1),
                                   ("flip_every", 1 if flip_every is None else flip_every, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if verifier not in VERIFIERS:
            raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
        verifying = model.using(verifier)  # refuses a dtype that these ops have not
        super().__init__(model, **engine)
        s = self.scheduler
        self.scheduler = VerifyScheduler(self.cache, s.max_batch, s.budget, s.chunk, s.speculate)
        self.window, self.group, self.wait, self.flip_every = window, group, wait, flip_every
        self.reach = min(most, model.config.context, self.cache.pages * self.cache.page_size)
        if window > self.reach:
            raise ValueError(f"window must be at most the {self.reach} tokens that a request may have here, or no "
                             f"group could be padded to it, got {window}")
        self.verifier, self.shape = verifying, None
        if verifier == "default":
            self.shape = OneShape(model, self.cache, group, window, self.reach)
            self.verifier = copy.copy(verifying)
            self.verifier.ops = replace(verifying.ops, attention=self.shape.attention)
        self.passes = self.windows = self.dummies = self.replayed = self.flips = self.recomputed = 0
        self.verified = self.drafts = self.held_steps = 0
        self.held_seconds = 0.0

    def submit(self, prompt, count: int, sampler: Sampler = GREEDY, *, verify: bool = False,
               stop: Iterable[int] = (), buffer: int | None = None, **more) -> Request:
        """As Engine.submit; with verify=True the request is deterministic, and a `Verified` is returned.

        Its buffer must hold a window, and with the default verifier all its tokens must lie within `reach`.
        """
        if verify and type(buffer) is int and 0 < buffer < self.window:
            raise ValueError(f"buffer must hold the {self.window} tokens of a window, which leave at once, got "
                             f"{buffer}")
        request = super().submit(prompt, count, sampler, stop=stop, buffer=buffer, **more)
        if not verify:
            return request
        self.scheduler.waiting.remove(request)
        needed = len(request.prompt) + count
        if self.shape and needed > self.reach:
            raise ValueError(f"prompt of {len(request.prompt)} tokens and the {count} to follow are {needed}, and a "
                             f"verify pass reaches {self.reach}")
        verified = Verified(request, self.window)
        self.scheduler.waiting.append(verified)
        return verified

    def step(self) -> int:
        """Verify passes that are due, then one forward of decode. Returns how many tokens went through them."""
        if self.stepping:
            return super().step()  # which refuses
        replayed = self._verify()
        served = super().step()
        return replayed + served if replayed + served else self._verify(idle=True)

    def counts(self) -> dict[str, int | float]:
        """As Engine.counts, and what verification did; `held back` are totals over the drafts that were kept."""
        return super().counts() | {
            "verify passes": self.passes, "windows": self.windows, "dummy windows": self.dummies,
            "tokens replayed": self.replayed, "drafts decoded": self.drafts, "tokens verified": self.verified,
            "flips": self.flips, "tokens recomputed": self.recomputed, "steps held back": self.held_steps,
            "seconds held back": self.held_seconds}

    def perturbed(self, token: int) -> int:
        """The draft that stands for a chosen token: another one where the fault switch says so."""
        self.drafts += 1
        if self.flip_every is None or self.drafts % self.flip_every:
            return token
        return (token + 1) % self.model.config.vocab_size

    # --- which windows, and when

    def _verify(self, idle: bool = False) -> int:
        """Replay the groups that are due, with `idle` all that there are; a window of each request, so that no long
        prompt holds others up. Returns how many tokens that were.
        """
        self.stepping, replayed, seen = True, 0, set()
        try:
            self.scheduler.admit()
            ripe = self._ripe()
            for request in ripe:
                request.ripe_for += 1
            while ripe and (idle or self._due(ripe)):
                windows = [Window.of(request) for request in ripe[: self.group]]
                self._replay(windows)
                replayed += sum(len(window.tokens) for window in windows)
                seen |= {window.request.number for window in windows}
                ripe = [request for request in self._ripe() if request.number not in seen]
        finally:
            self.stepping = False
        return replayed

    def _ripe(self) -> list[Verified]:
        ripe = [request for request in self.scheduler.running if isinstance(request, Verified) and request.ripe]
        return sorted(ripe, key=lambda request: (-request.ripe_for, request.number))

    def _due(self, ripe: list[Verified]) -> bool:
        """A group is full, or no other can join, or one has waited long enough; prompts do not wait."""
        drafting = any(isinstance(other, Verified) and not other.ripe and not other.paused
                       for other in self.scheduler.running)
        return len(ripe) >= self.group or not drafting or any(
            request.replaying or request.ripe_for > self.wait for request in ripe)

    # --- the pass

    def _replay(self, windows: list[Window]) -> None:
        rows = self._padded_rows(windows) if self.shape else self._rows(windows)
        chosen = self._chosen(windows, rows)
        bits = rows_of(rows) if self.digests else [None] * len(rows)
        self.passes += 1
        self.windows += len(windows)
        self.dummies += self.group - len(windows) if self.shape else 0
        self.replayed += sum(len(window.tokens) for window in windows)
        begin = 0
        for window in windows:
            end = begin + window.wanted
            self._settle(window, chosen[begin:end], bits[begin:end])
            begin = end

    def _rows(self, windows: list[Window]) -> torch.Tensor:
        """The logits that the windows want: a forward of their own lengths."""
        batch = self.cache.batch([len(window.tokens) for window in windows], [window.begin for window in windows],
                                 [window.request.pages for window in windows], [window.wanted for window in windows])
        ids = [token for window in windows for token in window.tokens]
        return self.verifier.forward(self._tensor(ids), batch, self.cache)

    def _padded_rows(self, windows: list[Window]) -> torch.Tensor:
        """The same from a forward of G x W tokens. What pads a window, or stands for one, lies in nobody's page."""
        size, dummies = self.window, self.group - len(windows)
        batch = self.shape.batch([window.begin for window in windows], [window.request.pages for window in windows])
        ids = [window.tokens + [0] * (size - len(window.tokens)) for window in windows] + [[0] * size] * dummies
        logits = self.verifier.forward(self._tensor(sum(ids, [])), batch, self.cache)
        return logits[self._tensor([size * g + i for g, window in enumerate(windows)
                                    for i in range(window.skipped, len(window.tokens))])]

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)

    # --- what is kept

    def _settle(self, window: Window, chosen: list[int], bits: list[bytes | None]) -> None:
        """Keep the drafts up to the first that differs, put the verifier's token there, and drop the rest."""
        request = window.request
        if request.finished:
            return None  # cancelled by another's on_token, a moment ago
        drafts, drafted, final = request.drafts, request.drafted, request.verified
        if not chosen:
            return self.scheduler.settle(request, window.begin + len(window.tokens))
        request.tokens[final:], request.drafted = [], []
        for number, (token, row) in enumerate(zip(chosen, bits, strict=True)):
            if token == NONE:
                return self._spoil(request)
            agreed = drafts[number : number + 1] == [token]
            self._count(request, drafted[number] if agreed else None)
            error = request.release(token, row)
            if request.finished:
                return None  # cancelled by its own on_token
            if error is not None or not request.left or token in request.ends:
                self.scheduler.settle(request, request.verified - 1)
                return self._finish(request, DONE if error is None else FAILED, error)
            if drafts and not agreed:
                self._roll_back(request, len(drafts) - number - 1)
                break
        else:
            request.tokens += drafts[len(chosen):]
            request.drafted = drafted[len(chosen):]
        return self.scheduler.settle(request, request.verified - 1)

    def _count(self, request: Verified, drafted: tuple[int, float] | None) -> None:
        self.verified += 1
        if drafted is not None:
            request.held_back.append(time.perf_counter() - drafted[1])
            self.held_steps += self.steps - drafted[0]
            self.held_seconds += request.held_back[-1]

    def _roll_back(self, request: Verified, dropped: int) -> None:
        request.lookup = Lookup(request.tokens)  # which has read dropped ones
        request.flipped_at.append(len(request.answer) - 1)
        request.recomputed += dropped
        self.flips += 1
        self.recomputed += dropped

    def _spoil(self, request: Verified) -> None:
        error = RuntimeError(f"request {request.number} has no next token behind {len(request.tokens)}: its verified "
                             "logits are not numbers")
        self._finish(request, FAILED, error, spoiled=True)
        self.cache.kv[:, self.cache.pages] = 0  # padding wrote there: what is masked must be 0 x 0

    def _finish(self, request: Verified, state: str, error: Exception | None, spoiled: bool = False) -> None:
        self.scheduler.drop(request, spoiled)
        request.state, request.error = state, error
