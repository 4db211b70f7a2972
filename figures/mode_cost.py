"""What the mode costs a model of transformers that nobody rewrote: a forward's time, and times the default's."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures import described, named_once, not_recorded, pick
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.moving.cost import MODE_COST, OPS

# a way's line, marker, words, and what a caption says of it
WAYS = {"whole": ("-", "D", "compiled whole", "whole: the model under torch.compile, for CUDA graphs"),
        "compiled": ("--", "s", "compiled by layers", "by layers: each decoder layer under torch.compile"),
        "eager": (":", "o", "eager", "eager: dispatching counted")}
COLOURS = dict(zip(OPS, (style.GREEN, style.BLUE), strict=True))
NAMES = {"default": "default", "invariant": "under the mode"}
BAND = {"alpha": 0.18, "linewidth": 0}
ROOM = 1.4  # times the medians, of the time axis


def _rows(data, machine) -> tuple[pd.DataFrame, dict]:
    """The forwards of one model at the points that both contenders have, in milliseconds, and their machine."""
    every = records.load(MODE_COST, machine, data)
    rows = pick(pick(every[every.how.isin(list(WAYS))], "model", "llama-3.1-8b"), "dtype", "bfloat16")
    both = rows.pivot(index=["how", "tokens"], columns="ops", values="us_p50").reindex(columns=list(OPS)).dropna()
    rows = rows[rows.set_index(["how", "tokens"]).index.isin(both.index)]
    if not len(rows):
        raise ValueError(f"no forward is recorded with and without the mode for {machine or 'any machine'} in {data}: "
                         "python -m kernels mode")
    ms = {f"ms_p{part}": rows[f"us_p{part}"] / 1e3 for part in ("05", "50", "95")}
    return rows.assign(**ms).sort_values("tokens"), described(data, rows.machine.iloc[0])


def _ratios(rows) -> dict[str, pd.Series]:
    """Of each way that is recorded: times the default's time under the mode, by tokens."""
    ms = rows.pivot(index=["how", "tokens"], columns="ops", values="ms_p50")
    ratio = ms.invariant / ms.default
    return {way: ratio[way] for way in WAYS if way in ratio.index.unique("how")}


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, about = _rows(data, machine)
    figure = page.figure(11, 6.4 if page.narrow else 4.2)
    left, right = figure.subplots(*((2, 1) if page.narrow else (1, 2)))
    _times(left, rows)
    _shares(right, _ratios(rows))
    counts = sorted(rows.tokens.unique())
    for axes in (left, right):
        style.token_axis(axes, counts, log=True)
        style.thin_labels(axes, counts, figure.get_figwidth() / (1 if page.narrow else 2) - 1.2)
        axes.set_xlabel("Tokens of the prompt")
    around(figure, page, _claim(rows), _caption(rows, about, page.newline), named_once([left, right]), columns=3)
    return figure


def _times(axes, rows) -> None:
    """Milliseconds a forward, medians with their bands; an axis that fits the medians."""
    for way, (line, marker, name, _) in WAYS.items():
        for ops, mine in rows[rows.how == way].groupby("ops"):
            axes.fill_between(mine.tokens, mine.ms_p05, mine.ms_p95, color=COLOURS[ops], **BAND)
            axes.plot(mine.tokens, mine.ms_p50, color=COLOURS[ops], linestyle=line, marker=marker,
                      label=f"{NAMES[ops]}, {name}")
    axes.set(yscale="log", ylabel="milliseconds a forward", title="Time")
    axes.set_ylim(rows.ms_p50.min() / ROOM, ROOM * rows.ms_p50.max())
    axes.minorticks_off()
    style.time_ticks(axes, True)


def _shares(axes, ratios) -> None:
    for way, ratio in ratios.items():
        line, marker, name, _ = WAYS[way]
        axes.plot(ratio.index, ratio, color=COLOURS["invariant"], linestyle=line, marker=marker,
                  label=f"{NAMES['invariant']}, {name}")
    axes.axhline(1, color=COLOURS["default"], linewidth=1.3, zorder=1)
    every = pd.concat(list(ratios.values()))
    axes.set_ylim(min(0.8, every.min() - 0.05), max(1.2, every.max() + 0.05))
    axes.set(ylabel="times the default's time", title="Under the mode, of the default's")


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, about = _rows(data, machine)
    said = []
    for way, ratio in _ratios(rows).items():
        ms = rows[rows.how == way].pivot(index="tokens", columns="ops", values="ms_p50")
        points = [f"{of.default:.1f} and {of.invariant:.1f} at {count:,} ({ratio[count]:.2f} times)"
                  for count, of in ms.iterrows()]
        said.append(f"{_capital(WAYS[way][2])}, {', '.join(points)}")
    return (f"{_claim(rows)}. Two panels over the tokens of a prompt. Left, milliseconds a forward on log axes, by "
            "default and under the mode; right, times the default's time under the mode, with a green line at 1. "
            f"{'. '.join(said)}. {' '.join(_caption(rows, about).split())}")


def _claim(rows) -> str:
    """Of each way, times the default's time under the mode, from the least to the most."""
    first, *more = [(WAYS[way][2], _span(ratio)) for way, ratio in _ratios(rows).items()]
    return "; ".join([f"{_capital(first[0])}, a model under the mode takes {first[1]} times the default's time",
                      *(f"{name} {span}" for name, span in more)])


def _span(numbers, form: str = ".2f") -> str:
    low, high = format(numbers.min(), form), format(numbers.max(), form)
    return low if low == high else f"{low} to {high}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _caption(rows, about, newline: str = " ") -> str:
    ways, slow = [way for way in WAYS if (rows.how == way).any()], rows.ms_p95.max()
    moved = rows.same_bits.eq(False).groupby(rows.ops).sum()
    beyond = f" The axis fits the medians; the slowest 95th percentile is {slow:,.1f} ms." \
        if slow > ROOM * rows.ms_p50.max() else ""
    return (f"{rows.model.iloc[0]}'s shape in transformers, {rows.dtype.iloc[0]}, random weights, one prompt, logits "
            f"of its last token. {about['device']}, host wall clock, medians of {_span(rows.repeats, ',.0f')} rounds, "
            f"contenders interleaved, band 5-95 %.{beyond}{newline}"
            f"{' '.join(f'{_capital(WAYS[way][3])}.' for way in ways)}{newline}"
            f"In a batch of four the prompt's logits have other bits at {moved.default} of {len(rows) // 2} points by "
            f"default, and at {moved.invariant or 'none'} under the mode."
            + not_recorded([WAYS[way][2] for way in WAYS], [WAYS[way][2] for way in ways]))
