"""A model that this suite did not write, for notebook 06b and for trying things: transformers' or plain PyTorch's."""
from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ... import runtime
from ...bits import hashed, portable

VOCABULARY, WIDTH, HEADS = 256, 64, 4


def has_transformers() -> bool:
    """Whether transformers can be imported here."""
    return importlib.util.find_spec("transformers") is not None


def example_model(folder: str = "") -> nn.Module:
    """The model in a Hugging Face folder, or a small one with random weights: a Llama, or plain PyTorch's decoder.

    Raises RuntimeError for a folder without transformers; what transformers says of a folder it cannot load.
    """
    if not has_transformers():
        if folder:
            raise RuntimeError(f"{folder} needs transformers, which is not installed here: pip install -e '.[test]'")
        return _drawn(Plain())
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder:
        return AutoModelForCausalLM.from_pretrained(folder).to(runtime.device()).eval()
    return _drawn(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, use_cache=False)))


@torch.no_grad()
def _drawn(model: nn.Module) -> nn.Module:
    """Portable weights, so that every machine has the same model."""
    for i, parameter in enumerate(model.parameters()):
        if parameter.dim() > 1:
            parameter.copy_(portable(len(parameter), parameter.shape[1], seed=i) * 0.25)
    return model.to(runtime.device()).eval()


class Plain(nn.Module):
    """A decoder as many are written: nn.Linear, nn.LayerNorm, scaled_dot_product_attention, no thought of batches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(PlainLayer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, attention_mask, position_ids):
        x = self.embed(input_ids) + self.places(position_ids)
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer in self.layers:
            x = layer(x, causal & attention_mask[:, None, None, :].bool())
        return SimpleNamespace(logits=self.head(x))


class PlainLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def example_prompts(lengths=(6, 1, 4), below: int = VOCABULARY) -> list[torch.Tensor]:
    """Tokens below a number, a prompt of each length."""
    return [(hashed(torch.arange(n, dtype=torch.int64, device="cpu"), i) % below).to(runtime.device())
            for i, n in enumerate(lengths)]


def padded(prompts: list[torch.Tensor], left: bool = False, length: int = 0) -> dict[str, torch.Tensor]:
    """A model's arguments by name: the prompts side by side, padded on the right or the left, and their positions.

    length  to pad to, at least the longest prompt's, which is the default
    """
    length, device = max(length, *map(len, prompts)), prompts[0].device
    ids, mask = (torch.zeros(len(prompts), length, dtype=torch.int64, device=device) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, own(prompt, length, left)] = prompt
        mask[row, own(prompt, length, left)] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def own(prompt: torch.Tensor, length: int, left: bool = False) -> slice:
    """Where a prompt's tokens are in a row of this length."""
    return slice(length - len(prompt), length) if left else slice(0, len(prompt))


def logits(model: nn.Module, prompts: list[torch.Tensor], left: bool = False) -> list[torch.Tensor]:
    """Each prompt's logits (tokens, vocabulary), all of them in one padded batch."""
    with torch.no_grad():
        given = padded(prompts, left)
        found = model(**given).logits
    return [found[row, own(prompt, found.shape[1], left)] for row, prompt in enumerate(prompts)]


class Planted(nn.Module):
    """Four layers for exercises, one of which looks at its neighbours in the batch."""

    def __init__(self):
        super().__init__()
        self.widen, self.norm, self.gate, self.narrow = (nn.Linear(8, 16), _Centred(), nn.ReLU(), _Shared(16, 4))

    def forward(self, x):
        return self.narrow(self.gate(self.norm(self.widen(x))))


class _Centred(nn.Module):
    """Less the mean of each row."""

    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


class _Shared(nn.Linear):
    """A product of rows scaled by the largest number of the whole batch, as quantised layers do."""

    def forward(self, x):
        largest = x.abs().amax()
        return super().forward(x / largest) * largest
