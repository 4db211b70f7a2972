"""What attention's ops are tried on: the sequences that a shape and a token count name, and numbers for them.

    H=32,KV=8,D=128,context=4096          heads, heads of k and v, their width, keys before the queries
    H=32,KV=8,D=128,context=4096,page=64  the same keys and values in pages of 64, dealt in a shuffled order
    H=32,KV=8,D=128,context=4096,mixed    the queries of a server's step, of many sequences: MIX, again and again
"""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ... import bits
from ...op import Shape
from .sequences import Sequences, chosen_rows

SPARE = 8  # of so many pages that hold keys, one more lies among them and holds none
# (sequences, queries of each) of a step: decodes, windows to verify, a chunk of a prompt, the begin of another
MIX = ((64, 1), (4, 16), (1, 384), (1, 512))
STEP = sum(count * each for count, each in MIX)


class Queries(Sequences):
    """Sequences whose rows are their queries: neighbours that are taken together stay one sequence on the same keys.

    So of one sequence `[:100]` is a prefill of 100, `[7:8]` a decode at position 7, and rows in any order are as many
    sequences on the same keys.
    """

    def __init__(self, queries: Iterable[int], keys: Iterable[int], device=None, pages=None, page_size=None):
        queries = list(queries)
        super().__init__(queries, keys, device, pages, page_size, range(len(queries)) if pages is None else None)

    def __getitem__(self, rows) -> Sequences:
        row = chosen_rows(rows, self.tokens)
        which = np.repeat(np.arange(len(self)), self.queries)[row]
        position = row - (self.starts + self.queries - self.keys)[which]
        cuts = np.flatnonzero((np.diff(position) != 1) | (np.diff(which) != 0)) + 1
        runs = np.split(np.arange(len(row)), cuts) if len(row) else []
        of = [which[run[0]] for run in runs]
        return Sequences([len(run) for run in runs], [int(position[run[-1]]) + 1 for run in runs], self.device,
                         None if self.pages is None else [self.pages[i] for i in of], self.page_size,
                         of if self.pages is None else None)


class Whole(Sequences):
    """Sequences in pages whose rows cannot be taken, for k and v hold no row a sequence."""

    def __getitem__(self, rows) -> Sequences:
        raise TypeError("rows of a decode in pages cannot be taken: k and v hold pages, and no row a sequence")


def numbers(rows: int, heads: int, width: int, dtype, device, seed: int, step: int = 0, scale: int = 0) -> torch.Tensor:
    """Portable numbers (rows, heads, width). With a `step`, columns of sizes from 2**-4 to 2**4, which it mixes.

    Without them scores of 8-bit numbers would be exact, and so would have no order.
    """
    if torch.device(device).type == "meta":  # arithmetic there would import torch's compiler first
        return torch.empty(rows, heads, width, dtype=dtype, device=device)
    made = bits.portable(rows, heads * width, dtype, device, seed, scale).view(rows, heads, width)
    exponent = torch.arange(width, dtype=torch.int64, device=device) * step % 9 - 4 * (step > 0)
    return made * (exponent + 127 << 23).to(torch.int32).view(torch.float32).to(dtype)


def sizes(shape: str | Shape, *needed: str, known: tuple[str, ...]) -> Shape:
    """The shape, if it gives `needed` and nothing that is not `known`. ValueError that names what is wrong."""
    shape = Shape.parse(shape, *needed)
    for name, size in shape.items():
        if name not in known:
            raise ValueError(f"shape may give {', '.join(known)} here, got {name!r} in {str(shape)!r}")
        if (name == "mixed") != (size is True):
            raise ValueError(f"{name} must be given {'without' if name == 'mixed' else 'with'} a number, got "
                             f"{str(shape)!r}")
    if shape.get("page") == 0:
        raise ValueError(f"page must be at least 1 key, got {str(shape)!r}")
    return shape


def decode_inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """One query for each of `tokens` sequences, all of `context` keys."""
    shape = sizes(shape, "H", "KV", "D", "context", known=("H", "KV", "D", "context", "page"))
    count, keys = [1] * tokens, [shape["context"]] * tokens
    pages = _pages(keys, shape.get("page"))
    sequences = Whole(count, keys, device, *pages) if pages else Sequences(count, keys, device)
    return _numbers_for(sequences, shape["context"], shape, dtype, seed)


def query_inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """`tokens` queries of one sequence, behind a context if the shape has one, or of a step's sequences if it says
    `mixed`; row i does not depend on `tokens`.
    """
    needed = ("H", "KV", "D", "context") if "mixed" in Shape.parse(shape) else ("H", "KV", "D")
    shape = sizes(shape, *needed, known=("H", "KV", "D", "context", "page", "mixed"))
    dealt = _dealt(tokens, shape)
    queries, keys = [n for n, _ in dealt], [n + before for n, before in dealt]
    capacity = max(map(sum, _dealt(STEP, shape))) if "mixed" in shape else keys[0]
    return _numbers_for(Queries(queries, keys, device, *_pages(keys, shape.get("page"))), capacity, shape, dtype, seed)


def keys_and_pairs(tokens: int, shape: Shape) -> tuple[int, int]:
    """How many keys `query_inputs` has, and how many pairs of a query and a key that it sees."""
    steps, rest = divmod(tokens, STEP) if "mixed" in shape else (0, tokens)

    def total(count):
        dealt = _dealt(count, shape)
        return sum(n + before for n, before in dealt), sum(n * before + n * (n + 1) // 2 for n, before in dealt)
    return tuple(steps * of_step + more for of_step, more in zip(total(STEP), total(rest), strict=True))


def _dealt(tokens: int, shape: Shape) -> list[tuple[int, int]]:
    """(queries, keys before them) of each sequence; of a step's last one, as many as are left.

    A step's sequences of a kind lie behind a quarter, a half, three quarters and all of the context, neighbours alike;
    what begins a prompt lies behind none.
    """
    context = shape.get("context", 0)
    if "mixed" not in shape:
        return [(tokens, context)]
    step = [(each, context * (4 * i // count + 1) // 4) for count, each in MIX[:2] for i in range(count)]
    step += [(MIX[2][1], context), (MIX[3][1], 0)]
    found, left = step * (tokens // STEP), tokens % STEP
    for each, before in step:
        if left > 0:
            found.append((min(each, left), before))
        left -= each
    return found


def _pages(keys: list[int], size: int | None) -> tuple:
    """(each sequence's pages, keys a page), the pages in a shuffled order with spare ones among them; () without a
    size. The order follows from the lengths alone, so that sets of inputs share their tables.
    """
    if not size:
        return ()
    needed = -(-np.array(keys, dtype=np.int64) // size)
    order = np.random.default_rng(len(keys)).permutation(_page_count(needed))
    return np.split(order, np.cumsum(needed))[:-1], size


def _page_count(needed: np.ndarray) -> int:
    return int(needed.sum()) + int(needed.sum()) // SPARE + 1


def _numbers_for(sequences: Sequences, capacity: int, shape: Shape, dtype, seed: int) -> tuple:
    """(q, k, v, sequences): row j of sequence i is made as number i * capacity + j, wherever it lies."""
    device, width = sequences.device, shape["D"]
    q = numbers(sequences.tokens, shape["H"], width, dtype, device, seed, 7, -1)
    k, v = (_cached(numbers(len(sequences) * capacity, shape["KV"], width, dtype, device, seed + i, step), sequences,
                    capacity) for i, step in ((1, 5), (2, 0)))
    return q, k, v, sequences


def _cached(rows: torch.Tensor, sequences: Sequences, capacity: int) -> torch.Tensor:
    """Keys or values (B * capacity, Hkv, D) as (B, capacity, Hkv, D), or in pages, 0 where no key lies."""
    if sequences.pages is None:
        return rows.unflatten(0, (len(sequences), capacity))
    size = sequences.page_size
    count = _page_count(np.array([len(p) for p in sequences.pages], dtype=np.int64))
    cache = torch.zeros(count * size, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    if rows.device.type != "meta":
        for i, (pages, keys) in enumerate(zip(sequences.pages, sequences.keys.tolist(), strict=True)):
            first = torch.from_numpy(pages * size)[:, None]
            place = (first + torch.arange(size, dtype=torch.int64, device="cpu")).flatten()[:keys]
            cache[place.to(rows.device)] = rows[i * capacity : i * capacity + keys]
    return cache.unflatten(0, (count, size))
