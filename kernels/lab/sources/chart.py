"""A picture of one row's answers over batch sizes: one strip for each op, one colour for each answer."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from .. import style

HATCHES = ("", "////", "....", "xxxx", "----", "||||", "oooo", "++++")


def answers(found: Mapping[str, Sequence[Sequence[int]]], machine: str) -> Figure:
    """`found`: op -> its answers, each the batch sizes that gave it (sources.device.group). A strip for each op.

    The title says how many ops gave row 0 more than one answer. Colours repeat after ten answers, hatches after eight.
    """
    colours = sns.color_palette("colorblind", 10)
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * len(found)))
    for y, groups in enumerate(found.values()):
        for answer, sizes in enumerate(groups):
            axes.barh([y] * len(sizes), 1, left=[size - 0.5 for size in sizes], height=0.7, linewidth=0,
                      color=colours[answer % 10], hatch=HATCHES[answer % 8], edgecolor="white")
    most = max(size for groups in found.values() for sizes in groups for size in sizes)
    axes.set(yticks=range(len(found)), yticklabels=list(found), xlabel="rows in the batch", xlim=(0.5, most + 0.5),
             xticks=[1] + list(range(8, most + 1, 8)), title=claim(found))
    axes.invert_yaxis()
    axes.grid(False)
    style.caption(figure, f"One colour, one answer for row 0. {machine}.")
    return figure


def claim(found: Mapping[str, Sequence]) -> str:
    """What the chart shows, in one line."""
    moving = [name for name, groups in found.items() if len(groups) > 1]
    if not moving:
        return "Row 0 has one answer at every batch size"
    return f"Row 0 has several answers in {len(moving)} of {len(found)} ops"
