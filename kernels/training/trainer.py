"""The loop: a step is a loss, its gradients and an update; on a GPU it is captured once and replayed.

Nothing in a step is drawn by a library or added in an order of its own choosing, so a run's weights have one digest: on
every run, on every Hopper GPU, and by the specification on a CPU.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from .. import runtime
from ..model.config import Config
from .backward import implementation_on
from .batches import drawn
from .corpus import Corpus, windows
from .forward import check_trainable, loss
from .parameters import Parameters
from .places import Places
from .recipe import Recipe

EAGER_STEPS = 2  # before a capture: they compile kernels and load them


@dataclass(frozen=True)
class Row:
    """A line of the loss curve: natural units a byte, means since the line before, and seconds since the begin."""

    step: int
    loss: float
    held_out_loss: float
    seconds: float


class Trainer:
    """A model of `config`, from its first weights on.

    Raises ValueError for a config that cannot be trained here, or windows that do not fit the text or the context;
    Unavailable on a GPU without Triton.
    """

    def __init__(self, config: Config, recipe: Recipe, corpus: Corpus, device: torch.device):
        check_trainable(config)
        if device.type == "cuda":
            runtime.require_triton("train")
        self.config, self.recipe, self.device, self.how = config, recipe, device, implementation_on(device)
        self.places = Places(config, recipe.batch, recipe.length, device)
        self.text = _bytes(corpus.text, device)
        self.scored = _bytes(b"".join(windows(corpus.excerpt, recipe.length, recipe.scored)), device)
        self.scored_places = Places(config, recipe.scored, recipe.length - 1, device)
        self.parameters = Parameters(config, recipe, device)
        self.numbers = recipe.numbers(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(recipe.steps, dtype=torch.float32, device=device)

    def step(self) -> None:
        """The next step. The host reads nothing back, and hands nothing over: it may be captured."""
        r, weights = self.recipe, self.parameters.weights
        window = drawn(self.text, self.at, r.batch, r.length, r.seed)
        value = loss(weights, self.config, window, self.places, self.how)
        gradients = torch.autograd.grad(value, tuple(weights.values()))
        self.parameters.update(gradients, self.numbers.index_select(0, self.at)[0], self.how)
        self.losses.index_copy_(0, self.at, value.detach().view(1))
        self.at.add_(1)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss of the held-out windows, of all their bytes but each first."""
        window = self.scored.view(self.recipe.scored, self.recipe.length).long()
        return float(loss(self.parameters.weights, self.config, window, self.scored_places, self.how))

    def run(self, every: int = 100, watch: Callable[[Row], None] = lambda row: None) -> list[Row]:
        """All steps; the loss curve, a row each `every` steps and one for the last. `watch` gets each row at once."""
        if type(every) is not int or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        begin, rows, step, last = time.perf_counter(), [], self.step, 0
        with _own_stream(self.device):
            for done in range(1, self.recipe.steps + 1):
                if self.device.type == "cuda" and done == EAGER_STEPS + 1:
                    step = self._captured()
                step()
                if done % every == 0 or done == self.recipe.steps:
                    mean = float(self.losses[last:done].double().mean())
                    rows.append(Row(done, mean, self.held_out_loss(), time.perf_counter() - begin))
                    last = done
                    watch(rows[-1])
        return rows

    def _captured(self) -> Callable[[], None]:
        """A step as a CUDA graph, which does not run while it is captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
            self.step()
        return graph.replay


def _bytes(text: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _own_stream(device: torch.device):
    """A capture cannot be on the default stream, and what it needs must be ready on its own."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
