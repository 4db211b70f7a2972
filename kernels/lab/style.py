"""One theme for every figure: who is drawn how, and nothing that makes two runs differ in their bytes."""
from __future__ import annotations

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

_SAFE = sns.color_palette("colorblind").as_hex()
GREEN, VERMILION, BLUE, ORANGE, PURPLE, GREY = _SAFE[2], _SAFE[3], _SAFE[0], _SAFE[1], _SAFE[4], "#6e6e6e"
BROWN = "#7a4b1e"  # darker than the palette's, which the colour-blind take for green or purple

# implementation -> colour, marker, line style, the published chart's wording or ours
CONTENDERS = {
    "cuda": (GREEN, "o", "-", "Non-batch-invariant (CUDA)"),
    "python": (VERMILION, "s", "-", "Batch-invariant (Python)"),
    "triton": (BLUE, "^", "-", "Batch-invariant (Triton)"),
    "compile": (ORANGE, "D", "--", "torch.compile of the default"),
    "flashinfer": (PURPLE, "v", "-.", "FlashInfer"),
    "tiled": (BROWN, "*", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "Fixed tiles of 128 rows (tiled)"),
    "frozen": (ORANGE, "D", (0, (4, 2)), "One frozen schedule"),
    "cublas_no_split_k": (PURPLE, "v", "-.", "cuBLAS without split-K (no guarantee)"),
    "split": (GREY, "x", ":", "Split by batch (moves bits)"),
}


def contender(name: str) -> dict:
    """Keyword arguments for Axes.plot: colour, marker, line style and label of one implementation."""
    color, marker, line, label = CONTENDERS.get(name, (GREY, "P", ":", name))
    return {"color": color, "marker": marker, "linestyle": line, "label": label}


def theme() -> None:
    """Set the suite's look, and fix what would change a figure's bytes from run to run."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    mpl.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.fontsize": 9, "legend.frameon": True, "legend.framealpha": 0.9, "lines.markersize": 6,
        "lines.linewidth": 2.0, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.5,
        "figure.dpi": 100, "savefig.dpi": 150, "svg.hashsalt": "same-bits", "svg.fonttype": "path",
        "figure.constrained_layout.use": True,
    })


def caption(figure: Figure, text: str) -> None:
    """A line under the figure: which machine, which clock, what the band is."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8.5, color="#404040")


def token_axis(axes, tokens, log: bool = False) -> None:
    """Token counts as the published chart has them (evenly spaced), or on a log axis."""
    if log:
        axes.set_xscale("log", base=2)
    positions = list(tokens) if log else list(range(len(tokens)))
    axes.set_xticks(positions, [str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_xlabel("# Tokens")
