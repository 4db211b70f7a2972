"""Sums in many orders, against a pencil that rounds fractions; and the exercises of notebook 01."""
import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import bits
from kernels.lab.notebook import exercises
from kernels.lab.orders import measure as orders

FORMATS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
DIGESTS = """
from kernels import bits
from kernels.lab import orders
from kernels.op import DTYPES
for dtype in DTYPES.values():
    x, rows = orders.numbers(300, dtype, spread=12), orders.shuffles(300, 40, seed=2)
    print(bits.digest((x, rows, *orders.distribution(x, rows).values())))
print(bits.digest((orders.arrivals(50, 20, 0.3), orders.every_order(orders.numbers(7)))))
"""


def rounded(value: Fraction, precision: int) -> Fraction:
    """The nearest number with so many significant bits, ties to even; exponents without limits."""
    if not value:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (exponent - precision + 1)
    return round(value / step) * step


class Pencil:
    """The ways to add, one addition at a time, on fractions."""

    def __init__(self, precision):
        self.round = lambda value: rounded(value, precision)

    def sequential(self, row):
        total = row[0]
        for number in row[1:]:
            total = self.round(total + number)
        return total

    def split(self, row):
        each, longer = divmod(len(row), 8)
        partial = []
        for part in range(min(8, len(row))):
            mine, row = row[:each + (part < longer)], row[each + (part < longer):]
            partial.append(self.sequential(mine))
        return self.sequential(partial)

    def pairwise(self, row):
        while len(row) > 1:
            ends = row[len(row) - len(row) % 2:]
            row = [self.round(a + b) for a, b in zip(row[::2], row[1::2], strict=False)] + ends
        return row[0]

    def kahan(self, row):
        total, lost = row[0], Fraction(0)
        for number in row[1:]:
            number = self.round(number - lost)
            after = self.round(total + number)
            lost = self.round(self.round(after - total) - number)
            total = after
        return total


def fractions(x):
    return list(map(Fraction, x.double().tolist()))


# Numbers and distances.

@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("spread", [0, 8])
def test_numbers_lie_where_they_are_said_to(dtype, spread):
    x = orders.numbers(4096, dtype, spread, seed=4).double()
    assert x.abs().max() <= 1 and x.min() < 0 < x.max()
    assert (x.abs().max() / x.abs()[x != 0].median()).log2() > spread / 2
    assert bits.same_bits(orders.numbers(4096, dtype, spread, positive=True, seed=4).double(), x.abs())
    assert not bits.same_bits(orders.numbers(4096, dtype, spread, seed=5).double(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_an_ulp_is_the_distance_to_the_next_number(dtype):
    width = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    x = torch.arange(2 ** (8 * dtype.itemsize - 1)).to(width).view(dtype).double()
    x = x[x.isfinite()].tolist()
    assert all(orders.ulp(a, dtype) == b - a for a, b in zip(x, x[1:], strict=False))
    assert orders.ulp(-3.0, dtype) == orders.ulp(3.0, dtype)


@given(st.floats(0, 2.0**100, width=32))
def test_an_ulp_of_float32_is_the_distance_to_the_next_number(value):
    here = torch.tensor(value)
    assert orders.ulp(value, torch.float32) == torch.nextafter(here, here + math.inf).double() - here.double()


def test_the_exact_sum_is_exact_and_errors_are_counted_from_it():
    x = torch.tensor([1e8, 1.0, -1e8, 2.0**-30])
    assert orders.exact(x) == 1 + Fraction(1, 2**30)
    assert orders.errors(torch.tensor([0.0, 1.0]), x).tolist() == [-(1 + 2.0**-30) * 2**23, -(2.0**-7)]
    balanced = torch.tensor([3.0, -3.0])  # no ulp at 0: those of the largest number count
    assert orders.errors(torch.tensor([2.0**-22]), balanced).item() == 1


# Orders.

def test_permutations_are_all_there_are():
    assert {tuple(row) for row in orders.permutations(4).tolist()} == set(permutations(range(4)))
    assert len(orders.permutations(8).unique(dim=0)) == 40_320


@pytest.mark.parametrize("n", [1, 2, 50, 40_000])
def test_shuffles_are_orders_and_differ(n):
    rows = orders.shuffles(n, 6)
    assert torch.equal(rows.sort(-1).values, torch.arange(n).expand(6, n))
    assert n < 50 or len(rows.unique(dim=0)) == 6
    assert torch.equal(rows[:3], orders.shuffles(n, 3)), "a row does not depend on how many are drawn"
    assert n < 50 or not torch.equal(rows, orders.shuffles(n, 6, seed=1))


def test_a_shuffle_puts_every_number_anywhere_alike():
    where = orders.shuffles(4, 24_000)
    counts = torch.stack([where[:, place].bincount(minlength=4) for place in range(4)])
    assert (counts - 6000).abs().max() < 6 * 6000**0.5


def test_blocks_arrive_in_order_unless_some_take_longer():
    in_order = torch.arange(64).expand(50, 64)
    assert torch.equal(orders.arrivals(64, 50, 0.0), in_order)
    assert torch.equal(orders.arrivals(64, 50, 3.0, workers=1), in_order), "one worker cannot race"
    raced = orders.arrivals(64, 50, 0.3)
    assert torch.equal(raced.sort(-1).values, in_order) and len(raced.unique(dim=0)) == 50


def test_a_block_cannot_arrive_before_it_could_start():
    """16 workers, 1 to 1.5 units a block: the first 16 end by 1.5, the next 16 from 2 to 3, the others from 3 on."""
    place = orders.arrivals(64, 200, 0.5).argsort(-1)
    assert (place[:, :16] < 16).all() and (place[:, 16:32] < 32).all() and (place[:, 32:] >= 32).all()
    assert (place[:, :16] != torch.arange(16)).any(), "within a wave they do race"


# Ways to add.

@pytest.mark.parametrize(("dtype", "precision"), FORMATS.items())
@pytest.mark.parametrize("kind", ["sequential", "split", "pairwise", "kahan"])
@pytest.mark.parametrize("n", [1, 5, 8, 9, 100])
def test_each_way_to_add_is_what_the_pencil_does(kind, dtype, precision, n):
    x = torch.stack([orders.numbers(n, dtype, spread=3, seed=seed) for seed in range(6)])
    add, pencil = getattr(orders, kind), getattr(Pencil(precision), kind)
    assert fractions(add(x)) == [pencil(fractions(row)) for row in x]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda v: abs(v) > 2.0**-60), min_size=1, max_size=40))
def test_any_numbers_are_added_as_the_pencil_does(values):
    x, pencil = torch.tensor(values), Pencil(24)
    row = fractions(x)
    assert Fraction(orders.sequential(x).item()) == pencil.sequential(row)
    assert Fraction(orders.pairwise(x).item()) == pencil.pairwise(row)
    assert Fraction(orders.kahan(x).item()) == pencil.kahan(row)


def test_rows_are_added_alone():
    x = torch.stack([orders.numbers(33, seed=seed) for seed in range(6)]).view(2, 3, 33)
    for kind, add in orders.KINDS.items():
        assert add(x).shape == (2, 3), kind
        assert bits.same_bits(add(x)[1, 2], add(x[1, 2])), kind


def test_cutting_a_tree_at_powers_of_two_changes_nothing_and_elsewhere_it_does():
    x = torch.stack([orders.numbers(4096, seed=seed) for seed in range(8)])
    whole = orders.pairwise(x)
    assert all(bits.same_bits(orders.pairwise(x, 1 << i), whole) for i in range(13))
    assert all(not bits.same_bits(orders.pairwise(x, parts), whole) for parts in (3, 5, 7))
    assert not bits.same_bits(orders.sequential(x, 2), orders.sequential(x))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("spread", [0, 16])
def test_fixed_point_has_no_order_and_errs_by_half_an_ulp(dtype, spread):
    for seed in range(10):
        x = orders.numbers(1000, dtype, spread, seed=seed)
        found = orders.fixed_point(x[orders.shuffles(1000, 20)])
        assert all(bits.same_bits(found[i], orders.fixed_point(x, parts)) for i, parts in enumerate(range(1, 21)))
        assert orders.errors(found, x).abs().max() <= 0.5 + 1e-3


def test_fixed_point_refuses_what_its_integers_cannot_hold():
    assert orders.fixed_point(torch.tensor([1e8, 1.0]), quantum=1.0).item() == 1e8
    assert orders.fixed_point(torch.tensor([0.75, 0.75]), quantum=1.0).item() == 2, "each number is rounded"
    for x in (torch.tensor([1e8, 1.0]), torch.tensor([math.nan, 1.0]), torch.tensor([-math.inf])):
        with pytest.raises(ValueError, match="too large for steps"):
            orders.fixed_point(x)
    assert orders.fixed_point(torch.tensor([2.0**60, 2.0**60]), quantum=1.0).item() == 2.0**61
    with pytest.raises(ValueError, match="too large for steps"):  # two of them need 64 bits
        orders.fixed_point(torch.tensor([2.0**62, 2.0**62]), quantum=1.0)


def all_orders(row):
    """Every way to add, by joining any two: the same as trees, counted another way."""
    if len(row) == 1:
        return row
    found = []
    for mask in range(1, 1 << (len(row) - 1)):
        left = [v for i, v in enumerate(row) if mask >> i & 1]
        right = [v for i, v in enumerate(row) if not mask >> i & 1]
        found += [rounded(a + b, 24) for a in all_orders(left) for b in all_orders(right)]
    return found


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 1), (3, 3), (4, 15), (5, 105), (6, 945)])
def test_every_order_is_every_tree(n, count):
    x = orders.numbers(n, spread=4, seed=n)
    found = orders.every_order(x)
    assert len(found) == count
    assert sorted(fractions(found)) == sorted(all_orders(fractions(x)))


def test_every_order_contains_those_from_left_to_right():
    x = orders.numbers(8, spread=8)
    found, line = orders.every_order(x), orders.sequential(x[orders.permutations(8)])
    assert len(found) == 135_135
    assert set(line.tolist()) < set(found.tolist())
    assert bits.digest(found)[:24] == "d0fc5cb20b7329fc112dba3d", "notebook 01 says this holds on every machine"


# Many sums.

def test_a_summary_counts_bits():
    x = torch.tensor([1.0, -1.0])
    found = {"zeros": torch.tensor([0.0, -0.0, 0.0]), "off": torch.tensor([2.0**-23, 0.0, 2.0**-22])}
    table = orders.summary(found, x)
    assert table["different results"].to_dict() == {"zeros": 2, "off": 3}
    assert table["worst error (ulp)"].to_dict() == {"zeros": 0, "off": 2}
    assert set(table.orders) == {3}


@pytest.mark.parametrize("dtype", FORMATS)
def test_of_all_kinds_only_fixed_point_has_one_result(dtype):
    x = orders.numbers(4096, dtype)
    table = orders.summary(orders.distribution(x, orders.shuffles(4096, 200)), x)
    assert list(table.index) == list(orders.KINDS)
    assert table.index[table["different results"] == 1].tolist() == ["fixed point"]
    assert table["worst error (ulp)"].is_monotonic_decreasing


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_vector_unit_gives_the_same_bits(capability, capsys):
    exec(DIGESTS, {})
    here = capsys.readouterr().out
    other = subprocess.run([sys.executable, "-c", DIGESTS], env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
                           capture_output=True, text=True, check=True)
    assert len(here.split()) == 4 and other.stdout == here


@pytest.mark.parametrize(("call", "error", "said"), [
    (lambda: orders.numbers(0), ValueError, "n must be at least 1, got 0"),
    (lambda: orders.numbers(2.0), TypeError, "n must be a whole number, got 2.0"),
    (lambda: orders.numbers(2, spread=61), ValueError, "spread must be 0 to 60, got 61"),
    (lambda: orders.numbers(2, torch.int32), TypeError, "dtype must be one of bfloat16, float16, float32, got"),
    (lambda: orders.permutations(9), ValueError, "n must be 1 to 8, got 9"),
    (lambda: orders.shuffles(3, 0), ValueError, "count must be at least 1, got 0"),
    (lambda: orders.arrivals(0, 1, 0.1), ValueError, "blocks must be at least 1"),
    (lambda: orders.arrivals(2, 1, -0.1), ValueError, "jitter must be 0 to 1000, got -0.1"),
    (lambda: orders.arrivals(2, 1, 0.1, workers=0), ValueError, "workers must be at least 1"),
    (lambda: orders.sequential([1.0, 2.0]), TypeError, "x must be a tensor, got list"),
    (lambda: orders.kahan(torch.arange(3)), TypeError, "x must hold floating-point numbers, got torch.int64"),
    (lambda: orders.pairwise(torch.ones(2, 0)), ValueError, r"at least 1, got shape \(2, 0\)"),
    (lambda: orders.sequential(torch.ones(3), 4), ValueError, "parts must be 1 to 3, got 4"),
    (lambda: orders.fixed_point(torch.ones(3), True), TypeError, "parts must be a whole number, got True"),
    (lambda: orders.every_order(torch.ones(10)), ValueError, "1 to 9 numbers, got shape"),
    (lambda: orders.every_order(torch.ones(2, 2)), ValueError, r"got shape \(2, 2\)"),
    (lambda: orders.distribution(torch.ones(2), orders.permutations(2), ["sum"]), ValueError, "pairwise.*got sum"),
    (lambda: orders.distribution(torch.ones(2), orders.permutations(2), []), ValueError, "got none"),
    (lambda: orders.distribution(torch.ones(2), orders.permutations(2), "split"), TypeError, "kinds .*got 'split'"),
    (lambda: orders.distribution(torch.ones(2), orders.permutations(2), None), TypeError, "kinds .*got None"),
    (lambda: orders.distribution(torch.ones(2), orders.permutations(2), [3]), ValueError, "kinds .*got 3"),
    (lambda: orders.distribution([1.0], orders.permutations(1)), TypeError, "x must be a tensor, got list"),
    (lambda: orders.split([1.0, 2.0]), TypeError, "x must be a tensor, got list"),
    (lambda: orders.split(torch.ones(0)), ValueError, r"x must have .* got shape \(0,\)"),
    (lambda: orders.split(torch.tensor(1.0)), ValueError, r"x must have .* got shape \(\)"),
    (lambda: orders.exact([1.0]), TypeError, "x must be a tensor, got list"),
    (lambda: orders.exact(torch.ones(2, 2)), ValueError, r"x must be a vector, got shape \(2, 2\)"),
    (lambda: orders.exact(torch.tensor([1.0, math.nan])), ValueError, "x must hold finite numbers"),
    (lambda: orders.every_order([1.0]), TypeError, "x must be a tensor, got list"),
    (lambda: orders.every_order(torch.arange(3)), TypeError, "x must hold floating-point numbers, got torch.int64"),
    (lambda: orders.errors(1.0, torch.ones(2)), TypeError, "found must be a tensor, got float"),
    (lambda: orders.errors(torch.ones(1), torch.tensor([math.inf])), ValueError, "x must hold finite numbers"),
    (lambda: orders.ulp(1.0, torch.int32), TypeError, "dtype must be a floating-point dtype, got torch.int32"),
    (lambda: orders.ulp(math.inf, torch.float32), ValueError, "value must be finite, got inf"),
    (lambda: orders.fixed_point(torch.ones(3), quantum=0), ValueError, "quantum must be above 0 and finite, got 0"),
    (lambda: orders.fixed_point(torch.ones(3), quantum=-1.0), ValueError, "quantum must be above 0"),
])
def test_bad_input_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


# Exercises.

def by_place(partial, block):
    return orders.sequential(partial[block.argsort()])


@pytest.mark.parametrize(("name", "answer", "hint"), [
    ("01.1", (257, 2049, 16_777_217), "well done"),
    ("01.1", (256, 2049, 16_777_217), "bfloat16 holds every whole number up to 256"),
    ("01.1", (257, 2051, 16_777_217), "float16 lacks a smaller one than 2051"),
    ("01.1", (257, 2049), "three numbers"),
    ("01.2", 34_459_425, "well done"),
    ("01.2", 3_628_800, "left to right"),
    ("01.2", 17_643_225_600, "halve it once"),
    ("01.2", 135_135, "how does a ninth one join"),
    ("01.3", lambda x: orders.sequential(x.sort().values), "well done"),
    ("01.3", lambda x: float(orders.exact(x)), "well done"),
    ("01.3", lambda x: orders.sequential(x), "50 orders of 1000 numbers gave"),
    ("01.3", lambda x: x.double().sum(), "which of its steps still rounds"),
    ("01.3", lambda x: x.max(), "that is not the sum"),
    ("01.4", by_place, "well done"),
    ("01.4", lambda partial, block: orders.sequential(partial), "still depends on who comes first"),
    ("01.4", lambda partial, block: orders.sequential(partial.sort().values), "one result at last"),
    ("01.4", lambda partial, block: partial[0], "not the sum of the 64"),
])
def test_exercises_know_right_from_wrong(name, answer, hint, capsys):
    exercises.grade(name, answer)
    assert hint in capsys.readouterr().out
