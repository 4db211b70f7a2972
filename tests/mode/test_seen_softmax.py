"""Softmax over keys begins at the first key with a weight, so that padding on the left moves no bit."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant
from kernels.mode.seen_softmax import NOTHING
from kernels.ops.softmax import softmax

DEVICE = runtime.device()
HIDING = {"-inf": -math.inf, "the lowest of float32": torch.finfo(torch.float32).min, "-10000": -1e4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _scores(keys: int, dtype=torch.float32) -> torch.Tensor:
    return portable(12, keys, dtype, DEVICE).view(2, 6, keys)


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("keys", [7, 300, 1500])
def test_a_row_has_the_bits_of_the_row_without_its_padding(keys, hiding):
    x, wanted = _scores(keys), softmax.python(_scores(keys).cpu(), -1)
    with batch_invariant(strict=True):
        for left, right in ((0, 0), (3, 0), (1030, 2), (0, 5)):
            padded = F.pad(x, (left, right), value=HIDING[hiding])
            p = padded.softmax(-1)
            assert same_bits(p[..., left : left + keys].cpu(), wanted) and p.sum(-1).sub(1).abs().max() < 1e-5
            assert same_bits(padded.mT.softmax(1).mT, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_hidden_by_the_lowest_of_their_dtype_are_found_after_a_cast(dtype):
    """transformers adds a mask in the model's dtype and takes softmax in float32."""
    x = _scores(40, dtype)
    mask = torch.zeros(45, dtype=dtype, device=DEVICE)
    mask[:5] = torch.finfo(dtype).min
    with batch_invariant(strict=True):
        alone = x.softmax(-1, dtype=torch.float32)
        assert same_bits((F.pad(x, (5, 0)) + mask).softmax(-1, dtype=torch.float32)[..., 5:], alone)


def test_each_row_begins_where_its_own_keys_do_and_one_without_keys_is_even():
    x = _scores(40)
    x[0, 0, :7], x[0, 1, :20], x[1, 2] = -math.inf, -1e9, torch.finfo(torch.float32).min
    with batch_invariant(strict=True):
        p = x.softmax(-1)
        assert same_bits(p[0, 0, 7:], x[0, 0, 7:].softmax(-1)) and same_bits(p[0, 1, 20:], x[0, 1, 20:].softmax(-1))
    assert not p[0, 0, :7].any() and not p[0, 1, :20].any() and same_bits(p[1, 2], torch.full_like(p[1, 2], 1 / 40))
    nothing = torch.tensor([[[0.0, NOTHING]]], device=DEVICE).softmax(-1)
    assert nothing[0, 0, 1] == 0.0


def test_its_gradient_begins_there_too():
    x, dy = _scores(40), portable(12, 40, device=DEVICE, seed=1).view(2, 6, 40)

    def gradient(x, dy):
        x = x.clone().requires_grad_()
        x.softmax(-1).backward(dy)
        return x.grad
    with batch_invariant(strict=True):
        padded = gradient(F.pad(x, (3, 2), value=torch.finfo(torch.float32).min), F.pad(dy, (3, 2)))
        assert same_bits(padded[..., 3:43], gradient(x, dy))
    torch.testing.assert_close(padded[..., 3:43], gradient(x, dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_windows_last_query_is_one_that_has_no_other_keys(dtype):
    """Prefill and decode with a cache of the last keys."""
    tokens, window = 40, 20
    place = torch.arange(tokens, device=DEVICE)
    seen = (place <= place[:, None]) & (place > place[:, None] - window)
    for seed in range(6):
        q, k, v = (portable(2 * tokens, 16, dtype, DEVICE, 3 * seed + i).view(1, 2, tokens, 16) for i in range(3))
        with batch_invariant(strict=True):
            whole = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            last = F.scaled_dot_product_attention(q[:, :, -1:], k[:, :, -window:], v[:, :, -window:])
        assert same_bits(whole[:, :, -1:], last)
