"""The tree of answers to one prompt: what they share is written once, and each first difference stands on red.

Plain functions to a Figure, each with one that says it in words; notebook 06, its widget and figures/ draw with these.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import records, style
from .chart import shown
from .loads import Server, crowd
from .measure import byte_model, fixed_ops
from .served import Served, serve

SAYS = "What answers share stands once; red: the first letter in which one leaves another."
MOST = 12  # answers that are drawn
_LETTER, _LINE = 0.125, 0.3  # inches
_RIGHT = 15  # room beside the text, in letters


@dataclass(frozen=True)
class Branch:
    """A line of the tree: an answer from the place on where it leaves the line above that it leaves."""

    line: int
    start: int
    letters: str
    number: int
    leaves: int | None = None


def branches(answers: Mapping[tuple[int, ...], int], most: int = MOST) -> list[Branch]:
    """The tree's lines, the most frequent answer first, at most so many; a branch stands below the line it leaves."""
    kept, found = sorted(answers, key=lambda answer: (-answers[answer], answer))[:most], []

    def grow(group: Sequence[tuple[int, ...]], start: int, leaves: int | None) -> None:
        first, *others = group
        line = len(found)
        found.append(Branch(line, start, shown(bytes(first[start:])), answers[first], leaves))
        parting = [(_parts(first, other), other) for other in others]
        for place in sorted({place for place, _ in parting}, reverse=True):
            alike: dict[tuple, list] = {}
            for where, other in parting:
                if where == place:
                    alike.setdefault(other[place : place + 1], []).append(other)
            for some in alike.values():
                grow(some, place, line)

    if kept:
        grow(kept, 0, None)
    return found


def _parts(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place in which they differ."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def draw_tree(axes: Axes, served: Served, most: int = MOST, points: float = 10) -> None:
    """One tree on these axes: a letter a unit across, a branch a unit down."""
    lines = branches(served.answers, most)
    length = max((branch.start + len(branch.letters) for branch in lines), default=1)
    for branch in lines:
        for x, letter in enumerate(branch.letters, branch.start):
            parts = x == branch.start and branch.leaves is not None
            axes.text(x, branch.line, letter, family="DejaVu Sans Mono", fontsize=points, ha="center", va="center",
                      color=style.MOVED[2] if parts else style.INK,
                      bbox={"facecolor": style.MOVED[1], "edgecolor": "none", "pad": 1.5} if parts else None)
        if branch.leaves is not None:
            x = branch.start - 0.62
            axes.plot([x, x], [branch.leaves + 0.45, branch.line], color=style.GREY, linewidth=1, zorder=0)
        axes.text(length + 0.5, branch.line, f"{branch.number:,} of {served.requests:,}", va="center",
                  fontsize=0.9 * points)
    left = list(served.answers.values())[most:]
    if left:
        axes.text(0, len(lines), f"and {_counted(len(left), 'more answer')}, of {_counted(sum(left), 'request')}",
                  va="center", fontsize=0.9 * points, color=style.GREY)
    axes.set(xlim=(-1, length + _RIGHT), ylim=(rows_of(served, most) - 0.4, -0.7), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def rows_of(served: Served, most: int = MOST) -> int:
    """Lines that a tree takes."""
    return min(len(served.answers), most) + (len(served.answers) > most)


def tree_chart(parts: Mapping[str, Served], title: str = "", caption: str = "", most: int = MOST) -> Figure:
    """A tree for each name, one below the other. The claim is the title if none is given."""
    with mpl.rc_context():
        style.theme()
        rows = [rows_of(served, most) + 1.2 for served in parts.values()]
        length = max(len(answer) for served in parts.values() for answer in served.answers)
        figure = Figure(figsize=(max(_LETTER * (length + 1 + _RIGHT), 6.4), 0.9 + _LINE * sum(rows)),
                        layout="constrained")
        blocks = figure.subplots(len(parts), 1, squeeze=False, height_ratios=rows)[:, 0]
        for axes, (name, served) in zip(blocks, parts.items(), strict=True):
            draw_tree(axes, served, most)
            axes.set_title(f"{name}: {counted(served)}", fontsize=10, pad=3)
        room = figure.get_figwidth() - 0.2
        figure.suptitle(style.wrapped(title or claim(parts), room, 12, "bold"), x=0.01, ha="left", fontsize=12,
                        fontweight="bold")
        style.caption(figure, style.wrapped(f"{SAYS} {caption}".strip(), room, style.CAPTION))
    return figure


def counted(served: Served) -> str:
    """Requests, answers and digests, in words."""
    return (f"{_counted(served.requests, 'request')}, {_counted(len(served.answers), 'answer')}, "
            f"{_counted(len(served.digests), 'digest')} of logits")


def claim(parts: Mapping[str, Served]) -> str:
    """How many answers one prompt got, in one line."""
    said = [f"{_counted(len(served.answers), 'answer')} with {name}" for name, served in parts.items()]
    return f"One prompt, {_counted(next(iter(parts.values())).requests, 'request')}: {', '.join(said)}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def tree_words(parts: Mapping[str, Served], most: int = MOST) -> str:
    """The picture in words: its text alternative."""
    said = []
    for name, served in parts.items():
        texts = [f"{shown(bytes(answer))!r} {number:,} times" for answer, number in list(served.answers.items())[:most]]
        first = served.first_difference
        where = "" if first is None else f"; they differ first at token {first + 1}"
        said.append(f"{name}: {counted(served)}{where}. {', '.join(texts)}.")
    return f"A tree of answers. {claim(parts)}. {' '.join(said)}"


@cache
def _served(server: Server, fixed: bool, copies: int, count: int) -> Served:
    model = byte_model(fixed_ops() if fixed else "default", torch.bfloat16)
    return serve(model, crowd(model.config, copies, copies // 2, count=count, spread=count, server=server))


def study(server: Server, fixed: bool, copies: int = 12, count: int = 24) -> tuple[Figure, str]:
    """The tree of one prompt's answers by a server with these settings, and of the same prompt asked for alone.

    Kept for each setting. Raises ValueError for numbers that `crowd` or the engine refuses.
    """
    ops = fixed_ops() if fixed else "default"
    alone, found = _served(Server(max_batch=1), fixed, 1, count), _served(server, fixed, copies, count)
    both = Served(alone.found + found.found, found.counts)
    said = ", ".join(f"{number} {what}" for what, number in found.counts.items()
                     if what in ("steps", "preemptions", "tokens found in the cache", "drafts accepted"))
    named = {f"{ops} ops, once alone and {copies} times among strangers": both}
    caption = f"{said}. {records.device_name()}."
    return tree_chart(named, title=f"{counted(both)}", caption=caption), f"{tree_words(named)} {caption}"
