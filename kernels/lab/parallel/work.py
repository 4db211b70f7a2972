"""What ranks do for notebook 08, its tests and its figure: products, texts, batches, and a library's order probed.

Each function gets its Ranks first; `Processes.run` sends it by name, torchrun's ranks call it themselves.
"""
from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from ... import bits
from ...model import parallel, steps
from ...model.config import Config
from ...model.parallel import Ranks, Sharded
from ...ops.all_reduce import all_reduce
from ...ops.matmul.op import matmul
from ...ops.matmul.order import shared_order
from ...ops.matmul.shared import share, shared_part
from ..proofs.model_forms import FOLDER

BIG = 2.0**30  # swallows a one that is added to it
PRODUCT = "N=64,K=512,gpus=8"
# as small as eight ranks can share: heads of 64 and an MLP of 512, so that leaves end where shares do
POCKET = Config("pocket", vocab_size=64, hidden_size=64, intermediate_size=512, layers=1, heads=8, kv_heads=2,
                head_dim=64, context=256, shared=8)


def product(ranks: Ranks, ops: str, tokens: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One product whose k is cut over the ranks, added by the library or in the order: (tokens, N), on every rank."""
    x, weight, _, order = matmul.inputs(tokens, PRODUCT, dtype)
    mine = share(order, weight.shape[1], ranks.size, ranks.rank)
    if ops == "default":
        return all_reduce.cuda(F.linear(x[:, mine], weight[:, mine]), None, None, ranks.group)
    return all_reduce.python(shared_part(x[:, mine], weight[:, mine], order, ranks.size), None, dtype, ranks.group)


def merged(ranks: Ranks, ops: str, elements: int) -> torch.Tensor | None:
    """(ranks, ranks, elements): at the place of two ranks, how many parts are in the smallest sum that holds both.

    Rank i holds a big number, rank j its negative, all others one. What is added before these two meet is swallowed,
    so the result counts the ones that come later. None on all ranks but the first.

    Method: Xie et al., FPRev, arXiv 2411.00442.
    """
    sizes = torch.ones(ranks.size, ranks.size, elements, dtype=torch.int64, device="cpu")
    for i in range(ranks.size):
        for j in range(i + 1, ranks.size):
            held = BIG if ranks.rank == i else -BIG if ranks.rank == j else 1.0
            part = torch.full((1, elements), held, dtype=torch.float32, device=ranks.device)
            call = all_reduce.cuda if ops == "default" else all_reduce.python
            later = call(part, None, torch.float32, ranks.group)[0]
            sizes[i, j] = sizes[j, i] = ranks.size - later.long().cpu()
    return sizes if ranks.first else None


def text(ranks: Ranks, ops: str, prompt: bytes, count: int) -> tuple[str, bytes]:
    """The byte model over these ranks: (digest of the prompt's logits, the `count` likeliest bytes behind it)."""
    model = byte_model(ranks).using(ops)
    digest = bits.digest(steps.logits(model, prompt))
    return digest, bytes(steps.greedy(model, prompt, count)) if count else b""


def batches(ranks: Ranks, seeds: list[int], ops: str = "invariant") -> list[str]:
    """The digest of the logits of one random batch for each seed: requests of random lengths on random prefixes."""
    model = pocket_model(ranks).using(ops)
    return [bits.digest(batch_logits(model, seed)) for seed in seeds]


def batch_logits(model, seed: int) -> torch.Tensor:
    """Logits after every token of a batch that the seed decides: 1 to 4 requests, decodes and chunks, on prefixes."""
    draw = torch.Generator(device="cpu").manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=draw, dtype=torch.int64, device="cpu"))

    requests = number(1, 4)
    held, new = [number(0, 9) for _ in range(requests)], [number(1, 1 + 5 * number(0, 1)) for _ in range(requests)]
    cache = model.cache(requests, 16)
    if any(held):
        rows = [row for row in range(requests) if held[row]]
        counts = [held[row] for row in rows]
        model.forward(_drawn(draw, sum(counts), model), cache.batch(counts, [0] * len(rows), rows), cache)
    return model.forward(_drawn(draw, sum(new), model), cache.batch(new, held), cache, logits="all")


def _drawn(draw, count, model) -> torch.Tensor:
    tokens = torch.randint(0, model.config.vocab_size, (count,), generator=draw, dtype=torch.int64, device="cpu")
    return tokens.to(model.device)


@cache
def byte_model(ranks: Ranks) -> Sharded:
    """This rank's piece of the byte model, loaded once."""
    return parallel.load(FOLDER, ranks)


@cache
def pocket_model(ranks: Ranks, seed: int = 0) -> Sharded:
    """This rank's piece of the smallest model that eight ranks share, with random weights."""
    return Sharded(POCKET, ranks, seed=seed)


def tree_of(sizes: torch.Tensor, element: int = 0) -> str:
    """`merged` of one element as the sum it was: '((0+1)+2)+3'; parts that meet at once, '(0+1+2)'."""
    return _tree(sizes[:, :, element].tolist(), list(range(len(sizes))))[1:-1] if len(sizes) > 1 else "0"


def _tree(sizes, parts: list[int]) -> str:
    if len(parts) == 1:
        return str(parts[0])
    children: list[list[int]] = []
    for part in parts:  # two parts are in one child if they meet before the whole does
        child = next((c for c in children if sizes[c[0]][part] < len(parts)), None)
        if child is None:
            children.append([part])
        else:
            child.append(part)
    return "(" + "+".join(_tree(sizes, child) for child in children) + ")"


def leaves_of(n: int, k: int, size: int) -> list[range]:
    """Which of the eight leaves each of `size` ranks has."""
    each = shared_order(n, k).segments // size
    return [range(rank * each, (rank + 1) * each) for rank in range(size)]
