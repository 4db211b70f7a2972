"""A decoder of Llama's or Qwen3's shape: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One forward takes a batch: any number of new tokens of any number of requests, so prompts, chunks of them, single
tokens and a verifier's windows alike, mixed as they come. With `invariant` ops a token's logits depend on its request
alone: on the tokens up to it, and on no neighbour, no chunk's border and no GPU.

A batch is said on the host, and nothing on the device is read back, so a forward can be captured as a CUDA graph.

Weights are random, from a seed, with the same bits on every machine; `folder.load` reads real ones.

Sources: Touvron et al., arXiv 2302.13971; Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783;
Qwen Team, Qwen3 Technical Report, arXiv 2505.09388.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import runtime
from ..op import DTYPES, dtype_name
from ..ops.matmul.order import shared_order
from .batch import Batch
from .cache import KVCache, check_fits
from .config import Config, preset
from .ops import choose
from .rotary_table import rotary_table
from .weights import Weights, random_weights


@dataclass(frozen=True)
class Layer:
    """One layer's weights; shapes in Config.layer_shapes. The last two are Qwen3's."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


class Llama:
    """A decoder with its weights on one device.

    config   a Config or the name of a preset
    ops      'default', 'invariant' or 'tiled' (ops.py says what they are); `using` gives others over the same weights
    dtype    default: bfloat16 on a GPU and with invariant ops, else float32
    weights  (name, shape) -> tensor; default: random_weights(seed, dtype, device), one tensor at a time

    Raises ValueError for an unknown preset or ops, TypeError for a dtype it cannot be, MemoryError, before
    anything is allocated, for weights larger than the memory that is free.
    """

    def __init__(self, config: Config | str, *, ops: str = "default", dtype: torch.dtype | None = None, device=None,
                 seed: int = 0, weights: Weights | None = None):
        self.config = config = preset(config) if isinstance(config, str) else config
        self.device = torch.empty(0, dtype=torch.float32, device=device or runtime.device()).device  # with its index
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" or ops == "invariant" else torch.float32)
        if self.dtype not in DTYPES.values():
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        self.ops_name, self.ops = ops, choose(ops, self.device, self.dtype)
        self.orders = _shared_orders(config)
        check_fits(f"{config.name} in {dtype_name(self.dtype)}", self.nbytes, self.device)
        weights = weights or random_weights(seed, self.dtype, self.device)
        outer = {name: weights(name, shape) for name, shape in config.outer_shapes.items()}
        self.embedding, self.norm = outer["embedding"], outer["norm"]
        self.head = outer.get("head", self.embedding)
        self.layers = [Layer(**{name: weights(f"{i}.{name}", shape) for name, shape in config.layer_shapes.items()})
                       for i in range(config.layers)]
        self.rotary_table = rotary_table(config, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.config.parameters * self.dtype.itemsize

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight under its name in Config.shapes; not copied."""
        layers = {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(self.layers)
                  for name in self.config.layer_shapes}
        return layers | {name: getattr(self, name) for name in self.config.outer_shapes}

    def using(self, ops: str) -> Llama:
        """The same weights, not copied, under other ops."""
        other = copy.copy(self)
        other.ops_name, other.ops = ops, choose(ops, self.device, self.dtype)
        return other

    def cache(self, requests: int, capacity: int) -> KVCache:
        """An empty KV cache for `requests` requests of up to `capacity` tokens each."""
        return KVCache(self.config, requests, capacity, self.dtype, self.device)

    def __call__(self, tokens: torch.Tensor, cache: KVCache, *, prefix: int | Sequence[int] = 0,
                 logits: str = "last") -> torch.Tensor:
        """`forward` over a window of W tokens for each of the cache's G requests.

        tokens  (G, W) int64 on the model's device
        prefix  how many tokens each request holds before them: one number for all, or G

        Returns (G, vocab_size), or with logits="all" (G, W, vocab_size). Raises as `forward` and `KVCache.batch` do.
        """
        _check_window(tokens, cache)
        requests, window = tokens.shape
        prefixes = [prefix] * requests if isinstance(prefix, int) else prefix
        out = self.forward(tokens.flatten(), cache.batch([window] * requests, prefixes), cache, logits=logits)
        return out if logits == "last" else out.view(requests, window, -1)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, batch: Batch, cache: KVCache, *, logits: str = "last",
                streams: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits after each request's last token, (R, vocab_size), or with logits="all" after each, (T, vocab_size).

        tokens   (T,) int64 on the device, the requests' new tokens one after another, each from 0 to vocab_size - 1;
                 on a GPU nobody looks (`steps.encode` does, on the host)
        batch    of this cache: which requests they are
        cache    holds all before them; their keys and values are written into it
        streams  a list to which the residual stream (T, hidden_size) is appended: of the embedding, and after each
                 layer. With logits="last" that after the last layer has R rows

        Raises ValueError for shapes that do not go together, a cache of another model, or (on a CPU) tokens that the
        vocabulary has not.
        """
        _check(self, tokens, batch, cache, logits)
        attend = self.ops.attention(batch.sequences)
        x, stream = F.embedding(tokens, self.embedding), None
        for layer, kv in zip(self.layers, cache.kv, strict=True):
            h, stream = self._add_norm(x, layer.attention_norm, stream)
            _keep(streams, stream)
            x = self._attention(h, layer, kv, batch, attend)
            h, stream = self._add_norm(x, layer.mlp_norm, stream)
            x = self._mlp(h, layer)
        if logits == "last":
            x, stream = x[batch.last], stream[batch.last]
        h, stream = self._add_norm(x, self.norm, stream)
        _keep(streams, stream)
        return self.ops.linear(h, self.head, None)

    def _add_norm(self, x, weight, stream):
        """(normalised x + stream, the new stream); the first layer has no stream yet."""
        if stream is None:
            return self.ops.rms_norm(x, weight, eps=self.config.norm_eps), x
        return self.ops.rms_norm(x, weight, stream, eps=self.config.norm_eps)

    def _attention(self, h, layer, kv, batch, attend):
        heads, keys = self.config.heads, self.config.kv_heads
        qkv = self.ops.linear(h, layer.qkv, None).view(len(h), heads + 2 * keys, -1)
        if self.config.qk_norm:
            for part, weight in ((qkv[:, :heads], layer.query_norm), (qkv[:, heads : heads + keys], layer.key_norm)):
                part.copy_(self._add_norm(part, weight, None)[0])
        self.ops.rotary(qkv, self.rotary_table, batch.positions, batch.slots, kv.flatten(0, 1), heads)
        y = attend(qkv[:, :heads], *kv.chunk(2, dim=2))
        return self.ops.linear(y.flatten(1), layer.output, self.orders["output"])

    def _mlp(self, h, layer):
        return self.ops.linear(self.ops.swiglu(self.ops.linear(h, layer.gate_up, None)), layer.down,
                               self.orders["down"])

    def __repr__(self):
        size = f"{self.config.parameters:,} parameters"
        return f"<Llama {self.config.name}: {size}, {dtype_name(self.dtype)} on {self.device}, {self.ops_name} ops>"


def _shared_orders(config: Config) -> dict[str, Sequence[int] | None]:
    """The order of the products whose k is cut over GPUs; None where the model is never shared: the op's own choice."""
    parts = ("output", "down")
    if config.shared == 1:
        return dict.fromkeys(parts)
    return {part: shared_order(*config.layer_shapes[part], gpus=config.shared) for part in parts}


def _keep(streams: list | None, stream) -> None:
    if streams is not None:
        streams.append(stream)


def _check_window(tokens, cache) -> None:
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens must be (requests, window) with at least one token, got {tuple(tokens.shape)}")
    if len(tokens) != cache.requests:
        raise ValueError(f"the cache holds {cache.requests} requests, got tokens of {len(tokens)}")
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a graph has to hold its batch: make it with cache.batch(...) and capture forward(...)")


def _check(model: Llama, tokens, batch: Batch, cache: KVCache, logits: str) -> None:
    c = model.config
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or tokens.device != model.device:
        raise ValueError(f"tokens must be (T,) of int64 on {model.device}, got {tuple(tokens.shape)} of {tokens.dtype} "
                         f"on {tokens.device}")
    if len(tokens) != batch.tokens:
        raise ValueError(f"tokens must be the batch's {batch.tokens}, got {len(tokens)}")
    layers, requests, capacity, kv_heads, head_dim = cache.kv.shape
    made_for = (layers, kv_heads, head_dim, cache.kv.dtype, cache.kv.device)
    if made_for != (c.layers, 2 * c.kv_heads, c.head_dim, model.dtype, model.device):
        raise ValueError(f"the cache is not one of {c.name} in {model.dtype} on {model.device}: use model.cache(...)")
    if batch.sequences.device != model.device or batch.room != (requests, capacity):
        raise ValueError(f"the batch is not one of this cache of {requests} x {capacity} tokens: use cache.batch(...)")
    if logits not in ("last", "all"):
        raise ValueError(f"logits must be last or all, got {logits!r}")
    if model.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < c.vocab_size:
        raise ValueError(f"tokens must lie in 0..{c.vocab_size - 1}, the vocabulary of {c.name}, got "
                         f"{int(tokens.min())}..{int(tokens.max())}")
