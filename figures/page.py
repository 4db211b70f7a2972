"""What a figure is drawn for: the screen, a paper's single or double column, or a slide.

A figure is laid out in inches and points of a screen, and all of it is written `scale` times that: letters, lines and
marks keep their proportions. Fewer inches then ask for fewer panels side by side, and for titles on several lines.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from kernels.lab import style

PANEL = 10  # points of a panel's title, on a screen
EDGE = 0.06  # inches of a screen around what stands above and below the panels


@dataclass(frozen=True)
class Page:
    """inches: the width that is written (None: each figure's own); tall: the height, where it is fixed; scale: written
    size of what is one on a screen; dpi: of the PNG as written; heading: points of the claim, on a screen.
    """

    name: str
    inches: float | None = None
    tall: float | None = None
    scale: float = 1.0
    dpi: int = 150
    heading: float = 14.0

    @property
    def screen(self) -> bool:
        return self.inches is None

    @property
    def width(self) -> float:
        """Inches of a screen across."""
        return self.inches / self.scale

    @property
    def height(self) -> float | None:
        """Inches of a screen from top to bottom; None where a figure may take what it needs."""
        return self.tall and self.tall / self.scale

    @property
    def narrow(self) -> bool:
        """Whether there is room for one panel alone."""
        return not self.screen and self.width < 7

    @property
    def newline(self) -> str:
        """What a caption that is broken by hand for the screen is broken by."""
        return "\n" if self.screen else " "

    def scaled(self, svg: bytes) -> bytes:
        """A drawing of the screen's inches at the size that is written: its own coordinates stay."""
        head, tag, rest = svg.partition(b"<svg ")
        tags, end, rest = rest.partition(b">")
        if self.scale != 1:
            tags = re.sub(rb'(width|height)="([\d.]+)pt"',
                          lambda m: b'%s="%gpt"' % (m[1], float(m[2]) * self.scale), tags)
        return head + tag + tags + end + rest

    def figure(self, width: float, height: float) -> Figure:
        """An empty figure: of this size, in inches, on a screen; else as wide as the page."""
        return Figure(figsize=(width, height) if self.screen else (self.width, self.height or height),
                      layout="constrained")


SCREEN = Page("screen")
PAGES = {page.name: page for page in (
    SCREEN, Page("single", 3.5, None, 0.72, 300, 12), Page("double", 7.2, None, 0.76, 300, 13),
    Page("slide", 40 / 3, 7.5, 1.35, 144, 14))}


def around(figure: Figure, page: Page, title: str, caption: str, legend: tuple[Sequence, Sequence] | None = None,
           columns: int = 9) -> None:
    """The claim above the panels; below them the legend of them all, if there is one, and the caption.

    legend: handles and labels, in as many columns as there is room for, `columns` at most. Where the height is free the
    panels keep the inches that the figure was made with, and the figure grows by what stands around them.
    """
    if page.screen and legend is None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=page.heading, fontweight="bold")
        style.caption(figure, caption)
        return
    room = figure.get_figwidth() - 2 * EDGE
    head = figure.suptitle(style.wrapped(title, room, page.heading, "bold"), x=0, y=1, ha="left", va="top",
                           fontsize=page.heading, fontweight="bold")
    foot = style.caption(figure, style.wrapped(caption, room, style.CAPTION), y=0)
    names = _legend(figure, *legend, columns, room) if legend else None
    if not page.screen:
        _wrap_titles(figure)
    top, bottom = (_inches(figure, text) + 2 * EDGE for text in (head, foot))
    middle = _inches(figure, names) + EDGE if names else 0
    if not page.height:
        figure.set_figheight(figure.get_figheight() + top + middle + bottom)
    width, height = figure.get_size_inches()
    head.set(x=EDGE / width, y=1 - EDGE / height, in_layout=False)
    foot.set(x=EDGE / width, y=EDGE / height, va="bottom", in_layout=False)
    if names:
        names.set_bbox_to_anchor((EDGE / width, bottom / height), figure.transFigure)
    figure.get_layout_engine().set(rect=(0, (bottom + middle) / height, 1, 1 - (top + middle + bottom) / height))
    _settle(figure)


def _settle(figure):
    """Lay the panels out once, to a millionth: the solver's last bits differ from run to run."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        axes.set_position([round(part, 6) for part in axes.get_position().bounds])
    figure.set_layout_engine("none")


def _wrap_titles(figure):
    """Each panel's title over its own panel."""
    for axes in figure.axes:
        title, place = axes.get_title(loc="left"), axes.get_subplotspec()
        across = place.get_gridspec().ncols if place else 1
        labelled = 1 if len(axes.get_shared_y_axes().get_siblings(axes)) > 1 else across  # panels with a time axis
        size = PANEL if across < 4 and figure.get_figwidth() / across > 2 else 8.5
        axes.set_title(style.wrapped(title, (figure.get_figwidth() - 0.6 * labelled) / across - 0.1, size, "bold"),
                       fontsize=size)


def _legend(figure, handles, labels, columns, room):
    """Names in as many columns as there is room for."""
    names = None
    for across in range(min(columns, len(labels)), 0, -1):
        names = figure.legend(handles, labels, loc="lower left", ncols=across, frameon=False, handlelength=3.2,
                              borderaxespad=0, borderpad=0, columnspacing=1.6)
        names.set_in_layout(False)
        if across == 1 or names.get_window_extent().width <= figure.dpi * room:
            break
        names.remove()
    return names


def _inches(figure, artist) -> float:
    """How tall it is on the screen's page."""
    return artist.get_window_extent().height / figure.dpi
