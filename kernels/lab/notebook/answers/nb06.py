"""Checkers of notebook 06, Serve a model."""
from __future__ import annotations

from ...serving.measure import held_out
from ..exercises import exercise
from ..written import number

GUESSES = 400  # of exercise 06.4


@exercise("06.1", wants="a set of names")
def _(answer):
    steps = {"rms_norm", "linear", "rotary", "attention", "swiglu"}
    assert set(answer) <= steps, f"the steps are called {', '.join(sorted(steps))}."
    assert "rotary" not in answer, "a rotation names two numbers of one row and one position: there is no sum to cut."
    assert "swiglu" not in answer, "swiglu works element by element: there is no sum to cut."
    assert set(answer) == {"rms_norm", "linear", "attention"}, "which steps add up many numbers for one result?"


@exercise("06.2", wants="a whole number")
def _(answer):
    answer = number(answer, "a whole number")
    assert answer != 40, "that is without the prefix cache: four pages for each of ten requests."
    assert answer != 13, "the third page of the prompt is not full: its request writes the answer into it."
    assert answer != 12, "each request needs more than one page of its own: how many tokens lie behind the shared ones?"
    assert answer == 22, "64 tokens lie in four pages; of the prompt's 40, how many full pages can be shared?"


@exercise("06.3", "kept(chosen, drafts)", wants="a list of tokens")
def _(kept):
    for chosen, drafts in (([7], []), ([5, 6, 9, 1], [5, 6, 7]), ([5, 6, 7, 1], [5, 6, 7]), ([4, 6, 7, 1], [5, 6, 7])):
        right = sum(chosen[: i + 1] == drafts[: i + 1] for i in range(len(drafts)))
        got, wanted = list(kept(list(chosen), list(drafts))), chosen[: right + 1]
        assert got != chosen[:right] or not right, (
            f"for kept({chosen}, {drafts}) one token is missing: the choice behind the last right draft counts too.")
        assert got == wanted, (f"kept({chosen}, {drafts}) is {wanted}, not {got}: a choice counts as long as all "
                               "drafts before it were right.")


@exercise("06.4", "draft(tokens)", wants="a byte, 0 to 255", kind="open")
def _(draft):
    text, right = held_out(), 0
    for i in range(GUESSES):
        end = len(text) // 16 * (i % 16) + 300 + 61 * (i // 16)
        guess = draft(list(text[end - 256 : end]))
        assert guess in range(256), f"a byte from 0 to 255 is asked for, and {guess!r} was guessed."
        right += int(guess) == text[end]
    assert 5 * right >= 2 * GUESSES, (f"{right} of {GUESSES} guesses were right, and two in five are asked for: what "
                                      "followed when the last few bytes stood there before?")
