"""Exercises: an answer is right, wrong with a hint, or not there yet; what is done; sums borrowed from a library."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.lab.notebook import exercises, written


def no_return(x):
    x * x


def prints(x):
    print(x * x)


def sometimes(x):
    return x * x if x > 2 else None


def stub(x):
    """Square x."""


def two(x, y):
    return x * y


def raises(x):
    return 1 / 0


def asserts(x):
    raise AssertionError("mine")


@pytest.mark.parametrize(("name", "answer", "passed", "said"), [
    ("01.1", ..., None, "○ Exercise 01.1: not answered yet. Replace the ... and run"),
    ("01.1", 4, True, "✓ Exercise 01.1: well done."),
    ("01.1", 5, False, "✗ Exercise 01.1: two and two"),
    ("01.1", torch.ones(2), False, "a whole number is asked for, and this is a tensor of shape (2,)"),
    ("01.1", abs, False, "a whole number is asked for, and this is a function"),
    ("01.2", ..., None, "not answered yet. Write square(x) and run"),
    ("01.2", stub, None, "not answered yet"),
    ("01.2", lambda x: ..., None, "not answered yet"),
    ("01.2", lambda x: None, None, "not answered yet"),
    ("01.2", lambda x: x * x, True, "✓ Exercise 01.2"),
    ("01.2", lambda x: x, False, "look again"),
    ("01.2", no_return, False, "square computes, but returns nothing: end it with `return`"),
    ("01.2", prints, False, "square computes, but returns nothing"),
    ("01.2", sometimes, False, "square returned None here: does every way through it end with `return`?"),
    ("01.2", raises, False, "your answer raised ZeroDivisionError: division by zero (line "),
    ("01.2", asserts, False, "your answer raised AssertionError: mine"),
    ("01.2", lambda x: torch.ones(2), False, "square(x) should return a number, and returned a tensor of shape (2,)"),
    ("01.2", two, False, "it is called as square(x), and yours takes (x, y)"),
    ("01.2", 3, False, "a function `square(x)` is asked for, and this is an int: 3."),
    ("01.2", "x * x", False, "a function `square(x)` is asked for, and this is a str: 'x * x'."),
])
def test_grade_prints_and_passes_tells(name, answer, passed, said, two_exercises, capsys):
    assert exercises.grade(name, answer) is None
    out = capsys.readouterr().out
    assert said in out
    assert ("raised" in out) == (answer in (raises, asserts)), "`raised` stands only where the answer did"
    assert exercises.passes(name, answer) is passed


def test_an_exercise_that_says_nothing_of_its_form_takes_values_and_functions(two_exercises, capsys):
    @exercises.exercise("01.3")
    def _(answer):
        assert (answer(3) if callable(answer) else answer) == 9, "three squared"

    assert exercises.passes("01.3", 9) and exercises.passes("01.3", lambda x: x * x)
    for answer, said in ((8, "three squared"), (raises, "your answer raised ZeroDivisionError"),
                         (no_return, "answer computes, but returns nothing")):
        exercises.grade("01.3", answer)
        assert said in capsys.readouterr().out


def test_none_may_be_an_answer_where_the_exercise_says_so(two_exercises, capsys):
    @exercises.exercise("01.3", "find(x)", none=True)
    def _(find):
        assert find(1) is None and find(3) == 9

    assert exercises.passes("01.3", sometimes)
    exercises.grade("01.3", prints)
    assert "returns nothing" in capsys.readouterr().out


def test_an_unknown_exercise(two_exercises, capsys):
    exercises.grade("09.9", 1)
    assert capsys.readouterr().out == "There is no exercise 09.9; there are 01.1, 01.2.\n"
    with pytest.raises(KeyError, match="no exercise 09.9"):
        exercises.passes("09.9", 1)
    with pytest.raises(ValueError, match="two exercises 01.1"):
        exercises.exercise("01.1")(len)
    with pytest.raises(ValueError, match="kind must be one of number, write, open, got 'easy'"):
        exercises.exercise("01.3", kind="easy")


def test_progress_is_what_notebooks_hold_and_what_was_graded_since(two_exercises, capsys, tmp_path):
    (tmp_path / "01_saved.ipynb").write_text(
        '{"cells": [{"outputs": [{"text": ["✗ Exercise 01.1: two and two\\n", "✓ Exercise 01.2: well done.\\n"]}]}]}')
    for name, content in (("02_no_json", "{"), ("03_no_cells", "[]"), ("04_odd_cells", '{"cells": [1]}')):
        (tmp_path / f"{name}.ipynb").write_text(content)
    exercises.progress(tmp_path)
    assert capsys.readouterr().out == "notebook 01: ✗ 01.1  ✓ 01.2\n1 of 2 exercises done\n"
    exercises.grade("01.1", 4)
    exercises.grade("01.2", ...)
    capsys.readouterr()
    exercises.progress(tmp_path)
    assert capsys.readouterr().out == "notebook 01: ✓ 01.1  ✓ 01.2\n2 of 2 exercises done\n"
    exercises.progress(tmp_path / "nowhere")
    assert "✓ 01.1  ○ 01.2\n1 of 2" in capsys.readouterr().out


def by_hand(x):
    total = x[0]
    for value in x[1:]:
        total = total + value
    return total


@pytest.mark.parametrize(("function", "found"), [
    (by_hand, []),
    (lambda x: sum(x), []),  # Python's own adds from left to right
    (lambda x: math.fsum(x.tolist()), []),
    (lambda x: x.amax() + x.sort().values[0], []),
    (lambda x: x.index_put((torch.tensor([0]),), torch.tensor([1.0])), []),
    (torch.sum, ["sum"]), (torch.Tensor.mean, ["mean"]), (torch.norm, ["linalg_vector_norm"]),
    (lambda x: x @ x, ["dot"]), (lambda x: torch.stack([x, x]) @ x, ["mv"]),
    (lambda x: torch.nn.functional.linear(x, x), ["dot"]), (lambda x: torch.cumsum(x, 0)[-1], ["cumsum"]),
    (lambda x: torch.einsum("i,i->", x, x), ["bmm"]), (lambda x: torch.var(x), ["var"]),
    (lambda x: torch.zeros(1).index_put_((torch.zeros(8, dtype=torch.int64),), x, accumulate=True), ["index_put"]),
    (lambda x: np.asarray(x).sum(), ["NumPy"]), (lambda x: x.numpy().sum(), ["NumPy"]),
    (lambda x: x.sum() + x.sum() + x.mean(), ["sum", "mean"]),
])
def test_a_librarys_sums_are_noticed_by_what_runs(function, found):
    x = torch.arange(8.0)
    result, noticed = written.library_sums(function, x)
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(function(x))) and set(found) <= set(noticed)
    assert bool(noticed) == bool(found)
    if found:
        with pytest.raises(AssertionError, match="order that the library chooses"):
            written.refuse_library_sums(function, x)


@pytest.mark.parametrize("value", [None, "4", True, [1, 2], torch.ones(2), print])
def test_what_is_no_number_is_named(value):
    with pytest.raises(AssertionError, match="a count is asked for, and this is "):
        written.number(value, "a count")


def test_numbers_come_in_the_count_that_is_asked_for():
    assert written.numbers(torch.tensor([1, 2]), 2, "a pair") == (1.0, 2.0)
    assert written.number(np.float32(2)) == 2.0 == written.number(torch.tensor([2.0]))
    for value in (3, (1,), (1, 2, 3), "ab", {1, 2}):
        with pytest.raises(AssertionError, match="a pair is asked for, and this is "):
            written.numbers(value, 2, "a pair")
    with pytest.raises(AssertionError, match="a number in each place of a pair is asked for, and this is a str"):
        written.numbers((1, "2"), 2, "a pair")
