"""The tree of answers: what one prompt was answered under many loads, with each set of ops, greedy."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures import described
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.serving import tree
from kernels.lab.serving.recorded import ANSWERS, EVERY, VERIFIED, recorded
from kernels.lab.serving.served import Served

MODEL = "byte"  # whose tokens are letters


def totals(data=records.DATA, machine: str | None = None) -> tuple[pd.DataFrame, dict]:
    """Rows of the loads counted together, and the machine that served them. ValueError where there are none."""
    rows = records.load(ANSWERS, machine, data)
    every = rows[rows.load == EVERY] if len(rows) else rows
    name = rows.machine.iloc[0] if len(rows) else machine
    if not len(every):
        raise ValueError(f"no load is recorded whole for {name or 'any machine'} in {data}: python -m kernels answers")
    return every, described(data, name) | {"folder": name}


def named(ops: str) -> str:
    """What answered, in words."""
    return "a verifier" if ops == VERIFIED else f"{ops} ops"


def _trees(data, machine) -> tuple[dict[str, Served], dict]:
    every, about = totals(data, machine)
    greedy = every[(every.model == MODEL) & (every.temperature == 0)]
    found = {named(ops): recorded(records.Path(data) / about["folder"], MODEL, ops, 0.0) for ops in greedy.ops}
    found = {name: served for name, served in found.items() if served.requests}
    if not found:
        raise ValueError(f"no answers of the byte model are recorded for {about['folder']}: python -m kernels answers")
    return found, about


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    trees, about = _trees(data, machine)
    most = 6 if page.narrow else tree.MOST
    rows = [tree.rows_of(served, most) + 1.2 for served in trees.values()]
    figure = page.figure(9, 0.9 + 0.3 * sum(rows))
    if not page.screen and not page.height:
        figure.set_figheight(0.3 * sum(rows))
    blocks = figure.subplots(len(trees), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (name, served) in zip(blocks, trees.items(), strict=True):
        tree.draw_tree(axes, served, most, 8 if page.narrow else 10)
        axes.set_title(f"{name}: {tree.counted(served)}", fontsize=10, pad=3)
    claim = tree.claim(trees)
    if page.screen:
        claim = style.wrapped(claim, figure.get_figwidth() - 0.2, page.heading, "bold")
    around(figure, page, claim, f"{tree.SAYS}{page.newline}{_caption(about, page.newline)}")
    return figure


def _caption(about, newline: str = " ") -> str:
    return (f"The trained byte model in bfloat16, greedy, {about['device'].removeprefix('NVIDIA ')}.{newline}"
            "Random loads mix lengths, chunks, cache hits, preemptions and cancellations.")


def words(data=records.DATA, machine: str | None = None) -> str:
    trees, about = _trees(data, machine)
    return f"{tree.tree_words(trees)} {_caption(about)}"
