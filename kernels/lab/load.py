"""A load test: random requests with faults, many at once; is a page lost, does an answer change?

    python -m kernels load --requests 10000 --seed 0

A model of random weights serves them. What a request should get is what it gets alone, in an engine of its own: its
tokens, and the digest of their logits. Requests come at random, and engines with settings drawn at random serve up
to 192 each; each engine but the last is stopped in the middle. The faults:

cancelled   by its client, at any time, also in the middle of a prompt
slow        a client that reads now and then, from a buffer of a few tokens
gone        a client that stops reading; the engine gives it up
raised      a client's on_token that raises
refused     an empty prompt, one longer than the context or than all pages, tokens that the vocabulary has not
poisoned    a token whose embedding is NaN, in the prompt or chosen by the model: there is no token behind it
stopped     still there when its engine was stopped

Pages are counted after every step. An answer that was cut short has to be the beginning of the one alone.
"""
from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from random import Random

import torch

from .. import runtime
from ..inference import Engine, Request, Sampler
from ..model.config import preset
from ..model.llama import Llama

POISON = 255  # the token whose embedding is NaN
PROMPTS, LONGEST, ANSWER = 80, 32, 6
CONTEXT = 64
SLOW, GONE, CANCELLED, RAISED, REFUSED, POISONED = "slow", "gone", "cancelled", "raised", "refused", "poisoned"
FAULTS = {"": 60, SLOW: 10, GONE: 4, CANCELLED: 12, RAISED: 4, REFUSED: 6, POISONED: 4}  # percent
EACH = 6  # requests an engine serves, for each that it runs at once


@dataclass(frozen=True)
class Job:
    """What a client asks for."""

    prompt: tuple[int, ...]
    count: int
    sampler: Sampler


@dataclass
class Tally:
    """What became of the requests: how many ended how, what the engines did, and what was wrong.

    ended    'done', or the fault, -> how many
    engine   Engine.counts() of all engines
    changed  answers that are not those given alone, nor their beginning
    lost     a line for each count of pages that was wrong, and for each fault that was not told its client
    """

    ended: Counter = field(default_factory=Counter)
    engine: Counter = field(default_factory=Counter)
    changed: int = 0
    lost: list[str] = field(default_factory=list)

    def __bool__(self):
        return not self.changed and not self.lost

    def __str__(self):
        return "\n".join([f"{sum(self.ended.values()):,} requests: "
                          + ", ".join(f"{count:,} {how}" for how, count in self.ended.most_common()),
                          ", ".join(f"{count:,} {what}" for what, count in self.engine.items() if what != "requests"),
                          f"{self.changed} answers changed, {len(self.lost)} pages or errors lost", *self.lost[:5]])


def small_model(ops: str = "tiled", dtype: torch.dtype | None = None, device="cpu") -> Llama:
    """The preset tiny with random weights and a context of CONTEXT, where one token's embedding is NaN."""
    dtype = dtype or (torch.bfloat16 if ops == "invariant" else torch.float32)
    model = Llama(dataclasses.replace(preset("tiny"), context=CONTEXT), ops=ops, dtype=dtype, device=device, seed=5)
    model.embedding[POISON] = float("nan")
    return model


def jobs(draw: Random) -> list[Job]:
    """What may be asked for: prompts that begin alike, some that repeat themselves, and a third of answers drawn."""
    heads = [[draw.randrange(POISON) for _ in range(LONGEST)] for _ in range(6)]
    made = []
    for _ in range(PROMPTS):
        begin = draw.choice(heads)[: draw.randint(0, LONGEST - 8)]
        end = [draw.randrange(POISON) for _ in range(draw.randint(1, 8))]
        prompt = (*begin, *end * draw.choice([1, 1, 3]))
        sampler = draw.choice([Sampler(), Sampler(), Sampler(temperature=1.5, top_k=40, seed=draw.randrange(1 << 40))])
        made.append(Job(prompt, draw.randint(1, ANSWER), sampler))
    return made


def alone(model: Llama, job: Job) -> Request:
    """A request that an engine of its own has served."""
    engine = Engine(model, pages=8, max_batch=1, digests=True, graphs=False)
    request = engine.submit(job.prompt, job.count, job.sampler)
    engine.run()
    return request


def settings(draw: Random) -> dict:
    """An engine's, drawn; pages are few, so that they run out."""
    size = draw.choice([1, 3, 8, 16])
    most = draw.choice([2, 16, 32])
    return {"page_size": size, "pages": -(-CONTEXT // size) * draw.choice([1, 3, 6]), "max_batch": most,
            "budget": most + draw.choice([3, 30, 64]), "chunk": draw.choice([3, 8, 64]),
            "sharing": draw.random() < 0.7, "speculate": draw.choice([0, 0, 2, 4])}


class Clients:
    """Random clients of one engine after another."""

    def __init__(self, model: Llama, seed: int):
        self.model, self.draw, self.tally = model, Random(seed), Tally()
        self.jobs = jobs(self.draw)
        self.alone = cache(partial(alone, model))

    def serve(self, most: int) -> int:
        """One engine serves up to `most` requests, which come at random. Returns how many.

        It is stopped when a few are left, but for one that serves all of `most`.
        """
        drawn = settings(self.draw)
        engine, count = Engine(self.model, **drawn, digests=True), min(most, EACH * drawn["max_batch"])
        here: list[tuple[Request, Job, str]] = []
        came, few = 0, 0 if count == most else self.draw.randint(0, 12)
        while came < count or len(here) > few:
            for _ in range(min(self.draw.randint(0, drawn["max_batch"] // 2), count - came)):
                came += 1
                self._come(engine, here)
            engine.step()
            self._check(engine)
            here = [one for one in here if not self._turn(engine, *one)]
        engine.stop()
        self._check(engine)
        if engine.cache.spare != engine.cache.pages:
            self.tally.lost.append(f"{engine.cache} was stopped and still holds pages")
        for request, job, _ in here:
            self._compare(request, job, "stopped" if isinstance(request.error, RuntimeError) else request.state)
        self.tally.engine.update(engine.counts())
        return count

    def _come(self, engine: Engine, here: list) -> None:
        kind = self.draw.choices(list(FAULTS), FAULTS.values())[0]
        job = self.draw.choice(self.jobs)
        if kind == REFUSED:
            return self._refused(engine)
        if kind == POISONED:
            at = self.draw.randrange(len(job.prompt))
            job = dataclasses.replace(job, prompt=(*job.prompt[:at], POISON, *job.prompt[at + 1 :]))
        options = {"buffer": self.draw.randint(1, 3), "patience": 5 if kind == GONE else None} \
            if kind in (SLOW, GONE) else {"on_token": self._raises} if kind == RAISED else {}
        return here.append((engine.submit(job.prompt, job.count, job.sampler, **options), job, kind))

    def _raises(self, request: Request, token: int) -> None:
        if self.draw.random() < 0.3:
            raise ConnectionResetError(f"the client of request {request.number} has hung up")

    def _refused(self, engine: Engine) -> None:
        prompt, count = self.draw.choice([([], 1), ([1] * CONTEXT, 1), ([1] * 9 * CONTEXT, 1), ([256], 2), ([-1], 2)])
        try:
            engine.submit(prompt, count)
            self.tally.lost.append(f"a prompt of {len(prompt)} tokens that is none was taken")
        except ValueError:
            self.tally.ended[REFUSED] += 1

    def _turn(self, engine: Engine, request: Request, job: Job, kind: str) -> bool:
        """What a client does after a step; True once its request has ended."""
        if kind == CANCELLED and self.draw.random() < 0.2:
            request.cancel()
        if kind == SLOW and self.draw.random() < 0.3:
            request.read(self.draw.randint(1, 2))
        if not request.finished:
            return False
        if isinstance(request.error, RuntimeError) and request.answer[-1:] == [POISON]:
            kind = POISONED  # the model chose that token, and a request alone fails behind it too
        expected = {POISONED: RuntimeError, GONE: TimeoutError, RAISED: ConnectionResetError}.get(kind)
        if request.error is not None and not isinstance(request.error, expected or ()):
            self.tally.lost.append(f"{request} failed with {request.error!r}")
        self._compare(request, job, kind if request.state != "done" else "done")
        return True

    def _compare(self, request: Request, job: Job, how: str) -> None:
        self.tally.ended[how] += 1
        if POISON in job.prompt:
            self.tally.changed += bool(request.answer)
            return
        wanted = self.alone(job)
        if request.state == "done":
            same = request.answer == wanted.answer and request.logit_digest == wanted.logit_digest
        else:
            same = request.answer == wanted.answer[: len(request.answer)]
        self.tally.changed += not same

    def _check(self, engine: Engine) -> None:
        try:
            engine.check()
        except RuntimeError as error:
            self.tally.lost.append(str(error))


def load(requests: int, seed: int = 0, model: Llama | None = None,
         watch: Callable[[int], None] = lambda served: None) -> Tally:
    """Serve so many random requests. `watch` is called with how many were served, after each engine.

    Raises ValueError for a count below 1.
    """
    if type(requests) is not int or requests < 1:
        raise ValueError(f"requests must be a whole number of at least 1, got {requests!r}")
    clients, served = Clients(model or small_model(), seed), 0
    while served < requests:
        served += clients.serve(requests - served)
        watch(served)
    return clients.tally


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels load", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", choices=("tiled", "invariant", "default"), default="invariant" if runtime.HAS_GPU else
                        "tiled", help="by default tiled on a CPU, and invariant on a GPU")
    a = parser.parse_args(argv)
    start, model = time.perf_counter(), small_model(a.ops, device=runtime.device())
    tally = load(a.requests, a.seed, model, lambda served: print(f"{served:,} served", flush=True))
    print(f"{tally}\n{time.perf_counter() - start:.0f} s, {model}")
    return 0 if tally else 1
