"""Every figure of the suite, drawn from data/ alone and byte for byte the same on the same pins.

A module here is one figure: `draw(data=...) -> Figure` and `ALT`, what a reader who cannot see it should know.
"""
from __future__ import annotations

import importlib
import pkgutil
from io import BytesIO
from pathlib import Path

from kernels.lab import style

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules([str(FOLDER)]) if not m.name.startswith("_"))


def render(name: str) -> dict[str, bytes]:
    """Draw one figure; returns {"svg": bytes, "png": bytes}. Raises ValueError for an unknown name."""
    if name not in names():
        raise ValueError(f"figure must be one of {', '.join(names())}, got {name!r}")
    style.theme()
    figure = importlib.import_module(f"figures.{name}").draw()
    files = {}
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        files[kind] = buffer.getvalue()
    return files
