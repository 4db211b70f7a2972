"""Ops that take functions: they run in the mode, with the bits of what the functions do, and no batch moves them."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import MovesBits, Refused, batch_invariant, compiling

DEVICE = runtime.device()
HEADS, TOKENS, WIDTH = 4, 13, 16
STARTS = torch.tensor([0, 5, 2, 9], device=DEVICE)  # where each sequence begins behind its padding


def made(*sizes, seed=0, dtype=torch.float32):
    return portable(torch.Size(sizes[:-1]).numel(), sizes[-1], dtype, DEVICE, seed).view(sizes)


X, W = made(6, 3, 40), made(40, 40, seed=1)


def body(x):
    """A product, a function of one number, a softmax and a norm."""
    return F.silu(x @ W).softmax(-1) * F.layer_norm(x, (40,))


def cond(x):
    return torch.cond(torch.tensor(True, device=x.device), body, torch.sin, (x,))


def while_loop(x):
    return torch._higher_order_ops.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, body(x)),
                                              (torch.tensor(0, device=x.device), x))[1]


def scan(x):
    rows = x.transpose(0, 1)  # PyTorch's versions differ in where they put the results of another dimension than 0
    return torch._higher_order_ops.scan(lambda state, row: (body(state + row), body(row) + state), x[:, 0] * 0, rows,
                                        dim=0)[1].transpose(0, 1)


def scanned(x):
    state, rows = x[:, 0] * 0, []
    for row in x.unbind(1):
        rows.append(body(row) + state)
        state = body(state + row)
    return torch.stack(rows, 1)


def associative_scan(x):
    return torch._higher_order_ops.associative_scan(torch.add, body(x), 1, combine_mode="generic")


def mapped(x):
    return torch._higher_order_ops.map(body, x)


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return body(x)

    @staticmethod
    def setup_context(*_):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy @ W.t()


def transformed(x):
    return torch.func.grad(lambda x: Product.apply(x).sum())(x) + torch.vmap(Product.apply)(x)


CALLS = {  # and the same without such an op
    "cond": (cond, body), "while_loop": (while_loop, lambda x: body(body(x))), "scan": (scan, scanned),
    "map": (mapped, body), "custom_function_call": (transformed, lambda x: torch.ones_like(x) @ W.t() + body(x)),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_has_the_bits_of_what_it_does(name):
    call, plain = CALLS[name]
    with torch.no_grad(), batch_invariant(strict=True):
        y, expected = call(X), plain(X)
    assert same_bits(y, expected)
    torch.testing.assert_close(y, plain(X), rtol=1e-4, atol=1e-5)


def _with_gradient(call, x):
    x = x.detach().clone().requires_grad_()
    y = call(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), x)


@torch.no_grad()
def _without_gradient(call, x):
    return call(x),


@pytest.mark.parametrize("call", [cond, while_loop, scan, mapped, associative_scan])
def test_no_batch_moves_it_or_its_gradient(call):
    # torch 2.11 asks tensors without numbers for their size in this gradient
    look = _without_gradient if call is while_loop and torch.__version__ < "2.12" else _with_gradient
    with batch_invariant(strict=True):
        whole, alone = look(call, X), look(call, X[2:3])
    assert all(same_bits(t[2:3], one) for t, one in zip(whole, alone, strict=True))
    torch.testing.assert_close(whole, look(call, X), rtol=1e-4, atol=1e-5)


@pytest.mark.serial  # it compiles
def test_compiled_it_has_the_bits_of_eager():
    torch._dynamo.reset()
    compiled, within = torch.compile(cond, dynamic=False), torch.compile(body, dynamic=False)
    with batch_invariant(strict=True):
        found, alone, expected = _with_gradient(compiled, X), _with_gradient(within, X), _with_gradient(cond, X)
    assert all(map(same_bits, found, alone)) and same_bits(found[0], expected[0])
    # on a GPU Inductor has another formula for the gradient of silu
    assert DEVICE.type == "cuda" or same_bits(found[1], expected[1])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_an_op_that_is_made_later_runs_too():
    class Later(torch._ops.HigherOrderOperator):
        def __call__(self, function, x):
            return super().__call__(function, x)
    with batch_invariant():
        pass
    later = Later("same_bits_later")
    try:
        later.py_impl(torch._C.DispatchKey.CompositeExplicitAutograd)(lambda function, x: function(x))
        later.py_autograd_impl(later)
        with torch.no_grad(), batch_invariant(strict=True):
            assert same_bits(later(body, X), body(X))
    finally:
        del torch._ops._higher_order_ops["same_bits_later"]


# flex_attention, whose mathematics PyTorch runs op by op where it is not compiled.

SCORES = {"none": None, "alibi": lambda s, b, h, i, j: s - (i - j) * 0.1,
          "capped": lambda s, b, h, i, j: torch.tanh(s / 3) * 3}


def padded(q, k, v, starts, score=None):
    """Causal attention of sequences that begin at `starts`."""
    def sees(b, h, i, j):
        return (j <= i) & (j >= starts[b])
    seen = flex.create_block_mask(sees, len(q), None, q.shape[2], k.shape[2], device=q.device)
    return flex.flex_attention(q, k, v, block_mask=seen, score_mod=score, enable_gqa=True)


def heads(dtype=torch.float32):
    return (made(len(STARTS), HEADS // share, TOKENS, WIDTH, seed=seed, dtype=dtype)
            for seed, share in enumerate((1, 2, 2)))


@pytest.mark.parametrize("score, dtype", [("none", torch.float32), ("alibi", torch.float32),
                                          ("capped", torch.bfloat16)], ids=str)
def test_neither_a_batch_nor_padding_moves_flex_attention(score, dtype):
    given = tuple(heads(dtype))
    with torch.no_grad(), batch_invariant(strict=True):
        y = padded(*given, STARTS, SCORES[score])
        for b, start in enumerate(STARTS.tolist()):
            alone = padded(*(t[b : b + 1, :, start:] for t in given), STARTS[:1], SCORES[score])
            assert same_bits(y[b : b + 1, :, start:], alone), b
    expected = padded(*given, STARTS, SCORES[score])
    torch.testing.assert_close(y, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_no_batch_moves_a_gradient_of_flex_attention(monkeypatch):
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # which refuses gradients on a CPU
    dy = made(len(STARTS), HEADS, TOKENS, WIDTH, seed=9)

    def gradients(*given):
        given, starts, dy = [t.clone().requires_grad_() for t in given[:3]], *given[3:]
        return torch.autograd.grad(padded(*given, starts, SCORES["capped"]), given, dy)
    given = *heads(), STARTS, dy
    with batch_invariant(strict=True):
        found, alone = gradients(*given), gradients(*(t[1:2] for t in given))
    assert all(same_bits(t[1:2], one) for t, one in zip(found, alone, strict=True))
    torch.testing.assert_close(found, gradients(*given), rtol=1e-4, atol=1e-6)


OBJECTS = "flex_attention is compiled to a kernel of its own, whose sums have no order here"


@pytest.mark.serial  # it compiles
def test_compiled_flex_attention_is_refused_or_warned_of_at_each_call():
    torch._dynamo.reset()
    given = [made(2, HEADS, TOKENS, WIDTH, seed=seed) for seed in range(3)]  # torch 2.11 wants three of a CPU
    compiled = torch.compile(flex.flex_attention)
    with torch.no_grad():
        with batch_invariant(strict=True), pytest.raises(Refused, match=OBJECTS):
            compiled(*given)
        with batch_invariant(), pytest.warns(MovesBits, match=OBJECTS) as seen:
            y = compiled(*given)
        assert seen[0].filename == __file__
        with batch_invariant(strict=True), pytest.raises(Refused, match=OBJECTS):
            compiled(*given)  # of what was compiled before
        torch.testing.assert_close(y, flex.flex_attention(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.serial  # it compiles
def test_compiled_flex_attention_inside_another_op_is_refused():
    torch._dynamo.reset()
    given = [made(2, HEADS, TOKENS, WIDTH, seed=seed) for seed in range(3)]

    @torch.compile
    def either(which, *given):
        return torch.cond(which, flex.flex_attention, lambda q, k, v: q.sin(), given)
    with torch.no_grad(), batch_invariant(strict=True), pytest.raises(Refused, match=OBJECTS):
        either(torch.tensor(True, device=DEVICE), *given)


@pytest.mark.parametrize("name", ["flex_attention", "flex_attention_backward", "associative_scan"])
def test_kernels_of_inductors_own_are_found_in_a_graph(name):
    graph = torch.fx.Graph()
    graph.output(graph.call_function(getattr(torch.ops.higher_order, name), (graph.placeholder("x"),)))
    module = torch.nn.Module()
    module.flex_attention = torch.fx.GraphModule({}, graph)
    outer = torch.fx.Graph()
    outer.output(outer.get_attr("flex_attention"))
    assert compiling._own_kernels(torch.fx.GraphModule(module, outer)) == [name]
    outer = torch.fx.Graph()
    outer.output(outer.placeholder("flex_attention"))
    assert compiling._own_kernels(torch.fx.GraphModule({}, outer)) == []


@pytest.mark.serial  # it compiles
def test_a_model_that_compiles_flex_attention_is_refused_by_name():
    from models import VOCABULARY, batch, prompts
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        attn_implementation="flex_attention")).to(DEVICE).eval()
    given = batch(prompts([9, 5]), True)
    with torch.no_grad():
        with batch_invariant(strict=True), pytest.raises(Refused, match=OBJECTS):
            model(**given)
        with batch_invariant(), pytest.warns(MovesBits, match=OBJECTS):
            found = model(**given).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(found[0], model(**given).logits[0], rtol=1e-4, atol=1e-5)
