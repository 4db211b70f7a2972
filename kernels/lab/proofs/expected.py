"""What the model of time may choose, as jobs of certificates.py: every schedule, in an order of one chain and in one of
segments.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...op import DTYPES
from ...ops.matmul.cost import Quantities
from ...ops.matmul.order import order
from ...ops.matmul.product import Product
from ...ops.matmul.schedule import Schedule, Unsuitable
from ...ops.matmul.steps import steps

WEIGHTS = ((2560, 2304), (640, 4096))  # N, K of one chain, and of segments


def expected(known: Quantities | None, rows: Callable[[Schedule, int], int]) -> list[dict]:
    """A job of `prove_all` for each schedule that a GPU's model of time may choose, at each weight it can carry out.

    `rows` of an input for a schedule and N. None, of a GPU without a model, gives no jobs.
    """
    jobs = []
    for dtype, ways in (known.ways if known else {}).items():
        for n, k in WEIGHTS:
            p = Product(0, n, k, DTYPES[dtype], (k, 1), (k, 1), order(n, k), False)
            jobs += [{"schedule": str(s), "n": n, "k": k, "dtype": dtype, "gpus": 1} for s in ways.schedules
                     if _carries_out(s, replace(p, m=rows(s, n)))]
    return jobs


def _carries_out(schedule: Schedule, product: Product) -> bool:
    try:
        return product.carried_out(schedule) == schedule and bool(steps(schedule, product))
    except Unsuitable:
        return False
