"""Fixtures of the notebooks' tests."""
from __future__ import annotations

import pytest

from kernels.lab.notebook import exercises


@pytest.fixture
def two_exercises(monkeypatch):
    """Two made-up exercises in place of the notebooks' own."""
    exercises.checkers()  # the notebooks' own are registered first
    monkeypatch.setattr(exercises, "CHECKERS", {})

    @exercises.exercise("01.1")
    def _(answer):
        assert answer == 4, "two and two"

    @exercises.exercise("01.2")
    def _(answer):
        if answer(2) != 4:
            raise AssertionError
