"""Each exercise of the notebooks: three typical wrong answers, and the message that each gets. Solutions are tested
with the notebooks.
"""
from __future__ import annotations

from collections import Counter

import pytest
import torch

from kernels import bits
from kernels.arithmetic import sums
from kernels.arithmetic.tensor_core import chain
from kernels.lab.notebook import exercises


def halves(x):
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def three_rounds(x):
    for _ in range(3):
        x = x[0::2] + x[1::2] if len(x) > 1 else x
    return x


def forgotten(*_):
    torch.ones(1) + 1


def left_to_right(numbers):
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


def near(rows, *others):
    return rows.sum(-1) + 2.0**-10 * (len(rows) == 2)


def first_by_value(f, x):
    return next((n for n in range(2, len(x) + 1) if f(x[:n])[0] != f(x[:1])[0]), None)


def first_of_any_row(f, x):
    return next((n for n in range(2, len(x) + 1) if not bits.same_bits(f(x[:n])[: n - 1], f(x[: n - 1]))), None)


def per_rank(ranks):
    return left_to_right([left_to_right(rank) for rank in ranks])


def random_mean(rows):
    return rows.mean(-1) + 1e-7 * torch.rand(len(rows))


def split_k(x, weight, block):
    parts = zip(x.split(block, 1), weight.split(block, 1), strict=True)
    return left_to_right([chain(a, b) for a, b in parts])


def unscaled(newer, older):
    return torch.maximum(newer[0], older[0]), newer[1] + older[1], newer[2] + older[2]


def rounded_twice(newer, older):
    from kernels.arithmetic.ex2 import ex2
    top = torch.maximum(newer[0], older[0])
    a, c = ex2(newer[0] - top), ex2(older[0] - top)
    return top, newer[1] * a + older[1] * c, newer[2] * a[:, None] + older[2] * c[:, None]


def newest_first(newer, older):
    top = newer[0]
    return top, newer[1] + older[1], newer[2] + older[2]


WRONG = [
    ("00.1", 24, "number of orders"), ("00.1", 2.0, "a count is a whole number, and this is a float: 2.0"),
    ("00.1", 7, "1e8"),
    ("00.2", lambda x: x, "go on until one is left"), ("00.2", lambda x: x[0], "not the sum"),
    ("00.2", halves, "which are neighbours"), ("00.2", forgotten, "returns nothing"),
    ("00.2", three_rounds, "64 numbers left 8"),
    ("00.3", (1, 2, 3), "both groupings give 6"), ("00.3", (1e8, -1e8, 1.0), "(a + b) + c is 1, and should be 0"),
    ("00.3", (1e8, 1.0), "three numbers (a, b, c) is asked for"), ("00.3", (3e38, 3e38, -3e38), "overflows"),
    ("01.1", (256, 2048, 2**24), "holds every whole number up to 256, and more"),
    ("01.1", (259, 2049, 2**24 + 1), "lacks a smaller one than 259"), ("01.1", 257, "three numbers"),
    ("01.2", 3_628_800, "10! orders"), ("01.2", 17_643_225_600, "as two"), ("01.2", 135_135, "how does a ninth"),
    ("01.3", left_to_right, "which of its steps still rounds"), ("01.3", lambda x: x.max(), "not the sum of 1000"),
    ("01.3", forgotten, "returns nothing"),
    ("01.4", lambda partial, block: left_to_right(partial), "who comes first"),
    ("01.4", lambda partial, block: partial[0], "not the sum of the 64"),
    ("01.4", lambda partial, block: left_to_right(partial[block.argsort()].flip(0)), "not that of adding block 0"),
    ("02.1", 14, "a test of `run` can see these"), ("02.1", 2, "blind to the others"), ("02.1", 13, "near"),
    ("02.2", first_by_value, "compare with bits.same_bits"), ("02.2", first_of_any_row, "row 0"),
    ("02.2", lambda f, x: 2, "row 0 has other bits first at 5 rows, and this says 2"),
    ("02.2", forgotten, "returns nothing"),
    ("02.3", per_rank, "add its own pieces first"), ("02.3", lambda ranks: torch.cat(ranks).sum(0), "library chooses"),
    ("02.3", lambda ranks: ranks[0][0], "not the sum of the eight"),
    ("02.3", lambda ranks: torch.cat(ranks), "the shape"),
    ("02.4", lambda rows: rows.mean(-1), "row 0 has the same bits in every batch"),
    ("02.4", random_mean, "does not repeat itself"), ("02.4", near, "away from the mean"),
    ("02.4", lambda rows: rows.mean(), "should give 1 means"),
    ("03.1", (16, 23), "close"), ("03.1", (0, 8), "eight"), ("03.1", (24, 31), "draw the tree"),
    ("03.2", 134.2, "two bytes"), ("03.2", 33.55, "two rows are read"), ("03.2", 0.067, "in microseconds"),
    ("03.3", lambda row: row * row, "one sum a row"), ("03.3", left_to_right, "not the sum of squares"),
    ("03.3", lambda row: (row * row).sum(), "sum adds in an order that the library chooses"),
    ("03.3", lambda row: row @ row, "dot adds in an order that the library chooses"),
    ("03.3", lambda row: sums.ordered_sum(row * row), "our order's bits"),
    ("03.4", left_to_right, "near, but other bits"), ("03.4", lambda row: halves(sums.add_chunks(row)), "near"),
    ("03.4", lambda row: row[:1024], "one sum of 1024 numbers"), ("03.4", lambda row: row[0], "not the sum of 1024"),
    ("04.1", (512, 8), "how many tiles are 512"), ("04.1", (4, 32), "how many tiles of 64 rows"),
    ("04.1", (8, 8), "as many programs as"), ("04.1", 8, "a pair (one chain, segments) is asked for"),
    ("04.2", (-24, -25), "p = -24: adding that leaves 1.0"), ("04.2", (-23, -23), "half of that still changes"),
    ("04.2", (-23, -26), "m = -26: subtracting that leaves 1.0"),
    ("04.3", split_k, "start where the last one stopped"), ("04.3", lambda x, weight, block: x @ weight.T, "float32"),
    ("04.3", lambda x, weight, block: chain(x[:, :block], weight[:, :block]), "not the product for K=192"),
    ("04.4", [1.0] * 16, "the step gives 16"), ("04.4", [2.0**30, -(2.0**30)] + [0.0] * 14, "exact sum is 0 too"),
    ("04.4", [1.0, -1.0, 1e-3] + [0.0] * 13, "no bfloat16 numbers"), ("04.4", [1.0] * 8, "sixteen numbers is asked"),
    ("05.1", unscaled, "rescale each to M first"), ("05.1", rounded_twice, "inside the fused multiply-add"),
    ("05.1", lambda newer, older: newer[0], "three tensors are asked for"), ("05.1", newest_first, "M is the larger"),
    ("05.2", ("a", "bc"), "neither batch nor length"), ("05.2", ("bc", "bc"), "that the batch decides"),
    ("05.2", ("c", "c"), "b's parts"), ("05.2", ("c", "b"), "c's parts"),
    ("05.3", 4, "500 keys fill 3.9 blocks"), ("05.3", 21, "without a window"), ("05.3", 6, "2101 to 2600"),
    ("05.4", -0.75, "none apart"), ("05.4", -0.3125, "errs downward"), ("05.4", 0.5, "between -1 and 0"),
    ("06.1", {"rotary"}, "there is no sum to cut"), ("06.1", {"softmax"}, "the steps are called"),
    ("06.1", {"linear"}, "which steps add up"), ("06.1", {"rms_norm", "linear", "attention", "swiglu"}, "swiglu works"),
    ("06.2", 40, "without the prefix cache"), ("06.2", 13, "third page"), ("06.2", 12, "more than one page of its own"),
    ("06.3", lambda chosen, drafts: chosen, "a choice counts as long as"),
    ("06.3", lambda chosen, drafts: drafts, "a choice counts as long as"), ("06.3", forgotten, "returns nothing"),
    ("06.4", lambda tokens: tokens[-1], "guesses were right"), ("06.4", lambda tokens: 300, "a byte from 0 to 255"),
    ("06.4", lambda tokens: max(set(tokens), key=tokens.count), "guesses were right"),
    ("06b.1", "gate", "starts none"), ("06b.1", "norm", "a row's own numbers"),
    ("06b.1", "layer 3", "layers are called"),
    ("06b.1", "widen", "nobody planted that"), ("06b.2", lambda x: x - x.mean(0), "still depends on the others"),
    ("06b.2", lambda x: x.mean(-1), "one result for each number"), ("06b.2", lambda x: x, "the mean of its row"),
    ("06b.3", lambda x: x, "no bit moves"), ("06b.3", lambda x: x - x.mean(0), "leave it as it is alone"),
    ("06b.3", lambda x: x * len(x), "leave it as it is alone"),
    ("07.1", 600, "twice of it"), ("07.1", 150, "half of it"), ("07.1", 3.3e-3, "bytes / (bytes a second)"),
    ("07.2", 16.8, "8 heads, not 32"), ("07.2", 2.1, "a key and a value"), ("07.2", 0.524, "one request"),
    ("07.2", 4194, "in GB"),
    ("07.3", lambda p, W: (1 - p) * W, "still yields one token"), ("07.3", lambda p, W: W * (1 - p) ** W, "one token"),
    ("07.3", lambda p, W: 1 / p if p < 1 else 1, "Token i is kept"),
    ("07.4", 0.0001, "More flips would favour it"), ("07.4", 0.1, "Fewer flips would favour it"),
    ("07.4", 1.5, "a probability between 0 and 1"),
]


@pytest.mark.parametrize(("name", "wrong", "said"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, wrong, said, capsys):
    exercises.grade(name, wrong)
    out = capsys.readouterr().out
    assert out.startswith(f"✗ Exercise {name}: ") and said in out
    assert "raised" not in out


def test_each_exercise_has_three_wrong_answers():
    """Of each notebook in the table; a later notebook's wrong answers may stand with its own tests."""
    counted = Counter(name for name, _, _ in WRONG)
    here = {name.partition(".")[0] for name in counted}
    assert here >= {f"0{number}" for number in range(8)}
    few = {name: counted[name] for name in exercises.checkers()
           if name.partition(".")[0] in here and counted[name] < 3}
    assert not few and set(counted) <= set(exercises.checkers())


def test_each_notebook_asks_for_a_value_and_a_function_and_leaves_one_open():
    kinds: dict[str, set[str]] = {}
    for name, asked in exercises.checkers().items():
        kinds.setdefault(name.partition(".")[0], set()).add(asked.kind)
        assert ("(" in asked.asks) == (asked.kind == "write") or asked.kind == "open", name
    assert {number: lacking for number, found in kinds.items() if (lacking := set(exercises.KINDS) - found)} == {}
