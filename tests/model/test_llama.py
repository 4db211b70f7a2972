"""The decoder against two independent ones, its cache against itself, and its errors."""
import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import runtime
from kernels.bits import digest, portable, same_bits
from kernels.model import cache as cache_module
from kernels.model import llama
from kernels.model.config import PRESETS, Config, RopeScaling
from kernels.model.llama import Llama
from kernels.model.weights import transformers_weights
from kernels.ops.rotary import fused_rotary, rotary
from kernels.ops.swiglu import fused_swiglu, swiglu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Largest error of a logit over the largest logit, of the tiny model. Seen: 1.0e-6, 1.6e-3, 1.5e-2.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Digests of tiny's weights of seed 7: made of integers and powers of two alone, so of every machine's.
WEIGHTS = {torch.float32: "4a0e6cb442bccce3", torch.float16: "43a2166638b918d1", torch.bfloat16: "9e32ee042d9d5296"}


def relative_error(got, expected) -> float:
    got, expected = (torch.as_tensor(t).double().cpu() for t in (got, expected))
    return float((got - expected).abs().max() / expected.abs().max())


def prompt(requests: int, tokens: int, device="cpu", start: int = 0, vocab: int = 256):
    """Tokens that differ everywhere, and their positions."""
    at = torch.arange(start, start + tokens, device=device).expand(requests, tokens)
    request = torch.arange(requests, device=device)[:, None]
    return (at * 37 + request * 101 + at * at % 11) % vocab, at.contiguous()


def run(model, tokens, positions, cache=None, **options):
    options = {"prefix": 0, "logits": "all", **options}
    return model(tokens, positions, cache or model.cache(*tokens.shape), **options)


# A reference written apart: NumPy, float64, one token at a time, rotations as complex numbers, no cache.

def reference_logits(model: Llama, ids: list[int]) -> np.ndarray:
    c = model.config

    def weight(tensor):
        return tensor.double().cpu().numpy()

    def norm(v, w):
        return v / math.sqrt(sum(v * v) / len(v) + c.norm_eps) * weight(w)

    def turn(v, position):
        half = c.head_dim // 2
        out = np.empty_like(v)
        for j in range(half):
            z = complex(v[j], v[j + half]) * np.exp(1j * position * reference_frequency(c, j))
            out[j], out[j + half] = z.real, z.imag
        return out

    stream = [weight(model.embedding)[i] for i in ids]
    for layer in model.layers:
        wq, wk, wv = np.split(weight(layer.qkv), [c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim])
        gate, up = np.split(weight(layer.gate_up), 2)
        normed = [norm(v, layer.attention_norm) for v in stream]
        keys = [[turn(k, t) for k in (wk @ v).reshape(c.kv_heads, -1)] for t, v in enumerate(normed)]
        values = [(wv @ v).reshape(c.kv_heads, -1) for v in normed]
        for t, v in enumerate(normed):
            mixed = []
            for h, q in enumerate((wq @ v).reshape(c.heads, -1)):
                kv = h * c.kv_heads // c.heads
                score = np.array([turn(q, t) @ keys[s][kv] for s in range(t + 1)]) / math.sqrt(c.head_dim)
                share = np.exp(score - score.max())
                mixed.append(sum(p * values[s][kv] for s, p in enumerate(share / share.sum())))
            stream[t] = stream[t] + weight(layer.output) @ np.concatenate(mixed)
        for t, v in enumerate(stream):
            h = norm(v, layer.mlp_norm)
            g = gate @ h
            stream[t] = v + weight(layer.down) @ (g / (1 + np.exp(-g)) * (up @ h))
    return np.stack([weight(model.head) @ norm(v, model.norm) for v in stream])


def reference_frequency(c: Config, j: int) -> float:
    """Llama 3.1's rule as its authors wrote it, with branches over wavelengths."""
    frequency = 1.0 / c.rope_theta ** (2 * j / c.head_dim)
    if c.rope_scaling is None:
        return frequency
    s, wavelength = c.rope_scaling, 2 * math.pi / frequency
    if wavelength < s.original_context / s.high_frequency_factor:
        return frequency
    if wavelength > s.original_context / s.low_frequency_factor:
        return frequency / s.factor
    smooth = (s.original_context / wavelength - s.low_frequency_factor) / (
        s.high_frequency_factor - s.low_frequency_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ops", ["default", "invariant"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_match_a_float64_reference(dtype, ops, device):
    model = Llama("tiny", ops=ops, dtype=dtype, device=device, seed=3)
    tokens, positions = prompt(2, 21, device)
    got = run(model, tokens, positions)
    expected = np.stack([reference_logits(model, row.tolist()) for row in tokens])
    assert relative_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_match_transformers(dtype, tied):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(PRESETS["tiny"], tied_embeddings=tied)
    scaling = config.rope_scaling
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=tied, initializer_range=0.1, rope_theta=config.rope_theta, rope_parameters={
            "rope_type": "llama3", "rope_theta": config.rope_theta, "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context})).to(dtype).eval()
    ours = Llama(config, dtype=dtype, device="cpu",
                 weights=transformers_weights(theirs.state_dict(), dtype, "cpu"))
    assert sum(p.numel() for p in theirs.parameters()) == config.parameters
    tokens, positions = prompt(2, 200)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert relative_error(run(ours, tokens, positions), expected) < TOLERANCE[dtype]


def test_the_comparison_sees_a_wrong_rotation():
    """The inverse test: without the stretch of slow rotations the logits leave the tolerance."""
    config = dataclasses.replace(PRESETS["tiny"], rope_scaling=None)
    tokens, positions = prompt(1, 200)
    right, wrong = (run(Llama(c, device="cpu"), tokens, positions) for c in ("tiny", config))
    assert relative_error(wrong, right) > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ops", ["default", "invariant"])
def test_one_pass_equals_chunks_and_token_by_token(ops, device):
    model = Llama("tiny", ops=ops, dtype=torch.float32, device=device)
    tokens, positions = prompt(2, 24, device)
    whole = model.cache(2, 40)
    expected = run(model, tokens, positions, whole)
    for sizes in ([1] * 24, [7, 1, 16], [10, 14]):
        for hint in (False, True):
            cache, parts, at = model.cache(2, 40), [], 0
            for size in sizes:
                here = slice(at, at + size)
                parts.append(run(model, tokens[:, here], positions[:, here], cache, prefix=at if hint else None))
                at += size
            assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE[torch.float32]
            assert relative_error(cache.kv, whole.kv) < TOLERANCE[torch.float32]
            assert not cache.kv[:, :, 24:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_request_in_a_group_equals_itself_alone(dtype, device):
    """Three requests with prefixes of 3, 9 and 0 tokens, each replaying a window of 4, as a verifier does."""
    model = Llama("tiny", dtype=dtype, device=device)
    tokens, positions = prompt(3, 13, device)
    prefixes = torch.tensor([3, 9, 0], device=device)
    places = prefixes[:, None] + torch.arange(4, device=device)
    group = model.cache(3, 16)
    run(model, tokens[:, :9], positions[:, :9], group)  # leaves what it wrote behind the shorter prefixes: masked
    got = run(model, tokens.gather(1, places), places, group, prefix=9)
    for g, prefix in enumerate(prefixes.tolist()):
        alone = model.cache(1, 16)
        if prefix:
            run(model, tokens[g : g + 1, :prefix], positions[g : g + 1, :prefix], alone)
        window = slice(prefix, prefix + 4)
        expected = run(model, tokens[g : g + 1, window], positions[g : g + 1, window], alone, prefix=None)
        assert relative_error(got[g : g + 1], expected) < TOLERANCE[dtype]


def test_last_logits_are_the_last_of_all_logits():
    model = Llama("tiny", device="cpu")
    tokens, positions = prompt(3, 11)
    every = run(model, tokens, positions)
    assert every.shape == (3, 11, 256)
    last = run(model, tokens, positions, logits="last")
    assert last.shape == (3, 256)
    assert relative_error(last, every[:, -1]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_invariant_ops_use_the_suites_norm_and_share_the_weights(device):
    default = Llama("tiny", device=device)
    invariant = default.using("invariant")
    norm = llama.rms_norm
    assert invariant.ops.rms_norm is (norm.triton if device == "cuda" else norm.python)
    assert default.ops.rms_norm is llama.rms_norm.cuda
    assert invariant.layers is default.layers
    assert "invariant" in repr(invariant) and "default" in repr(default)


# The two fused kernels: on a GPU compiled, elsewhere in Triton's interpreter, against the plain functions.

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")


@needs_triton
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 16), (8, 8, 8), (6, 1, 64), (32, 8, 128)])
def test_fused_rotary_has_the_bits_of_the_plain_one(heads, kv_heads, head_dim):
    config = dataclasses.replace(PRESETS["tiny"], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    device = runtime.device()
    table = llama.rotary_table(config, device)
    positions = torch.tensor([[5, 6, 7], [0, 1, 2]], device=device)
    shape, results = (2, 3, heads + 2 * kv_heads, head_dim), []
    for turn in (rotary, fused_rotary):
        qkv = portable(6, shape[2] * head_dim, torch.float32, device).view(shape).clone()
        qkv[1, 2, -1, :2] = torch.tensor([-0.0, float("inf")])  # a value is copied, not multiplied
        kv = torch.zeros(2, 9, 2 * kv_heads, head_dim, device=device)
        turn(table, positions, 9, heads)(qkv, kv)
        results.append((qkv, kv))
    assert same_bits(*results)
    qkv, kv = results[0]
    assert same_bits(kv[0, 5:8], qkv[0, :, heads:]) and same_bits(kv[1, :3], qkv[1, :, heads:])
    assert not kv[0, :5].any() and not kv[0, 8:].any() and not kv[1, 3:].any()


@needs_triton
def test_fused_rotary_writes_nowhere_for_a_position_outside_the_cache():
    table = llama.rotary_table(PRESETS["tiny"], runtime.device())
    qkv = torch.ones(2, 1, 8, 16, device=table.device)
    kv = torch.zeros(2, 4, 4, 16, device=table.device)
    fused_rotary(table, torch.tensor([[4], [-1]], device=table.device), 4, 4)(qkv, kv)
    assert not kv.any()


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("tokens, width", [(1, 1), (3, 192), (2, 1500)])
def test_fused_swiglu_matches_the_plain_one(tokens, width):
    gate_up = 8 * portable(tokens, 2 * width, torch.float32, runtime.device())
    gate_up[0, 0] = -200.0  # exp overflows and the result is still 0
    got, expected = fused_swiglu(gate_up), swiglu(gate_up)
    assert got.shape == (tokens, width) and got.isfinite().all()
    assert relative_error(got, expected.double()) < 1e-6 if expected.any() else not got.any()


@needs_triton
def test_the_decoder_with_every_kernel_of_the_suite():
    """What `invariant` is on a GPU; on a CPU the same kernels, interpreted."""
    model = Llama("tiny", dtype=torch.float32)
    tokens, positions = prompt(2, 5, model.device)
    expected = run(model, tokens, positions)
    model.ops = llama.Ops(rms_norm=llama.rms_norm.triton, rotary=fused_rotary, swiglu=fused_swiglu)
    cache = model.cache(2, 6)
    got = [run(model, tokens[:, :4], positions[:, :4], cache),
           run(model, tokens[:, 4:], positions[:, 4:], cache, prefix=None)]
    assert relative_error(torch.cat(got, 1), expected) < TOLERANCE[torch.float32]


@pytest.mark.skipif(runtime.HAS_GPU or bool(runtime.WHY_NOT), reason="Triton's interpreter does not run here")
def test_the_interpreter_never_sees_bfloat16():
    """It is wrong for it: swiglu hands it float32 and lets torch round, rotary writes in place and refuses."""
    gate_up = portable(3, 8, torch.bfloat16)
    assert same_bits(fused_swiglu(gate_up), fused_swiglu(gate_up.float()).bfloat16())
    table, positions = llama.rotary_table(PRESETS["tiny"]), torch.zeros(1, 1, dtype=torch.int64)
    qkv, kv = (torch.zeros(1, 1, heads, 16, dtype=torch.bfloat16) for heads in (8, 4))
    with pytest.raises(TypeError, match="interpreter"):
        fused_rotary(table, positions, 1, 4)(qkv, kv)


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.ops import rotary, swiglu

def code(kernel, types, constants, target):
    names = [p.name for p in kernel.params]
    signature = {**dict(zip(names, types)), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()},
                       {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t[0] == "*"})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]

for target in (80, 90, 100):
    sizes = {"QUERIES": 32, "KEYS": 8, "HALF": 64, "BLOCK": rotary.HEADS_A_PROGRAM, "PDL": target >= 90}
    turned = code(rotary._rotary_kernel, ["*bf16", "*fp32", "*i64", "*bf16", "i32", "i32"], sizes, target)
    assert "mul.f32" in turned.replace(".rn", "").replace("f32x2", "f32"), turned
    assert not re.search(r"fma|ftz|approx", turned), turned
    sizes = {"F": 14336, "BLOCK": swiglu.COLUMNS_A_PROGRAM, "PDL": target >= 90}
    code(swiglu._swiglu_kernel, ["*bf16", "*bf16"], sizes, target)
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason=runtime.WHY_NOT or "Triton runs here")
def test_fused_kernels_compile_for_every_gpu_and_the_rotation_fuses_nothing():
    """In a process of its own: a kernel cannot be interpreted and compiled in one."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr


# Sizes, weights, and what a forward may not do.

@pytest.mark.parametrize("name, published", [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)])
def test_parameters_match_the_published_count(name, published):
    assert PRESETS[name].parameters == published


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_the_parameters_it_counts(name):
    model = on_meta(name)
    tensors = [model.embedding, model.norm, *(t for layer in model.layers for t in vars(layer).values())]
    tensors += [] if model.config.tied_embeddings else [model.head]
    assert sum(t.numel() for t in tensors) == model.config.parameters
    assert sum(t.nbytes for t in tensors) == model.nbytes


def on_meta(name, dtype=torch.bfloat16):
    """A model of shapes alone: a tensor on the meta device has no values to read."""
    return Llama(name, dtype=dtype, device="meta", weights=lambda _, shape: torch.empty(shape, device="meta"
                                                                                       ).to(dtype))


@pytest.mark.parametrize("prefix", [0, 5, None])
def test_a_forward_reads_nothing_back_from_the_device(prefix):
    """So it can be captured as a CUDA graph. On the meta device there is nothing to read back."""
    model = on_meta("llama-3.2-1b")
    tokens = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    assert model(tokens, tokens, model.cache(2, 16), prefix=prefix).shape == (2, 128256)


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
    tokens, positions = prompt(1, 32, vocab=4096)
    logits = run(model, tokens, positions)
    assert logits.isfinite().all() and 0.3 < logits.std() < 5
    assert len(logits.argmax(-1).unique()) > 16


@pytest.mark.gpu
@pytest.mark.parametrize("ops", ["default", "invariant"])
@pytest.mark.parametrize("prefix", [0, None])
def test_a_captured_forward_gives_what_an_eager_one_does(ops, prefix):
    model = Llama("tiny", ops=ops, device="cuda")
    tokens, positions = prompt(2, 9, "cuda")
    cache = model.cache(2, 16)
    expected = run(model, tokens, positions, cache, prefix=prefix)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    held = torch.zeros_like(tokens)
    with torch.cuda.graph(graph):
        got = run(model, held, positions, cache, prefix=prefix)
    held.copy_(tokens)
    graph.replay()
    assert relative_error(got, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("ops", ["default", "invariant"])
def test_a_position_outside_the_cache_leaves_other_requests_alone(ops):
    model = Llama("tiny", ops=ops, device="cuda")
    tokens, positions = prompt(3, 4, "cuda")
    cache, damaged = model.cache(3, 8), model.cache(3, 8)
    run(model, tokens, positions, cache)
    positions[1] += 6
    run(model, tokens, positions, damaged)
    assert same_bits(cache.kv[:, [0, 2]], damaged.kv[:, [0, 2]])


# Errors.

@pytest.mark.parametrize("change, message", [
    ({"layers": 0}, "layers"), ({"hidden_size": 64.0}, "hidden_size"), ({"vocab_size": True}, "vocab_size"),
    ({"kv_heads": 3}, "heads must be a multiple of kv_heads"), ({"head_dim": 24}, "head_dim"),
    ({"head_dim": 4}, "head_dim"), ({"context": -1}, "context"), ({"norm_eps": 0.0}, "norm_eps"),
    ({"norm_eps": float("nan")}, "norm_eps"), ({"rope_theta": 1.0}, "rope_theta"),
])
def test_a_bad_config_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


@pytest.mark.parametrize("change, message", [
    ({"factor": 0.5}, "factor"), ({"original_context": 0}, "original_context"),
    ({"low_frequency_factor": 4.0}, "low_frequency_factor"), ({"low_frequency_factor": 0.0}, "low_frequency_factor"),
])
def test_a_bad_rope_scaling_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**change)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="llama-3.1-8b, llama-3.2-1b, small, tiny"):
        Llama("llama-4")
    with pytest.raises(ValueError, match="default or invariant"):
        Llama("tiny", ops="fast")
    with pytest.raises(TypeError, match="bfloat16, float16, float32"):
        Llama("tiny", dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_or_cache_too_large_says_how_large_and_how_much_is_free(device):
    if cache_module.free_memory(torch.device(device)) is None:
        with pytest.raises((MemoryError, RuntimeError)):
            Llama("tiny", device=device).cache(10**12, 512)
        return
    huge = dataclasses.replace(PRESETS["llama-3.1-8b"], name="huge", layers=10**5)
    with pytest.raises(MemoryError, match=r"huge in bfloat16 takes \d+\.\d GB and .* has \d+\.\d GB free"):
        Llama(huge, dtype=torch.bfloat16, device=device)
    with pytest.raises(MemoryError, match=r"a KV cache of 1000000000 x 512 tokens for tiny takes"):
        Llama("tiny", device=device).cache(10**9, 512)


@pytest.mark.parametrize("requests, capacity", [(0, 8), (1, 0), (1, 1025)])
def test_a_cache_of_impossible_size_is_refused(requests, capacity):
    with pytest.raises(ValueError, match="cache"):
        Llama("tiny", device="cpu").cache(requests, capacity)


def test_a_cache_may_hold_the_whole_context_and_no_more():
    assert Llama("tiny", device="cpu").cache(1, 1024).capacity == 1024
    with pytest.raises(ValueError, match="a cache of 1025 tokens is longer than tiny's context of 1024"):
        Llama("tiny", device="cpu").cache(1, 1025)


@pytest.mark.parametrize("change, message", [
    ({"window": 9}, "window of 9 tokens after 0 is longer than the cache of 8"),
    ({"prefix": 5}, "window of 4 tokens after 5 is longer than the cache of 8"),
    ({"prefix": -1}, "prefix"), ({"logits": "first"}, "logits"), ({"requests": 3}, "holds 2 requests"),
    ({"start": 5, "prefix": None}, r"positions must lie in 0\.\.7, got 5\.\.8"),
    ({"start": 1}, r"positions must lie in 0\.\.3, got 1\.\.4"),
    ({"dtype": torch.int32}, "tokens must be .* int64"), ({"window": 0}, "at least one token"),
])
def test_a_forward_that_cannot_be_names_the_argument(change, message):
    change = {"window": 4, "prefix": 0, "logits": "last", "requests": 2, "start": 0, "dtype": torch.int64, **change}
    model = Llama("tiny", device="cpu")
    tokens, positions = prompt(change["requests"], change["window"], start=change["start"])
    with pytest.raises(ValueError, match=message):
        model(tokens.to(change["dtype"]), positions, model.cache(2, 8), prefix=change["prefix"],
              logits=change["logits"])


def test_a_forward_refuses_what_does_not_belong_together():
    model = Llama("tiny", device="cpu")
    tokens, positions = prompt(1, 4)
    with pytest.raises(ValueError, match="tokens' shape"):
        model(tokens, positions[:, :3], model.cache(1, 8))
    with pytest.raises(ValueError, match="model.cache|use model"):
        model(tokens, positions, Llama("tiny", dtype=torch.float16, device="cpu").cache(1, 8))
    with pytest.raises(ValueError, match="must be on cpu"):
        model(tokens.to("meta"), positions, model.cache(1, 8))
