"""Weights for a model: random ones with the same bits on every machine, or those of a transformers model."""
from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import torch

from .. import bits
from .config import Config

Weights = Callable[[str, tuple[int, ...]], torch.Tensor]


def random_weights(seed: int, dtype: torch.dtype, device) -> Weights:
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
    "query_norm": ["model.layers.{}.self_attn.q_norm"], "key_norm": ["model.layers.{}.self_attn.k_norm"],
    "output": ["model.layers.{}.self_attn.o_proj"],
    "mlp_norm": ["model.layers.{}.post_attention_layernorm"],
    "gate_up": [f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up")],
    "down": ["model.layers.{}.mlp.down_proj"],
}


def in_transformers(name: str) -> list[str]:
    """The tensors that a weight ('3.qkv') is made of in transformers, in the order of its rows."""
    layer, _, part = name.rpartition(".")
    return [f"{piece.format(layer)}.weight" for piece in _IN_TRANSFORMERS[part]]


def pieces(config: Config, name: str) -> list[tuple[str, int]]:
    """Those tensors, each with how many of the weight's rows it has."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"qkv": [q, kv, kv], "gate_up": [config.intermediate_size] * 2}
    part = name.rpartition(".")[2]
    whole = [(config.layer_shapes | config.outer_shapes)[part][0]]
    return list(zip(in_transformers(name), rows.get(part, whole), strict=True))


def transformers_weights(state: Mapping[str, torch.Tensor], dtype: torch.dtype, device) -> Weights:
    """(name, shape) -> a weight out of the state dict of transformers' LlamaForCausalLM or Qwen3ForCausalLM."""
    def weight(name, shape):
        return torch.cat([state[piece] for piece in in_transformers(name)]).to(device, dtype)
    return weight
