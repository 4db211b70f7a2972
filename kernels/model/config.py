"""The sizes of a decoder, and those of published models. `hf_config` reads and writes them as config.json."""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

SHARED = (1, 8)


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
    """The sizes of a decoder. Raises ValueError that names the field for sizes that none can have.

    qk_norm  each head of queries and keys goes through an RMSNorm of its own before it is turned, as in Qwen3
    shared   the most GPUs that may ever share the model, 1 or 8. It decides the order of the products whose k is cut
             over GPUs (attention's output, the MLP's down), and so the bits on any number of GPUs
    """

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
    qk_norm: bool = False
    shared: int = 1

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim",
                      "context"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        if self.head_dim < 8 or self.head_dim & (self.head_dim - 1):
            raise ValueError(f"head_dim must be a power of two of at least 8, got {self.head_dim}")
        for field, least in (("rope_theta", 1.0), ("norm_eps", 0.0)):
            if not least < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be a number above {least:g}, got {getattr(self, field)!r}")
        self._check_shared()

    def _check_shared(self):
        if self.shared not in SHARED or type(self.shared) is not int:
            raise ValueError(f"shared must be 1 or 8, the most GPUs that may share the model, got {self.shared!r}")
        for field in ("heads", "intermediate_size"):
            if getattr(self, field) % self.shared:
                raise ValueError(f"{field} must be a multiple of shared = {self.shared}, got {getattr(self, field)}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Config:
        """The sizes in a Hugging Face folder's config.json, of a LlamaForCausalLM or a Qwen3ForCausalLM.

        Raises FileNotFoundError, or ValueError that names the file and the field for what is damaged or not
        implemented.
        """
        from .hf_config import read

        return read(Path(folder))

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """One layer's weights: name -> shape. Matrices are (out, in); qkv and gate_up are two or three in one."""
        d, q, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attention_norm": (d,), "qkv": (q + 2 * kv, d), "output": (d, q),
            "mlp_norm": (d,), "gate_up": (2 * self.intermediate_size, d), "down": (d, self.intermediate_size)}
        return shapes | ({"query_norm": (self.head_dim,), "key_norm": (self.head_dim,)} if self.qk_norm else {})

    @property
    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights outside the layers: name -> shape. Tied embeddings are the head too."""
        table = (self.vocab_size, self.hidden_size)
        return {"embedding": table, "norm": table[1:]} | ({} if self.tied_embeddings else {"head": table})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model: name -> shape; '3.qkv' is layer 3's."""
        layers = {f"{i}.{name}": shape for i in range(self.layers) for name, shape in self.layer_shapes.items()}
        return layers | self.outer_shapes

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, as published counts have it (tied embeddings once)."""
        return sum(map(math.prod, self.shapes.values()))


_QWEN3 = {"vocab_size": 151936, "kv_heads": 8, "head_dim": 128, "context": 40960, "rope_theta": 1000000.0,
          "rope_scaling": None, "norm_eps": 1e-6, "qk_norm": True}
PRESETS = {config.name: config for config in (
    Config("llama-3.1-8b", vocab_size=128256, hidden_size=4096, intermediate_size=14336, layers=32, heads=32,
           kv_heads=8, head_dim=128),
    Config("llama-3.2-1b", vocab_size=128256, hidden_size=2048, intermediate_size=8192, layers=16, heads=32,
           kv_heads=8, head_dim=64, tied_embeddings=True, rope_scaling=RopeScaling(factor=32.0)),
    Config("qwen3-0.6b", hidden_size=1024, intermediate_size=3072, layers=28, heads=16, tied_embeddings=True, **_QWEN3),
    Config("qwen3-8b", hidden_size=4096, intermediate_size=12288, layers=36, heads=32, **_QWEN3),
    Config("byte", vocab_size=256, hidden_size=256, intermediate_size=1024, layers=3, heads=8, kv_heads=2, head_dim=64,
           context=1024, rope_theta=10000.0, rope_scaling=None),
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
