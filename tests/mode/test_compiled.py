"""torch.compile and the mode: one graph outside, one inside, and inside the bits of eager."""
from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant, compiling, masks, read_masks
from kernels.mode.switch import MovesBits, Refused

DEVICE = runtime.device()
W = portable(24, 40, device=DEVICE, seed=1)


def layer(x):
    """A product, a norm of sums, a softmax, a function of one number, and a mean: what Inductor would fuse."""
    y = F.gelu(F.linear(x, W))
    return (y.softmax(-1) * y).sum(-1), y.var(-1) if x.dim() == 3 else y.mean(-1)


@pytest.mark.serial  # it compiles
def test_compiled_has_the_bits_of_eager_and_no_batch_moves_them():
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, dynamic=False), portable(5, 40, device=DEVICE)
    with torch.no_grad():
        outside = compiled(x)
        with batch_invariant(strict=True):
            inside = compiled(x)
            assert same_bits(inside, layer(x)) and not same_bits(inside, outside)
            assert same_bits([y[2:3] for y in inside], compiled(x[2:3]))
        assert same_bits(compiled(x), outside)
    with batch_invariant(strict=True):
        found, alone = (_gradient(compiled, rows) for rows in (x, x[2:3]))
        with pytest.raises(Exception, match="var.correction moves its bits"):
            compiled(x[None])
    assert same_bits(found[2:3], alone)
    torch.testing.assert_close(found, _gradient(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_code_rounds_where_eager_does(dtype):
    """What Inductor fuses follows the sizes, so a rounding that fusion left out could follow the batch."""
    def rounded(a, b, c):
        stream = (a + b) * c
        return stream, (stream.float() * 1.5 + a).to(dtype) * b + c, a / b, a / 3
    torch._dynamo.reset()
    compiled, given = torch.compile(rounded, dynamic=False), [portable(8, 96, dtype, DEVICE, seed) for seed in range(3)]
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), batch_invariant(strict=True):
        assert same_bits(compiled(*given), rounded(*given))
    assert not any("fxgraph_cache" in name for name in torch._dynamo.utils.counters["inductor"])


@pytest.mark.serial  # it compiles
def test_no_row_moves_in_functions_of_one_number_that_inductor_writes():
    """On a CPU its vectors and the last few numbers behind them would have other routines."""
    def functions(x):
        return torch.sigmoid(x) * x.tanh().log2().nan_to_num() + x.atan()
    torch._dynamo.reset()
    compiled = torch.compile(functions)
    x = torch.randn(41, 37, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with batch_invariant(strict=True):
        whole = compiled(x)
        assert all(same_bits(whole[i : i + 1], compiled(x[i : i + 1])) for i in range(41))
    torch.testing.assert_close(whole, functions(x), rtol=1e-3, atol=1e-4)


@pytest.mark.serial  # it compiles
def test_a_compiled_softmaxs_gradient_is_eagers():
    torch._dynamo.reset()
    compiled, x = torch.compile(lambda x: (x.softmax(-1).square(), 0), dynamic=False), portable(5, 40, device=DEVICE)
    with batch_invariant(strict=True):
        assert same_bits(_gradient(compiled, x), _gradient(lambda x: (x.softmax(-1).square(), 0), x))


def _gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x)[0].sum(), x)[0]


def _bias(keep):
    return torch.where(keep, 0.0, float("-inf"))[:, None].expand(-1, HEADS, -1, -1)


HEADS, TOKENS = 4, 5
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
# results that PyTorch lays otherwise than the rules do
LAID = {
    "softmax": lambda x: x.transpose(1, 3).softmax(1) * 2, "mean": lambda x: x.transpose(1, 3).mean(2, True) * 2,
    "gelu": lambda x: F.gelu(x.transpose(1, 3)) * 2, "bmm": lambda x: (x.transpose(2, 3) @ x) * 2,
    "rms_norm": lambda x: F.rms_norm(x.transpose(2, 3), (x.shape[2],)) * 2,
    "layer_norm": lambda x: F.layer_norm(x.transpose(1, 3), (x.shape[1],)) * 2,
    "attention": lambda x: F.scaled_dot_product_attention(x, x + 1, x * 2, is_causal=True).transpose(1, 2) * 2,
    "attention of float16": lambda x: F.scaled_dot_product_attention(x.half(), x.half(), x.half()).float() * 2,
}


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("name", LAID)
def test_compiled_results_lie_where_compiled_code_looks(name):
    torch._dynamo.reset()
    compiled, x = torch.compile(LAID[name], dynamic=False), portable(2 * HEADS * TOKENS, 16, device=DEVICE)
    x = x.view(2, HEADS, TOKENS, 16)
    with batch_invariant(strict=True):
        with torch.no_grad():
            assert same_bits(compiled(x), LAID[name](x))
        found, eager = (torch.autograd.grad(f(y).float().square().sum(), y)[0]
                        for f in (compiled, LAID[name]) for y in [x.clone().requires_grad_()])
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_find_attentions_results_where_pytorchs_own_would_lie(backend, dtype):
    def heads_together(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).view(2, TOKENS, -1)
    torch._dynamo.reset()
    x = portable(2 * HEADS * TOKENS, 16, dtype, DEVICE).view(2, TOKENS, HEADS, 16).transpose(1, 2)
    with torch.no_grad(), batch_invariant(strict=True):
        assert same_bits(torch.compile(heads_together, backend=backend)(x), heads_together(x))


@pytest.mark.serial  # it compiles
def test_the_backward_of_pytorchs_own_attention_lies_there_too():
    def dense(x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).transpose(1, 2) * 2
    torch._dynamo.reset()
    compiled, x = torch.compile(dense, dynamic=False), portable(2 * HEADS * TOKENS, 16, device=DEVICE)
    x, mask = x.view(2, HEADS, TOKENS, 16).requires_grad_(), portable(TOKENS, TOKENS, device=DEVICE)
    with batch_invariant(), pytest.warns(MovesBits, match="attn_mask is dense"):
        found = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(dense(x).square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.serial  # it compiles
def test_layers_that_share_a_mask_read_it_once_and_its_numbers_count(monkeypatch):
    def three(x, keep):
        for _ in range(3):
            x = x + EFFICIENT(x, x, x, _bias(keep), False)[0]
        return x
    read = []
    monkeypatch.setattr(read_masks, "number_of",
                        lambda mask, *sizes: (read.append(sizes), masks.number_of(mask, *sizes))[1])
    torch._dynamo.reset()
    compiled, x = torch.compile(three, dynamic=False), portable(2 * HEADS * TOKENS, 16).view(2, HEADS, TOKENS, 16)
    causal = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool).tril()
    with torch.no_grad(), batch_invariant(strict=True):
        for hidden in (0, 2, 0):
            keep = causal.clone()
            keep[1, :, :hidden] = False
            read.clear()
            assert same_bits(compiled(x, keep), three(x, keep)) and read == [(2, TOKENS, TOKENS)]
        keep[1, 3, 1] = False
        with pytest.raises(Refused, match="scaled_dot_product_attention has an order for masks in which each query"):
            compiled(x, keep)


@pytest.mark.serial  # it compiles
def test_draws_and_results_that_eager_keeps_apart_stay_apart():
    def drawn(x):
        noise = [torch.normal(0.0, 1.0, x.shape, dtype=x.dtype, device=x.device) for _ in range(2)]
        return x + noise[0], x + noise[1], x.sort()[0], x.sort()[0]
    torch._dynamo.reset()
    compiled, x = torch.compile(drawn, dynamic=False), portable(4, 16, device=DEVICE)
    with torch.no_grad(), batch_invariant(), pytest.warns(MovesBits, match="normal.float_float draws"):
        one, other, a, b = compiled(x)
    assert not torch.equal(one, other) and torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert torch.Tag.nondeterministic_seeded in compiling._opaque("native_dropout").tags
    assert torch.Tag.nondeterministic_seeded not in compiling._opaque("mm").tags


def test_one_result_is_handed_on_without_a_walk(monkeypatch):
    """Walking results as a tree takes the host about as long as the call itself."""
    def walked(*_):
        raise AssertionError("walked")
    monkeypatch.setattr(compiling, "tree_map_only", walked)
    x, product = portable(24, 40, device=DEVICE), compiling._opaque("mm")
    with batch_invariant(strict=True):
        assert same_bits(product(x, W.t()), x @ W.t()) and product(x, W.t()).is_contiguous()
    with pytest.raises(AssertionError, match="walked"):
        compiling._opaque("native_layer_norm")(x, [40], None, None, 1e-5)


@pytest.mark.serial  # it compiles
def test_masks_made_of_noise_are_each_read():
    def two(x):
        for _ in range(2):
            noise = torch.normal(0.0, 1.0, (2, 1, 1, 1), dtype=x.dtype, device=x.device)
            hidden = torch.where(noise > 9, -torch.inf, 0.0).expand(-1, HEADS, TOKENS, TOKENS)
            x = x + EFFICIENT(x, x, x, hidden, False)[0]
        return x
    graphs, x = [], portable(2 * HEADS * TOKENS, 16, device=DEVICE).view(2, HEADS, TOKENS, 16)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        read_once = read_masks.read_once
        patch.setattr(read_masks, "read_once", lambda module: (read_once(module), graphs.append(module))[0])
        with torch.no_grad(), batch_invariant(), pytest.warns(MovesBits, match="normal.float_float draws"):
            torch.compile(two, dynamic=False)(x)
    read = [str(node.target) for module in graphs for node in module.graph.nodes]
    assert read.count("same_bits_mode.read_mask.default") == 2


def test_threads_may_read_masks_at_once(monkeypatch):
    monkeypatch.setattr(masks, "READ", {})
    monkeypatch.setattr(masks, "KEPT", 2)
    given = [torch.ones(1, 1, 1, keys, dtype=torch.bool) for keys in range(1, 9)]
    with ThreadPoolExecutor(4) as threads:
        numbers = list(threads.map(lambda i: masks.number_of(given[i % 8], 1, 1, i % 8 + 1), range(400)))
    assert all(numbers) and len(masks.READ) == 2


def test_what_masks_say_is_kept_under_numbers_of_which_the_oldest_go(monkeypatch):
    monkeypatch.setattr(masks, "KEPT", 2)
    monkeypatch.setattr(masks, "READ", {})
    numbers = [masks.number_of(torch.ones(1, 1, 1, keys, dtype=torch.bool), 1, 1, keys) for keys in (3, 4, 5, 5)]
    assert numbers[2] == numbers[3] and list(masks.READ) == numbers[1:3]
    assert masks.number_of(torch.full((1, 1, 1, 3), 0.5), 1, 1, 3) == 0


@pytest.mark.gpu
def test_cuda_graphs_hold_a_model_but_attention_and_see_each_mask():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def two(x, keep):
        for _ in range(2):
            q = F.linear(x, EYE).view(len(x), TOKENS, HEADS, 64).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q, attn_mask=keep[:, None])
            x = F.linear(y.transpose(1, 2).flatten(2), EYE)
        return x
    EYE, x = (portable(rows, HEADS * 64, seed=rows, device="cuda").bfloat16() for rows in (HEADS * 64, 2 * TOKENS))
    x = x.view(2, TOKENS, -1)
    compiled = torch.compile(two, dynamic=False, mode="reduce-overhead")
    causal = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril()
    with torch.no_grad(), batch_invariant(strict=True):
        for hidden in (0, 0, 0, 2, 1, 0, 2):
            causal[1, :, :2] = torch.arange(2, device="cuda") >= hidden
            keep = causal & torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril()
            torch.compiler.cudagraph_mark_step_begin()
            assert same_bits(compiled(x, keep).clone(), two(x, keep)), hidden
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert torch._inductor.cudagraph_trees.get_manager(x.device.index, create_if_none_exists=False) is not None


def drawn(x):
    y = torch.randn(5, 40, device=x.device) + torch.zeros_like(x).uniform_() + torch.zeros_like(x).random_(1, 9) + x
    return torch.fft.rfft(y).real + torch.complex(x, x).sgn().real[:, :21]


@pytest.mark.serial  # it compiles
def test_compiled_code_names_what_it_refuses():
    torch._dynamo.reset()
    x, compiled = portable(5, 40, device=DEVICE), torch.compile(drawn)
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen, batch_invariant():
        warnings.simplefilter("always", MovesBits)
        assert compiled(x).isfinite().all()
        with batch_invariant(strict=True), pytest.raises(Refused, match="draws from one stream"):
            compiled(x)
    named = {str(w.message).split()[1] for w in seen if w.category is MovesBits}
    assert named == {"randn", "uniform", "random_.from", "fft", *["sgn"] * (DEVICE.type == "cpu")}
