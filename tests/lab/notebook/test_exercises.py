"""Exercises: an answer is right, wrong with a hint, or not there yet; and the notebooks' own checkers."""
from __future__ import annotations

import pytest
import torch

from kernels.lab.notebook import exercises


@pytest.mark.parametrize(("name", "answer", "passed", "said"), [
    ("01.1", ..., None, "not answered yet"),
    ("01.1", 4, True, "✓ Exercise 01.1"),
    ("01.1", 5, False, "✗ Exercise 01.1: two and two"),
    ("01.1", torch.ones(2), False, "your answer raised RuntimeError"),
    ("01.2", lambda x: x * x, True, "✓ Exercise 01.2"),
    ("01.2", lambda x: x, False, "look again"),
    ("01.2", lambda x: ..., None, "not answered yet"),
    ("01.2", lambda x: None, None, "not answered yet"),
    ("01.2", lambda x: 1 / 0, False, "your answer raised ZeroDivisionError"),
    ("01.2", 3, False, "your answer raised TypeError"),
])
def test_grade_prints_and_passes_tells(name, answer, passed, said, two_exercises, capsys):
    assert exercises.grade(name, answer) is None
    assert said in capsys.readouterr().out
    assert exercises.passes(name, answer) is passed


def test_a_stub_function_is_not_answered(two_exercises, capsys):
    def answer(x):
        """Square x."""
    exercises.grade("01.2", answer)
    assert "not answered yet" in capsys.readouterr().out


def test_an_unknown_exercise(two_exercises, capsys):
    exercises.grade("09.9", 1)
    assert capsys.readouterr().out == "There is no exercise 09.9; there are 01.1, 01.2.\n"
    with pytest.raises(KeyError, match="no exercise 09.9"):
        exercises.passes("09.9", 1)
    with pytest.raises(ValueError, match="two exercises 01.1"):
        exercises.exercise("01.1")(len)


@pytest.mark.parametrize(("name", "wrong", "hint"), [
    ("00.1", 24, "number of orders"), ("00.1", 2.0, "whole number"), ("00.1", 7, "1e8"),
    ("00.2", lambda x: x, "go on until one is left"), ("00.2", lambda x: x[0], "not the sum"),
    ("00.2", lambda x: x.view(2, -1).sum(0).flip(0).cumsum(0)[-1] if len(x) > 1 else x[0], "which are neighbours"),
    ("03.1", (16, 23), "close"), ("03.1", (0, 8), "eight"), ("03.1", (24, 31), "draw the tree"),
    ("03.2", 134.2, "two bytes"), ("03.2", 33.55, "two rows are read"), ("03.2", 0.067, "in microseconds"),
    ("03.3", lambda row: row * row, "one sum a row"), ("03.3", lambda row: row.sum(), "not the sum of squares"),
    ("03.3", lambda row: rms_norm_order(row), "our order's bits"),
])
def test_a_wrong_answer_gets_its_hint(name, wrong, hint, capsys):
    exercises.grade(name, wrong)
    assert hint in capsys.readouterr().out


def rms_norm_order(row):
    from kernels.arithmetic.sums import ordered_sum
    return ordered_sum(row * row)
