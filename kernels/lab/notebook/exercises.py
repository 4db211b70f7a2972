"""Exercises: what the notebooks' stubs hand their answers to.

A notebook's stub leaves `answer = ...` and calls `grade`, which prints and never raises, so Run All goes on:

    answer = ...
    grade("03.1", answer)

A checker takes the answer, returns None if it is right, and else raises AssertionError whose message is a hint.
A folded solution is a markdown cell with <details> around a ```python block that begins `# solution 03.1` and
sets `answer`; the tests run it.
"""
from __future__ import annotations

import dis
from collections.abc import Callable
from inspect import isfunction
from itertools import permutations

import torch

from ... import bits
from ...arithmetic import sums
from ...arithmetic.tensor_core import chain, explain
from ...ops.matmul.op import matmul, order
from ..orders import measure as orders

CHECKERS: dict[str, Callable] = {}
_CONSTANT = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE", "COPY_FREE_VARS"}


def exercise(name: str) -> Callable:
    """Register the decorated checker as exercise `name`, such as "03.1": notebook 03, first exercise."""
    def register(checker):
        if name in CHECKERS:
            raise ValueError(f"there are two exercises {name}")
        CHECKERS[name] = checker
        return checker
    return register


def grade(name: str, answer) -> None:
    """Print whether the answer is right, a hint if it is not, or that there is none yet. Never raises."""
    if name not in CHECKERS:
        print(f"There is no exercise {name}; there are {', '.join(sorted(CHECKERS)) or 'none'}.")
    elif _unanswered(answer):
        print(f"○ Exercise {name}: not answered yet. Replace the ... and run the cell again.")
    else:
        hint = _hint(name, answer)
        print(f"✗ Exercise {name}: {hint}" if hint else f"✓ Exercise {name}: well done.")


def passes(name: str, answer) -> bool | None:
    """Whether the answer is right; None if there is none yet. Raises KeyError for an unknown exercise."""
    if name not in CHECKERS:
        raise KeyError(f"there is no exercise {name}; there are {sorted(CHECKERS)}")
    return None if _unanswered(answer) else _hint(name, answer) is None


def _hint(name: str, answer) -> str | None:
    try:
        CHECKERS[name](answer)
    except AssertionError as error:
        return str(error) or "not yet; look again at the question."
    except Exception as error:  # noqa: BLE001 - whatever an answer raises is a hint to its author
        return f"your answer raised {type(error).__name__}: {error}"
    return None


def _unanswered(answer) -> bool:
    """Whether this is the stub: an Ellipsis, or a function that does nothing but return None or an Ellipsis."""
    if not isfunction(answer):
        return answer is ...
    constants = set(answer.__code__.co_consts) - {answer.__doc__}
    return constants <= {None, ...} and {i.opname for i in dis.get_instructions(answer)} <= _CONSTANT


@exercise("00.1")
def _(answer):
    assert isinstance(answer, int), f"a count is a whole number, and this is a {type(answer).__name__}."
    found = {_left_to_right(order) for order in permutations([1e8, 1.0, -1e8, 1.0])}
    assert answer != 24, "24 is the number of orders; many of them give the same sum."
    assert answer == len(found), "in float32 1e8 + 1 is 1e8: is each 1 added before 1e8 is gone, or after?"


def _left_to_right(numbers) -> float:
    total = torch.tensor(0.0)
    for number in numbers:
        total = total + torch.tensor(number)
    return total.item()


@exercise("00.2")
def _(answer):
    for width in (1, 2, 8, 1024):
        x = bits.portable(1, width, seed=width)[0]
        got = torch.as_tensor(answer(x.clone())).reshape(-1)
        assert got.numel() == 1, f"{width} numbers left {got.numel()}; go on until one is left."
        assert torch.isclose(got, x.sum(), rtol=1e-4, atol=1e-4).all(), f"this is not the sum of {width} numbers."
        assert bits.same_bits(got, sums.add_neighbours(x)), (
            f"near, but other bits for {width} numbers: which are neighbours, 0 and 1, or 0 and the middle?")


@exercise("01.1")
def _(answer):
    assert len(answer) == 3, "three numbers are asked for: bfloat16's, float16's and float32's."
    for n, dtype in zip(answer, (torch.bfloat16, torch.float16, torch.float32), strict=True):
        first = next(2**i + 1 for i in range(60) if orders.ulp(2**i, dtype) == 2)
        assert n >= first, f"{dtype} holds every whole number up to {n}, and more; where does its gap become 2?"
        assert n == first, f"{dtype} lacks a smaller one than {n}; where does its gap become 2?"


@exercise("01.2")
def _(answer):
    assert answer != 3_628_800, "10! orders are those from left to right, and they count a + b and b + a as two."
    assert answer != 17_643_225_600, "that counts a + b and b + a as two: halve it once for each of the 9 additions."
    assert answer == 34_459_425, "eight numbers have 1 x 3 x 5 x 7 x 9 x 11 x 13; how does a ninth one join?"


@exercise("01.3")
def _(answer):
    wide = torch.tensor([1e17, 1.0, -1e17, 1.0, 3e8, -3e8, 1e-3])
    for x in (orders.numbers(1000, seed=3), orders.numbers(300, spread=40), wide):
        found = torch.stack([torch.as_tensor(answer(x[order])).float().reshape(())
                             for order in orders.shuffles(len(x), 50)])
        off = (found.double() - float(orders.exact(x))).abs().max().item()
        assert off <= 1e-4 * x.abs().sum().item(), f"off by {off:.3g}: that is not the sum of {len(x)} numbers."
        several = len(found.unique())
        assert several == 1, f"50 orders of {len(x)} numbers gave {several} sums: which of its steps still rounds?"


@exercise("01.4")
def _(answer):
    partial = orders.sequential(orders.numbers(4096).view(64, 64))
    found = torch.stack([torch.as_tensor(answer(partial[block], block)).reshape(())
                         for block in orders.arrivals(64, 20, 0.5)])
    assert torch.isclose(found, partial.sum(), atol=1e-3).all(), "this is not the sum of the 64 partial sums."
    assert len(found.unique()) == 1, "it still depends on who comes first: give each block a place of its own."
    assert bits.same_bits(found[0], orders.sequential(partial)), (
        "one result at last, but not that of adding block 0, 1, 2, ... left to right.")


@exercise("02.1")
def _(answer):
    assert answer in ("run", "batch", "schedule"), 'one of the words "run", "batch" and "schedule" is asked for.'
    assert answer != "run", "each kernel repeats itself when it is called again with the same tensors."
    assert answer != "schedule", "the machine, its libraries and its settings are the same at noon; what is not?"


@exercise("02.2")
def _(answer):
    x = bits.portable(12, 64)
    for change in (2, 5, 12, None):
        def moves(rows, change=change):
            return rows.sum(-1) + (len(rows) == change) * 2.0**-10

        got = answer(moves, x)
        assert got == change, f"row 0 has other bits first at {change} rows, and this says {got}."

    def moves_elsewhere(rows):
        return torch.cat([rows[:1, 0], rows[1:, 0] + len(rows)])

    got = answer(moves_elsewhere, x)
    assert got is None, f"row 0 keeps its bits here, other rows do not; this says {got}."

    def zeros(rows):
        return torch.full((len(rows),), -0.0 if len(rows) == 3 else 0.0)

    assert answer(zeros, x) == 3, "-0.0 and 0.0 are equal, and they have other bits: compare with bits.same_bits."


@exercise("02.3")
def _(answer):
    pieces = bits.portable(8, 4096)
    exact, sums_ = pieces.double().sum(0), {}
    for ranks in (1, 2, 4, 8):
        got = answer([piece.clone() for piece in pieces.chunk(ranks)])
        assert got.shape == exact.shape, f"{ranks} processes left the shape {tuple(got.shape)}, not (4096,)."
        assert (got - exact).abs().max() < 1e-5, f"for {ranks} processes this is not the sum of the eight pieces."
        sums_[ranks] = got
    for ranks, got in sums_.items():
        assert bits.same_bits(got, sums_[1]), (
            f"{ranks} processes and 1 give other bits: does each process add its own pieces first?")


@exercise("03.1")
def _(answer):
    first, last = answer
    assert last - first == 7, "each side of an addition covers as many columns as the other: eight."
    assert (first, last) != (16, 23), "close: in which pairs do the blocks of eight go, counted from column 0?"
    assert (first, last) == (0, 7), "draw the tree over 16 columns: 0+1, 2+3, ..., then pairs of pairs."


@exercise("03.2")
def _(answer):
    exact = 4 * 4096 * 8192 * 2 / 4.0e12 * 1e6
    assert abs(answer / exact - 0.5) > 0.02, "half of it: two rows are read and two are written."
    assert abs(answer / exact - 2) > 0.04, "twice it: a bfloat16 number has two bytes."
    assert abs(answer / exact - 1) < 0.02, "bytes read and written, divided by bytes a second, in microseconds."


@exercise("03.3")
def _(answer):
    rows = bits.portable(16, 4096)
    got = torch.stack([torch.as_tensor(answer(row.clone())).reshape(-1) for row in rows])
    exact = rows.double().square().sum(-1, keepdim=True)
    assert got.shape == exact.shape, f"one sum a row is asked for, and this is {got.shape[-1]} numbers."
    wrong = (got / exact - 1).abs().max().item()
    assert wrong < 1e-5, f"this is not the sum of squares: {wrong:.2g} of it is missing or too much."
    again = torch.stack([torch.as_tensor(answer(row.clone())).reshape(-1) for row in rows])
    assert bits.same_bits(got, again), "the same row gave other bits the second time."
    assert not bits.same_bits(got, sums.ordered_sum(rows * rows)), "these are our order's bits; find another order."


@exercise("04.1")
def _(answer):
    one, cut = answer
    assert one != 512, "a tile holds 64 weight rows; how many tiles are 512?"
    assert one == 8, "16 tokens are one tile high; how many tiles of 64 rows are 512 wide?"
    assert cut == 8 * order(512, 8192)[0], "each tile is as many programs as `order(512, 8192)` has segments."


@exercise("04.2")
def _(answer):
    for name, exponent, sign in zip("pm", answer, (1, -1), strict=True):
        def changes(exponent, sign=sign):
            product = torch.tensor([sign * 2.0**exponent], dtype=torch.bfloat16)
            return explain(torch.ones_like(product), product, 1.0)["result"] != 1.0

        word = "adding" if sign > 0 else "subtracting"
        assert changes(exponent), f"{name} = {exponent}: {word} that leaves 1.0; a larger one does not."
        assert not changes(exponent - 1), f"{name} = {exponent}: {word} half of that still changes 1.0."


@exercise("04.3")
def _(answer):
    for seed, k in ((0, 192), (2, 500)):
        x, weight, _ = matmul.inputs(8, f"N=24,K={k}", torch.bfloat16, seed=seed)
        for block in (16, 48, 64, 512):
            got = answer(x.clone(), weight.clone(), block)
            assert got.shape == (8, 24) and got.dtype == torch.float32, (
                f"float32 of shape (8, 24) is asked for, and this is {got.dtype} of shape {tuple(got.shape)}.")
            assert torch.allclose(got, x.float() @ weight.float().T, atol=1e-3), (
                f"this is not the product for K={k} in blocks of {block}.")
            assert bits.same_bits(got, chain(x, weight)), (
                f"other bits in blocks of {block}: does each block start where the last one stopped?")


@exercise("07.1")
def _(answer):
    assert abs(answer / 600 - 1) > 0.02, "twice of it: a weight takes two operations a token, a multiply and an add."
    assert abs(answer / 150 - 1) > 0.02, "half of it: a bfloat16 weight has two bytes."
    assert abs(answer / 300 - 1) < 0.02, "bytes / (bytes a second) = operations / (operations a second)."


@exercise("07.2")
def _(answer):
    exact = 8 * 4000 * 32 * 2 * 8 * 128 * 2 / 1e9
    assert abs(answer / exact - 4) > 0.1, "four times too much: keys and values have 8 heads, not 32."
    assert abs(answer / exact - 0.5) > 0.01, "half of it: there is a key and a value, and each number has two bytes."
    assert abs(answer / exact - 0.125) > 0.01, "that is one request; the group has eight."
    assert abs(answer / exact - 1) < 0.03, "requests x tokens x layers x 2 x kv_heads x head_dim x bytes, in GB."


@exercise("07.3")
def _(answer):
    assert abs(answer(1.0, 64) - 1) < 1e-6, "if every draft differs, a pass still yields one token: the verifier's own."
    for p, window in ((0.5, 2), (0.01, 64), (0.003, 512)):
        exact = sum((1 - p) ** i for i in range(window))
        assert abs(answer(p, window) / exact - 1) < 1e-6, (
            f"p={p}, W={window} gives {exact:.4g}. Token i is kept, as it is or replaced, if all before it agreed.")
