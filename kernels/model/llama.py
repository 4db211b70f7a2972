"""A Llama-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One forward takes a window of W tokens for each of G requests, so it is a prefill (W = the prompt), a chunk of
one, a decode step (W = 1) and a verifier's replay (G x W) alike. Shapes are fixed by the arguments' shapes and
nothing on the device is read back, so a forward can be captured as a CUDA graph.

Weights are random, from a seed, with the same bits on every machine; `transformers_weights` reads real ones.

Source: Touvron et al., arXiv 2302.13971; Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783.
"""
from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import bits, runtime
from ..op import DTYPES
from ..ops import rotary as fused
from ..ops.rms_norm import rms_norm
from .cache import KVCache, check_fits


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of slow rotations, for contexts longer than the model was first trained on."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if self.factor < 1 or self.original_context < 1:
            raise ValueError(f"factor and original_context must be at least 1, got {self}")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(f"low_frequency_factor must lie between 0 and high_frequency_factor, got {self}")


@dataclass(frozen=True)
class Config:
    """The sizes of a decoder. Raises ValueError that names the field for sizes no Llama can have."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 131072
    tied_embeddings: bool = False
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    norm_eps: float = 1e-5

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim",
                      "context"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        if self.head_dim < 8 or self.head_dim & (self.head_dim - 1):
            raise ValueError(f"head_dim must be a power of two of at least 8, got {self.head_dim}")
        for field, least in (("rope_theta", 1.0), ("norm_eps", 0.0)):
            if not least < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be a number above {least:g}, got {getattr(self, field)!r}")

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """One layer's weights: name -> shape. Matrices are (out, in); qkv and gate_up are two or three in one."""
        d, q, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"attention_norm": (d,), "qkv": (q + 2 * kv, d), "output": (d, q),
                "mlp_norm": (d,), "gate_up": (2 * self.intermediate_size, d), "down": (d, self.intermediate_size)}

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, as published counts have it (tied embeddings once)."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes.values())
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.layers * layer + embeddings + self.hidden_size


PRESETS = {config.name: config for config in (
    Config("llama-3.1-8b", vocab_size=128256, hidden_size=4096, intermediate_size=14336, layers=32, heads=32,
           kv_heads=8, head_dim=128),
    Config("llama-3.2-1b", vocab_size=128256, hidden_size=2048, intermediate_size=8192, layers=16, heads=32,
           kv_heads=8, head_dim=64, tied_embeddings=True, rope_scaling=RopeScaling(factor=32.0)),
    Config("small", vocab_size=4096, hidden_size=512, intermediate_size=1536, layers=6, heads=8, kv_heads=4,
           head_dim=64, context=4096, tied_embeddings=True),
    Config("tiny", vocab_size=256, hidden_size=64, intermediate_size=192, layers=2, heads=4, kv_heads=2, head_dim=16,
           context=1024, rope_scaling=RopeScaling(original_context=64)),
)}


def preset(name: str) -> Config:
    """A preset by name. Raises ValueError that lists the names there are."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}") from None


def random_weights(seed: int, dtype: torch.dtype, device) -> Callable[[str, tuple], torch.Tensor]:
    """(name, shape) -> a weight with the same bits on every machine, made where it will stay.

    A matrix keeps its input's size (standard deviation about 1 / sqrt(in)); a norm's weights lie around 1.
    """
    def weight(name, shape):
        own_seed = zlib.crc32(f"{seed}.{name}".encode()) >> 1
        if len(shape) == 1:
            return 1 + bits.portable(1, *shape, dtype, device, own_seed)[0] / 4
        return bits.portable(*shape, dtype, device, own_seed, scale=round(math.log2(3 / math.sqrt(shape[1]))))
    return weight


_IN_TRANSFORMERS = {
    "embedding": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"],
    "attention_norm": ["model.layers.{}.input_layernorm"],
    "qkv": [f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"],
    "output": ["model.layers.{}.self_attn.o_proj"],
    "mlp_norm": ["model.layers.{}.post_attention_layernorm"],
    "gate_up": [f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up")],
    "down": ["model.layers.{}.mlp.down_proj"],
}


def transformers_weights(state: Mapping[str, torch.Tensor], dtype: torch.dtype, device):
    """(name, shape) -> a weight out of the state dict of transformers' LlamaForCausalLM (or its safetensors)."""
    def weight(name, shape):
        layer, _, part = name.rpartition(".")
        pieces = [state[f"{piece.format(layer)}.weight"] for piece in _IN_TRANSFORMERS[part]]
        return torch.cat(pieces).to(device, dtype)
    return weight


def rotary_table(config: Config, device="cpu") -> torch.Tensor:
    """(context, head_dim) float32: each position's head_dim/2 cosines, then its sines; worked out in float64."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    if scaling := config.rope_scaling:
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_context * frequency / (2 * math.pi)
        fast = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keep the frequency, 0: divide it by the factor
        frequency = frequency * (fast + (1 - fast) / scaling.factor)
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float().to(device)


def rotary(table, positions, capacity: int, heads: int) -> Callable:
    """Once a forward: positions (G, W) -> rotate(qkv, kv), which each layer calls.

    qkv is (G, W, heads + 2 * kv_heads, head_dim): queries and keys are rotated in place, in float32, rounded
    once. kv is the layer's cache, (G, capacity, 2 * kv_heads, head_dim): keys and values are written into it.
    """
    positions = positions.clamp(0, capacity - 1)  # a bad one must not reach another request's slots
    cos, sin = table[positions][:, :, None].chunk(2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    first = torch.arange(0, len(positions) * capacity, capacity, device=positions.device)[:, None]
    slots = (first + positions).flatten()

    def rotate(qkv, kv):
        qk = qkv[:, :, : heads + kv.shape[2] // 2]
        a, b = qk.chunk(2, -1)
        qk.copy_(qk * cos + torch.cat([b, a], -1) * sin)
        kv.flatten(0, 1).index_copy_(0, slots, qkv[:, :, heads:].flatten(0, 1))
    return rotate


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2F) -> (T, F): silu of the first half, times the second."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Ops:
    """Which implementation each step of the decoder uses."""

    rms_norm: Callable = rms_norm.cuda
    linear: Callable = F.linear
    attention: Callable = F.scaled_dot_product_attention
    rotary: Callable = rotary
    swiglu: Callable = swiglu


def choose_ops(name: str, device: torch.device) -> Ops:
    """'default': what PyTorch calls. 'invariant': this suite's, where it has the op, and default elsewhere.

    Without a GPU 'invariant' is the specification: the interpreter would give the same bits a thousand times slower.
    """
    if name not in ("default", "invariant"):
        raise ValueError(f"ops must be default or invariant, got {name!r}")
    if name == "default":
        return Ops()
    if device.type != "cuda":
        return Ops(rms_norm=rms_norm.python)
    runtime.require_triton("llama")
    return Ops(rms_norm=rms_norm.triton, rotary=fused.rotary, swiglu=fused.swiglu)


@dataclass(frozen=True)
class Layer:
    """One layer's weights; shapes in Config.layer_shapes."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class _Window:
    """What one forward works out once for all its layers. A mask of None: nothing but the window, causal."""

    requests: int
    tokens: int
    rotate: Callable
    keys: int
    mask: torch.Tensor | None


class Llama:
    """A decoder with its weights on one device.

    config   a Config or the name of a preset
    ops      'default' or 'invariant'; `using` gives the other over the same weights
    dtype    default: bfloat16 on a GPU, float32 on a CPU
    weights  (name, shape) -> tensor; default: random_weights(seed, dtype, device), one tensor at a time

    Raises ValueError for an unknown preset or ops, TypeError for a dtype it cannot be, MemoryError, before
    anything is allocated, for weights larger than the memory that is free.
    """

    def __init__(self, config: Config | str, *, ops: str = "default", dtype: torch.dtype | None = None, device=None,
                 seed: int = 0, weights: Callable | None = None):
        self.config = config = preset(config) if isinstance(config, str) else config
        self.device = torch.empty(0, device=device or runtime.device()).device  # with its index
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if self.dtype not in DTYPES.values():
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        self.ops_name, self.ops = ops, choose_ops(ops, self.device)
        check_fits(f"{config.name} in {str(self.dtype).removeprefix('torch.')}", self.nbytes, self.device)
        weights = weights or random_weights(seed, self.dtype, self.device)
        table = (config.vocab_size, config.hidden_size)
        self.embedding = weights("embedding", table)
        self.layers = [Layer(**{name: weights(f"{i}.{name}", shape) for name, shape in config.layer_shapes.items()})
                       for i in range(config.layers)]
        self.norm = weights("norm", table[1:])
        self.head = self.embedding if config.tied_embeddings else weights("head", table)
        self.rotary_table = rotary_table(config, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.config.parameters * self.dtype.itemsize

    def using(self, ops: str) -> Llama:
        """The same weights, not copied, under the other ops."""
        other = copy.copy(self)
        other.ops_name, other.ops = ops, choose_ops(ops, self.device)
        return other

    def cache(self, requests: int, capacity: int) -> KVCache:
        """An empty KV cache for so many requests of at most so many tokens each."""
        return KVCache(self.config, requests, capacity, self.dtype, self.device)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, *, prefix: int | None = None,
                logits: str = "last") -> torch.Tensor:
        """Logits of the next token, (G, vocab_size), or with logits="all" after each token, (G, W, vocab_size).

        tokens, positions  (G, W) integers; a request's positions ascend by 1, and the cache holds all before them
        cache              keys and values of the window are written into it at their positions
        prefix             if the caller knows: no request holds more tokens than this before the window, so no
                           more keys are read. 0: an empty prefix, positions 0..W-1, and the cache is not read at all.

        On a GPU the host never looks at positions: one outside the cache gives meaningless logits for its own
        request and leaves the others alone. Raises ValueError for shapes that do not go together, a window
        longer than the cache, or (on a CPU) a position outside it.
        """
        _check(self, tokens, positions, cache, prefix, logits)
        window = self._window(positions, cache, prefix)
        x, stream = F.embedding(tokens.flatten(), self.embedding), None
        for layer, kv in zip(self.layers, cache.kv, strict=True):
            h, stream = self._add_norm(x, layer.attention_norm, stream)
            x = self._attention(h, layer, kv, window)
            h, stream = self._add_norm(x, layer.mlp_norm, stream)
            x = self._mlp(h, layer)
        if logits == "last":
            x, stream = (t.view(*tokens.shape, -1)[:, -1] for t in (x, stream))
        h, _ = self._add_norm(x, self.norm, stream)
        out = self.ops.linear(h, self.head)
        return out if logits == "last" else out.view(*tokens.shape, -1)

    __call__ = forward

    def _window(self, positions, cache, prefix) -> _Window:
        requests, tokens = positions.shape
        rotate = self.ops.rotary(self.rotary_table, positions, cache.capacity, self.config.heads)
        keys = cache.capacity if prefix is None else prefix + tokens
        mask = None
        if prefix != 0:
            mask = torch.arange(keys, device=self.device) <= positions[:, None, :, None]
        return _Window(requests, tokens, rotate, keys, mask)

    def _add_norm(self, x, weight, stream):
        """(normalised x + stream, the new stream); the first layer has no stream yet."""
        if stream is None:
            return self.ops.rms_norm(x, weight, eps=self.config.norm_eps), x
        return self.ops.rms_norm(x, weight, stream, eps=self.config.norm_eps)

    def _attention(self, h, layer, kv, window):
        heads = self.config.heads
        qkv = self.ops.linear(h, layer.qkv).view(window.requests, window.tokens, -1, self.config.head_dim)
        window.rotate(qkv, kv)
        seen = qkv[:, :, heads:] if window.mask is None else kv[:, : window.keys]
        q, k, v = (t.transpose(1, 2) for t in (qkv[:, :, :heads], *seen.chunk(2, dim=2)))
        y = self.ops.attention(q, k, v, attn_mask=window.mask, is_causal=window.mask is None, enable_gqa=True)
        return self.ops.linear(y.transpose(1, 2).reshape(len(h), -1), layer.output)

    def _mlp(self, h, layer):
        return self.ops.linear(self.ops.swiglu(self.ops.linear(h, layer.gate_up)), layer.down)

    def __repr__(self):
        size, dtype = f"{self.config.parameters:,} parameters", str(self.dtype).removeprefix("torch.")
        return f"<Llama {self.config.name}: {size}, {dtype} on {self.device}, {self.ops_name} ops>"


def _check(model, tokens, positions, cache, prefix, logits):
    c = model.config
    for name, tensor in (("tokens", tokens), ("positions", positions)):
        if tensor.dim() != 2 or tensor.dtype != torch.int64 or not tensor.numel():
            raise ValueError(f"{name} must be (requests, window) of int64 with at least one token, "
                             f"got {tuple(tensor.shape)} of {tensor.dtype}")
    if tokens.shape != positions.shape:
        raise ValueError(f"positions must have tokens' shape {tuple(tokens.shape)}, got {tuple(positions.shape)}")
    if tokens.device != model.device or positions.device != model.device:
        raise ValueError(f"tokens and positions must be on {model.device}, got {tokens.device}, {positions.device}")
    layers, requests, capacity, kv_heads, head_dim = cache.kv.shape
    made_for = (layers, kv_heads, head_dim, cache.kv.dtype, cache.kv.device)
    if made_for != (c.layers, 2 * c.kv_heads, c.head_dim, model.dtype, model.device):
        raise ValueError(f"the cache is not one of {c.name} in {model.dtype} on {model.device}: use model.cache(...)")
    if len(tokens) != requests:
        raise ValueError(f"the cache holds {requests} requests, got tokens of {len(tokens)}")
    window = tokens.shape[1]
    if (prefix or 0) + window > capacity:
        raise ValueError(f"a window of {window} tokens after {prefix or 0} is longer than the cache of {capacity}")
    if prefix is not None and prefix < 0:
        raise ValueError(f"prefix must be None or at least 0, got {prefix}")
    if logits not in ("last", "all"):
        raise ValueError(f"logits must be last or all, got {logits!r}")
    if model.device.type == "cpu":
        last = capacity if prefix is None else prefix + window
        if positions.min() < 0 or positions.max() >= last:
            raise ValueError(f"positions must lie in 0..{last - 1}, got {int(positions.min())}..{int(positions.max())}")
