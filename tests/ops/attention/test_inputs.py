"""What attention's ops are tried on: pages and mixed sequences hold the same keys as rows side by side."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import HERE, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention_chunk, attention_decode, attention_prefill
from kernels.bits import same_bits
from kernels.lab.closure import of_functions
from kernels.lab.sweep import estimate
from kernels.op import Shape
from kernels.ops.attention import Sequences, contenders
from kernels.ops.attention.inputs import MIX, STEP, Queries
from kernels.runtime import Unavailable

SMALL = "H=2,KV=1,D=8"
POINTS = ((attention_decode, 3, f"{SMALL},context=50"), (attention_prefill, 40, SMALL),
          (attention_chunk, 9, f"{SMALL},context=70"), (attention_chunk, 131, f"{SMALL},context=30,mixed"))
every_point = pytest.mark.parametrize(("op", "tokens", "shape"), POINTS, ids=lambda x: getattr(x, "name", str(x)))


@every_point
@pytest.mark.parametrize("page", [1, 16, 64])
def test_pages_hold_the_same_keys_in_a_shuffled_order_with_spare_ones(op, tokens, shape, page):
    side_by_side, paged = op.inputs(tokens, shape), op.inputs(tokens, f"{shape},page={page}")
    assert same_bits(op.python(*side_by_side), op.python(*paged))
    used = np.concatenate(paged[3].pages)
    assert len(paged[1]) > len(used) == len(set(used.tolist())) == (-(-paged[3].keys // page)).sum()
    assert paged[1].shape[1] == page and (len(used) < 5 or (np.diff(used) != 1).any())
    assert op.work(tokens, shape, torch.bfloat16) == op.work(tokens, f"{shape},page={page}", torch.bfloat16)


@every_point
def test_a_row_does_not_depend_on_how_many_there_are_nor_its_pages_on_the_seed(op, tokens, shape):
    for name in (shape, f"{shape},page=16"):
        many, few = op.inputs(tokens, name), op.inputs(tokens // 2, name)
        assert same_bits(op.python(*many)[: tokens // 2], op.python(*few))
    one, other = (op.inputs(tokens, f"{shape},page=16", seed=seed) for seed in (1, 2))
    assert np.array_equal(one[3].table, other[3].table) and not same_bits(one[1], other[1])


@needs_triton
@every_point
def test_the_schedule_has_the_bits_in_pages(op, tokens, shape):
    tokens = min(tokens, 3)
    paged, side_by_side = (op.inputs(tokens, name, device=HERE) for name in (f"{shape},page=16", shape))
    assert same_bits(op.triton(*paged), op.python(*side_by_side))


@every_point
def test_the_default_computes_the_same_attention_in_pages(op, tokens, shape):
    for name in (shape, f"{shape},page=16"):
        given_ = op.inputs(tokens, name, torch.float16)
        assert torch.allclose(op.cuda(*given_), op.python(*given_), atol=2e-3, rtol=2e-3)


def test_a_step_mixes_decodes_verifications_a_chunk_and_a_prompt():
    sequences = attention_chunk.inputs(STEP + 70, "H=1,KV=1,D=2,context=4096,mixed")[3]
    assert STEP == 1024 and sequences.tokens == STEP + 70
    assert sequences.queries[:70].tolist() == [each for count, each in MIX for _ in range(count)]
    before = (sequences.keys - sequences.queries)[:70].tolist()
    assert before == [1024] * 16 + [2048] * 16 + [3072] * 16 + [4096] * 16 + [1024, 2048, 3072, 4096, 4096, 0]
    assert sequences.queries[70:].tolist() == [1] * 64 + [6]  # the last has what is left


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2500), st.integers(0, 300), st.sampled_from(["", ",mixed"]))
def test_work_counts_the_keys_and_pairs_that_sequences_have(tokens, context, kind):
    shape = f"H=4,KV=2,D=8,context={context}{kind}"
    sequences = attention_chunk.inputs(tokens, shape, torch.bfloat16, "meta")[3]
    q, k = sequences.queries, sequences.keys
    work = attention_chunk.work(tokens, shape, torch.bfloat16)
    pairs = sum(sum(range(b - a + 1, b + 1)) for a, b in zip(q.tolist(), k.tolist(), strict=True))
    assert work.flops == 4 * 4 * 8 * pairs
    assert work.bytes == 2 * 8 * (2 * tokens * 4 + 2 * int(k.sum()) * 2)


@pytest.mark.parametrize(("op", "shape", "message"), [
    (attention_decode, "context=50,page=0", "page must be at least 1 key"),
    (attention_decode, "context=50,page", "page=... with a number|page must be given with a number"),
    (attention_decode, "context=50,pages=16", "shape may give H, KV, D, context, page here, got 'pages'"),
    (attention_decode, "context=50,mixed", "got 'mixed'"), (attention_decode, "page=16", "context="),
    (attention_chunk, "mixed", "context="), (attention_chunk, "context=4,mixed=3", "mixed must be given without")])
def test_shapes_that_say_nothing_are_named(op, shape, message):
    with pytest.raises(ValueError, match=message):
        op.inputs(2, f"{SMALL},{shape}")


def test_rows_of_a_decode_in_pages_are_not_taken():
    with pytest.raises(TypeError, match="no row a sequence"):
        attention_decode.take(attention_decode.inputs(3, f"{SMALL},context=50,page=16"), slice(0, 2))


@every_point
def test_rows_in_pages_are_taken_on_the_same_keys(op, tokens, shape):
    if op is attention_decode:
        return
    given_ = op.inputs(tokens, f"{shape},page=16")
    rows = torch.tensor([0, 1, tokens - 1, 2, 2, tokens // 2])
    assert same_bits(op.python(*op.take(given_, rows)), op.python(*given_)[rows])


def test_neighbours_of_two_sequences_stay_two():
    """Query 3 of the second follows query 2 of the first."""
    some = Queries([3, 4], [3, 4])[[2, 6]]
    assert some.queries.tolist() == [1, 1] and some.keys.tolist() == [3, 4] and some.place.tolist() == [0, 1]


@every_point
@pytest.mark.parametrize("page", ["", ",page=16"])
def test_the_bytes_of_inputs_are_estimated(op, tokens, shape, page):
    made = op.inputs(tokens, shape + page)
    assert estimate.input_bytes(op, tokens, shape + page, torch.bfloat16) == sum(t.nbytes for t in made[:3])


def test_neighbours_of_one_length_are_one_call_of_the_default():
    def runs(*given, **named):
        return [(a, b, place.start, place.stop, n, m) for a, b, place, n, m in
                contenders._alike(Sequences(*given, **named))]
    assert runs([1, 1, 0, 2, 2], [9, 9, 5, 9, 9]) == [(0, 2, 0, 2, 1, 9), (2, 6, 3, 5, 2, 9)]
    assert runs([1, 1, 1], [9, 9, 8]) == [(0, 2, 0, 2, 1, 9), (2, 3, 2, 3, 1, 8)]
    assert runs([1, 1], [9, 9], slots=[3, 4]) == [(0, 2, 3, 5, 1, 9)]
    assert runs([1, 1], [9, 9], slots=[4, 3]) == [(0, 1, 4, 5, 1, 9), (1, 2, 3, 4, 1, 9)]
    step = attention_chunk.inputs(STEP, f"{SMALL},context=4096,mixed", device="meta")[3]
    assert len([*contenders._alike(step)]) == 4 + 4 + 2


@pytest.mark.parametrize("page", ["", ",page=16"])
def test_flash_attention_3_is_told_where_keys_lie(page, monkeypatch):
    """Its own interface, computed by the specification from what it was told."""
    told = {}

    def kvcache(q, k_cache, v_cache, cache_seqlens, max_seqlen_q, causal, cu_seqlens_q, num_splits, page_table=None,
                cache_batch_idx=None):
        told.update(most=max_seqlen_q, causal=causal, splits=num_splits)
        pages = None if page_table is None else [row[: -(-n // k_cache.shape[1])].tolist() for row, n in zip(
            page_table, cache_seqlens.tolist(), strict=True)]
        slots = None if cache_batch_idx is None else cache_batch_idx.tolist()
        sequences = Sequences(cu_seqlens_q.diff().tolist(), cache_seqlens.tolist(), pages=pages, slots=slots,
                              page_size=None if pages is None else k_cache.shape[1])
        return attention_chunk.python(q, k_cache, v_cache, sequences)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(
        flash_attn_func=None, flash_attn_with_kvcache=kvcache))
    given_ = attention_chunk.inputs(131, f"{SMALL},context=30,mixed{page}")
    assert same_bits(contenders.flash_attention_3(*given_), attention_chunk.python(*given_))
    assert told == {"most": 16, "causal": True, "splits": 0}


@pytest.mark.parametrize("said, error, words", [
    ("mha_fwd, flash_api.cpp:1228, This flash attention build does not support paged KV.\n", Unavailable,
     "^flash_attention_3: this build of the package takes no keys in pages$"),
    ("mha_fwd: out of memory", RuntimeError, "^mha_fwd: out of memory$")])
def test_a_build_of_flash_attention_3_without_pages_is_told_in_a_line(said, error, words, monkeypatch):
    def kvcache(*_, **__):
        raise RuntimeError(said)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(
        flash_attn_func=None, flash_attn_with_kvcache=kvcache))
    with pytest.raises(error, match=words) as caught:
        attention_chunk.implementation("flash_attention_3")(*attention_chunk.inputs(3, f"{SMALL},context=30,page=16"))
    assert type(caught.value) is error
    assert of_functions(attention_chunk.implementation("flash_attention_3")) == of_functions(
        contenders.flash_attention_3), "its rows stay those of this code"


def test_a_shape_of_pages_is_written_as_it_is_read():
    for shape in ("H=2,KV=1,D=8,context=50,page=16", "H=2,KV=1,D=8,context=50,mixed,page=16"):
        assert str(Shape.parse(shape)) == shape
