"""One addition of a Hopper tensor core, digit by digit: what its adder keeps of four products and an accumulator."""
from __future__ import annotations

from matplotlib.figure import Figure

from kernels.arithmetic.tensor_core import HOPPER, explain
from kernels.lab import records
from kernels.lab.adder import chart as adder_chart

EXPONENTS, ACCUMULATOR = (3, -6, -14, -27), -2
def words(data=records.DATA, machine: str | None = None) -> str:
    return adder_chart.in_words(explain(*adder_chart.example(EXPONENTS, ACCUMULATOR), HOPPER), HOPPER)


def draw(data=records.DATA, machine: str | None = None) -> Figure:
    """Worked out from the rule alone; it is the same for every record."""
    return adder_chart.study(EXPONENTS, ACCUMULATOR)[0]
