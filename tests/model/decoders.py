"""Small decoders, prompts for them, and a decoder written apart: NumPy, float64, one token at a time, no cache."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from kernels.model.config import PRESETS, Config
from kernels.model.llama import Llama

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TINY = PRESETS["tiny"]
SHAPES = {"llama": TINY, "tied": dataclasses.replace(TINY, tied_embeddings=True),
          "qwen3": dataclasses.replace(TINY, qk_norm=True, head_dim=32, rope_scaling=None, rope_theta=1e6)}
# Largest error of a logit over the largest logit, of these models. Seen: 1.4e-6, 1.9e-3, 1.5e-2.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
OPS_AND_DTYPES = [(ops, dtype) for ops in ("default", "tiled", "invariant") for dtype in TOLERANCE
                  if (ops, dtype) != ("invariant", torch.float32)]
each_ops_and_dtype = pytest.mark.parametrize("ops, dtype", OPS_AND_DTYPES, ids=lambda v: str(v).removeprefix("torch."))


def relative_error(got, expected) -> float:
    got, expected = (torch.as_tensor(t).double().cpu() for t in (got, expected))
    return float((got - expected).abs().max() / expected.abs().max())


def prompt(requests: int, tokens: int, device="cpu", vocab: int = 256) -> torch.Tensor:
    """Tokens that differ everywhere."""
    at = torch.arange(tokens, device=device).expand(requests, tokens)
    request = torch.arange(requests, device=device)[:, None]
    return (at * 37 + request * 101 + at * at % 11) % vocab


def run(model: Llama, tokens: torch.Tensor, cache=None, **options) -> torch.Tensor:
    return model(tokens, cache or model.cache(*tokens.shape), **{"logits": "all", **options})


def on_meta(config, dtype=torch.bfloat16) -> Llama:
    """A model of shapes alone: a tensor on the meta device has no values to read."""
    return Llama(config, dtype=dtype, device="meta",
                 weights=lambda _, shape: torch.empty(shape, device="meta").to(dtype))


def reference_logits(model: Llama, ids: list[int]) -> np.ndarray:
    c = model.config

    def weight(tensor):
        return tensor.double().cpu().numpy()

    def norm(v, w):
        return v / math.sqrt(sum(v * v) / len(v) + c.norm_eps) * weight(w)

    def turn(v, position):
        """The rotations as complex numbers."""
        half = c.head_dim // 2
        out = np.empty_like(v)
        for j in range(half):
            z = complex(v[j], v[j + half]) * np.exp(1j * position * frequency(c, j))
            out[j], out[j + half] = z.real, z.imag
        return out

    def heads(v, count, own_norm):
        return [norm(h, own_norm) if c.qk_norm else h for h in v.reshape(count, -1)]

    stream = [weight(model.embedding)[i] for i in ids]
    for layer in model.layers:
        wq, wk, wv = np.split(weight(layer.qkv), [c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim])
        gate, up = np.split(weight(layer.gate_up), 2)
        normed = [norm(v, layer.attention_norm) for v in stream]
        keys = [[turn(k, t) for k in heads(wk @ v, c.kv_heads, layer.key_norm)] for t, v in enumerate(normed)]
        values = [(wv @ v).reshape(c.kv_heads, -1) for v in normed]
        for t, v in enumerate(normed):
            mixed = []
            for h, q in enumerate(heads(wq @ v, c.heads, layer.query_norm)):
                kv, turned = h * c.kv_heads // c.heads, turn(q, t)
                score = np.array([turned @ keys[s][kv] for s in range(t + 1)]) / math.sqrt(c.head_dim)
                share = np.exp(score - score.max())
                mixed.append(sum(p * values[s][kv] for s, p in enumerate(share / share.sum())))
            stream[t] = stream[t] + weight(layer.output) @ np.concatenate(mixed)
        for t, v in enumerate(stream):
            h = norm(v, layer.mlp_norm)
            g = gate @ h
            stream[t] = v + weight(layer.down) @ (g / (1 + np.exp(-g)) * (up @ h))
    return np.stack([weight(model.head) @ norm(v, model.norm) for v in stream])


def frequency(c: Config, j: int) -> float:
    """Llama 3.1's rule as its authors wrote it, with branches over wavelengths."""
    plain = 1.0 / c.rope_theta ** (2 * j / c.head_dim)
    if c.rope_scaling is None:
        return plain
    s, wavelength = c.rope_scaling, 2 * math.pi / plain
    if wavelength < s.original_context / s.high_frequency_factor:
        return plain
    if wavelength > s.original_context / s.low_frequency_factor:
        return plain / s.factor
    smooth = (s.original_context / wavelength - s.low_frequency_factor) / (
        s.high_frequency_factor - s.low_frequency_factor)
    return (1 - smooth) * plain / s.factor + smooth * plain
