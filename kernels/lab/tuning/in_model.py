"""The fastest schedules of a model's weights, timed where they are used.

    python -m kernels.lab.tuning.in_model --model llama-3.1-8b --tokens 64 128 256 512
    python -m kernels.lab.tuning.in_model --gpus 8 --tokens 32 128    the order that up to eight GPUs can share

Alone, a product lacks its neighbours: what they leave in L2, kernels that end while it starts, a GPU that is warm from
others. So of two schedules the slower one alone can be the faster one in a model. Here CUDA graphs of a few of its
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
from ...model.config import PRESETS, preset
from ...model.llama import Llama
from ...op import Shape, dtype_name
from ...ops.matmul.call import CALL
from ...ops.matmul.learned import LEARNED, Form
from ...ops.matmul.order import is_tree
from ...ops.matmul.schedule import Schedule
from .. import bench, records
from ..proofs.certificates import CERTIFICATES, SECTIONS, certificates, stand_in
from .shared_candidates import shared_candidates
from .tune import expected, n_and_k, proved, store

LAYERS, NOISE = 8, 0.004  # layers hold more bytes than L2; a share of the forward
Weight = tuple[int, int]  # N and K


class Forward:
    """A forward of so many tokens, with a schedule for each weight's product that is named.

    `gpus` above 1: its weights are those whose order is a tree.
    """

    def __init__(self, run: Callable[[], torch.Tensor], tokens: int, gpus: int = 1):
        self.run, self.chosen = run, {}
        CALL.plans.clear()
        run()
        self.forms = {(f.n, f.k): f for f in (Form.of(plan.product, plan.index) for plan in CALL.plans.values())
                      if f.tokens >= tokens and (gpus == 1 or is_tree(f.order))}

    @property
    def weights(self) -> list[Weight]:
        """Those that see all tokens, the largest first."""
        return sorted(self.forms, key=lambda weight: (-weight[0] * weight[1], weight))

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
        us, failed = _times(forward, each, repeats)
        if today not in us:
            raise RuntimeError(f"today's schedule of {weight} could not be timed: {today}: {failed.get(today)}")
        best = min(us, key=us.__getitem__)
        n, k = weight
        progress(f"  N={n} K={k}: {us[today]:.1f} us a forward with {today}; {us[best] / us[today]:.4f} of it with "
                 f"{best}")
        if us[best] < (1 - NOISE) * us[today]:
            chosen[weight] = best
    forward({})
    return chosen


def _times(forward: Forward, each: dict[Schedule, dict], repeats: int) -> tuple[dict[Schedule, float], dict]:
    """Microseconds of a forward with each, medians, of those that run; and what the others raised."""
    calls = {s: partial(forward, chosen) for s, chosen in each.items()}
    times = bench.measure(calls, lambda _: (), "graph", device=runtime.device(), set_bytes=1 << 30, repeats=repeats)
    torch.cuda.empty_cache()  # the memory of every schedule's graph
    us = {s: t.percentiles()["us_p50"] for s, t in times.items() if isinstance(t, bench.Timing)}
    return us, {s: error for s, error in times.items() if s not in us}


def llama(name: str, gpus: int = 1) -> Callable[[int], Forward]:
    """tokens -> a forward of this suite's model of a preset's sizes, of a few layers, in an order for so many GPUs."""
    config = preset(name)
    config = replace(config, layers=min(config.layers, LAYERS), shared=gpus)
    model = Llama(config, ops="invariant", device=runtime.device())

    def forward(tokens):
        cache = model.cache(1, tokens)
        ids = torch.arange(tokens, dtype=torch.int64, device=model.device) % config.vocab_size
        return Forward(partial(model.forward, ids, cache.batch([tokens], [0]), cache), tokens, gpus)
    return forward


def tune_in_model(made: Callable[[int], Forward], counts: Sequence[int], most: int, out, machine: str | None = None,
                  workers: int | None = None, only: Sequence[Weight] = (),
                  progress: Callable[[str], None] = print, gpus: int = 1) -> None:
    """Tune the weights of a model for so many tokens each, among `most` schedules that the model of time likes best.

    `made` is what `llama` gives for `gpus`; above 1 there is no model of time, and all candidates are tried. `only`
    names the weights that are tuned, by default all. Writes the GPU's table and the machine's certificates, token
    count by token count. Raises ValueError without a model of time for this GPU, RuntimeError where today's schedule
    cannot be timed.
    """
    section = next(name for name, of in SECTIONS.items() if of == gpus)
    device, dtype, folder = runtime.device(), torch.bfloat16, records.open_machine(out, machine)
    forwards = {count: made(count) for count in counts}
    points = {(n, k, count): expected(n, k, count, dtype, device.index, most) if gpus == 1 else
              shared_candidates(n, k, count, dtype, runtime.has_pdl(device.index))
              for count, forward in forwards.items() for n, k in only or forward.weights}
    good = proved(points, dtype, workers, progress, gpus)
    for count, forward in forwards.items():
        progress(f"{count} tokens")
        found = {weight: [s for s in points[*weight, count] if (s, *stand_in(*weight, gpus)) in good]
                 for weight in only or forward.weights}
        for (n, k), schedule in fastest(forward, found, progress=progress).items():
            CERTIFICATES.merge(folder, certificates(schedule, n, k, dtype, device, gpus))
            store(runtime.slug(device.index), dtype_name(dtype), str(Shape(N=n, K=k)), {count: schedule},
                  Path(out) / "schedules", section)
    records.note_machine(folder, CERTIFICATES.file)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.lab.tuning.in_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PRESETS), default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--best", type=int, default=16, help="schedules for a weight, of those expected to be fastest")
    parser.add_argument("--gpus", type=int, choices=sorted(SECTIONS.values()), default=1,
                        help="the most GPUs that may ever share the order; above 1 all candidates are timed")
    parser.add_argument("--weights", type=n_and_k, nargs="+", default=(), help="N,K of those to tune (default: all)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if min(a.tokens) < 1 or a.best < 1:
        parser.error("--tokens and --best take numbers from 1")
    if not runtime.HAS_GPU:
        print("error: schedules are tuned on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    try:
        tune_in_model(llama(a.model, a.gpus), sorted(set(a.tokens)), a.best, a.out, a.machine, a.workers, a.weights,
                      gpus=a.gpus)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
