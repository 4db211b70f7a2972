"""The decoder against two independent ones, its cache against itself, and its errors."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from decoders import (
    DEVICES,
    SHAPES,
    TINY,
    TOLERANCE,
    each_ops_and_dtype,
    on_meta,
    prompt,
    reference_logits,
    relative_error,
    run,
)

from kernels import OPS, runtime
from kernels.bits import digest, same_bits
from kernels.model import cache as cache_module
from kernels.model import ops as ops_module
from kernels.model import specified_attention
from kernels.model.config import PRESETS
from kernels.model.llama import Llama
from kernels.model.weights import transformers_weights

# Digests of tiny's weights of seed 7: made of integers and powers of two alone, so of every machine's.
WEIGHTS = {torch.float32: "4a0e6cb442bccce3", torch.float16: "43a2166638b918d1", torch.bfloat16: "9e32ee042d9d5296"}
# `tiled` is for a CPU: its attention reads lengths on the host, which no capture allows.
captured = pytest.mark.parametrize("ops", [name for name in ops_module.NAMES if name != "tiled"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@each_ops_and_dtype
def test_logits_match_a_float64_reference(shape, ops, dtype, device):
    model = Llama(SHAPES[shape], ops=ops, dtype=dtype, device=device, seed=3)
    tokens = prompt(2, 9, device)
    expected = np.stack([reference_logits(model, row.tolist()) for row in tokens])
    assert relative_error(run(model, tokens), expected) < TOLERANCE[dtype]


def in_transformers(transformers, c):
    """The same model in transformers, with random weights."""
    scaling = c.rope_scaling and {
        "rope_type": "llama3", "factor": c.rope_scaling.factor, "low_freq_factor": c.rope_scaling.low_frequency_factor,
        "high_freq_factor": c.rope_scaling.high_frequency_factor,
        "original_max_position_embeddings": c.rope_scaling.original_context}
    kind, config = (transformers.Qwen3ForCausalLM, transformers.Qwen3Config) if c.qk_norm else (
        transformers.LlamaForCausalLM, transformers.LlamaConfig)
    return kind(config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_embeddings,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": c.rope_theta}))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_transformers(dtype, shape):
    transformers = pytest.importorskip("transformers")
    config = SHAPES[shape]
    torch.manual_seed(0)
    theirs = in_transformers(transformers, config)
    for name, weight in theirs.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # they begin at 1, where a norm left out would be close
            weight.data = torch.linspace(0.5, 1.5, len(weight))
    theirs = theirs.to(dtype).eval()
    ours = Llama(config, dtype=dtype, device="cpu", weights=transformers_weights(theirs.state_dict(), dtype, "cpu"))
    assert sum(p.numel() for p in theirs.parameters()) == config.parameters
    tokens = prompt(2, 200)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert relative_error(run(ours, tokens), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape, change", [("llama", {"rope_scaling": None}), ("qwen3", {"rope_theta": 1e4}),
                                           ("qwen3", {"qk_norm": False}), ("llama", {"norm_eps": 1e-3})])
def test_the_comparison_sees_a_wrong_shape(shape, change):
    """The inverse test: with another rotation, without a norm, the logits leave the tolerance."""
    tokens = prompt(1, 200)
    right, wrong = (run(Llama(c, device="cpu"), tokens)
                    for c in (SHAPES[shape], dataclasses.replace(SHAPES[shape], **change)))
    assert relative_error(wrong, right) > 20 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ops", ["default", "tiled"])
def test_one_pass_equals_chunks_and_token_by_token(ops, device):
    model = Llama("tiny", ops=ops, dtype=torch.float32, device=device)
    tokens = prompt(2, 24, device)
    whole = model.cache(2, 40)
    expected = run(model, tokens, whole)
    for sizes in ([1] * 24, [7, 1, 16], [10, 14]):
        cache, parts, at = model.cache(2, 40), [], 0
        for size in sizes:
            parts.append(run(model, tokens[:, at : at + size], cache, prefix=at))
            at += size
        assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE[torch.float32]
        assert relative_error(cache.kv, whole.kv) < TOLERANCE[torch.float32]
        assert not cache.kv[:, :, 24:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_request_in_a_group_equals_itself_alone(dtype, device):
    """Three requests with prefixes of 3, 9 and 0 tokens, each replaying a window of 4, as a verifier does."""
    model = Llama("tiny", dtype=dtype, device=device)
    tokens, prefixes = prompt(3, 13, device), [3, 9, 0]
    group = model.cache(3, 16)
    run(model, tokens[:, :9], group)  # leaves what it wrote behind the shorter prefixes: not seen
    got = run(model, torch.stack([tokens[g, n : n + 4] for g, n in enumerate(prefixes)]), group, prefix=prefixes)
    for g, prefix in enumerate(prefixes):
        alone = model.cache(1, 16)
        if prefix:
            run(model, tokens[g : g + 1, :prefix], alone)
        expected = run(model, tokens[g : g + 1, prefix : prefix + 4], alone, prefix=prefix)
        assert relative_error(got[g : g + 1], expected) < TOLERANCE[dtype]


def test_last_logits_are_the_last_of_all_logits():
    model = Llama("tiny", device="cpu")
    tokens = prompt(3, 11)
    every = run(model, tokens)
    assert every.shape == (3, 11, 256)
    last = run(model, tokens, logits="last")
    assert last.shape == (3, 256)
    assert relative_error(last, every[:, -1]) < TOLERANCE[torch.float32]


def test_a_forward_keeps_the_streams_it_is_asked_for():
    model = Llama("tiny", device="cpu")
    tokens, cache, streams = prompt(1, 5)[0], model.cache(1, 5), []
    logits = model.forward(tokens, cache.batch([5], [0]), cache, logits="all", streams=streams)
    assert len(streams) == model.config.layers + 1 and {s.shape for s in streams} == {(5, 64)}
    assert same_bits(streams[0], model.embedding[tokens]) and not same_bits(streams[0], streams[1])
    normed = OPS["rms_norm"].cuda(streams[-1], model.norm, eps=model.config.norm_eps)
    assert same_bits(logits, torch.nn.functional.linear(normed, model.head))


@pytest.mark.parametrize("device", DEVICES)
def test_each_set_of_ops_is_what_it_says_and_shares_the_weights(device):
    default = Llama("tiny", device=device, dtype=torch.bfloat16)
    invariant, tiled = default.using("invariant"), default.using("tiled")
    kind = "triton" if device == "cuda" else "python"
    for name in ("rms_norm", "swiglu"):
        assert getattr(invariant.ops, name) is getattr(OPS[name], kind)
        assert getattr(default.ops, name) is OPS[name].cuda and getattr(tiled.ops, name) is OPS[name].python
    assert invariant.layers is default.layers
    assert "invariant" in repr(invariant) and "default" in repr(default)


def test_invariant_ops_call_the_suites_products_and_attention(monkeypatch):
    """Every product, the head's too, and one attention a layer."""
    called = []
    for name in ("matmul", "attention_prefill"):
        real = OPS[name]
        spy = dataclasses.replace(real, python=lambda *given, real=real: called.append((
            real.name, tuple(given[1].shape), given[3:])) or real.python(*given))
        monkeypatch.setattr(ops_module if name == "matmul" else specified_attention, name, spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # on more cores each has some of a weight's rows
    model = Llama(dataclasses.replace(SHAPES["llama"], heads=8, shared=8), ops="invariant", device="cpu")
    run(model, prompt(1, 5))
    products = [(shape, order) for name, shape, (order, *_) in called if name == "matmul"]
    layer = [((192, 64), None), ((64, 128), (8, 64, 3)), ((384, 64), None), ((64, 192), (8, 64, 3))]
    assert products == [*layer, *layer, ((256, 64), None)]
    assert [name for name, *_ in called].count("attention_prefill") == 2


# Sizes, weights, and what a forward may not do.

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_the_parameters_it_counts(name):
    model = on_meta(name)
    tensors = model.weights()
    assert {k: tuple(t.shape) for k, t in tensors.items()} == model.config.shapes
    assert sum(t.nbytes for t in tensors.values()) == model.nbytes
    assert (model.head is model.embedding) is model.config.tied_embeddings


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
@pytest.mark.parametrize("prefix", [0, 5, [3, 9]])
def test_a_forward_reads_nothing_back_from_the_device(name, prefix):
    """So it can be captured as a CUDA graph. On the meta device there is nothing to read back."""
    model = on_meta(name)
    tokens = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    assert model(tokens, model.cache(2, 16), prefix=prefix).shape == (2, model.config.vocab_size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_random_weights_are_the_same_on_every_machine(dtype, device):
    model = Llama("tiny", dtype=dtype, device=device, seed=7)
    assert digest((model.embedding, model.norm, model.layers[1].qkv, model.head))[:16] == WEIGHTS[dtype]
    assert not same_bits(model.layers[0].qkv, model.layers[1].qkv)
    assert not same_bits(model.embedding, Llama("tiny", dtype=dtype, device=device, seed=8).embedding)


def test_random_weights_keep_activations_in_bounds():
    model = Llama("small", device="cpu")
    for layer in (model.layers[0], model.layers[-1]):
        for name in ("qkv", "output", "gate_up", "down"):
            matrix = getattr(layer, name)
            assert 0.6 < matrix.std() * math.sqrt(matrix.shape[1]) < 1.5
    logits = run(model, prompt(1, 32, vocab=4096))
    assert logits.isfinite().all() and 0.3 < logits.std() < 5
    assert len(logits.argmax(-1).unique()) > 16


@pytest.mark.gpu
@captured
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens, prefixes", [([9, 9], [0, 0]), ([1, 1], [9, 9]), ([1, 7, 4], [9, 0, 3])])
def test_a_captured_forward_gives_what_an_eager_one_does(ops, shape, tokens, prefixes):
    model = Llama(SHAPES[shape], ops=ops, device="cuda")
    cache = model.cache(len(tokens), 16)
    run(model, prompt(len(tokens), 9, "cuda"), cache)
    ids, batch = prompt(1, sum(tokens), "cuda")[0], cache.batch(tokens, prefixes)
    expected = model.forward(ids, batch, cache)
    torch.cuda.synchronize()
    graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(ids)
    with torch.cuda.graph(graph):
        got = model.forward(held, batch, cache)
    held.copy_(ids)
    graph.replay()
    assert same_bits(got, expected) if ops == "invariant" else relative_error(got, expected) < 0.03


@pytest.mark.gpu
def test_a_window_cannot_be_captured_for_nothing_would_hold_its_batch():
    model = Llama("tiny", device="cuda")
    tokens, cache = prompt(1, 4, "cuda"), model.cache(1, 4)
    model(tokens, cache)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"cache.batch\(...\) and capture forward"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(tokens, cache)


# Errors.

def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="llama-3.1-8b, llama-3.2-1b, qwen3-0.6b, qwen3-8b, byte, small, tiny"):
        Llama("llama-4")
    with pytest.raises(ValueError, match="ops must be one of default, invariant, tiled, fused, got 'fast'"):
        Llama("tiny", ops="fast")
    with pytest.raises(TypeError, match="bfloat16, float16, float32"):
        Llama("tiny", dtype=torch.float64)


def test_invariant_ops_choose_bfloat16_and_refuse_float32():
    assert Llama("tiny", ops="invariant", device="cpu").dtype == torch.bfloat16
    for make in (lambda: Llama("tiny", ops="invariant", dtype=torch.float32, device="cpu"),
                 lambda: Llama("tiny", device="cpu").using("invariant")):
        with pytest.raises(TypeError, match="give dtype=torch.bfloat16, or ops='tiled'"):
            make()


@pytest.mark.skipif(runtime.HAS_GPU, reason="with a GPU an unindexed one is found")
def test_invariant_ops_without_triton_are_the_specification_and_need_none(monkeypatch):
    monkeypatch.setattr(runtime, "WHY_NOT", "no Triton here")
    model = Llama("tiny", ops="invariant", device="cpu")
    assert run(model, prompt(1, 1)).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_or_cache_too_large_says_how_large_and_how_much_is_free(device):
    if cache_module.free_memory(torch.device(device)) is None:
        with pytest.raises((MemoryError, RuntimeError)):
            Llama("tiny", device=device).cache(10**12, 512)
        return
    huge = dataclasses.replace(PRESETS["llama-3.1-8b"], name="huge", layers=10**4)
    with pytest.raises(MemoryError, match=r"huge in bfloat16 takes \d+\.\d GB and .* has \d+\.\d GB free"):
        Llama(huge, dtype=torch.bfloat16, device=device)
    with pytest.raises(MemoryError, match=r"a KV cache of 1000000000 x 512 tokens for tiny takes"):
        Llama("tiny", device=device).cache(10**9, 512)


@pytest.mark.parametrize("change, message", [
    ({"window": 9}, r"tokens must lie in 1\.\.8, got 9"), ({"prefix": 5}, "4 tokens behind 5, which is more than"),
    ({"prefix": -1}, r"prefixes must lie in 0\.\.8, got -1"), ({"logits": "first"}, "logits must be last or all"),
    ({"prefix": [0]}, "one entry for each"), ({"requests": 3}, "holds 2 requests, got tokens of 3"),
    ({"dtype": torch.int32}, r"tokens must be \(T,\) of int64"), ({"window": 0}, "at least one token"),
    ({"add": 200}, r"tokens must lie in 0\.\.255, the vocabulary of tiny, got \d+\.\.\d+"),
    ({"add": -200}, r"tokens must lie in 0\.\.255, .* got -\d+"),
])
def test_a_window_that_cannot_be_names_the_argument(change, message):
    change = {"window": 4, "prefix": 0, "logits": "last", "requests": 2, "dtype": torch.int64, "add": 0, **change}
    model, tokens = Llama(TINY, device="cpu"), prompt(change["requests"], change["window"]) + change["add"]
    with pytest.raises(ValueError, match=message):
        model(tokens.to(change["dtype"]), model.cache(2, 8), prefix=change["prefix"], logits=change["logits"])


def test_a_forward_refuses_what_does_not_belong_together():
    model, tokens = Llama("tiny", device="cpu"), prompt(1, 4)
    cache = model.cache(1, 8)
    with pytest.raises(ValueError, match="must be the batch's 3, got 4"):
        model.forward(tokens[0], cache.batch([3], [0]), cache)
    with pytest.raises(ValueError, match="use model.cache"):
        model(tokens, Llama("tiny", dtype=torch.float16, device="cpu").cache(1, 8))
    for other in (model.cache(1, 9), model.cache(2, 8)):
        with pytest.raises(ValueError, match=r"not one of this cache of 1 x 8 tokens: use cache.batch"):
            model.forward(tokens[0], other.batch([4], [0]), cache)
    with pytest.raises(ValueError, match=r"tokens must be \(T,\) of int64 on cpu, got .* on meta"):
        model(tokens.to("meta"), cache)
