"""Fit the model of time (ops/matmul/cost.py) to what was timed, and say how well it chooses.

    python -m kernels.lab.tuning.cost_fit --machine h200    data/h200/cost_times.csv -> data/schedules/h200_cost.json

Weights of cost_design.CHECKED are not fitted: what the choice costs is told on them. The fit moves the logarithm of
each quantity downhill in the squared logarithm of predicted over measured; times near a point's best count most.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from ...op import DTYPES, Shape
from ...ops.matmul import cost
from ...ops.matmul.schedule import Schedule
from ...ops.matmul.ways import Form, Sizes, columns, variants
from .. import records
from . import cost_design as design
from .cost_times import COST_TIMES

STEPS, PULL = 3000, 1e-4  # of the descent; how strongly a quantity is drawn to the rough model's
REGISTERS, SHARED_BYTES, WARPS = 65536, 228 * 1024, 64  # of a multiprocessor


class Timed(NamedTuple):
    """Rows of COST_TIMES as the model takes them: sizes and forms as arrays, and the number of each row's tile."""

    rows: pd.DataFrame
    sizes: Sizes
    form: Form
    tile: np.ndarray
    tiles: list[Schedule]
    held: np.ndarray


def measured_tiles(rows: pd.DataFrame, dtype: str) -> list[Schedule]:
    """The design's tiles of which at least one way was timed: of others nothing is known, and none is chosen."""
    timed = set(rows.schedule[rows.dtype == dtype])
    return [tile for tile in design.rough_tiles(DTYPES[dtype]) if any(str(s) in timed for s in variants(tile))]


def timed(rows: pd.DataFrame, dtype: str, tiles: list[Schedule] | None = None) -> Timed:
    """The rows of a dtype whose schedules are ways of these tiles, by default of all that were timed."""
    tiles = measured_tiles(rows, dtype) if tiles is None else tiles
    number = {str(s): i for i, tile in enumerate(tiles) for s in variants(tile)}
    rows = rows[(rows.dtype == dtype) & rows.schedule.isin(number)].reset_index(drop=True)
    weights = [tuple(Shape.parse(shape).values()) for shape in rows["shape"]]
    forms = (Form.of(n, k, count, DTYPES[dtype]) for (n, k), count in zip(weights, rows.tokens, strict=True))
    sizes = {line: Sizes.of(Schedule.parse(line)) for line in rows.schedule.unique()}
    of_row = rows.schedule.map(number).to_numpy()
    return Timed(rows, Sizes(*columns(rows.schedule.map(sizes))), Form(*columns(forms)), of_row, tiles,
                 np.array([_held(tile, rows[of_row == i]) for i, tile in enumerate(tiles)]))


def _held(tile: Schedule, rows: pd.DataFrame) -> int:
    """Programs that a multiprocessor holds, by what the compiled kernel takes of it."""
    if tile.persistent or rows.registers.isna().all():
        return 1 if tile.persistent else int(design.rough(tile).held)
    registers = rows.registers.median() + 7  # given out in eights
    return int(max(1, min(REGISTERS // (registers // 8 * 8 * 32 * tile.warps), WARPS // tile.warps,
                          SHARED_BYTES // (rows.shared_bytes.median() + 1024))))


# the fit


class Fitted(NamedTuple):
    """What was fitted: the GPU's rates, and a Tile of arrays with a number for each of `tiles`."""

    rates: cost.Rates
    tile: cost.Tile
    tiles: list[Schedule]


def fit(data: Timed, rates: cost.Rates | None = None, steps: int = STEPS) -> Fitted:
    """The quantities that predict these times best; a GPU's `rates` stay as they are where they are given."""
    rough = [design.rough(tile) for tile in data.tiles]
    first = torch.tensor([[*tile[:-1]] for tile in rough], dtype=torch.float64, device="cpu").T.log()
    shift = torch.zeros_like(first, requires_grad=True)
    base = torch.tensor(rates or design.ROUGH, dtype=torch.float64, device="cpu").log()
    move = torch.zeros_like(base, requires_grad=rates is None)
    amounts = _tensors(cost.amounts(data.sizes, data.form, data.held[data.tile]))
    of_row = torch.tensor(data.tile, dtype=torch.int64, device="cpu")
    wanted, weight = (torch.tensor(numbers, dtype=torch.float64, device="cpu")
                      for numbers in (data.rows.us_p50.to_numpy(), _weights(data.rows)))
    wanted = wanted.log()
    descent = torch.optim.Adam([shift, *[move] * (rates is None)], lr=0.03)
    for step in range(steps):
        descent.param_groups[0]["lr"] = 0.03 * (1 - step / steps) + 1e-4
        quantities = (first + shift).exp()
        tile = cost.Tile(*(q[of_row] for q in quantities), None)
        error = cost.microseconds(amounts, tile, cost.Rates(*(base + move).exp())).log() - wanted
        loss = (weight * error**2).mean() + PULL * ((shift**2).mean() + (move**2).mean())
        descent.zero_grad()
        loss.backward()
        descent.step()
    return Fitted(cost.Rates(*(base + move).exp().detach().tolist()),
                  cost.Tile(*(first + shift).exp().detach().numpy(), data.held), data.tiles)


def _tensors(value: Any) -> Any:
    """Arrays, however deep in tuples, as tensors of float64."""
    if isinstance(value, tuple):
        return type(value)(*map(_tensors, value))
    return torch.from_numpy(np.asarray(value, dtype=np.float64))


def _weights(rows: pd.DataFrame) -> np.ndarray:
    """How much each time counts: all of it for the fastest of a point, a third at twice its time."""
    fastest = rows.groupby(["shape", "tokens"]).us_p50.transform("min")
    return (1 / (1 + 2 * (rows.us_p50 / fastest - 1))).to_numpy()


# how well it chooses


def predicted(fitted: Fitted, data: Timed) -> np.ndarray:
    """Microseconds of each row by the model."""
    tile = cost.Tile(*(quantity[data.tile] for quantity in fitted.tile))
    return cost.microseconds(cost.amounts(data.sizes, data.form, tile.held), tile, fitted.rates)


def choices(fitted: Fitted, data: Timed, default: pd.DataFrame) -> pd.DataFrame:
    """One row a point: the schedule chosen of those timed, its `us`, the fastest's `best`, the default's `cuda`."""
    rows = data.rows.assign(predicted=predicted(fitted, data))
    points = rows.groupby(["shape", "tokens"])
    chosen = rows.loc[points.predicted.idxmin()].set_index(["shape", "tokens"])
    best, cuda = points.us_p50.min(), default.set_index(["shape", "tokens"]).us_p50
    return pd.DataFrame({"schedule": chosen.schedule, "us": chosen.us_p50, "predicted": chosen.predicted, "best": best,
                         "cuda": cuda.reindex(best.index), "checked": [is_checked(s) for s, _ in best.index]})


def is_checked(shape: str) -> bool:
    """Whether a weight is kept out of the fit."""
    return tuple(Shape.parse(shape).values()) in design.CHECKED


def words(chosen: pd.DataFrame) -> str:
    """What the choice costs, and how fast it is beside the default."""
    lost, speed = chosen.us / chosen.best, chosen.cuda / chosen.us
    return (f"{len(chosen)} points: {_mean(lost):.3f} times the fastest's time in the geometric mean, "
            f"{lost.quantile(0.95):.2f} at the 95th percentile, {lost.max():.2f} at worst; {_mean(speed):.3f} of the "
            f"default's speed (the fastest: {_mean(chosen.cuda / chosen.best):.3f}), {speed.min():.2f} at worst, below "
            f"0.95 at {(speed < 0.95).sum()} and below 0.85 at {(speed < 0.85).sum()}")


def _mean(ratios) -> float:
    return float(np.exp(np.log(ratios.dropna()).mean()))


# keeping


def stored(data: Timed, name: str, folder) -> Fitted:
    """What was fitted for one GPU, as the ops read it. FileNotFoundError where there is none, ValueError where it has
    not all of the data's tiles."""
    known = cost.load(name, folder)
    if known is None:
        raise FileNotFoundError(f"there is no {name}_cost.json in {folder}: python -m kernels.lab.tuning.cost_fit")
    ways = known.ways[data.rows.dtype.iloc[0]]
    at = [ways.schedules.index(tile) for tile in data.tiles]
    return Fitted(known.rates, cost.Tile(*(quantity[at] for quantity in ways.tile)), data.tiles)


def write(fits: dict[str, Fitted], machine: dict, path: Path, lockstep: bool) -> None:
    """The file that the ops read: four digits of each quantity. `fits` by dtype; the rates are bfloat16's.

    `lockstep`: whether schedules that walk so are among what was timed; only then are they chosen.
    """
    lines = {dtype: {str(tile): [*(float(f"{q[i]:.4g}") for q in fit.tile[:-1]), int(fit.tile.held[i])]
                     for i, tile in enumerate(fit.tiles)} for dtype, fit in fits.items()}
    rates = {name: float(f"{rate:.4g}") for name, rate in fits["bfloat16"].rates._asdict().items()}
    known = {name: machine[name] for name in ("device", "triton", "torch") if name in machine}
    text = json.dumps({**known, "lockstep": lockstep, "rates": rates, "tiles": lines}, indent=1)
    records.write_atomic(path, _on_one_line(text) + "\n")
    cost.quantities.cache_clear()


def _on_one_line(text: str) -> str:
    """JSON whose lists of numbers do not take a line each."""
    return re.sub(r"\[\s+([^\]]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.lab.tuning.cost_fit",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="h200", help="the folder under --out with cost_times.csv")
    parser.add_argument("--out", default=records.DATA, type=Path, help="the data folder")
    parser.add_argument("--check", action="store_true", help="tell how well it chooses, and write nothing")
    a = parser.parse_args(argv)
    folder = a.out / a.machine
    rows, fits = COST_TIMES.read(folder), {}
    if not len(rows):
        print(f"error: there is no {COST_TIMES.file} in {folder}", file=sys.stderr)
        return 1
    for dtype in sorted(rows.dtype.unique()):  # bfloat16 first: it tells the GPU's rates
        default = rows[(rows.dtype == dtype) & (rows.schedule == "cuda")]
        known = timed(rows[~rows["shape"].map(is_checked)], dtype)
        fits[dtype] = fit(known, fits["bfloat16"].rates if fits else None)
        chosen = choices(fits[dtype], timed(rows, dtype, fits[dtype].tiles), default)
        for name, part in chosen.groupby("checked"):
            print(f"{dtype}, {'not fitted' if name else 'fitted'}: {words(part)}")
    if not a.check:
        path = a.out / "schedules" / f"{tables_name(a.machine)}_cost.json"
        write(fits, records.read_machine(folder), path, bool(rows.schedule.str.endswith(" lockstep").any()))
        print(path)
    return 0


def tables_name(machine: str) -> str:
    """The GPU's name as its table has it: h200-2 is another machine of the kind h200."""
    return machine.split("-")[0]


if __name__ == "__main__":
    sys.exit(main())
