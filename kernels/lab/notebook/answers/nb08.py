"""Checkers of notebook 08, Span several GPUs."""
from __future__ import annotations

import torch

from .... import bits
from ....ops.matmul.shared import SHARES, joined
from ..exercises import exercise


@exercise("08.1", wants="a number of megabytes")
def _(answer):
    exact = 64 * 4096 * 4 * 3 * 2 * 32 / 1e6
    assert abs(answer / exact - 4 / 3) > 0.01, "a third too much: its own part lies in its own memory."
    assert abs(answer / exact - 0.5) > 0.01, "half of it: a layer has two products along k, output and down."
    assert abs(answer / exact - 1 / 3) > 0.01, "a third of it: there are three other GPUs to read from."
    assert abs(answer / exact - 0.25) > 0.01, "a quarter of it: a part is float32, four bytes a number."
    assert abs(answer / exact - 1) < 0.01, "tokens x hidden size x bytes x other GPUs x sums a layer x layers, in MB."


@exercise("08.2", "answer(parts)", wants="a tensor")
def _(answer):
    for size in SHARES:
        parts = [bits.portable(3, 40, seed=90 + rank) for rank in range(size)]
        got = answer([part.clone() for part in parts])
        assert isinstance(got, torch.Tensor) and got.shape == (3, 40), "one tensor of the parts' shape is asked for."
        assert torch.allclose(got, torch.stack(parts).sum(0), atol=1e-5), f"for {size} parts that is not their sum."
        assert bits.same_bits(got + 0.0, joined(parts)), (
            f"for {size} parts the bits are those of another order: add neighbours in pairs until one sum is left.")


@exercise("08.3", wants="a list of eight numbers", kind="open")
def _(answer):
    numbers = torch.as_tensor(answer, dtype=torch.float32, device="cpu")
    assert numbers.shape == (8,), f"eight numbers are asked for, not {tuple(numbers.shape)}."
    assert bool(numbers.isfinite().all()), "every number must be finite as a float32."
    found = [float(_in_sequence([_in_sequence(mine) for mine in numbers.view(gpus, -1)])) for gpus in (1, 2, 4)]
    assert len(set(found)) == 3, (
        f"in sequence, 1, 2 and 4 GPUs give {', '.join(map(repr, found))}: three different sums are asked for. Let "
        "numbers differ in size, so that what is added early is rounded away.")


def _in_sequence(parts):
    """parts[0] + parts[1] + ..., from the left."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
