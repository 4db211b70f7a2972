"""What is recorded of keys in pages, and of a step's mixed sequences: told in words beside attention's figure."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ...op import Shape

ASIDE = ("page", "mixed")  # what a shape says that is in no panel
AT = ["op", "dtype", "tokens", "clock"]


def is_aside(rows: pd.DataFrame) -> np.ndarray:
    """Which rows are of keys in pages or of mixed sequences."""
    return np.array([bool(set(ASIDE) & set(Shape.parse(shape))) for shape in rows["shape"]], dtype=bool)


def without(shape: str, name: str) -> str:
    """The shape without one of its sizes."""
    return str(Shape(**{key: size for key, size in Shape.parse(shape).items() if key != name}))


def paged(rows: pd.DataFrame, ours: str = "triton") -> pd.Series:
    """Time of ours with keys in pages over that with keys side by side, by keys a page: a number for each point that
    has both."""
    mine = rows[rows.implementation == ours]
    size = [Shape.parse(shape).get("page", 0) for shape in mine["shape"]]
    mine = mine.assign(page=size, plain=[without(shape, "page") for shape in mine["shape"]])
    both = mine[mine.page > 0].merge(mine[mine.page == 0], on=[*AT, "plain"], suffixes=("", "_plain"))
    return (both.us_p50 / both.us_p50_plain).set_axis(both.page)


def mixed(rows: pd.DataFrame, ours: str, other: str) -> pd.Series:
    """Another contender's time over ours at each point of mixed sequences that has both, by tokens."""
    step = rows[np.array(["mixed" in Shape.parse(shape) for shape in rows["shape"]], dtype=bool)]
    us = step.pivot(index=["shape", *AT], columns="implementation", values="us_p50").reindex(columns=[ours, other])
    return (us[other] / us[ours]).dropna().droplevel(["shape", "op", "dtype", "clock"])


def told(rows: pd.DataFrame, ours: str, others: Mapping[str, str]) -> str:
    """Both in words that begin with a dot between, '' where nothing is recorded. others: contender -> its name."""
    said = [f"keys in pages of {page} take {_range(found)} times as long as keys side by side ({_points(found)})"
            for page, found in paged(rows, ours).groupby(level=0)]
    speeds = {name: mixed(rows, ours, other) for other, name in others.items()}
    beside = [f"{_range(found)} times {name}'s speed ({_points(found)})" for name, found in speeds.items()
              if len(found)]
    if beside:
        said.append(f"decodes, verifications, a chunk and a prompt's begin in one call: {', '.join(beside)}")
    return "".join(f" · {text}" for text in said)


def _range(found: pd.Series) -> str:
    low, high = f"{found.min():.2f}", f"{found.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _points(found: pd.Series) -> str:
    return f"{len(found)} point{'s' * (len(found) != 1)}"
