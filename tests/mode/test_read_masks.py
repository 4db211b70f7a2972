"""A mask that graphs of their own are given is read once, for as long as nobody writes to it."""
from __future__ import annotations

import pytest
import torch

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import batch_invariant, masks, read_masks
from kernels.mode.switch import Refused

DEVICE = runtime.device()
HEADS, TOKENS = 4, 5
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
COSTS_A_WAIT = read_masks._costs_a_wait
pytestmark = pytest.mark.serial  # it compiles


def layer(x, keep):
    hidden = torch.where(keep, 0.0, float("-inf"))[:, None].expand(-1, HEADS, -1, -1)
    return x + EFFICIENT(x, x, x, hidden, False)[0]


def other_layer(x, keep):
    """It hides the last key from all others too."""
    hidden = torch.where(keep, 0.0, float("-inf"))[:, None].expand(-1, HEADS, -1, -1)
    last = torch.arange(TOKENS, device=x.device) == TOKENS - 1
    return x + EFFICIENT(x, x, x, hidden.masked_fill(last, -torch.inf), False)[0]


def of_two(x, keep):
    return layer(x, keep & (x[:, 0, :, :1] < 9))


def of_noise(x, keep):
    noise = torch.normal(0.0, 1.0, (2, 1, 1), dtype=x.dtype, device=x.device)
    return layer(x, keep & (noise < 99))


def _x(seed: int = 0) -> torch.Tensor:
    return portable(2 * HEADS * TOKENS, 16, device=DEVICE, seed=seed).view(2, HEADS, TOKENS, 16)


def _keep(hidden: int = 0) -> torch.Tensor:
    keep = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril()
    keep[1, :, :hidden] = False
    return keep


@pytest.fixture
def numbers(monkeypatch):
    """-> the sizes of each mask whose numbers were looked at, of masks that seem to be on a GPU."""
    looked = []

    def number_of(mask, *sizes):
        looked.append(sizes)
        return masks.number_of(mask, *sizes)
    monkeypatch.setattr(read_masks, "number_of", number_of)
    monkeypatch.setattr(read_masks, "_costs_a_wait", lambda mask: True)
    monkeypatch.setattr(read_masks, "_KNOWN", {})
    torch._dynamo.reset()
    return looked


@torch.no_grad()
def test_graphs_of_their_own_that_share_a_mask_read_it_once(numbers):
    compiled, x, keep = torch.compile(layer, dynamic=False), _x(), _keep()
    with batch_invariant(strict=True):
        for _ in range(3):
            assert same_bits(compiled(x, keep), layer(x, keep)) and len(numbers) == 1
        keep[1, :, :2] = False  # another batch's, in place
        for _ in range(2):
            assert same_bits(compiled(x, keep), layer(x, keep)) and len(numbers) == 2
        for hidden in (1, 2):
            new = _keep(hidden)
            assert same_bits(compiled(x, new), layer(x, new))
        assert len(numbers) == 4


@torch.no_grad()
def test_what_graphs_make_of_one_input_is_kept_apart(numbers):
    one, other = (torch.compile(each, dynamic=False) for each in (layer, other_layer))
    x, keep = _x(), _keep()
    with batch_invariant(strict=True):
        for _ in range(2):
            assert same_bits(one(x, keep), layer(x, keep)) and same_bits(other(x, keep), other_layer(x, keep))
    assert len(numbers) == 2


@torch.no_grad()
def test_a_mask_that_is_refused_is_refused_each_time(numbers):
    compiled, keep = torch.compile(layer, dynamic=False), _keep()
    keep[1, 3, 1] = False
    for _ in range(2):
        with batch_invariant(strict=True), pytest.raises(Refused, match="attn_mask is dense in another way"):
            compiled(_x(), keep)
    assert len(numbers) == 2


@pytest.mark.parametrize("function", [of_two, of_noise])
@torch.no_grad()
def test_a_mask_of_more_than_one_input_or_of_noise_is_compared(numbers, function):
    compiled, x, keep = torch.compile(function, dynamic=False), _x(), _keep()
    with batch_invariant():
        for _ in range(2):
            compiled(x, keep)
    assert len(numbers) == 2 and not read_masks._KNOWN


@torch.inference_mode()
def test_a_mask_without_a_version_is_compared(numbers):
    compiled, x, keep = torch.compile(layer, dynamic=False), _x(), _keep()
    with batch_invariant(strict=True):
        for hidden in (0, 2):
            keep[1, :, :hidden] = False
            assert same_bits(compiled(x, keep), layer(x, keep))
    assert len(numbers) == 2


@torch.no_grad()
def test_on_a_cpu_and_for_cuda_graphs_numbers_are_compared(numbers, monkeypatch):
    x, keep = _x(), _keep()
    with batch_invariant(strict=True):
        with torch._inductor.config.patch({"triton.cudagraphs": True}):
            compiled = torch.compile(layer, dynamic=False)
            first = compiled(x, keep).clone()  # the next replay of a graph writes there
            assert same_bits(first, compiled(x, keep)) and len(numbers) == 2
        assert not read_masks._KNOWN
        numbers.clear()
        torch._dynamo.reset()
        monkeypatch.setattr(read_masks, "_costs_a_wait", COSTS_A_WAIT)
        compiled = torch.compile(layer, dynamic=False)
        assert same_bits(compiled(x, keep), compiled(x, keep))
        assert len(numbers) == (1 if keep.is_cuda else 2)


@torch.no_grad()
def test_sizes_that_vary_are_told_apart(numbers):
    compiled = torch.compile(layer, dynamic=True)
    with batch_invariant(strict=True):
        for tokens in (5, 3, 5, 4):
            x, keep = _x()[:, :, :tokens], _keep()[:, :tokens, :tokens]
            for _ in range(2):
                assert same_bits(compiled(x, keep), layer(x, keep))
    assert len(numbers) == len(read_masks._KNOWN) + 1 == 4


def test_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(read_masks, "_KNOWN", {})
    monkeypatch.setattr(read_masks, "_costs_a_wait", lambda mask: True)
    monkeypatch.setattr(read_masks, "MOST", 2)
    given = [torch.ones(1, 1, 1, keys, dtype=torch.bool) for keys in (3, 4, 5)]
    for keys, mask in enumerate(given, 3):
        read_masks.READER_OF(mask, 7, [keys], mask, 1, 1, keys)
    assert [key[1] for key in read_masks._KNOWN] == [4, 5]
    text = "x" * (read_masks.LONGEST + 1)
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"), text))
    assert read_masks._text(node, {}, {}) is None
