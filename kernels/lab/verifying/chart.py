"""Pictures of verification: what is decoded again over the window, and what a mix of requests gets a second."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import records, style
from . import explore
from .explore import Mix, Served
from .measure import predicted_share

WAYS = {"loose": (style.GREEN, "-", "loose: default ops, nobody verified"),
        "verified": (style.VERMILION, (0, (4, 2)), "verified"),
        "invariant": (style.BLUE, "-.", "invariant ops for all")}
SHARES = np.linspace(0, 1, 21)


def published(out=records.DATA) -> pd.DataFrame:
    """LLM-42's shares of tokens decoded again, in percent, over the window at G = 1. Raises OSError."""
    return pd.read_csv(Path(out) / "llm42" / "rollbacks.csv", comment="#")


def protocol_chart(drafts: Sequence[int], chosen: Sequence[int]) -> Figure:
    """One verify pass: what decode drafted behind the last verified token, what went in, what the verifier chose."""
    keeps = kept(drafts, chosen)
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(0.62 * len(drafts) + 2.6, 3.1), layout="constrained")
        axes = figure.subplots()
        for place, (draft, choice) in enumerate(zip(drafts, chosen, strict=True)):
            before = "last" if place == 0 else str(drafts[place - 1])
            state = "kept" if place < keeps - (drafts[keeps - 1] != chosen[keeps - 1]) else \
                "replaced" if place < keeps else "dropped"
            for row, (text, look) in enumerate(((str(draft), "draft"), (before, "draft"), (str(choice), state))):
                face, ink = _BOXES[look]
                axes.text(place, -row, text, ha="center", va="center", fontsize=9, color=ink,
                          bbox={"facecolor": face, "edgecolor": ink, "boxstyle": "round,pad=0.3"})
        for row, name in enumerate(("decode's drafts", "the pass reads", "the pass chooses")):
            axes.text(-0.8, -row, name, ha="right", va="center", fontsize=10)
        axes.set(xlim=(-3.2, len(drafts) - 0.4), ylim=(-2.6, 0.6), xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(protocol_claim(drafts, chosen))
    return figure


_BOXES = {"draft": ("#ffffff", style.INK), "kept": (style.SAME[1], style.SAME[2]),
          "replaced": (style.MOVED[1], style.MOVED[2]), "dropped": ("#ececec", "#8a8a8a")}


def kept(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens leave: the drafts up to the first that differs, and the verifier's in its place."""
    differs = [i for i, (draft, choice) in enumerate(zip(drafts, chosen, strict=True)) if draft != choice]
    return differs[0] + 1 if differs else len(drafts)


def protocol_claim(drafts: Sequence[int], chosen: Sequence[int]) -> str:
    """What leaves, what is replaced and what is dropped, in one line."""
    keeps = kept(drafts, chosen)
    if list(drafts) == list(chosen):
        return f"All {keeps} drafts are kept"
    return (f"{keeps - 1} of {len(drafts)} drafts are kept (green), draft {keeps} is replaced (red), "
            f"{len(drafts) - keeps} are dropped (grey)")


def rollbacks_chart(rows: pd.DataFrame, published: pd.DataFrame | None = None, title: str = "",
                    caption: str = "") -> Figure:
    """Left, tokens decoded again for one kept, over the window; right, tokens that agree before and behind a flip."""
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        shares(left, rows, published)
        spans(right, rows)
        figure.suptitle(title or rollbacks_claim(rows), x=0.01, ha="left", fontsize=13, fontweight="bold")
        style.caption(figure, caption)
    return figure


def shares(axes: Axes, rows: pd.DataFrame, published: pd.DataFrame | None = None) -> None:
    """Drafts dropped for each verified token, and what one flip rate for all windows predicts.

    The rate is of flips among the drafts that were compared with the verifier's choice.
    """
    rows = rows.sort_values("window")
    rate = rows.flips.sum() / max((rows.drafts - rows.recomputed).sum(), 1)
    windows = rows.window.tolist()
    axes.plot(windows, 100 * rows.share, color=style.VERMILION, marker="D", label="measured here")
    axes.plot(windows, [100 * predicted_share(rate, w) for w in windows], color=style.GREY, linestyle=":",
              label=f"predicted: {rate:.3%} of drafts flip")
    if published is not None:
        axes.plot(published.window, published.share, linestyle="none", marker="o", markerfacecolor="none",
                  markeredgewidth=1.5, color=style.BLUE, label="LLM-42, Llama-3.1-8B (H100 PCIe)")
        windows = sorted({*windows, *published.window})
    style.token_axis(axes, windows, log=True)
    axes.set(xlabel="Window W (tokens)", ylabel="Decoded again, % of tokens kept", ylim=(0, None),
             title="The price of a wide window")
    axes.legend(loc="upper left")


def spans(axes: Axes, rows: pd.DataFrame) -> None:
    """Tokens for each flip, up to a request's first one and behind it."""
    rows = rows.sort_values("window")
    for name, label, color, marker in (("first", "up to the first flip", style.BLUE, "o"),
                                       ("later", "behind it, up to the next", style.BROWN, "s")):
        known = rows[rows[f"{name}_flips"] > 0]
        axes.plot(known.window, known[f"{name}_tokens"] / known[f"{name}_flips"], color=color, marker=marker,
                  linestyle="-" if name == "first" else (0, (4, 2)), label=label)
    style.token_axis(axes, rows.window.tolist(), log=True)
    axes.set(xlabel="Window W (tokens)", ylabel="Tokens for each flip", ylim=(0, None),
             title="How long decode and verifier agree")
    if not rows.flips.any():  # nothing to divide by: an empty scale would promise a curve
        axes.text(0.5, 0.5, f"no flip in {rows.tokens.sum():,.0f} tokens", transform=axes.transAxes, ha="center",
                  va="center")
        axes.set(yticks=[], xlim=(rows.window.min() / 1.2, rows.window.max() * 1.2))
    axes.legend(loc="lower left")


def rollbacks_claim(rows: pd.DataFrame) -> str:
    few, *_, many = (rows if len(rows) > 1 else pd.concat([rows, rows])).sort_values("window").itertuples()
    return (f"Tokens decoded again: {few.share:.1%} with windows of {few.window}, {many.share:.1%} with windows of "
            f"{many.window}")


def rollbacks_words(rows: pd.DataFrame) -> str:
    said = [f"{row.window}: {row.share:.1%}, {row.flips} flips" for row in rows.sort_values("window").itertuples()]
    total = rows[["first_tokens", "first_flips", "later_tokens", "later_flips"]].sum()
    return (f"{rollbacks_claim(rows)}. Left, tokens decoded again for one kept, over the window: {'; '.join(said)}. "
            + (f"Right, tokens for each flip: up to a request's first one "
               f"{total.first_tokens / max(total.first_flips, 1):,.0f} over all windows, behind it "
               f"{total.later_tokens / max(total.later_flips, 1):,.0f}." if rows.flips.any() else
               f"Right, no flip in {rows.tokens.sum():,.0f} tokens."))


def mix_chart(lines: Mapping[str, list[Served]], mix: Mix, points: Mapping[str, Served], title: str,
              caption: str = "") -> Figure:
    """Tokens a second over the share of deterministic requests: predicted lines, and measured points at mix.share."""
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figure.subplots()
        for way, served in lines.items():
            color, line, label = WAYS[way]
            axes.plot(100 * SHARES, [at.tokens_per_s for at in served], color=color, linestyle=line, label=label)
            if way in points:
                axes.plot([100 * mix.share], [points[way].tokens_per_s], color=color, marker="D", markersize=9,
                          markeredgecolor="white", linestyle="none", label=f"{way}, measured")
        axes.set(xlabel="Deterministic requests, %", ylabel="Tokens a second", ylim=(0, None), xlim=(-2, 102))
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.legend(loc="upper right", ncols=2)
        axes.set_title(title)
        style.caption(figure, caption)
    return figure


def explored(window: int, group: int, share: float, batch: int, measure: bool = False, model: str = "byte",
             costs: explore.Costs | None = None) -> tuple[Figure, str]:
    """The picture of a mix on this machine and its words; predicted from `costs`, by default measured here.

    Raises ValueError for a mix that cannot be.
    """
    mix = Mix(batch, share, window, group, model=model)
    known = costs or explore.costs(batch, window, group, model)
    guesses = [explore.predicted(Mix(batch, float(at), window, group, model=model), known) for at in SHARES]
    lines = {way: [guess[way] for guess in guesses] for way in WAYS}
    points = {way: explore.measured(mix, way) for way in WAYS} if measure else {}
    guess = explore.predicted(mix, known)
    title = mix_claim(mix, points or guess, bool(points))
    caption = (f"{model} model · {records.device_name()} · lines predicted from a step of {known.step_ms:.3g} ms "
               f"({known.fixed_step_ms:.3g} with\nops of fixed order: {explore.fixed_ops()}) and a pass of "
               f"{known.pass_ms:.3g} ms over {group} x {window} tokens · diamonds measured")
    return mix_chart(lines, mix, points, title, caption), mix_words(mix, guess, points)


def mix_claim(mix: Mix, served: Mapping[str, Served], measured: bool) -> str:
    best = max(("verified", "invariant"), key=lambda way: served[way].tokens_per_s)
    ratio = served["verified"].tokens_per_s / served["invariant"].tokens_per_s
    return (f"W = {mix.window}, G = {mix.group}, {mix.deterministic} of {mix.batch} deterministic: {best} is faster, "
            f"{max(ratio, 1 / ratio):.2f} times ({'measured' if measured else 'predicted'})")


def mix_words(mix: Mix, guess: Mapping[str, Served], points: Mapping[str, Served]) -> str:
    said = [f"{way} {guess[way].tokens_per_s:,.0f}" + (f" predicted, {points[way].tokens_per_s:,.0f} measured"
                                                       if points else " predicted") for way in WAYS]
    held = f"{guess['verified'].held_back_ms:,.0f} ms predicted"
    if points:
        held += f", {points['verified'].held_back_ms:,.0f} ms measured"
    return (f"{mix_claim(mix, points or guess, bool(points))}. Tokens a second: {'; '.join(said)}. A verified draft is "
            f"held back {held}.")
