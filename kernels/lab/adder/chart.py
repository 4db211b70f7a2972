"""A picture of one addition in a tensor core: significands side by side, and where the adder cuts them.

Plain functions to a Figure, over tensor_core.explain; notebook 04, its widget and figures/adder.py draw with these.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...arithmetic.tensor_core import AMPERE, HOPPER, Adder, explain
from .. import style

PRODUCTS = 4
EXPONENTS = range(-40, 17)  # of a product or the accumulator, in `example`
ADDERS = {"Hopper": HOPPER, "Ampere": AMPERE}
_FACTORS = ((1.3203125, 1.5234375), (1.1796875, -1.7421875), (1.9140625, 1.2734375), (-1.4609375, -1.0859375))
_ACCUMULATOR = Fraction(0b101101110010110100111011, 1 << 23)
_BELOW = 14  # columns drawn below the grid
_KEPT = {0: ("#d7e6f3", "#1b4f7d"), 1: (style.BLUE, "#ffffff")}
_LOST = {0: ("#f6dccb", "#8c3a12"), 1: ("#8c1d18", "#ffffff")}


def example(exponents: Sequence[int | None], accumulator: int | None = None) -> tuple:
    """Factors a, b (4,) bfloat16 and a float32 accumulator with fixed significands and these exponents.

    None is a zero. Exponents run from -40 to 16. ValueError for any other, or for another number of products.
    """
    if len(exponents) != PRODUCTS:
        raise ValueError(f"exponents must be {PRODUCTS}, one a product, got {len(exponents)}")
    for name, value in (*(("exponents", e) for e in exponents), ("accumulator", accumulator)):
        if value is not None and (type(value) is not int or value not in EXPONENTS):
            raise ValueError(f"{name} must be None or a whole number from {EXPONENTS[0]} to {EXPONENTS[-1]}, "
                             f"got {value!r}")
    a = [0.0 if e is None else p * 2.0 ** (e // 2) for (p, _), e in zip(_FACTORS, exponents, strict=True)]
    b = [0.0 if e is None else q * 2.0 ** (e - e // 2) for (_, q), e in zip(_FACTORS, exponents, strict=True)]
    start = 0.0 if accumulator is None else float(_ACCUMULATOR) * 2.0**accumulator
    factors = (torch.tensor(values, dtype=torch.bfloat16, device="cpu") for values in (a, b))
    return *factors, start


def study(exponents: Sequence[int | None], accumulator: int | None = None, adder: Adder = HOPPER,
          title: str = "") -> tuple[Figure, str]:
    """One addition of `example`'s numbers: the picture, and in words. Arguments and errors as there."""
    table = explain(*example(exponents, accumulator), adder)
    return picture(table, adder, title), in_words(table, adder)


def claim(table: dict, adder: Adder) -> str:
    """What the adder did, in one line."""
    terms = [t for t in table["terms"] if t["value"]]
    cut = sum(bool(t["lost"]) and bool(t["kept"]) for t in terms)
    gone = sum(not t["kept"] for t in terms)
    whole = len(terms) - cut - gone
    return (f"{whole} of {len(terms)} terms kept whole, {cut} cut, {gone} lost: the line is {adder.fraction_bits} bits "
            "below the largest exponent")


def in_words(table: dict, adder: Adder) -> str:
    """The picture in words: its text alternative."""
    said = [f"{t['term']}, {_number(t['value'])}, {_fate(t)}" for t in table["terms"]]
    return (f"The binary digits of an accumulator and {len(table['terms']) - 1} exact products, one a line, aligned at "
            f"the binary point, with a cut {adder.fraction_bits} places below 2 to the {table['exponent']}, the "
            f"largest exponent. {'; '.join(said)}. What is kept is added exactly and cut to 24 digits: "
            f"{_number(table['result'])}, short of the exact sum by {_number(table['lost'])}.")


def picture(table: dict, adder: Adder, title: str = "") -> Figure:
    """Draw what tensor_core.explain returned for one addition by `adder`; the claim is the title if none is given."""
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(10, 1.55 + 0.3 * (len(table["terms"]) + 1)), layout="constrained")
        axes = figure.subplots()
        digits(axes, table, adder)
        axes.set_title(title or claim(table, adder), pad=10)
        style.caption(figure, caption(table))
    return figure


def caption(table: dict) -> str:
    """What the colours mean, and what this addition lost."""
    return ("Red digits are cut toward zero: by the adder, right of the line, or below it to make a float32 of the "
            f"sum. This step loses {_number(table['lost'])} in all")


def digits(axes: Axes, table: dict, adder: Adder) -> None:
    """The digits of what tensor_core.explain returned, a line a term, and of their sum."""
    names = [t["term"] for t in table["terms"]] + ["their sum"]
    places = [*range(len(names) - 1), len(names) - 0.7]
    end = adder.fraction_bits + _BELOW
    for y, term in enumerate(table["terms"]):
        _line(axes, y, *_term_digits(term), adder.fraction_bits, end)
        _beside(axes, y, end, _number(term["value"]), _fate(term).removeprefix("is ").split(" by ")[0])
    sign, of_sum = _sum_digits(table, adder)
    _line(axes, places[-1], sign, of_sum, (_first(of_sum) or 0) + 23, end)
    rounded = "cut to 24 digits" if table["sum"] != table["result"] else "kept whole"
    _beside(axes, places[-1], end, _number(table["result"]), rounded)
    _frame(axes, table, adder, places, names)


def _frame(axes, table, adder, places, names):
    """The cut, the powers of two and the names."""
    end = adder.fraction_bits + _BELOW
    axes.vlines(adder.fraction_bits + 0.5, -0.6, places[-2] + 0.5, color="#404040", linewidth=1.6)
    axes.axhline(places[-1] - 0.65, color="#404040", linewidth=0.8)
    axes.set_yticks(places, names)
    at = range(0, end + 1, 5)
    axes.set_xticks(at, [f"$2^{{{table['exponent'] - i}}}$" for i in at])
    axes.xaxis.tick_top()
    left = -len(names).bit_length() - 2  # the first column of the sum of these terms, each below four, and its sign
    axes.set(xlim=(left, end + 9), ylim=(places[-1] + 0.55, -0.6))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _term_digits(term) -> tuple[str, dict[int, int]]:
    """Sign, and digit by column: column 0 stands for the largest exponent."""
    digits = term["kept_bits"][1:].replace(".", "") + term["lost_bits"]
    return term["kept_bits"][0], {i - 1: int(d) for i, d in enumerate(digits)}


def _sum_digits(table, adder) -> tuple[str, dict[int, int]]:
    """The same of the sum of what was kept, a multiple of the grid."""
    digits = f"{int(abs(table['sum']) / table['grid']):b}"
    start = adder.fraction_bits + 1 - len(digits)
    return "-" if table["sum"] < 0 else "+", {start + i: int(d) for i, d in enumerate(digits)}


def _first(digits: dict[int, int]) -> int | None:
    return next((place for place, digit in digits.items() if digit), None)


def _line(axes, y, sign, digits, cut, end):
    """One number: a cell for each digit from its first one to its last one, red after column `cut`."""
    first = _first(digits)
    if first is None:
        axes.text(0, y, "0", ha="center", va="center", fontsize=8)
        return
    last = max(place for place, digit in digits.items() if digit)
    for place in range(first, min(last, end) + 1):
        fill, ink = (_KEPT if place <= cut else _LOST)[digits[place]]
        axes.barh(y, 0.92, 0.8, place - 0.46, color=fill, linewidth=0)
        axes.text(place, y, str(digits[place]), ha="center", va="center", fontsize=7, color=ink)
    if sign == "-" and first <= end:
        axes.text(first - 0.95, y, "−", ha="center", va="center", fontsize=9)
    if last > end:
        axes.text(end + 0.95, y, "›", ha="center", va="center", fontsize=10, color=_LOST[1][0])


def _beside(axes, y, end, number, fate):
    axes.text(end + 2, y, f"{number}\n{fate}", va="center", fontsize=7.5, linespacing=1.05)


def _fate(term) -> str:
    if not term["value"]:
        return "is zero"
    if not term["lost"]:
        return "is kept whole"
    return f"is cut by {_number(abs(term['lost']))}" if term["kept"] else "is lost whole"


def _number(value: float) -> str:
    return "0" if not value else f"{value:.6g}" if math.isfinite(value) else "infinity"
