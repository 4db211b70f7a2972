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
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import runtime
from ..op import DTYPES
from ..ops.rms_norm import rms_norm
from ..ops.rotary import fused_rotary, rotary
from ..ops.swiglu import fused_swiglu, swiglu
from .cache import KVCache, check_fits
from .config import Config, preset
from .weights import random_weights


def rotary_table(config: Config, device="cpu") -> torch.Tensor:
    """(context, head_dim) float32: each position's head_dim/2 cosines, then its sines; worked out in float64."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    if scaling := config.rope_scaling:
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_context * frequency / (2 * math.pi)
        fast = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keep the frequency, 0: divide it by the factor
        frequency = frequency * (fast + (1 - fast) / scaling.factor)
    angle = torch.arange(config.context, dtype=torch.float64, device="cpu")[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float().to(device)


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
    return Ops(rms_norm=rms_norm.triton, rotary=fused_rotary, swiglu=fused_swiglu)


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
        self.device = torch.empty(0, dtype=torch.float32, device=device or runtime.device()).device  # with its index
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
        """An empty KV cache for `requests` requests of up to `capacity` tokens each."""
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
            mask = torch.arange(keys, dtype=torch.int64, device=self.device) <= positions[:, None, :, None]
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
