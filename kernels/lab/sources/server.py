"""A toy server whose batches form by arrival, and a sampler whose requests share a generator.

The server's model is one matrix: with y = s @ w, the state s of a request becomes y / (1 + |y|), and the token is a
letter, the largest of the first 26 elements. The matrix stretches differences, as a deep network may, so that one unit
in the last place grows into another text. Additions and divisions of single elements are correctly rounded everywhere:
the product alone can move a bit.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ... import bits, runtime
from ...arithmetic import sums
from .device import group, ordered_product

WIDTH, LENGTH, LARGEST_BATCH = 256, 40, 8
GAIN = 64.0  # how much the matrix stretches; with this one a last bit becomes another letter within 20 steps
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Request:
    """One prompt, the tick at which it arrives, and what the server adds: the text, and the batch size of each step."""

    prompt: int
    arrives: int = 0
    text: str = ""
    batches: list[int] = field(default_factory=list)


def model(device=None) -> torch.Tensor:
    """The matrix, (WIDTH, WIDTH) float32, the same bits on every machine."""
    w = bits.portable(WIDTH, WIDTH, device=device or runtime.device(), seed=1)
    return w * (GAIN / (0.333 * WIDTH**0.5))  # 0.333: the root mean square of its elements


def serve(requests: Sequence[Request], product: Product, length: int = LENGTH, device=None) -> list[Request]:
    """Answer every request with `length` letters; returns the requests, in their order, with text and batches.

    Each tick takes one step of all requests that are active, in one batch. A request becomes active when it has
    arrived and there are fewer than LARGEST_BATCH, first come first served, and leaves when its text is complete.
    """
    w = model(device)
    done = [Request(r.prompt, r.arrives) for r in requests]
    waiting, active, tick = sorted(done, key=lambda r: r.arrives), [], 0
    while waiting or active:
        while waiting and waiting[0].arrives <= tick and len(active) < LARGEST_BATCH:
            request = waiting.pop(0)
            active.append((request, bits.portable(1, WIDTH, device=w.device, seed=request.prompt)[0]))
        if active:
            y = product(torch.stack([state for _, state in active]), w)
            states = y / (1 + y.abs())
            for (request, _), letter in zip(active, states[:, : len(LETTERS)].argmax(1).tolist(), strict=True):
                request.text += LETTERS[letter]
                request.batches.append(len(active))
            active = [(r, state) for (r, _), state in zip(active, states, strict=True) if len(r.text) < length]
        tick += 1
    return done


def crowd(seed: int, prompt: int = 100, others: int = 12) -> list[Request]:
    """`prompt` first, at tick 10, and then other prompts that arrive at ticks from 0 to 31 drawn by `seed`."""
    ticks = ((bits.portable(1, others, seed=seed)[0] + 1) * 16).int().tolist()
    return [Request(prompt, 10)] + [Request(prompt + 1 + i, tick) for i, tick in enumerate(ticks)]


def alone(prompt: int = 100) -> list[Request]:
    """The same prompt with the server to itself."""
    return [Request(prompt, 10)]


def split_by_batch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (rows, K), w (K, N) -> (rows, N): the fewer rows, the more parts k is cut in, so bits move on every machine."""
    parts = max(1, LARGEST_BATCH // len(x))
    return sum(sums.ordered_sum(a[:, None] * b.t())[..., 0]
               for a, b in zip(x.chunk(parts, 1), w.chunk(parts, 0), strict=True))


def moving_product() -> tuple[str, Product]:
    """This machine's default if a batch moves its bits at the model's size, else split_by_batch; and which it is."""
    w = model()
    x = bits.portable(LARGEST_BATCH, WIDTH, device=w.device)
    results = {rows: (x[:rows] @ w)[:1] for rows in range(1, LARGEST_BATCH + 1)}
    if len(group(results)) > 1:
        return "this machine's default x @ w", torch.matmul
    return "a product split by batch (the default moved nothing here)", split_by_batch


invariant_product: Product = ordered_product


def sample_shared(probabilities: torch.Tensor, neighbours: int, steps: int, seed: int = 0) -> list[int]:
    """probabilities (V,) -> the tokens of one request that stands behind `neighbours` in each step's batch.

    All requests draw from one generator with this seed, as when a server seeds itself once.
    """
    generator = torch.Generator(probabilities.device).manual_seed(seed)
    batch = probabilities.expand(neighbours + 1, -1)
    return [int(torch.multinomial(batch, 1, generator=generator)[-1]) for _ in range(steps)]


def sample_by_counter(probabilities: torch.Tensor, neighbours: int, steps: int, seed: int = 0) -> list[int]:
    """The same, but a draw is a hash of the request's own seed and step: no generator, nothing to share."""
    cumulative = probabilities.double().cumsum(-1).expand(neighbours + 1, -1)
    tokens = []
    for step in range(steps):
        seeds = [1000 + n for n in range(neighbours)] + [seed]
        draws = torch.tensor([[uniform(s, step)] for s in seeds], device=probabilities.device, dtype=torch.float64)
        tokens.append(int((cumulative <= draws * cumulative[:, -1:]).sum(1)[-1]))  # <=: never one of weight 0
    return tokens


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) from a request's seed and the count of its draws: the same wherever it is asked for."""
    return int(bits.hashed(torch.tensor([step], dtype=torch.int64, device="cpu"), seed)) / 2**32
