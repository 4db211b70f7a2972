"""How fast products of weights run that no table holds, against cuBLAS: the distribution over all points."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from figures import described, named_once, not_recorded, of_older_code, pick
from figures.page import SCREEN, Page, around
from kernels.lab import older, records, style
from kernels.lab.tuning.unseen import speeds
from kernels.lab.tuning.unseen_times import UNSEEN
from kernels.lab.tuning.unseen_weights import MODELS
from kernels.op import Shape

LOOKS = {
    "frozen": style.contender("frozen"),
    "online": {"color": style.PURPLE, "marker": "v", "linestyle": "-.", "label": "Tuned while it runs"},
    "triton": style.contender("triton") | {"label": "Chosen untimed"},
}


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, machine = recorded(data, machine)
    speed = speeds(rows).droplevel("dtype")
    figure = page.figure(13, 5.2 if page.screen else 6 if page.narrow else 3.6)
    left, right = figure.subplots(*((2, 1) if page.narrow else (1, 2)))
    ends = 0.9 * speed.min(axis=None), 1.1 * max(1, speed.max(axis=None))
    for name, look in _looks(speed).items():
        _distribution(left, speed[name].dropna(), look)
        _by_tokens(right, speed[name].dropna(), look)
    left.axvline(1, color=style.GREY, linewidth=1.3, zorder=1)
    left.set(xscale="log", xlim=ends, xlabel="Times cuBLAS' speed", ylim=(0, 1), ylabel="Share of points",
             title="How many points are slower than this")
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.axhline(1, color=style.GREY, linewidth=1.3, zorder=1)
    right.set(yscale="log", ylim=ends, ylabel="Times cuBLAS' speed",
              title="The same by token count: each weight, and the mean")
    for axis in (left.xaxis, right.yaxis):
        axis.set_major_locator(FixedLocator([0.1, 0.25, 0.5, 1, 2, 4, 8]))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
    _name_the_slowest(right, speed)
    tokens = sorted(speed.index.unique("tokens"))
    style.token_axis(right, tokens, log=True)
    style.thin_labels(right, tokens, (page.width / (1 if page.narrow else 2) if not page.screen else 6) - 0.6)
    if page.screen:
        left.legend(*(part[::-1] for part in named_once([left])), loc="lower right")
    caption = _caption(rows, speed, machine)
    if not page.screen:  # digits are drawn wider than they are measured
        caption = style.wrapped(caption, 0.94 * page.width, style.CAPTION)
    around(figure, page, _claim(speed), caption,
           None if page.screen else tuple(part[::-1] for part in named_once([left])))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, _ = recorded(data, machine)
    speed = speeds(rows).droplevel("dtype")
    said = "; ".join(f"{look['label']} {_mean(speed[name]):.2f} in the geometric mean, {speed[name].median():.2f} in "
                     f"the median, {speed[name].min():.2f} to {speed[name].max():.2f}, below 0.90 at "
                     f"{(speed[name] < 0.9).sum()} of {speed[name].notna().sum()} points"
                     for name, look in reversed(_looks(speed).items()))
    return (f"{_claim(speed)}. Left, the share of points that are slower than each multiple of cuBLAS' speed; right, "
            f"the multiple of every weight over token counts, with the mean of each count. {said}. "
            f"The slowest: {slowest(speed, 3)}.")


def recorded(data, machine: str | None = None) -> tuple[pd.DataFrame, dict]:
    """The rows in bfloat16 (or another dtype, if none are) that can be compared with the default's, and their machine.

    Raises FileNotFoundError where no machine has such a table, ValueError where it has no such rows.
    """
    rows = records.load(UNSEEN, machine, out=data)
    name = rows.machine.iloc[0] if len(rows) else machine
    rows = pick(rows, "dtype", "bfloat16") if len(rows) else rows
    ours = [name for name in LOOKS if (rows.implementation == name).any()]
    if not ours or "cuda" not in set(rows.implementation) or speeds(rows)[ours].isna().all(axis=None):
        raise ValueError(f"no unseen weight is recorded beside cuda's for {name or 'any machine'} in {data}: "
                         "python -m kernels unseen")
    return older.mark(rows[rows.implementation.isin(["cuda", *LOOKS])]), described(data, name)


def _looks(speed) -> dict[str, dict]:
    return {name: look for name, look in LOOKS.items() if name in speed and speed[name].notna().any()}


def _distribution(axes, speed, look):
    """The share of points below each speed, as steps."""
    speed = np.sort(speed)
    axes.step(np.concatenate([[0], speed]), np.arange(len(speed) + 1) / len(speed), where="post", color=look["color"],
              linestyle=look["linestyle"], label=look["label"])


def _by_tokens(axes, speed, look):
    mean = np.exp(np.log(speed).groupby("tokens").mean())
    axes.plot(speed.index.get_level_values("tokens"), speed, linestyle="none", marker=look["marker"], markersize=3,
              color=look["color"], alpha=0.35, markeredgewidth=0)
    axes.plot(mean.index, mean, **look)


def _ours(speed) -> str:
    """Whose slowest points are named."""
    return next(name for name in reversed(LOOKS) if name in _looks(speed))


def _name_the_slowest(axes, speed):
    """Where its token counts stand widest apart, so that its name covers no point; a line leads there."""
    column = speed[_ours(speed)].dropna()
    (shape, tokens), low = column.idxmin(), column.min()
    counts = np.array(sorted(speed.index.unique("tokens")), dtype=float)
    at = int(np.argmax(np.diff(np.log(counts)))) if len(counts) > 1 else 0
    place = float(np.sqrt(counts[at] * counts[min(at + 1, len(counts) - 1)]))
    axes.annotate(f"slowest: {_sizes(shape)}", (tokens, low), (place, low), ha="center", va="center",
                  fontsize=style.CAPTION, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                  arrowprops={"arrowstyle": "-", "color": style.GREY, "linewidth": 0.8})


def slowest(speed, count: int) -> str:
    """In words, the slowest points of our choice: its weight, the model that has it, and its token count."""
    column = speed[_ours(speed)].nsmallest(count)
    return "; ".join(f"{_sizes(shape)}{_model(shape)} at {tokens}: {value:.2f}"
                     for (shape, tokens), value in column.items())


def _sizes(shape: str) -> str:
    return "{N:,} x {K:,}".format(**Shape.parse(shape))


def _model(shape: str) -> str:
    sizes = tuple(Shape.parse(shape).values())
    return next((f" ({model})" for model, weights in MODELS.items() if sizes in weights), "")


def _claim(speed) -> str:
    kept = _looks(speed)
    said = {"triton": "{} of cuBLAS' speed", "online": "tuned while it runs: {}", "frozen": "one frozen schedule: {}"}
    parts = [text.format(f"{_mean(speed[name]):.2f}") for name, text in said.items() if name in kept]
    return f"Weights in no table: {'; '.join(parts)}"


def _caption(rows, speed, machine) -> str:
    weights, counts = (len(speed.index.unique(level)) for level in ("shape", "tokens"))
    below = "; ".join(f"{look['label'].lower()}, median {speed[name].median():.2f}, below 0.90 at "
                      f"{(speed[name] < 0.9).sum()} of {speed[name].notna().sum()} points"
                      for name, look in reversed(_looks(speed).items()))
    return (f"{weights} weights of other models, x {counts} token counts off powers of two · {rows.dtype.iloc[0]} · "
            f"{machine['device']}, torch {machine['torch']}\nclock `{rows.clock.iloc[0]}`: device time with inputs out "
            f"of cache, medians of at least {rows.repeats.min():g} samples · 1 is the speed of F.linear (cuBLAS)\n"
            f"{below}\n"
            f"slowest {LOOKS[_ours(speed)]['label'].lower()}: {slowest(speed, 4)}"
            + not_recorded(LOOKS, rows.implementation) + of_older_code(rows).replace(", drawn hollow", ""))


def _mean(column) -> float:
    return float(np.exp(np.log(column.dropna()).mean()))
