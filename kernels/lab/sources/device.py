"""What moves bits inside one call on one device; notebook 02 runs each of these in front of the reader.

Plain functions that return results and print nothing. `group` sorts results by their bits.
"""
from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ... import bits, runtime
from ...arithmetic import elementary, sums
from ...arithmetic.sums import tree
from ...runtime import tl, triton

BLOCK = 1024
PRECISIONS = ("highest", "high", "medium")


def group(results: Mapping[Hashable, torch.Tensor]) -> list[list]:
    """The labels of results, those with the same bits together: [[1], [2, 4, 8]] is two different answers."""
    found: dict[str, list] = {}
    for label, result in results.items():
        found.setdefault(bits.digest(result), []).append(label)
    return list(found.values())


def digests(function: Callable, runs: int = 20) -> set[str]:
    """The digests of `runs` calls of a function without arguments; more than one says that bits move run to run."""
    return {bits.digest(function()) for _ in range(runs)}


# Atomic additions.

@triton.jit
def block_sums_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """Each program adds its block; then all add into one cell as they arrive, or each fills a cell of its own."""
    block = tl.program_id(0)
    x = tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK)[None, :])
    part = tl.sum(tree(x), axis=1)  # tree has left one column, and a sum of one has no order
    if ATOMIC:
        tl.atomic_add(out_ptr + tl.arange(0, 1), part)
    else:
        tl.store(out_ptr + block + tl.arange(0, 1), part)


def block_sums(x: torch.Tensor) -> torch.Tensor:
    """x (n,) float32, n a multiple of 1024 -> (n / 1024,): the sum of each block.

    By the kernel above without atomics; where Triton cannot run, by the same order in PyTorch. TypeError or
    ValueError for another x.
    """
    blocks = _blocks(x)
    if runtime.WHY_NOT:
        return sums.add_neighbours(x.view(blocks, BLOCK))[:, 0]
    parts = torch.empty(blocks, dtype=torch.float32, device=x.device)
    block_sums_kernel[(blocks,)](x, parts, BLOCK, False, enable_fp_fusion=False)
    return parts


def atomic_sum(x: torch.Tensor) -> torch.Tensor:
    """x (n,) float32, n a multiple of 1024 -> (1,): the blocks' sums added with atomics, in the order of arrival.

    Triton's interpreter runs one program after another, so there they always arrive in one order.
    Raises runtime.Unavailable where Triton cannot run, TypeError or ValueError for another x.
    """
    blocks = _blocks(x)
    runtime.require_triton("atomic_sum")
    total = torch.zeros(1, dtype=torch.float32, device=x.device)
    block_sums_kernel[(blocks,)](x, total, BLOCK, True, enable_fp_fusion=False)
    return total


def _blocks(x: torch.Tensor) -> int:
    _float32(x)
    if x.dim() != 1 or not x.numel() or x.numel() % BLOCK:
        raise ValueError(f"x must have one dimension, a multiple of {BLOCK} long, got shape {tuple(x.shape)}")
    return x.numel() // BLOCK


def _float32(x) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x must be a float32 tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def sum_on_arrival(parts: torch.Tensor, seed: int) -> torch.Tensor:
    """parts (n,) -> (1,): added one by one in an order that `seed` decides, as a race between blocks would."""
    order = torch.argsort(bits.portable(1, parts.numel(), seed=seed)[0], stable=True)
    total = torch.zeros(1, dtype=torch.float32, device="cpu")
    for part in parts.cpu()[order]:
        total = total + part
    return total


# Products and attention with an order of their own, and products whose sum is split.

def ordered_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (rows, K), w (K, N) float32 -> (rows, N): sums over k in the order of arithmetic/sums.py. Small sizes only."""
    return torch.cat([sums.ordered_sum(row[None, :] * w.t())[None, :, 0] for row in x])


def ordered_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (queries, D), k and v (keys, D) float32 -> (queries, D): every sum in the order of arithmetic/sums.py.

    The exponential is arithmetic/elementary.py's, the same for every element wherever it stands. Small sizes only.
    """
    scores = ordered_product(q, k.t()) * (1 / math.sqrt(q.shape[-1]))
    weights = elementary.exp(scores - scores.amax(-1, keepdim=True))
    return ordered_product(weights, v) / sums.ordered_sum(weights)


def split_product(x: torch.Tensor, w: torch.Tensor, parts: int, keep: torch.dtype = torch.float32) -> torch.Tensor:
    """x (rows, K), w (K, N) -> (rows, N): k is cut into `parts`, and the parts' results are added in sequence.

    This is split-K by hand. `keep` is the type in which a part's result waits to be added.
    """
    pieces = [ordered_product(a, b).to(keep) for a, b in zip(x.chunk(parts, 1), w.chunk(parts, 0), strict=True)]
    total = pieces[0]
    for piece in pieces[1:]:
        total = (total.float() + piece.float()).to(keep)
    return total


# Fewer bits than asked for.

def tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 -> float32 that TF32 can hold: 10 stored bits of significand instead of 23, to nearest, ties to even."""
    _float32(x)
    i = x.contiguous().view(torch.int32)
    rounded = (i + 0x0FFF + ((i >> 13) & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


@contextmanager
def _quiet():
    """Silence PyTorch's warnings about its switches and TF32, which would appear in the reader's notebook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def float32_precision(name: str):
    """torch.set_float32_matmul_precision inside a with-block: 'highest', 'high' (TF32 on a GPU) or 'medium'.

    ValueError for another name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"name must be one of {', '.join(PRECISIONS)}, got {name!r}")
    with _quiet():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def bfloat16_partial_sums(allowed: bool):
    """Whether cuBLAS may keep a split product's parts in bfloat16, inside a with-block. A CPU has no such switch."""
    switches = torch.backends.cuda.matmul
    before = switches.allow_bf16_reduced_precision_reduction
    switches.allow_bf16_reduced_precision_reduction = allowed
    try:
        yield
    finally:
        switches.allow_bf16_reduced_precision_reduction = before


# The choice of a kernel.

def convolutions(images: torch.Tensor, filters: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same convolution by each library PyTorch has here: cuDNN or oneDNN, and PyTorch's own."""
    call = torch.nn.functional.conv2d
    if images.is_cuda:
        name, flags = "cuDNN", partial(torch.backends.cudnn.flags, allow_tf32=False)
    else:
        name, flags = "oneDNN", partial(torch.backends.mkldnn.flags, allow_tf32=None)
    found = {}
    for label, enabled in ((name, True), (f"without {name}", False)):
        with _quiet(), flags(enabled=enabled):
            found[label] = call(images, filters)
    return found


def tiled_sum(x: torch.Tensor, tile: int) -> torch.Tensor:
    """x (rows, D) -> (rows,): tiles added in sequence, then the columns of the sum in pairs. The tile is the order."""
    total = torch.zeros(x.shape[0], tile, dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[1], tile):
        total = total + x[:, start : start + tile]
    return sums.add_neighbours(total)[:, 0]


def race(contenders: Mapping[Hashable, Callable], repeats: int = 3):
    """The label of the contender with the shortest time, as an autotuner picks it: by the clock."""
    def seconds(function):
        took = []
        for _ in range(repeats):
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            took.append(time.perf_counter() - start)
        return min(took)

    return min(contenders, key=lambda name: seconds(contenders[name]))


def _synchronize():
    if runtime.HAS_GPU:
        torch.cuda.synchronize()


def compiled(function: Callable, arguments: Sequence) -> torch.Tensor | str:
    """The result under torch.compile, or one line why it cannot compile here (it needs a C++ compiler on a CPU)."""
    try:
        with _quiet():
            return torch.compile(function, dynamic=False)(*arguments)
    except Exception as error:  # noqa: BLE001 - the reason is what a reader without a compiler gets to see
        return f"not here: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
