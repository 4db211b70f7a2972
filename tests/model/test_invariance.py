"""One order for a whole model: a token's bits depend on its request alone, in any batch, any chunks, any mix."""
import dataclasses

import pytest
import torch
from decoders import SHAPES, prompt

from kernels.bits import elements_differ, same_bits
from kernels.model import steps
from kernels.model.config import PRESETS
from kernels.model.llama import Llama

WIDE = dataclasses.replace(SHAPES["llama"], heads=8, kv_heads=2, head_dim=64, layers=1)
INVARIANT = [("invariant", torch.bfloat16, "cpu"), ("invariant", torch.float16, "cpu"), ("tiled", torch.float32, "cpu"),
             ("tiled", torch.bfloat16, "cpu"),
             *(pytest.param("invariant", dtype, "cuda", marks=pytest.mark.gpu)
               for dtype in (torch.bfloat16, torch.float16))]
every_invariant = pytest.mark.parametrize("ops, dtype, device", INVARIANT, ids=lambda v: str(v).removeprefix("torch."))


def model_of(shape, ops="invariant", dtype=torch.bfloat16, device="cpu", **changes) -> Llama:
    config = dataclasses.replace(SHAPES.get(shape, WIDE), **changes)
    return Llama(config, ops=ops, dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "wide"])
@every_invariant
def test_prefill_chunks_and_decode_have_the_same_bits(shape, ops, dtype, device):
    model, tokens = model_of(shape, ops, dtype, device), prompt(1, 11)[0]
    whole = steps.layer_digests(model, tokens)
    assert len(set(whole.values())) == model.config.layers + 2
    for chunks in ([1] * 11, [4, 1, 6]):
        assert steps.layer_digests(model, tokens, chunks) == whole


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@every_invariant
def test_prompt_chunk_decode_and_verify_in_one_forward_are_each_request_alone(shape, ops, dtype, device):
    """Rows of the cache in another order than the requests, one of them unused."""
    model = model_of(shape, ops, dtype, device)
    tokens, new, held, rows = prompt(4, 12, device), [5, 4, 1, 3], [0, 6, 9, 2], [3, 0, 4, 1]
    cache = model.cache(5, 12)
    for i, (count, row) in enumerate(zip(held, rows, strict=True)):
        if count:
            model.forward(tokens[i, :count], cache.batch([count], [0], [row]), cache)
    mixed = torch.cat([tokens[i, h : h + n] for i, (h, n) in enumerate(zip(held, new, strict=True))])
    got = model.forward(mixed, cache.batch(new, held, rows), cache, logits="all").split(new)
    for i, (h, n) in enumerate(zip(held, new, strict=True)):
        assert same_bits(got[i], steps.logits(model, tokens[i, : h + n])[h:])


@every_invariant
def test_a_row_in_a_batch_of_any_size_and_place_is_the_row_alone(ops, dtype, device):
    model, tokens = model_of("llama", ops, dtype, device), prompt(7, 3, device)
    alone = [model(row[None], model.cache(1, 3), logits="all")[0] for row in tokens]
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2], [5, 5, 0]):
        together = model(tokens[order], model.cache(len(order), 3), logits="all")
        assert all(same_bits(row, alone[i]) for row, i in zip(together, order, strict=True))


def test_what_lies_in_the_cache_behind_a_request_changes_nothing():
    model, tokens = model_of("llama"), prompt(1, 4)
    clean, used = model.cache(1, 300), model.cache(1, 300)
    used.kv.fill_(3.0)
    assert same_bits(model(tokens, clean, logits="all"), model(tokens, used, logits="all"))


def test_last_logits_have_the_bits_of_all_logits():
    model = model_of("qwen3")
    for new in ([3, 3], [1, 4]):
        cache, tokens = model.cache(2, 4), prompt(1, sum(new))[0]
        every = model.forward(tokens, cache.batch(new, [0, 0]), cache, logits="all")
        last = model.forward(tokens, cache.batch(new, [0, 0]), cache)
        assert same_bits(last, every[[new[0] - 1, sum(new) - 1]])


def test_the_check_sees_one_product_that_follows_the_batch():
    """The inverse test: the MLP's last product, rounded in two halves where there is more than one row."""
    model, tokens = model_of("llama"), prompt(1, 6)[0]
    plain = model.ops.linear

    def linear(x, weight, order):
        if len(x) == 1 or weight.shape[1] != model.config.intermediate_size:
            return plain(x, weight, order)
        half = weight.shape[1] // 2
        return plain(x[:, :half], weight[:, :half], None) + plain(x[:, half:], weight[:, half:], None)

    right = steps.logits(model, tokens)
    model.ops = dataclasses.replace(model.ops, linear=linear)
    assert not same_bits(steps.logits(model, tokens), right)
    assert same_bits(steps.logits(model, tokens, [1] * 6), right)


def test_a_model_that_eight_gpus_may_share_has_an_order_of_its_own_and_keeps_it():
    one, eight = (model_of("wide", shared=shared, intermediate_size=512) for shared in (1, 8))
    tokens = prompt(1, 5)[0]
    assert one.orders == {"output": None, "down": None}
    assert eight.orders == {"output": (8, 64, 3), "down": (8, 64, 3)}
    assert steps.layer_digests(eight, tokens) == steps.layer_digests(eight, tokens, [1, 3, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama", "qwen3", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_has_the_bits_of_a_hopper_gpu(shape, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the specification adds as Hopper's tensor cores do")
    tokens = prompt(1, 9)[0]
    assert steps.layer_digests(model_of(shape, dtype=dtype), tokens) == steps.layer_digests(
        model_of(shape, dtype=dtype, device="cuda"), tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("name, shared", [("byte", 1), ("byte", 8), ("small", 1)])
def test_random_batches_move_no_bit(name, shared):
    """Requests, prefixes, windows and rows of the cache drawn at random, against each request as one window."""
    model = Llama(dataclasses.replace(PRESETS[name], shared=shared), ops="invariant", device="cuda", seed=5)
    draw, most = torch.Generator().manual_seed(7), 300
    tokens = prompt(16, most, "cuda", vocab=model.config.vocab_size)
    alone = [steps.logits(model, row) for row in tokens]
    for _ in range(40):
        rows = torch.randperm(16, generator=draw)[: int(torch.randint(1, 17, (1,), generator=draw))].tolist()
        cache, held, moved = model.cache(16, most), [0] * len(rows), 0
        for _ in range(4):
            room = [most - h for h in held]
            new = [int(torch.randint(1, max(2, min(r, 1 << int(torch.randint(0, 8, (1,), generator=draw)))), (1,),
                                     generator=draw)) for r in room]
            ids = torch.cat([tokens[i, h : h + n] for i, h, n in zip(rows, held, new, strict=True)])
            got = model.forward(ids, cache.batch(new, held, rows), cache, logits="all").split(new)
            moved += sum(elements_differ(part, alone[i][h : h + n])
                         for part, i, h, n in zip(got, rows, held, new, strict=True))
            held = [h + n for h, n in zip(held, new, strict=True)]
        assert moved == 0
