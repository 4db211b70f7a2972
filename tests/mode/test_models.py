"""Models of transformers that nobody rewrote: three lines, and the batch no longer matters."""
from __future__ import annotations

import importlib.util
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import DEVICE, batch, model, prompts, where
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant

NAMES = ("llama", "qwen3", "gpt2")
each_model = pytest.mark.parametrize("name", NAMES)
DTYPES = (torch.float32, torch.bfloat16)


def alone(net, given):
    return [net(input_ids=prompt[None]).logits[0] for prompt in given]


def together(net, given, left):
    padded = batch(given, left)
    found = net(**padded).logits
    return [found[i, where(prompt, found.shape[1], left)] for i, prompt in enumerate(given)]


@each_model
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention, backend", [("sdpa", None), ("sdpa", SDPBackend.MATH), ("eager", None)],
                         ids=["", "PyTorch multiplies itself", "of products and a softmax"])
@torch.no_grad()
def test_no_bit_differs_in_random_batches_padded_left_and_right(name, dtype, attention, backend):
    net, given = model(name, dtype, attention), prompts([5, 1, 3, 4, 2, 5])
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(2)]
    with batch_invariant(strict=True), nullcontext() if backend is None else sdpa_kernel(backend):
        expected = alone(net, given)
        for seed, left in itertools.product(range(2), (True, False)):
            chosen = orders[seed][: 3 + seed]
            found = together(net, [given[i] for i in chosen], left)
            assert all(same_bits(y, expected[i]) for y, i in zip(found, chosen, strict=True))


@pytest.mark.parametrize("scale", [None, 0.3, -2.0])
@pytest.mark.parametrize("keys", [7, 600])
@torch.no_grad()
def test_attention_has_the_same_bits_where_pytorch_multiplies_itself(keys, scale):
    """transformers takes one way for a prompt of shared heads alone, the other for a padded one."""
    q, k, v = (portable(4 * rows, 16, device=DEVICE, seed=seed).view(1, 4, rows, 16)
               for seed, rows in enumerate((6, keys, keys)))
    seen = torch.ones(6, keys, dtype=torch.bool, device=DEVICE).tril(keys - 6)
    with batch_invariant(strict=True):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        with sdpa_kernel(SDPBackend.MATH):
            assert same_bits(y, F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
            k_, v_, seen_ = (F.pad(t, edge) for t, edge in ((k, (0, 0, 3, 2)), (v, (0, 0, 3, 2)), (seen, (3, 2))))
            for hidden in (-torch.inf, torch.finfo(torch.float32).min):
                mask = torch.where(seen_, 0.0, hidden)
                assert same_bits(y, F.scaled_dot_product_attention(q, k_, v_, attn_mask=mask, scale=scale))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of this kind of CPU's products")
@torch.no_grad()
def test_without_the_mode_bits_differ():
    """The inverse."""
    given = prompts([5, 1, 3, 4])
    for name in NAMES:
        net = model(name)
        assert not all(map(same_bits, alone(net, given), together(net, given, True)))


@each_model
@torch.no_grad()
def test_what_it_computes_is_the_model(name):
    net, given = model(name), prompts([4, 4])
    with batch_invariant(strict=True):
        found = together(net, given, False)
    torch.testing.assert_close(found, together(net, given, False), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_is_the_same_alone_and_padded():
    net, given = model("llama"), prompts([4, 2])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with batch_invariant(strict=True):
        texts = [net.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), output_logits=True,
                              return_dict_in_generate=True, **settings) for prompt in given]
        padded = batch(given, True)
        both = net.generate(padded["input_ids"], attention_mask=padded["attention_mask"], output_logits=True,
                            return_dict_in_generate=True, **settings)
    for i, text in enumerate(texts):
        assert both.sequences[i, -4:].tolist() == text.sequences[0, -4:].tolist()
        assert all(same_bits(a[i], b[0]) for a, b in zip(both.logits, text.logits, strict=True))


def test_gradients_of_a_model_are_the_same_twice_and_right():
    net, given = model("qwen3"), batch(prompts([4, 3]), False)

    def gradients():
        net.zero_grad()
        net(**given, labels=given["input_ids"]).loss.backward()
        return [p.grad.clone() for p in net.parameters()]
    expected = gradients()
    with batch_invariant(strict=True):
        found, again = gradients(), gradients()
    net.zero_grad()
    assert same_bits(found, again)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-5)


# Against what a reader would do without this suite, where that can be imported.

ESCAPES = ("mm", "mm.out", "bmm", "an exception")


def escapes(name: str, mode) -> bool:
    """Whether the mode leaves this case to PyTorch, so that other rows move its bits, or stays on behind it."""
    x, w = torch.randn(2, 100, 2048, device=DEVICE), torch.randn(2, 2048, 16, device=DEVICE)
    calls = {"mm": lambda x: torch.mm(x[0], w[0]), "bmm": lambda x: torch.bmm(x, w)[0],
             "mm.out": lambda x: torch.mm(x[0], w[0], out=torch.empty(x.shape[1], 16, device=DEVICE))}

    def moves(call):
        return not all(same_bits(call(x)[:rows], call(x[:, :rows])) for rows in (1, 3, 17))
    if name in calls:
        assert moves(calls[name]), "nothing to see: the default does not move here"
        with mode():
            return moves(calls[name])
    plain = torch.mm(x[0], w[0])
    with pytest.raises(KeyError), mode():
        raise KeyError
    return not same_bits(torch.mm(x[0], w[0]), plain)


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_escapes_this_mode(name):
    assert not escapes(name, lambda: batch_invariant(strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("batch_invariant_ops") is None,
                    reason="batch_invariant_ops is not installed here")
@pytest.mark.parametrize("name", ESCAPES)
def test_the_same_cases_elsewhere(name):
    """`mm` they catch; what escapes them is what the case says, and the test tells if that changes."""
    from batch_invariant_ops import set_batch_invariant_mode

    assert escapes(name, set_batch_invariant_mode) == (name != "mm")
