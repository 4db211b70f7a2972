"""Batches made on the host: places in the cache, attention over any mix, and what no batch can be."""
import math

import pytest
import torch
from decoders import TINY, relative_error

from kernels.model import attend
from kernels.model.cache import KVCache
from kernels.model.tiled_attention import tiled

CACHE = KVCache(TINY, 3, 10, torch.float32, "cpu")


def test_positions_slots_and_last_tokens():
    batch = CACHE.batch([2, 1, 3], [4, 9, 0], [2, 0, 1])
    assert batch.positions.tolist() == [4, 5, 9, 0, 1, 2]
    assert batch.slots.tolist() == [24, 25, 9, 10, 11, 12]
    assert batch.last.tolist() == [1, 2, 5] and (len(batch), batch.tokens) == (3, 6)
    assert batch.sequences.keys.tolist() == [6, 10, 3] and batch.sequences.place.tolist() == [2, 0, 1]
    assert {t.dtype for t in (batch.positions, batch.slots)} == {torch.int64}


def test_windows_of_one_size_take_their_last_rows_without_a_copy():
    batch = CACHE.batch([2, 2, 2], [0, 0, 0])
    x = torch.arange(12.0).view(6, 2)
    assert x[batch.last].tolist() == x[[1, 3, 5]].tolist()
    assert x[batch.last].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("given, error, message", [
    (([], []), ValueError, "at least one request, got 0, 0 and 0"),
    (([1], [0, 0]), ValueError, "one entry for each of at least one request, got 1, 2 and 1"),
    (([0], [0]), ValueError, r"tokens must lie in 1\.\.10, got 0 at 0"),
    (([1, 11], [0, 0]), ValueError, r"tokens must lie in 1\.\.10, got 11 at 1"),
    (([1], [-1]), ValueError, r"prefixes must lie in 0\.\.10, got -1 at 0"),
    (([3], [8]), ValueError, "request 0 has 3 tokens behind 8, which is more than the 10"),
    (([1], [0], [3]), ValueError, r"rows must lie in 0\.\.2, got 3 at 0"),
    (([1, 1], [0, 0], [1, 1]), ValueError, r"rows must differ, .* got \[1, 1\]"),
    (([1.5], [0]), TypeError, "tokens must be integers, got 1.5 at 0"),
    (([1], [True]), TypeError, "prefixes must be integers, got True at 0"),
])
def test_a_batch_that_cannot_be_names_the_argument(given, error, message):
    with pytest.raises(error, match=message):
        CACHE.batch(*given)


@pytest.mark.parametrize("requests, capacity", [(0, 8), (1, 0), (1, 1025)])
def test_a_cache_of_impossible_size_is_refused(requests, capacity):
    with pytest.raises(ValueError, match="cache"):
        KVCache(TINY, requests, capacity, torch.float32, "cpu")


def test_a_cache_may_hold_the_whole_context_and_no_more():
    assert KVCache(TINY, 1, 1024, torch.float32, "cpu").capacity == 1024
    with pytest.raises(ValueError, match="a cache of 1025 tokens is longer than tiny's context of 1024"):
        KVCache(TINY, 1, 1025, torch.float32, "cpu")


# Attention in float32, PyTorch's and in tiles, against float64.

MIXES = {"prompts": ([5, 5], [5, 5], None), "decode": ([1, 1, 1], [7, 7, 7], None),
         "decode, lengths": ([1, 1, 1], [7, 3, 10], [2, 0, 1]), "chunks": ([3, 3], [9, 9], [1, 2]),
         "mixed": ([4, 1, 1, 2], [4, 9, 9, 8], [3, 1, 2, 0]), "rows apart": ([2, 2], [6, 6], [3, 1]),
         "longer than a block": ([70, 1, 130], [150, 260, 130], None)}


def attended(q, k, v, sequences):
    """Each query by itself, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    rows, group = [], q.shape[1] // k.shape[2]
    for i, (count, keys) in enumerate(zip(sequences.queries.tolist(), sequences.keys.tolist(), strict=True)):
        for r in range(count):
            see, row = keys - count + r + 1, int(sequences.place[i])
            for h, one in enumerate(q[len(rows) // q.shape[1]]):
                share = (k[row, :see, h // group] @ one / math.sqrt(q.shape[2])).softmax(0)
                rows.append(share @ v[row, :see, h // group])
    return torch.stack(rows).view(q.shape)


def tensors(sequences, requests=4, capacity=300):
    made = torch.Generator().manual_seed(len(sequences))
    q, k, v = (torch.randn(shape, generator=made) for shape in (
        (sequences.tokens, 4, 16), (requests, capacity, 2, 16), (requests, capacity, 2, 16)))
    for i, keys in enumerate(sequences.keys.tolist()):  # what lies behind the keys must not be seen
        k[int(sequences.place[i]), keys:], v[int(sequences.place[i]), keys:] = 100.0, 100.0
    return q, k, v


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("prepare", [attend.default, tiled], ids=["default", "tiled"])
def test_attention_over_a_mix_is_each_query_over_its_keys(prepare, mix):
    new, keys, rows = MIXES[mix]
    cache = KVCache(TINY, 4, 300, torch.float32, "cpu")
    sequences = cache.batch(new, [k - n for n, k in zip(new, keys, strict=True)], rows).sequences
    q, k, v = tensors(sequences)
    assert relative_error(prepare(sequences)(q, k, v), attended(q, k, v, sequences)) < 2e-6


@pytest.mark.parametrize("mix, calls, masks", [("prompts", 1, 0), ("decode", 1, 0), ("decode, lengths", 1, 1),
                                               ("chunks", 1, 1), ("mixed", 3, 1), ("rows apart", 1, 1)])
def test_the_default_makes_few_calls_and_no_mask_without_need(mix, calls, masks, monkeypatch):
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((options["attn_mask"] is not None, k))
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    new, keys, rows = MIXES[mix]
    cache = KVCache(TINY, 4, 300, torch.float32, "cpu")
    sequences = cache.batch(new, [k - n for n, k in zip(new, keys, strict=True)], rows).sequences
    q, k, v = tensors(sequences)
    attend.default(sequences)(q, k, v)
    assert (len(seen), sum(masked for masked, _ in seen)) == (calls, masks)
    if mix not in ("decode, lengths", "rows apart"):
        assert all(t.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() for _, t in seen), "keys are copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_move_no_bit_with_the_batch_or_the_chunk(dtype):
    cache = KVCache(TINY, 2, 300, torch.float32, "cpu")
    q = torch.randn(2, 290, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    k, v = (torch.randn(2, 300, 2, 16, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
    both = tiled(cache.batch([290, 290], [0, 0]).sequences)(q.flatten(0, 1), k, v).view(q.shape)
    for begin, end in ((0, 1), (127, 128), (100, 200), (255, 290), (289, 290)):
        one = tiled(cache.batch([end - begin], [begin], [1]).sequences)(q[1, begin:end], k, v)
        assert torch.equal(one, both[1, begin:end])
