"""The mode: PyTorch's own ops go to this suite's and no batch moves them; and it leaves nothing behind."""
from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import bits, runtime
from kernels.bits import portable, same_bits
from kernels.mode import Refused, batch_invariant, masks
from kernels.mode import attention as attention_rules
from kernels.mode.names import op_of
from kernels.mode.refused import KNOWN
from kernels.mode.switch import RULES
from kernels.op import DTYPES
from kernels.ops.bmm import bmm
from kernels.ops.embedding_gradient import embedding_gradient
from kernels.ops.layer_norm import layer_norm
from kernels.ops.matmul.op import matmul
from kernels.ops.mean import mean, sum
from kernels.ops.softmax import log_softmax, softmax

DEVICE = runtime.device()
ROOT = Path(__file__).resolve().parents[2]


def made(*sizes, seed=0, dtype=torch.float32):
    rows = sizes[0] if len(sizes) > 1 else 1
    count = 1
    for size in sizes:
        count *= size
    return portable(rows, count // rows, dtype, DEVICE, seed).view(sizes)


LONG = made(2, 3000) ** 9  # of many sizes: 8-bit numbers of one size have exact sums
X, W, B = made(6, 40), made(24, 40, seed=1), made(24, seed=2)
Q = made(2, 4, 5, 8, seed=3)


def triton_or_python(op):
    return op.triton if X.is_cuda else op.python


# What each op becomes: the same bits as this suite's own.

BECOMES = {
    "mm": (lambda: X @ W.t(), lambda: triton_or_python(matmul)(X, W)),
    "linear": (lambda: F.linear(X, W), lambda: triton_or_python(matmul)(X, W)),
    "linear with a bias": (lambda: F.linear(X[None], W, B), lambda: triton_or_python(matmul)(X[None], W, B)),
    "matmul 3d@2d": (lambda: X.view(2, 3, 40) @ W.t(), lambda: triton_or_python(matmul)(X.view(2, 3, 40), W)),
    "matmul 1d@2d": (lambda: X[0] @ W.t(), lambda: triton_or_python(matmul)(X, W)[0]),
    "mv": (lambda: X @ W[0], lambda: triton_or_python(matmul)(X, W[:1])[:, 0]),
    "dot": (lambda: X[1] @ W[0], lambda: triton_or_python(matmul)(X, W[:1])[1, 0]),
    "addmm": (lambda: torch.addmm(X[:, :24], X, W.t(), beta=0.5, alpha=3), lambda:
              triton_or_python(matmul)(X, W) * 3 + X[:, :24] * 0.5),
    "bmm": (lambda: torch.bmm(Q[0], Q[1].mT), lambda: triton_or_python(bmm)(Q[0], Q[1])),
    "baddbmm": (lambda: torch.baddbmm(Q[0, :, :, :5], Q[0], Q[1].mT), lambda:
                triton_or_python(bmm)(Q[0], Q[1]) + Q[0, :, :, :5]),
    "einsum": (lambda: torch.einsum("bik,bjk->bij", Q[0], Q[1]), lambda: triton_or_python(bmm)(Q[0], Q[1])),
    "softmax": (lambda: X.softmax(0), lambda: triton_or_python(softmax)(X, 0)),
    "softmax to float32": (lambda: X.bfloat16().softmax(-1, dtype=torch.float32), lambda:
                           triton_or_python(softmax)(X.bfloat16().float(), -1)),
    "log_softmax": (lambda: X.log_softmax(-1), lambda: triton_or_python(log_softmax)(X, -1)),
    "mean": (lambda: X.mean(), lambda: triton_or_python(mean)(X)),
    "mean over a dimension": (lambda: X.mean(-1, True), lambda: triton_or_python(mean)(X, -1, True)),
    "sum": (lambda: Q.sum((0, 2)), lambda: triton_or_python(sum)(Q, (0, 2))),
    "sum to float32": (lambda: LONG.bfloat16().sum(-1, dtype=torch.float32), lambda:
                       triton_or_python(sum)(LONG.bfloat16().float(), -1)),
    "layer_norm": (lambda: F.layer_norm(X, (40,), W[0], W[1]), lambda:
                   triton_or_python(layer_norm)(X, W[0], W[1], 1e-5)[0]),
}


@pytest.mark.parametrize("name", BECOMES)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_an_op_becomes_this_suites(name, grad):
    call, expected = BECOMES[name]
    with torch.set_grad_enabled(grad), batch_invariant(strict=True):
        result = call()
    assert same_bits(result, expected()), bits.elements_differ(result, expected())


@pytest.mark.parametrize("name", BECOMES)
def test_an_op_is_still_the_op(name):
    call, _ = BECOMES[name]
    with batch_invariant(strict=True):
        result = call()
    assert result.dtype == call().dtype
    torch.testing.assert_close(result, call(), rtol=3e-5, atol=3e-5)


OUT = {
    "mm": lambda out: torch.mm(X, W.t(), out=out),
    "addmm": lambda out: torch.addmm(B, X, W.t(), out=out),
    "bmm": lambda out: torch.bmm(Q[0], Q[1].mT, out=out),
    "mv": lambda out: torch.mv(X, W[0], out=out),
    "sum": lambda out: torch.sum(X, -1, out=out),
    "mean": lambda out: torch.mean(X, -1, out=out),
    "silu": lambda out: torch.ops.aten.silu.out(X, out=out),
    "_softmax": lambda out: torch.ops.aten._softmax.out(X, -1, False, out=out),
}
PLAIN = {"mm": BECOMES["mm"][0], "addmm": lambda: torch.addmm(B, X, W.t()), "bmm": BECOMES["bmm"][0],
         "mv": BECOMES["mv"][0], "sum": lambda: X.sum(-1), "mean": lambda: X.mean(-1), "silu": lambda: F.silu(X),
         "_softmax": lambda: X.softmax(-1)}


@pytest.mark.parametrize("name", OUT)
def test_an_overload_that_writes_has_the_same_bits(name):
    with batch_invariant(strict=True):
        expected = PLAIN[name]()
        into = torch.empty_like(expected)
        assert OUT[name](into) is into and same_bits(into, expected)
        grown = torch.empty(0, dtype=expected.dtype, device=DEVICE)
        assert same_bits(OUT[name](grown), expected)


def test_in_place_overloads_write_where_they_are_told():
    with batch_invariant(strict=True):
        y = X[:, :24].clone()
        kept, expected = y.data_ptr(), torch.addmm(y, X, W.t())
        assert y.addmm_(X, W.t()).data_ptr() == kept and same_bits(y, expected)
        z = X.clone()
        assert same_bits(F.silu(z, inplace=True), F.silu(X)) and same_bits(z, F.silu(X))


def test_a_result_of_another_dtype_is_pytorchs_to_refuse():
    with batch_invariant(strict=True), pytest.raises(RuntimeError, match="dtype"):
        torch.mm(X, W.t(), out=torch.empty(6, 24, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("call", [lambda: X @ X, lambda: torch.bmm(Q[0], Q[0]), lambda: torch.mv(X, X[:, 0]),
                                  lambda: torch.addmm(B, X, X), lambda: torch.dot(X[0], W[:, 0]),
                                  lambda: torch.native_layer_norm(X, (40,), B, None, 1e-5),
                                  lambda: torch.native_layer_norm(X, (240,), None, None, 1e-5),
                                  lambda: torch.native_layer_norm(X.view(2, 3, 40), (120,), None, None, 1e-5)])
def test_shapes_that_do_not_fit_are_pytorchs_to_refuse(call):
    with batch_invariant(strict=True), pytest.raises(RuntimeError, match=r"size|shape|tensor"):
        call()


# No batch moves them.

def test_many_rows_times_a_vector_add_as_few_do():
    """The vector is the weight: the number of rows must not cut k."""
    rows, vector = made(2100, 600), made(600, seed=1)
    with batch_invariant(strict=True):
        assert same_bits((rows @ vector)[:2], rows[:2] @ vector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, call", [
    ("linear", lambda x: F.linear(x, W.to(x.dtype))), ("softmax", lambda x: x.softmax(-1)),
    ("layer_norm", lambda x: F.layer_norm(x, (40,))), ("rms_norm", lambda x: F.rms_norm(x, (40,), W[0].to(x.dtype))),
    ("mean", lambda x: x.mean(-1)), ("silu", F.silu), ("gelu", F.gelu), ("sigmoid", torch.sigmoid),
    ("attention", lambda x: F.scaled_dot_product_attention(*[x.view(-1, 1, 5, 8)] * 3, is_causal=True).flatten(1))],
    ids=lambda v: v if isinstance(v, str) else "")
def test_no_batch_moves_a_row(name, call, dtype):
    x = made(33, 40, dtype=dtype)

    def inside(x):
        with batch_invariant(strict=True):
            return call(x)
    some = [slice(0, 1), slice(7, 8), slice(0, 2), slice(3, 20), slice(32, 33)]
    report = bits.check_invariance(inside, (x,), batches=some)
    assert report, report


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU's loops")
@pytest.mark.parametrize("call", [F.silu, F.gelu, torch.sigmoid, torch.exp2, lambda x: F.gelu(x, approximate="tanh"),
                                  F.softplus, F.mish, lambda x: x.abs() ** 2.5, lambda x: x.abs().rsqrt(), torch.sinh,
                                  torch.cosh, lambda x: torch.atan2(x, x + 1), lambda x: torch.logaddexp(x, -x),
                                  lambda x: x.abs() ** (x[..., :1] * 0 + 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_element_has_the_same_bits_wherever_it_lies(call, dtype):
    x = made(700, dtype=dtype) * 3 + 2.0**-9
    with batch_invariant(strict=True):
        whole = call(x)
        each = torch.cat([call(x[i : i + 1]) for i in range(100)] + [call(x[100:333]), call(x[333:].clone())])
    assert same_bits(whole, each)
    torch.testing.assert_close(whole, call(x))


@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_batch_moves_a_softmaxs_gradient(softmax, dtype):
    x, w = made(9, 40, dtype=dtype), made(9, 40, dtype=dtype, seed=1)

    def gradient(rows):
        y = x[rows].detach().requires_grad_()
        return torch.autograd.grad((softmax(y, -1) * w[rows]).sum(), y)[0]
    expected = gradient(slice(None))
    with batch_invariant(strict=True):
        found = gradient(slice(None))
        assert same_bits(found, torch.cat([gradient(slice(i, i + 3)) for i in (0, 3, 6)]))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of this kind of CPU's products")
def test_without_the_mode_a_batch_does_move_them():
    """The inverse: the comparison above fails where it should."""
    x, w = made(64, 512), made(512, 512, seed=1)
    assert not bits.check_invariance(lambda x: F.linear(x, w), (x,), batches=[slice(0, 1)])
    elements = made(512) * 3
    assert not same_bits(F.gelu(elements), torch.cat([F.gelu(elements[i : i + 1]) for i in range(512)]))


# Masks.

def padded(left: bool):
    """Two sequences of 5 and 3 keys, the second one padded on one side: the mask, and where its tokens are."""
    own = slice(2, 5) if left else slice(0, 3)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=DEVICE).tril()
    mask[1, :, :, : own.start] = False
    mask[1, :, :, own.stop :] = False
    return mask, own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("additive", [True, False], ids=["additive", "boolean"])
def test_a_padded_sequence_has_the_bits_of_itself_alone(dtype, left, additive):
    q, k, v = (made(2, 4, 5, 8, seed=i, dtype=dtype) for i in range(3))
    mask, own = padded(left)
    if additive:
        mask = torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill(~mask, torch.finfo(dtype).min)
    with batch_invariant(strict=True):
        together = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        for b, keys in ((0, slice(0, 5)), (1, own)):
            alone = F.scaled_dot_product_attention(*(t[b : b + 1, :, keys] for t in (q, k, v)), is_causal=True)
            assert same_bits(together[b, :, keys], alone[0])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(together[1, :, own], expected[1, :, own], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_what_pytorch_writes_for_cudnn_hides_a_key(dtype):
    mask, _ = padded(True)
    written = torch.where(mask.logical_not(), -65504.0, torch.zeros((), dtype=dtype, device=DEVICE))
    assert written.dtype == dtype and written.isfinite().all()
    with batch_invariant(strict=True):
        found = [F.scaled_dot_product_attention(*[Q.to(dtype)] * 3, attn_mask=m) for m in (mask, written)]
    assert same_bits(*found)


@pytest.mark.parametrize("value, dtype, said", [(-1e4, torch.bfloat16, "-9984"), (-65504.0, torch.float32, "-65504"),
                                                (math.nan, torch.float32, "nan"), (math.inf, torch.bfloat16, "inf")])
def test_what_makes_a_mask_dense_is_named(value, dtype, said):
    mask = torch.zeros(2, 1, 5, 5, dtype=dtype, device=DEVICE)
    mask[1, 0, 2, 3:] = value
    with batch_invariant(strict=True), pytest.raises(Refused, match=rf"numbers, such as {said} at \[1, 0, 2, 3\]"):
        F.scaled_dot_product_attention(*[Q.to(dtype)] * 3, attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decode_has_the_bits_of_prefill(dtype):
    q, k, v = (made(1, 4, 5, 8, seed=i, dtype=dtype) for i in range(3))
    with batch_invariant(strict=True):
        prefill = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)
        for i in range(5):
            step = F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :2, : i + 1], v[:, :2, : i + 1],
                                                  enable_gqa=True)
            assert same_bits(step, prefill[:, :, i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_window_and_no_mask_are_what_pytorch_means(dtype):
    q, k, v = (made(2, 4, 9, 8, seed=i, dtype=dtype) for i in range(3))
    key = torch.arange(9, device=DEVICE)
    window = (key <= key[:, None]) & (key > key[:, None] - 3)
    for given in ({"attn_mask": window}, {}, {"attn_mask": (key <= key[:, None]) & (key >= 0)}, {"scale": 0.3},
                  {"is_causal": True}):
        with batch_invariant(strict=True):
            y = F.scaled_dot_product_attention(q, k, v, **given)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, **given), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_usual_scale_is_known_however_it_was_computed(width, monkeypatch):
    """32 ** -0.5 and 1 / sqrt(32) are neighbours in float64; transformers gives the first."""
    q = made(1, 2, 5, width, dtype=torch.bfloat16)
    slow = []
    monkeypatch.setattr(attention_rules, "_one", lambda *given: slow.append(given))
    with batch_invariant(strict=True):
        ys = [F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)
              for scale in (None, width ** -0.5, 1 / math.sqrt(width))]
    assert not slow and same_bits(ys[0], ys[1]) and same_bits(ys[0], ys[2])


def test_a_long_cache_beside_a_row_moves_nothing():
    """Of so many keys a product would make segments, whose length follows their number; here they are one chain."""
    q, k, v = made(1, 1, 2, 4), *(made(1, 1, 5000, 4, seed=i) for i in (1, 2))
    mask = torch.arange(5000, device=DEVICE) < torch.tensor([[4000], [4001]], device=DEVICE)
    with batch_invariant(strict=True):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        alone = F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :4000], v[:, :, :4000])
    assert same_bits(y[:, :, :1], alone)


def test_another_mask_of_the_same_shape_is_read_anew():
    for hidden in range(2, 5):
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=DEVICE).tril()
        mask[1, :, :, :hidden] = False
        with batch_invariant(strict=True):
            y = F.scaled_dot_product_attention(Q, Q, Q, attn_mask=mask)
            mask[1, :, :, :hidden] = True  # and when it is written to
            mask[1, :, :, : hidden - 1] = False
            z = F.scaled_dot_product_attention(Q, Q, Q, attn_mask=mask)
        assert (y[1, :, hidden - 1] == 0).all() and not (z[1, :, hidden - 1] == 0).all()
        assert same_bits(y[0], z[0])


def test_a_mask_like_the_last_one_is_not_read_again(monkeypatch):
    read = []
    monkeypatch.setattr(masks, "_read", lambda mask, *sizes: read.append(mask.clone()) or object())
    monkeypatch.setattr(masks, "_LAST", [])
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool, device=DEVICE).tril()

    def seen(given, batch=2):
        return masks.of_mask(given, batch, 3, 4, DEVICE)
    first = seen(mask)
    assert seen(mask) is seen(mask.clone()) is seen(mask) is first and len(read) == 1
    mask[1, :, :, 0] = False  # what is kept is a copy
    other = seen(mask)
    assert other is not first and len(read) == 2 and torch.equal(read[1], mask)
    assert seen(mask, batch=1) is not other and seen(mask.float()) is not seen(mask[:, :, :, :3]) and len(read) == 5


@pytest.mark.parametrize("before", [True, False])
def test_what_is_kept_of_a_mask_is_what_was_read(before, monkeypatch):
    """Another thread writes to the mask just before it is read, or behind."""
    read = masks._read

    def written_to(given, *sizes):
        if before:
            mask.fill_(True)
        seen = read(given, *sizes)
        mask.fill_(True)
        return seen
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE).tril()
    wanted = [read(given, 1, 3, 3, DEVICE).runs for given in (mask, torch.ones_like(mask))]
    monkeypatch.setattr(masks, "_LAST", [])
    monkeypatch.setattr(masks, "_read", written_to)
    assert masks.of_mask(mask, 1, 3, 3, DEVICE).runs == wanted[0]
    assert masks.of_mask(torch.ones_like(mask), 1, 3, 3, DEVICE).runs == wanted[1]


@pytest.mark.skipif(runtime.HAS_GPU, reason="NumPy's memory is a CPU's")
def test_a_mask_in_numpys_memory_is_read_anew():
    memory = np.zeros((1, 1, 5, 5), dtype=np.float32)
    mask = torch.from_numpy(memory)
    with batch_invariant(strict=True):
        F.scaled_dot_product_attention(Q, Q, Q, attn_mask=mask)
        memory[:] = np.triu(np.full((5, 5), -np.inf), 1)
        y = F.scaled_dot_product_attention(Q, Q, Q, attn_mask=mask)
        z = F.scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    assert same_bits(y, z)


def test_a_sparse_mask_behind_a_dense_one_is_refused_by_name():
    dense = torch.ones(3, 3, device=DEVICE)
    masks.of_mask(dense.tril() - 1 == 0, 1, 3, 3, DEVICE)
    with pytest.raises(masks.Unsupported, match="has an order for masks of two dimensions"):
        masks.of_mask((dense.tril() - 1 == 0).to_sparse(), 1, 3, 3, DEVICE)


def test_a_large_mask_is_not_kept(monkeypatch):
    monkeypatch.setattr(masks, "COPIED", 11)
    monkeypatch.setattr(masks, "_LAST", [])
    for shape, kept in (((1, 1, 3, 4), False), ((1, 1, 2, 4), True)):
        masks.of_mask(torch.ones(shape, dtype=torch.bool, device=DEVICE), 1, *shape[2:], DEVICE)
        assert (masks._LAST[0].copy is not None) == kept


def test_queries_that_see_nothing_give_zeros():
    mask = torch.zeros(5, 5, dtype=torch.bool, device=DEVICE)
    mask[2:, :3] = True
    for dtype in (torch.float32, torch.bfloat16):
        with batch_invariant(strict=True):
            y = F.scaled_dot_product_attention(*[Q.to(dtype)] * 3, attn_mask=mask)
        assert (y[:, :, :2] == 0).all() and y.isfinite().all() and (y[:, :, 2:] != 0).any()


# Gradients.

def loss(modules, tokens):
    embed, norm, linear = modules
    x = norm(embed(tokens))
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    x = F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], is_causal=True, enable_gqa=True)
    x = F.rms_norm(x.transpose(1, 2).flatten(2), (16,), norm.weight, 1e-5)
    return F.cross_entropy(F.silu(linear(x)).flatten(0, 1), tokens.flatten() % 12)


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    made = torch.nn.Embedding(7, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 12)
    with torch.no_grad():
        for module in made:
            for i, p in enumerate(module.parameters()):
                p.copy_(portable(1, p.numel(), seed=i + p.numel()).view(p.shape))
    return [module.to(DEVICE) for module in made]


def test_gradients_are_right_and_the_same_twice(modules):
    tokens = torch.arange(3 * 6, device=DEVICE).view(3, 6) * 5 % 7
    parameters = [p for module in modules for p in module.parameters()]
    expected = torch.autograd.grad(loss(modules, tokens), parameters)
    with batch_invariant(strict=True):
        found, again = (torch.autograd.grad(loss(modules, tokens), parameters) for _ in range(2))
    assert same_bits(found, again)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_rows_gradient_is_moved_by_no_batch(modules):
    """Of inputs: a row's own, the neighbours' apart."""
    _, norm, linear = modules

    def gradient(x):
        x = x.detach().requires_grad_()
        with batch_invariant(strict=True):
            y = F.gelu(linear(norm(x)))
            q = y.unflatten(-1, (3, 4)).transpose(1, 2)
            F.scaled_dot_product_attention(q, q, q, is_causal=True).backward(torch.ones_like(q))
        return x.grad
    report = bits.check_invariance(gradient, (made(9, 5, 16),), batches=[slice(0, 1), slice(4, 5), slice(2, 9)])
    assert report, report


def test_an_embeddings_gradient_adds_neighbours_in_pairs():
    dy, tokens = made(5, 3), torch.tensor([2, 0, 2, 2, 1], device=DEVICE)
    expected = torch.stack([dy[1], dy[4], (dy[0] + dy[2]) + dy[3], torch.zeros_like(dy[0])])
    assert same_bits(embedding_gradient(dy, tokens, 4), expected)
    table = torch.zeros(4, 3, device=DEVICE, requires_grad=True)
    with batch_invariant(strict=True):
        F.embedding(tokens, table, padding_idx=0).backward(dy)
    expected[0] = 0
    assert same_bits(table.grad, expected)
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \(5,\)"):
        embedding_gradient(dy, tokens[:4], 4)


# Where it is used.

def test_outside_nothing_is_replaced():
    before = F.linear(X, W)
    with batch_invariant():
        F.linear(X, W)
    assert same_bits(F.linear(X, W), before)
    for name in ("mm", "addmm", "bmm", "_softmax"):
        assert not any("same_bits" in line or "kernels/mode" in line for line in
                       torch._C._dispatch_dump(f"aten::{name}").splitlines() if line.startswith("CPU:"))


def test_autocast_casts_before_the_mode_sees_it():
    with torch.autocast(DEVICE.type, torch.bfloat16), batch_invariant(strict=True):
        y = F.linear(X, W)
    assert same_bits(y, triton_or_python(matmul)(X.bfloat16(), W.bfloat16()))


def test_inference_mode_and_vmap():
    expected = triton_or_python(matmul)(X, W)
    with torch.inference_mode(), batch_invariant(strict=True):
        assert same_bits(F.linear(X, W).clone(), expected)
    with batch_invariant(strict=True):
        y = torch.vmap(torch.mm)(Q[0], Q[1].mT)
    assert same_bits(y, triton_or_python(bmm)(Q[0], Q[1]))


def test_other_dispatch_modes_see_pytorchs_ops():
    class Count(TorchDispatchMode):
        ops = []

        def __torch_dispatch__(self, op, types, arguments=(), named=None):
            self.ops.append(op)
            return op(*arguments, **(named or {}))
    with batch_invariant(strict=True), Count():
        y = F.linear(X, W)
    assert Count.ops == [torch.ops.aten.t.default, torch.ops.aten.mm.default]
    assert same_bits(y, triton_or_python(matmul)(X, W))


def test_tensors_without_numbers_pass():
    with batch_invariant(strict=True):
        y = torch.empty(3, 4, device="meta", dtype=torch.float32) @ torch.empty(4, 5, device="meta",
                                                                               dtype=torch.float32)
    assert y.shape == (3, 5) and y.is_meta


def test_integers_pass_for_their_sums_have_no_order():
    whole = torch.arange(12, device=DEVICE).view(3, 4)
    with batch_invariant(strict=True):
        assert whole.sum() == 66 and (whole.float() > 1).sum() == 10
        assert whole.cumsum(0)[-1].tolist() == [12, 15, 18, 21]
        if DEVICE.type == "cpu":
            assert (whole @ whole.t()).tolist() == [[14, 38, 62], [38, 126, 214], [62, 214, 366]]


def test_forward_mode_derivatives_are_refused():
    with batch_invariant(strict=True), pytest.raises(Refused, match="forward-mode"):
        torch.func.jvp(lambda a: a @ a.t(), (X,), (X,))


# The atlas: everything that a machine has seen move has a rule.

ELSEWHERE = {"compile(": "mm", "matmul[": "mm", "linear": "mm", "einsum": "bmm",
             "sdpa[": "_scaled_dot_product_flash_attention", "conv": "convolution",
             "rms_norm": "_fused_rms_norm", "layer_norm": "native_layer_norm",
             "gather.backward": "scatter_add_", "index_select.backward": "index_add_", "sum": "sum",
             "softmax": "_softmax", "log_softmax": "_log_softmax", "gelu": "gelu", "scatter_add": "scatter_add"}


def seen_to_move() -> set[str]:
    found = set()
    for path in (ROOT / "data").glob("*/atlas.csv"):
        with path.open() as file:
            found |= {row["op"] for row in csv.DictReader(file)
                      if row["verdict"] == "varies" and row["property"] != "threads"}
    return found


def test_everything_that_the_atlas_has_seen_move_has_a_rule():
    def ruled(name):
        return name in RULES or name in KNOWN or any(name.startswith(of) and rule in RULES
                                                     for of, rule in ELSEWHERE.items())
    with batch_invariant():
        pass
    assert len(seen_to_move()) > 30
    assert sorted(name for name in seen_to_move() if not ruled(name)) == []


def test_every_rule_is_of_an_op_that_exists():
    with batch_invariant():
        pass
    assert len(RULES) > 100
    lacking = [name for name in RULES if op_of(name) is None]
    assert [name for name in lacking if not name.startswith(("_native_batch_norm", "index_put_"))] == []


def test_dtypes_are_those_of_the_suite():
    assert set(DTYPES) == {"bfloat16", "float16", "float32"}
    with batch_invariant(strict=True):
        for dtype in DTYPES.values():
            assert (X.to(dtype) @ W.t().to(dtype)).dtype == dtype


def test_a_row_of_safe_softmax_begins_at_its_first_key():
    scores = portable(6, 40, device=DEVICE).view(2, 3, 40)
    padded = torch.full((2, 3, 47), -torch.inf, dtype=torch.float32, device=DEVICE)
    padded[:, :, 5:45] = scores
    padded[1, 2] = -torch.inf
    with batch_invariant(strict=True):
        alone, found = (torch.ops.aten._safe_softmax(x, -1) for x in (scores, padded))
        across = torch.ops.aten._safe_softmax(padded.transpose(0, 2), 0).transpose(0, 2)
    assert same_bits(across, found) and same_bits(alone, triton_or_python(softmax)(scores, -1))
    assert same_bits(found[0, :, 5:45], alone[0]) and not found[:, :, :5].any() and not found[:, :, 45:].any()
    assert not found[1, 2].any()


def test_attention_of_an_empty_batch_is_empty():
    q = torch.empty(0, 2, 3, 4, dtype=torch.float32, device=DEVICE)
    with batch_invariant(strict=True):
        y, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True)
        assert y.shape == q.shape and sums.shape == q.shape[:3]
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
