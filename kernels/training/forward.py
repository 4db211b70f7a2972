"""A forward over whole sequences that autograd can go back through: the model's own ops, and the model's own bits."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from ..model.config import Config
from ..ops.matmul.order import shared_order
from .functions import Attend, CrossEntropy, Embed, Linear, Norm, SwiGLU
from .places import Places

Weights = Mapping[str, torch.Tensor]


def check_trainable(config: Config) -> None:
    """Raise ValueError that names the field for a model that this forward does not have."""
    for field in ("tied_embeddings", "qk_norm"):
        if getattr(config, field):
            raise ValueError(f"{field} must be False for a model that is trained here, and {config.name} has it")


def logits(weights: Weights, config: Config, tokens: torch.Tensor, places: Places, how: str) -> torch.Tensor:
    """(B, W) int64 -> (B * W, vocab_size) bfloat16: after each token, the logits of the next.

    weights  name -> bfloat16 tensor, the names and shapes of `config.shapes`
    how      'python' or 'triton': same bits, and those of Llama's 'invariant' ops
    """
    x, stream = Embed.apply(tokens.flatten(), weights["embedding"], how), None
    for i in range(config.layers):
        own = {name: weights[f"{i}.{name}"] for name in config.layer_shapes}
        h, stream = Norm.apply(x, own["attention_norm"], stream, config.norm_eps, how)
        y = Attend.apply(Linear.apply(h, own["qkv"], None, how), config.heads, config.kv_heads, places, how)
        x = _shared(y, own["output"], config, how)
        h, stream = Norm.apply(x, own["mlp_norm"], stream, config.norm_eps, how)
        x = _shared(SwiGLU.apply(Linear.apply(h, own["gate_up"], None, how), how), own["down"], config, how)
    h, _ = Norm.apply(x, weights["norm"], stream, config.norm_eps, how)
    return Linear.apply(h, weights["head"], None, how)


def loss(weights: Weights, config: Config, window: torch.Tensor, places: Places, how: str) -> torch.Tensor:
    """(B, W + 1) int64 -> () float32: the mean of -log p(next token), in natural units, over B * W tokens."""
    found = logits(weights, config, window[:, :-1], places, how)
    return CrossEntropy.apply(found, window[:, 1:].flatten(), how)


def _shared(x, weight, config, how):
    """A product whose k several GPUs may share."""
    return Linear.apply(x, weight, shared_order(*weight.shape, config.shared), how)
