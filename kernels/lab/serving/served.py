"""One prompt served many times among strangers: the answers, and the digests of the logits they were chosen from."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from ...inference import Engine, Request, Sampler
from ...inference.verify import VerifyingEngine
from ...model.llama import Llama
from .loads import Call, Load

SEED = 7
WINDOW, GROUP, FLIP_EVERY, KEYS = 8, 4, 16, 32  # of a verifying server; its passes read a multiple of so many keys


@dataclass
class Served:
    """What our requests got: (answer, digest of its logits) -> how many requests, and what the engine counted."""

    found: Counter[tuple[tuple[int, ...], str]] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Served) -> Served:
        return Served(self.found + other.found, self.counts + other.counts)

    @property
    def requests(self) -> int:
        return sum(self.found.values())

    @property
    def answers(self) -> dict[tuple[int, ...], int]:
        """Answer -> how many requests got it, the most frequent first."""
        total: Counter = Counter()
        for (answer, _), number in self.found.items():
            total[answer] += number
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    @property
    def digests(self) -> set[str]:
        return {digest for _, digest in self.found}

    @property
    def first_difference(self) -> int | None:
        """The first token, counted from 0, in which two answers differ; None if all are the same."""
        return first_difference(self.answers)

    def __str__(self):
        counts = {"request": self.requests, "answer": len(self.answers), "digest": len(self.digests)}
        return ", ".join(f"{number} {what}{'s' * (number != 1)}" for what, number in counts.items()) + " of logits"


def first_difference(answers: Iterable[Sequence[int]]) -> int | None:
    """The first place in which two of these differ; None if they are the same."""
    answers = list(answers)
    shortest = min(map(len, answers), default=0)
    differs = (place for place in range(shortest) if len({answer[place] for answer in answers}) > 1)
    return next(differs, shortest if len({len(answer) for answer in answers}) > 1 else None)


def serve(model: Llama, load: Load, sampler: Sampler = Sampler(), verify: bool = False) -> Served:  # noqa: B008
    """Serve a load, our requests with this sampler. Raises what a request of ours failed with.

    verify  our requests are verified, whatever the server at one shape, and one in FLIP_EVERY drafts is changed

    The pages are counted in the end: RuntimeError if one is lost.
    """
    engine, ours, waiting, step = _engine(model, load, verify), [], list(load.calls), 0
    to_cancel: list[tuple[int, Request]] = []
    while waiting or engine.scheduler.requests:
        while waiting and waiting[0].arrives <= step:
            call = waiting.pop(0)
            sure = {"verify": True} if verify and call.seed is None else {}
            request = engine.submit(call.prompt, call.count, _sampler(call, sampler), **sure)
            ours += [request] if call.seed is None else []
            to_cancel += [(call.cancelled, request)] if call.cancelled is not None else []
        for _, request in (pair for pair in to_cancel if pair[0] <= step):
            request.cancel()
        to_cancel = [pair for pair in to_cancel if pair[0] > step]
        engine.step()
        step += 1
    engine.check()
    for request in ours:
        if request.error is not None:
            raise request.error
    cancelled = sum(call.cancelled is not None for call in load.calls)
    return Served(Counter((tuple(request.answer), request.logit_digest) for request in ours),
                  Counter(engine.counts() | {"to be cancelled": cancelled}))


def _engine(model: Llama, load: Load, verify: bool) -> Engine:
    settings = {**asdict(load.server), "digests": True}
    if not verify:
        return Engine(model, **settings)
    longest = max((len(call.prompt) + call.count for call in load.calls if call.seed is None), default=1)
    return VerifyingEngine(model, window=WINDOW, group=GROUP, flip_every=FLIP_EVERY,
                           reach=-(-longest // KEYS) * KEYS, **settings)


def _sampler(call: Call, ours: Sampler) -> Sampler:
    if call.seed is None:
        return ours
    return Sampler(temperature=1.0, seed=call.seed) if call.seed else Sampler()


def sampler_of(temperature: float) -> Sampler:
    """The sampler of our requests: all have one seed, so a server that keeps its bits gives them one answer."""
    return Sampler(temperature=temperature, seed=SEED)
