"""The handout: one page for a class, with six words, three properties, the tree of a sum, and the ladder.

    python -m figures.handout            handout.svg and handout.pdf, beside the figures
    python -m figures.handout --check    say whether their bytes would change

It is no figure of data: nothing in it was measured. `python -m figures` draws it with the others. Its sum is worked out
with the suite's own order when it is drawn.
"""
from __future__ import annotations

import argparse
import sys
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import FOLDER
from kernels.arithmetic.sums import add_neighbours
from kernels.lab import records, style
from kernels.lab.sources import PROPERTIES

A4 = (8.27, 11.69)  # inches
LEFT, RIGHT = 0.07, 0.93  # of the page's width
NUMBERS = (1.0, 2.0**-24, 2.0**-24, 2.0**-24, 1.0, 2.0**-24, -1.0, 2.0**-24)
WORDS = {
    "order": "which numbers are added, in which pairs. Without it a floating-point sum has no single value.",
    "specification": "op.python: the order of every sum in plain PyTorch. It runs anywhere, and it decides the bits.",
    "schedule": "one way to carry the order out: which part of a machine adds what, and when. op.triton picks one for "
                "speed. None may change a bit.",
    "default": "op.cuda: what PyTorch does today. We measure whether its bits move, and never assume it.",
    "invariant": "said of the specification and all its schedules: a row's bits depend on that row alone.",
    "digest": "the SHA-256 of a result's bits. Equal digests mean equal bits, on any two machines."}
LADDER = ("from run to run", "for every batch", "for every schedule",
          "for prefill, chunks and decode; for trainer and sampler", "for every number of GPUs",
          "on your laptop, where the specification gives the digest that a GPU recorded")


def draw() -> Figure:
    """The page."""
    figure = Figure(figsize=A4, layout="none")
    y = _line(figure, 0.965, "Same Bits", 22, "bold")
    y = _line(figure, y, "Why does the same prompt give different bits, and how do you stop it? Fix the order of every "
                         "sum, and leave the schedule free.", 10.5, gap=0.012)
    y = _heading(figure, y, "Six words")
    for word, meaning in WORDS.items():
        y = _entry(figure, y, word, meaning, 0.20)
    y = _heading(figure, y, "Three properties that are often taken for one")
    for name, meaning in PROPERTIES.items():
        y = _entry(figure, y, name, meaning, 0.20)
    y = _heading(figure, y, "The tree: neighbours in pairs")
    axes = figure.add_axes((LEFT, y - 0.205, RIGHT - LEFT, 0.20))
    tree(axes)
    y = _line(figure, y - 0.215, words_of_the_tree(), 9, gap=0.010)
    y = _heading(figure, y, "The ladder: the bits are the same ...")
    for number, rung in enumerate(LADDER, 1):
        y = _entry(figure, y, f"{number}", rung, 0.04)
    return figure


def tree(axes: Axes) -> None:
    """NUMBERS at the bottom, and above them the sums of neighbours, up to one number."""
    values = torch.tensor(NUMBERS, dtype=torch.float32, device="cpu")
    places, level = list(range(len(NUMBERS))), 0
    while True:
        for x, value in zip(places, values.tolist(), strict=True):
            axes.text(x, level, _shown(value), ha="center", va="center", fontsize=9,
                      color="#ffffff" if len(places) == 1 else style.INK,
                      bbox={"boxstyle": "round,pad=0.35", "linewidth": 0.8, "edgecolor": style.BLUE,
                            "facecolor": style.BLUE if len(places) == 1 else "#e8f1f8"})
        if len(places) == 1:
            break
        above = [(a + b) / 2 for a, b in zip(places[0::2], places[1::2], strict=True)]
        for x, (a, b) in zip(above, zip(places[0::2], places[1::2], strict=True), strict=True):
            axes.plot([a, x, b], [level, level + 1, level], color=style.GREY, linewidth=1, zorder=0)
        values, places, level = values[0::2] + values[1::2], above, level + 1
    axes.set(xlim=(-0.6, len(NUMBERS) - 0.4), ylim=(-0.4, level + 0.4))
    axes.axis("off")


def words_of_the_tree() -> str:
    """What the tree gives, and what adding from left to right gives."""
    numbers = torch.tensor(NUMBERS, dtype=torch.float32, device="cpu")
    straight = numbers[0]
    for number in numbers[1:]:
        straight = straight + number
    paired = add_neighbours(numbers).item()
    return (f"Eight float32 numbers; e is 2 to the power of -24, half a step from 1 to the next number. In pairs their "
            f"sum is {_shown(paired)}, from left to right it is {_shown(straight.item())}. Exactly it is "
            f"{_shown(sum(NUMBERS))}. A row in this suite is first cut in chunks of 1024, which are added in sequence.")


def _shown(value: float) -> str:
    """A sum of ones and of e = 2**-24, as such."""
    whole = round(value)
    parts = round((value - whole) * 2**24)
    small = "" if not parts else ("e" if abs(parts) == 1 else f"{abs(parts)}e")
    if whole == 0 and small:
        return f"-{small}" if parts < 0 else small
    return f"{whole}" + (f" {'-' if parts < 0 else '+'} {small}" if small else "")


def _heading(figure, y: float, text: str) -> float:
    figure.add_artist(mpl.lines.Line2D([LEFT, RIGHT], [y - 0.006, y - 0.006], color=style.BLUE, linewidth=1.2))
    return _line(figure, y - 0.014, text, 13, "bold", gap=0.006)


def _entry(figure, y: float, word: str, meaning: str, indent: float) -> float:
    """A word, and beside it what it means; the height below."""
    figure.text(LEFT, y, word, fontsize=10, fontweight="bold", va="top", color=style.BLUE)
    return _line(figure, y, meaning, 10, x=LEFT + indent, gap=0.005)


def _line(figure, y: float, text: str, points: float, weight: str = "normal", x: float = LEFT,
          gap: float = 0.004) -> float:
    """Text from here to the right edge, on as many lines as it needs; the height below it."""
    lines = style.wrapped(text, (RIGHT - x) * A4[0], points, weight)
    figure.text(x, y, lines, fontsize=points, fontweight=weight, va="top", color=style.INK, linespacing=1.3)
    return y - (lines.count("\n") + 1) * 1.35 * points / 72 / A4[1] - gap


def render() -> dict[str, bytes]:
    """{"svg": bytes, "pdf": bytes}, the same on the same pins: no date, and a PDF that is not compressed."""
    style.theme()
    files = {}
    # uncompressed: what a compressor makes of the same bytes differs from one zlib to another
    with mpl.rc_context({"pdf.fonttype": 42, "pdf.compression": 0}):
        for kind, metadata in (("svg", {"Date": None, "Creator": None}),
                               ("pdf", {"CreationDate": None, "Creator": None, "Producer": None,
                                        "Title": "Same Bits: a handout"})):
            buffer = BytesIO()
            draw().savefig(buffer, format=kind, metadata=metadata)
            files[kind] = buffer.getvalue()
    return files


def write(out: Path = FOLDER, check: bool = False) -> str:
    """'changed' or 'as it was'; the files are written unless `check`."""
    changed = {kind: content for kind, content in render().items()
               if not (out / f"handout.{kind}").is_file() or (out / f"handout.{kind}").read_bytes() != content}
    for kind, content in {} if check else changed.items():
        records.write_atomic(records.made(out) / f"handout.{kind}", content)
    word = "changed" if changed else "as it was"
    print(f"handout: {word}")
    return word


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m figures.handout", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file's bytes would change")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write into (default: figures)")
    a = parser.parse_args(argv)
    return int(write(a.out, a.check) == "changed" and a.check)


if __name__ == "__main__":
    sys.exit(main())
