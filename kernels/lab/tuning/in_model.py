"""The fastest schedules of a model's weights, timed where they are used.

    python -m kernels.lab.tuning.in_model --model llama-3.1-8b --tokens 64 128 256 512

Alone, a product lacks its neighbours: what they leave in L2, kernels that end while it starts, a GPU that is warm from
others. So two schedules that are equally fast alone can differ by a tenth in a model. Here CUDA graphs of a few of its
layers take turns, each with another schedule of one weight, the others as chosen before. The fastest takes the place of
today's in the GPU's table if the forward is shorter by more than NOISE; its bits are proved first, as `tune` does.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ... import runtime
from ...model.config import PRESETS, Config, preset
from ...model.llama import Llama
from ...op import Shape, dtype_name
from ...ops.matmul.call import CALL
from ...ops.matmul.learned import LEARNED, Form
from ...ops.matmul.schedule import Schedule
from .. import bench, records
from ..proofs.certificates import CERTIFICATES, certificates, stand_in
from .tune import expected, proved, store

LAYERS, NOISE = 8, 0.004  # layers hold more bytes than L2; a share of the forward
Weight = tuple[int, int]  # N and K


def weights(config: Config) -> list[Weight]:
    """The model's weights that see all tokens, the largest first."""
    found = {shape for shape in config.layer_shapes.values() if len(shape) == 2}
    return sorted(found, key=lambda shape: -shape[0] * shape[1])


class Forward:
    """A forward of some tokens, with a schedule for each product's form that is named."""

    def __init__(self, model: Llama, tokens: int):
        self.model, self.cache, self.chosen = model, model.cache(1, tokens), {}
        ids = torch.arange(tokens, dtype=torch.int64, device=model.device) % model.config.vocab_size
        self.run = partial(model.forward, ids, self.cache.batch([tokens], [0]), self.cache)
        CALL.plans.clear()
        self.run()
        self.forms = {(f.n, f.k): f for f in (Form.of(plan.product, plan.index) for plan in CALL.plans.values())
                      if f.tokens >= tokens}

    def today(self, weight: Weight) -> Schedule:
        """The schedule that a weight's product takes."""
        form = self.forms[weight]
        return next(plan.wanted[0] for plan in CALL.plans.values() if Form.of(plan.product, plan.index) == form)

    def __call__(self, chosen: dict[Weight, Schedule]) -> torch.Tensor:
        wanted = {self.forms[weight]: schedule for weight, schedule in chosen.items()}
        if wanted != self.chosen:  # not within a capture: the call before it has loaded the kernels
            for form in self.chosen:
                LEARNED.pop(form, None)
            LEARNED.update(wanted)
            self.chosen = wanted
            CALL.plans.clear()
        return self.run()


def fastest(forward: Forward, found: dict[Weight, Iterable[Schedule]], repeats: int = 21,
            progress: Callable[[str], None] = print) -> dict[Weight, Schedule]:
    """{weight: schedule} of those for which another one than today's makes the forward shorter, weight by weight."""
    chosen: dict[Weight, Schedule] = {}
    for weight, schedules in found.items():
        forward(chosen)
        today = forward.today(weight)
        each = {s: {**chosen, weight: s} for s in dict.fromkeys([today, *schedules])}
        us = _times(forward, each, repeats)
        if today not in us:
            raise RuntimeError(f"today's schedule of {weight} could not be timed: {today}")
        best = min(us, key=us.__getitem__)
        n, k = weight
        progress(f"  N={n} K={k}: {us[today]:.1f} us a forward with {today}; {us[best] / us[today]:.4f} of it with "
                 f"{best}")
        if us[best] < (1 - NOISE) * us[today]:
            chosen[weight] = best
    forward({})
    return chosen


def _times(forward: Forward, each: dict[Schedule, dict], repeats: int) -> dict[Schedule, float]:
    """Microseconds of a forward with each, medians, of those that run."""
    calls = {s: partial(forward, chosen) for s, chosen in each.items()}
    times = bench.measure(calls, lambda _: (), "graph", device=forward.model.device, set_bytes=1 << 30,
                          repeats=repeats)
    torch.cuda.empty_cache()  # the memory of every schedule's graph
    return {s: t.percentiles()["us_p50"] for s, t in times.items() if isinstance(t, bench.Timing)}


def tune_in_model(name: str, counts: Sequence[int], most: int, out, machine: str | None = None,
                  workers: int | None = None, progress: Callable[[str], None] = print) -> None:
    """Tune a preset's weights for so many tokens each, among `most` schedules that the model of time likes best.

    Writes the GPU's table and the machine's certificates, token count by token count. Raises RuntimeError without a
    CUDA GPU, ValueError without a model of time for it.
    """
    if not runtime.HAS_GPU:
        raise RuntimeError("schedules are tuned on a CUDA GPU, and there is none here")
    device, config, folder = runtime.device(), preset(name), records.open_machine(out, machine)
    model = Llama(replace(config, layers=min(config.layers, LAYERS)), ops="invariant", device=device)
    points = {(n, k, count): expected(n, k, count, model.dtype, device.index, most)
              for count in counts for n, k in weights(config)}
    good = proved(points, model.dtype, workers, progress)
    for count in counts:
        progress(f"{count} tokens")
        found = {weight: [s for s in points[*weight, count] if (s, *stand_in(*weight, 1)) in good]
                 for weight in weights(config)}
        for (n, k), schedule in fastest(Forward(model, count), found, progress=progress).items():
            CERTIFICATES.merge(folder, certificates(schedule, n, k, model.dtype, device, 1))
            store(runtime.slug(device.index), dtype_name(model.dtype), str(Shape(N=n, K=k)), {count: schedule},
                  Path(out) / "schedules")
    records.note_machine(folder, CERTIFICATES.file)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.lab.tuning.in_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PRESETS), default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--best", type=int, default=16, help="schedules for a weight, of those expected to be fastest")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if min(a.tokens) < 1 or a.best < 1:
        parser.error("--tokens and --best take numbers from 1")
    try:
        tune_in_model(a.model, sorted(set(a.tokens)), a.best, a.out, a.machine, a.workers)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
