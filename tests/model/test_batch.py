"""Batches made on the host: places in the cache, attention over any mix, and what no batch can be."""
import math

import pytest
import torch
from decoders import TINY, relative_error

from kernels.bits import same_bits
from kernels.model import attend
from kernels.model.cache import KVCache
from kernels.model.llama import Llama
from kernels.model.specified_attention import specified
from kernels.model.tiled_attention import tiled
from kernels.ops.attention.op import attention_prefill
from kernels.ops.attention.sequences import Sequences

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


# The same in pages, and the specification of decode steps that share their chains.

def in_pages(sequences, k, v, size=16):
    """The sequences with their keys in shuffled pages, and those pages."""
    need = [-(-keys // size) for keys in sequences.keys.tolist()]
    order = torch.randperm(sum(need) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    pages = [[order.pop() for _ in range(count)] for count in need]
    paged = [torch.full((sum(need) + 2, size, *t.shape[2:]), 50.0, dtype=t.dtype) for t in (k, v)]
    for i, table in enumerate(pages):
        for cache, t in zip(paged, (k, v), strict=True):
            kept = torch.nn.functional.pad(sequences.keys_of(i, t), (0, 0, 0, 0, 0, -int(sequences.keys[i]) % size))
            cache[table] = kept.unflatten(0, (-1, size))
    return Sequences(sequences.queries, sequences.keys, "cpu", pages, size), *paged


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("prepare", [attend.default, tiled], ids=["default", "tiled"])
def test_attention_over_pages_is_that_over_rows(prepare, mix):
    new, keys, rows = MIXES[mix]
    cache = KVCache(TINY, 4, 300, torch.float32, "cpu")
    sequences = cache.batch(new, [k - n for n, k in zip(new, keys, strict=True)], rows).sequences
    q, k, v = tensors(sequences)
    paged, *kept = in_pages(sequences, k, v)
    got, wanted = prepare(paged)(q, *kept), prepare(sequences)(q, k, v)
    assert torch.equal(got, wanted) if prepare is tiled else relative_error(got, wanted) < 2e-6


DECODES = {"one": ([1], [5]), "a block's border": ([1, 1, 1], [127, 128, 129]),
           "many": ([1] * 6, [7, 3, 300, 16, 9, 1]), "leaves": ([1, 1], [1025, 40]),
           "windows too": ([1, 2, 9, 1, 2], [20, 33, 150, 21, 2])}


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("mix", DECODES)
def test_decodes_that_share_chains_have_the_specifications_bits(mix, paged):
    new, keys = DECODES[mix]
    given = torch.Generator().manual_seed(len(keys))
    sequences = Sequences(new, keys, "cpu")
    q, k, v = (torch.randn(shape, generator=given).to(torch.bfloat16) for shape in (
        (sum(new), 4, 16), (len(keys), max(keys), 2, 16), (len(keys), max(keys), 2, 16)))
    wanted = attention_prefill.python(q, k, v, sequences)
    if paged:
        sequences, k, v = in_pages(sequences, k, v)
    assert same_bits(specified(sequences)(q, k, v), wanted)


def test_more_cores_move_no_bit_of_a_specified_model():
    model, tokens = Llama("tiny", ops="invariant", device="cpu"), torch.arange(12).view(6, 2)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            cache = model.cache(6, 3)
            found.append((model(tokens, cache), model(tokens[:, :1], cache, prefix=2)))
        finally:
            torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 256])
def test_the_default_reads_pages_on_a_gpu(size):
    """With pages of 256 tokens by varlen_attn, where PyTorch has it for pages; else gathered."""
    sequences = Sequences([1, 70, 1, 9], [300, 70, 20, 500], "cpu")
    given = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=given) for shape in ((81, 4, 64), (4, 512, 2, 64), (4, 512, 2, 64)))
    paged, *kept = in_pages(sequences, k, v, size)
    got = attend.default(paged.to("cuda"))(*(t.to("cuda", torch.bfloat16) for t in (q, *kept)))
    assert relative_error(got, attend.default(sequences)(q, k, v)) < 2e-2
