"""Fixtures of the notebooks' tests."""
from __future__ import annotations

import pytest

from kernels.lab.notebook import exercises


@pytest.fixture
def two_exercises(monkeypatch):
    """Two made-up exercises in place of the notebooks' own."""
    exercises.checkers()  # the notebooks' own are registered first
    monkeypatch.setattr(exercises, "CHECKERS", {})
    monkeypatch.setattr(exercises, "_graded", {})

    @exercises.exercise("01.1", wants="a whole number")
    def _(answer):
        assert answer == 4, "two and two"

    @exercises.exercise("01.2", "square(x)", wants="a number")
    def _(square):
        if square(2) != 4:
            raise AssertionError
