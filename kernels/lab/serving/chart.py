"""Pictures of one request's text in many batches: letters that differ from the text alone stand on red.

Plain functions to a Figure, each with one that says it in words; notebooks 00 and 06 and the widget draw with these.
"""
from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import records, style
from . import measure
from .measure import COUNT, REQUEST, Answer

_SHOWN = {ord("\n"): "↵", ord("\t"): "⇥"}
_DIGITS = 12
_LEFT, _RIGHT = 12, 28  # room beside the text, in letters


def batches_chart(parts: Sequence[Sequence[Answer]], title: str = "", caption: str = "") -> Figure:
    """A line a batch: its text, and the digest of its logits; a block for each list of answers.

    The first answer of a list is what the others are compared with. The claim is the title if none is given.
    """
    with mpl.rc_context():
        style.theme()
        width = 0.13 * (len(parts[0][0].text) + _LEFT + _RIGHT)
        height = 1.0 + sum(0.5 + 0.34 * len(answers) for answers in parts)
        figure = Figure(figsize=(width, height), layout="constrained")
        blocks = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[len(a) + 0.6 for a in parts])[:, 0]
        for axes, answers in zip(blocks, parts, strict=True):
            _draw(axes, answers)
        figure.suptitle(title or claim(parts), x=0.01, ha="left", fontsize=12, fontweight="bold")
        style.caption(figure, f"Text, and digest of the logits it was chosen from. Red: other than alone. {caption}"
                      .strip())
    return figure


def _draw(axes: Axes, answers: Sequence[Answer]) -> None:
    letters = len(answers[0].text)
    for y, answer in enumerate(answers):
        axes.text(-0.8, y, _name(answer), ha="right", va="center", fontsize=9.5)
        first = answer.differs_from(answers[0])
        for x, letter in enumerate(shown(answer.text)):
            flipped = first is not None and x >= first
            axes.text(x, y, letter, family="DejaVu Sans Mono", fontsize=11, ha="center", va="center",
                      color=style.MOVED[2] if flipped else style.INK,
                      bbox={"facecolor": style.MOVED[1], "edgecolor": "none", "pad": 2} if flipped else None)
        glyph, fill, ink = style.SAME if answer.digest == answers[0].digest else style.MOVED
        axes.text(letters + 1, y, f"{answer.digest[:_DIGITS]}  {glyph}", va="center", fontsize=9, color=ink,
                  bbox={"facecolor": fill, "edgecolor": "none", "boxstyle": "round,pad=0.25"})
    axes.set(xlim=(-_LEFT, letters + _RIGHT), ylim=(len(answers) - 0.5, -0.6), xticks=[], yticks=[])
    axes.set_title(f"{answers[0].ops} ops", fontsize=10, pad=4)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _name(answer: Answer) -> str:
    return "alone" if answer.size == 1 else f"one of {answer.size}"


def shown(text: bytes) -> str:
    """One printable letter a byte."""
    return "".join(_SHOWN.get(byte, chr(byte) if 32 <= byte < 127 else "·") for byte in text)


def claim(parts: Sequence[Sequence[Answer]]) -> str:
    """What texts and digests say, in one line."""
    return "; ".join(f"{answers[0].ops}: {_counted(len({a.text for a in answers}), 'text')}, "
                     f"{_counted(len({a.digest for a in answers}), 'digest')}" for answers in parts)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def batches_words(parts: Sequence[Sequence[Answer]]) -> str:
    """The picture in words: its text alternative."""
    said = [f"{answers[0].ops} ops, {_name(a)}: {shown(a.text)!r}, logits {a.digest[:_DIGITS]}"
            for answers in parts for a in answers]
    return f"One request in batches. {claim(parts)}. {'; '.join(said)}."


def study(size: int, fixed: bool, prompt: bytes = REQUEST, count: int = COUNT,
          seed: int | None = None) -> tuple[Figure, str]:
    """The request alone and in a batch of `size`, with the default ops or with a fixed order: picture and words."""
    ops = measure.fixed_ops() if fixed else "default"
    parts = [measure.answers(ops, (1, size), prompt, count, seed)]
    return batches_chart(parts, caption=f"{records.device_name()}."), batches_words(parts)
