"""Small models of transformers with random weights, and batches of them padded on either side."""
from __future__ import annotations

from functools import cache

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels import runtime

DEVICE = runtime.device()
VOCABULARY = 64
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2}


@cache
def model(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> torch.nn.Module:
    """'llama', 'qwen3' or 'gpt2', with attention by PyTorch's op or ('eager') of products and a softmax."""
    torch.manual_seed(0)
    if name == "llama":
        made = LlamaForCausalLM(LlamaConfig(**_SIZES))
    elif name == "qwen3":
        made = Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=8))
    else:
        made = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                                          bos_token_id=0, eos_token_id=0))
    made.set_attn_implementation(attention)
    return made.to(DEVICE, dtype).eval()


def prompts(lengths, seed: int = 0) -> list[torch.Tensor]:
    """Random tokens, a prompt of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).to(DEVICE) for n in lengths]


def batch(given: list[torch.Tensor], left: bool) -> dict[str, torch.Tensor]:
    """The prompts side by side, padded on one side to the longest, with their positions."""
    length = max(map(len, given))
    ids, mask = (torch.zeros(len(given), length, dtype=torch.int64, device=DEVICE) for _ in range(2))
    for i, prompt in enumerate(given):
        own = where(prompt, length, left)
        ids[i, own], mask[i, own] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def where(prompt, length: int, left: bool) -> slice:
    return slice(length - len(prompt), length) if left else slice(0, len(prompt))
