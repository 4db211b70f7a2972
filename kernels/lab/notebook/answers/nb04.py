"""Checkers of notebook 04, Multiply matrices."""
from __future__ import annotations

import torch

from .... import bits
from ....arithmetic.tensor_core import chain, explain
from ....ops.matmul.op import matmul
from ....ops.matmul.order import order
from ..exercises import exercise
from ..written import numbers


@exercise("04.1", wants="a pair (one chain, segments)")
def _(answer):
    one, cut = numbers(answer, 2, "a pair (one chain, segments)")
    assert one != 512, "a tile holds 64 weight rows; how many tiles are 512?"
    assert one == 8, "16 tokens are one tile high; how many tiles of 64 rows are 512 wide?"
    assert cut == 8 * order(512, 8192)[0], "each tile is as many programs as `order(512, 8192)` has segments."


@exercise("04.2", wants="a pair (p, m)")
def _(answer):
    for name, exponent, sign in zip("pm", numbers(answer, 2, "a pair (p, m)"), (1, -1), strict=True):
        def changes(exponent, sign=sign):
            product = torch.tensor([sign * 2.0**exponent], dtype=torch.bfloat16, device="cpu")
            return explain(torch.ones_like(product), product, 1.0)["result"] != 1.0

        word = "adding" if sign > 0 else "subtracting"
        assert changes(exponent), f"{name} = {exponent:g}: {word} that leaves 1.0; a larger one does not."
        assert not changes(exponent - 1), f"{name} = {exponent:g}: {word} half of that still changes 1.0."


@exercise("04.3", "in_blocks(x, weight, block)", wants="a float32 matrix")
def _(in_blocks):
    for seed, k in ((0, 192), (2, 500)):
        x, weight, _ = matmul.inputs(8, f"N=24,K={k}", torch.bfloat16, seed=seed)
        for block in (16, 48, 64, 512):
            got = in_blocks(x.clone(), weight.clone(), block)
            assert got.shape == (8, 24) and got.dtype == torch.float32, (
                f"float32 of shape (8, 24) is asked for, and this is {got.dtype} of shape {tuple(got.shape)}.")
            assert torch.allclose(got, x.float() @ weight.float().T, atol=1e-3), (
                f"this is not the product for K={k} in blocks of {block}.")
            assert bits.same_bits(got, chain(x, weight)), (
                f"other bits in blocks of {block}: does each block start where the last one stopped?")


@exercise("04.4", wants="sixteen numbers", kind="open")
def _(answer):
    products = torch.tensor([numbers(answer, 16, "sixteen numbers")], dtype=torch.float64, device="cpu")
    factors = products.bfloat16()
    assert torch.equal(factors.double(), products), "some of them are no bfloat16 numbers: powers of two always are."
    exact = products.sum().item()  # of few bits each: float64 holds it
    assert exact != 0, "their exact sum is 0 too; add one product that is lost."
    step = chain(torch.ones_like(factors), factors).item()
    assert step == 0, f"the step gives {step:g}: what is left must lie beyond the line, 25 bits below the largest."
