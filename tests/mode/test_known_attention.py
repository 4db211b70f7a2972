"""Attention that is known when code is compiled: constant masks are read then, and CUDA graphs hold the calls."""
from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from playing import Q

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant, compiling, known_attention
from kernels.mode.switch import Refused

DEVICE = runtime.device()
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 5, 16
KNOWN = "same_bits_mode::aten__scaled_dot_product_efficient_attention_known"
READ, AT_EACH_CALL, Y = "same_bits_mode::read_mask", KNOWN.replace("_known", "_read"), "same_bits_mode::known_attention"
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
FLASH = torch.ops.aten._scaled_dot_product_flash_attention


def _x(dtype=torch.bfloat16, width=WIDTH):
    return portable(BATCH * HEADS * TOKENS, width, dtype, DEVICE).view(BATCH, HEADS, TOKENS, width)


def _bias(keep, dtype=torch.bfloat16):
    return torch.where(keep, 0.0, float("-inf")).to(dtype).expand(BATCH, HEADS, -1, -1)


def _places(window=0, first=0):
    """Which keys a query sees: those before it, made of places alone, as transformers makes it."""
    place = torch.arange(TOKENS, dtype=torch.int64, device=DEVICE)
    keep = (place[None, :] <= place[:, None]) & (place[None, :] >= first)
    return keep & (place[None, :] > place[:, None] - window) if window else keep


def constant(x):
    for _ in range(2):
        x = x + EFFICIENT(x, x, x, _bias(_places()), False)[0]
    return x


def _compiled(function, monkeypatch, *given, in_graphs=False):
    """A function compiled in the mode: its result, and the ops that Inductor got."""
    names = []

    def replace(module, _):
        known_attention.replace(module, in_graphs)
        names.extend(getattr(node.target, "name", str)() for node in module.graph.nodes)
    monkeypatch.setattr(compiling, "known_attention", SimpleNamespace(replace=replace))
    torch._dynamo.reset()
    with torch.no_grad(), batch_invariant(strict=True):
        return torch.compile(function, dynamic=False)(*given), names


@pytest.mark.serial  # it compiles
def test_a_constant_mask_is_read_once_while_it_is_compiled(monkeypatch):
    x = _x()
    with torch.no_grad(), batch_invariant(strict=True):
        eager = constant(x)
    before = len(known_attention.SEEN)
    y, names = _compiled(constant, monkeypatch, x)
    assert same_bits(y, eager)
    assert names.count(Y) == 2 and READ not in names
    assert not any(name.startswith("aten::le") for name in names)  # nothing makes the mask any more
    assert len(known_attention.SEEN) == before + 1
    again, _ = _compiled(constant, monkeypatch, x)
    assert same_bits(again, eager) and len(known_attention.SEEN) == before + 1


LEFT = {"a window": lambda x: EFFICIENT(x, x, x, _bias(_places(window=2)), False)[0],
        "hidden from the first on": lambda x: EFFICIENT(x, x, x, _bias(_places(first=1)), False)[0],
        "first key hidden": lambda x: EFFICIENT(x, x, x, _bias(_places(first=1).any(0).expand(TOKENS, -1)), False)[0],
        "of data": lambda x: EFFICIENT(x, x, x, _bias(_places() & (x[0, 0, :, :1] < 9)), False)[0],
        "float32": lambda x: EFFICIENT(x.float(), x.float(), x.float(), _bias(_places(), torch.float32), False)[0]}


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("name", LEFT)
def test_other_masks_are_read_at_each_call(name, monkeypatch):
    x = _x()
    with torch.no_grad(), batch_invariant(strict=True):
        eager = LEFT[name](x)
    y, names = _compiled(LEFT[name], monkeypatch, x)
    assert same_bits(y, eager) and names.count(READ) == 1
    assert AT_EACH_CALL in names


@pytest.mark.serial  # it compiles
def test_a_constant_mask_without_an_order_is_refused_when_it_is_called(monkeypatch):
    with pytest.raises(Refused, match="scaled_dot_product_attention has an order for masks that show or hide"):
        _compiled(lambda x: EFFICIENT(x, x, x, torch.full_like(x[..., :TOKENS], 0.5), False)[0], monkeypatch, _x())


@pytest.mark.serial  # it compiles
@pytest.mark.parametrize("in_graphs", [False, True])
def test_calls_without_a_mask_are_known_where_graphs_hold_them_or_y_alone_is_wanted(in_graphs, monkeypatch):
    def plain(x):
        y, sums, *_ = EFFICIENT(x, x, x, None, True)
        return y + EFFICIENT(x, x, x, None, True, 0.0, True)[0] + FLASH(x, x, x, 0.0, True)[0], sums
    x = _x()
    with torch.no_grad(), batch_invariant(strict=True):
        eager = plain(x)
    found, names = _compiled(plain, monkeypatch, x, in_graphs=in_graphs)
    assert all(map(same_bits, found, eager))
    assert names.count(Y) == 2 and names.count(KNOWN) == in_graphs


def test_y_alone_lies_as_it_is_said_to_wherever_queries_lie():
    x = _x().transpose(1, 2).contiguous().transpose(1, 2)
    op = torch.ops.same_bits_mode.known_attention.default
    for q in (x, x.contiguous(), x.repeat_interleave(2, -1)[..., ::2]):
        y, said = op(-1, False, q, x, x, True, None), op(-1, True, *(t.to("meta") for t in (q, x, x)), True, None)
        with batch_invariant(strict=True):
            assert same_bits(y, EFFICIENT(x, x, x, None, False, 0.0, True)[0]) and y.stride() == said.stride()


def test_who_prepares_is_another_thread(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    known_attention._prepare(lambda *given: made.append(threading.get_ident()), (_x(),), {})
    assert len(made) == 1 and made[0] != threading.get_ident()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must run once before a CUDA graph is captured"):
        known_attention._prepare(lambda *given: None, (_x(),), {})


def test_outside_of_graphs_nothing_is_prepared_for_a_capture(attention, monkeypatch):
    """A capture by hand on a stream of its own takes attention as the op without a place does."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    op, given = torch.ops.same_bits_mode.known_attention.default, (Q, Q, Q, True, None)
    with pytest.raises(RuntimeError, match="must run once before a CUDA graph is captured"):
        op(-1, True, *given)
    assert not attention and op(-1, False, *given).shape == Q.shape
    assert [kind for kind, *_ in attention] == ["looked at"]
    assert op(-1, True, *given).shape == Q.shape and attention[-1][0] == "launched"


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [True, False])
def test_a_cuda_graph_holds_all_of_a_model_whose_masks_are_known(masked):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eye = portable(HEADS * 64, HEADS * 64, torch.bfloat16, "cuda", 1)

    def three(x):
        for _ in range(3):
            q = F.linear(x, eye).view(BATCH, TOKENS, HEADS, 64).transpose(1, 2)
            y = EFFICIENT(q, q, q, _bias(_places()), False)[0] if masked else FLASH(q, q, q, 0.0, True)[0]
            x = x + F.linear(y.transpose(1, 2).flatten(2), eye)
        return x
    compiled = torch.compile(three, dynamic=False, mode="reduce-overhead")
    with torch.no_grad(), batch_invariant(strict=True):
        for seed in range(6):
            x = portable(BATCH * TOKENS, HEADS * 64, torch.bfloat16, "cuda", seed).view(BATCH, TOKENS, -1)
            torch.compiler.cudagraph_mark_step_begin()
            assert same_bits(compiled(x).clone(), three(x)), seed
            assert same_bits(compiled(x).clone()[1:], three(x)[1:])
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert "cudagraph_partitions" not in torch._dynamo.utils.counters["inductor"] or \
        torch._dynamo.utils.counters["inductor"]["cudagraph_partitions"] <= 1
