"""Does this GPU add as arithmetic/tensor_core.py says? Millions of outputs, compared bit for bit.

    python -m kernels tensor-core --out data

A plain Triton kernel multiplies in two tile sizes, so that a Hopper GPU uses both mma.sync and wgmma. The adder is
probed first; its chain, computed on the same GPU, must give every output. Rows go to tensor_core.csv.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from tqdm.auto import tqdm

from ... import bits, runtime
from ...arithmetic import tensor_core
from ...op import DTYPES
from ...runtime import tl, triton
from .. import provenance, records

TENSOR_CORE = records.Table(
    "tensor_core.csv",
    ("instruction", "dtype", "k", "input", "block", "fraction_bits", "outputs", "mismatches", "not_nearest", "nan",
     "infinite", "subnormal", "zero", "recorded_at", "source"),
    ("instruction", "dtype", "k", "input"),
)
LENGTHS = (1, 16, 31, 64, 100, 512, 1000, 4096, 8200, 16384)
TILES = (16, 64)  # rows: wgmma needs 64
# Inputs that kernels/bits.py does not have, and the range of their exponents, as stored.
EXPONENTS = {
    "bfloat16": {"finite": (0, 188), "any": (0, 254), "underflow": (46, 58), "overflow": (187, 190)},
    "float16": {"finite": (0, 30), "any": (0, 30), "underflow": (0, 1)},
}


@triton.jit
def _kernel(x_ptr, weight_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of x @ weight.T in float32: k in order, one accumulator."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * K + k[None, :], mask=(row < M) & (k[None, :] < K), other=0.0)
        weight = tl.load(weight_ptr + column * K + k[:, None], mask=(column < N) & (k[:, None] < K), other=0.0)
        total = tl.dot(x, weight, total)
    tl.store(y_ptr + row * N + column, total, mask=(row < M) & (column < N))


def dot(x, weight, tile: int = 64) -> torch.Tensor:
    """x (M, K), weight (N, K), bfloat16 or float16 -> float32 (M, N), `tile` rows a program."""
    return _launch(x, weight, tile)[0]


def instruction(dtype: torch.dtype, tile: int) -> str:
    """The matrix instruction that `dot` became on this GPU, such as mma.sync, wgmma or tcgen05.mma."""
    example = torch.zeros(64, 64, dtype=dtype, device=runtime.device())
    ptx = _launch(example, example, tile)[1].asm["ptx"]
    return re.search(r"\b(wgmma|tcgen05\.mma|mma\.sync)\b", ptx)[1]


def _launch(x, weight, tile):
    runtime.require_triton("dot")
    (rows, k), columns = x.shape, len(weight)
    y = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, tile), triton.cdiv(columns, 64))
    return y, _kernel[grid](x.contiguous(), weight.contiguous(), y, rows, columns, k, tile, 64, 64)


def kinds(dtype: str) -> tuple[str, ...]:
    """Every kind of input for this dtype. Sums of float16 products do not overflow."""
    return ("portable", *bits.ADVERSARIAL, "uniform", "sparse", "returns_to_zero", *EXPONENTS[dtype])


def inputs(kind: str, rows: int, columns: int, k: int, dtype: str = "bfloat16", device="cpu", seed: int = 0) -> tuple:
    """x (rows, k) and weight (columns, k), the same on every machine.

    portable         as in kernels/bits.py, and the adversarial kinds there
    uniform          uniform over -1 to 1, and so with few small exponents
    sparse           the same, but three of four numbers of x are zero
    returns_to_zero  the same, but the second half of the sum subtracts the first half
    finite           any sign and significand, any exponent with which a sum is mostly finite
    any              any sign, exponent and significand, and one number in 4 k an infinity or a NaN
    underflow        products about 2**-149; in float16 subnormal factors
    overflow         sums about 2**128

    Raises ValueError for another kind or dtype.
    """
    if dtype not in EXPONENTS:
        raise ValueError(f"dtype must be one of {', '.join(EXPONENTS)}, got {dtype!r}")
    if kind not in kinds(dtype):
        raise ValueError(f"kind must be one of {', '.join(kinds(dtype))} for {dtype}, got {kind!r}")
    x, weight = (_matrix(kind, n, k, dtype, device, 4 * seed + i) for i, n in enumerate((rows, columns)))
    if kind == "sparse":
        x = torch.where(_hashed(rows, k, device, 4 * seed + 2) % 4 == 0, x, torch.zeros_like(x))
    if kind == "returns_to_zero":
        half = k // 2
        x[:, half : 2 * half], weight[:, half : 2 * half] = x[:, :half], -weight[:, :half]
    return x, weight


def _matrix(kind, rows, k, dtype, device, seed):
    if kind in bits.ADVERSARIAL:
        return bits.adversarial(kind, rows, k, DTYPES[dtype], device, seed)
    if kind == "portable":
        return bits.portable(rows, k, DTYPES[dtype], device, seed)
    h = _hashed(rows, k, device, seed)
    if kind not in EXPONENTS[dtype]:
        return ((h - 2**31).float() * 2.0**-31).to(DTYPES[dtype])
    (low, high), width = EXPONENTS[dtype][kind], bits.SIGNIFICANT_BITS[DTYPES[dtype]] - 1  # bits stored
    exponent = low + (h >> 11) % (high - low + 1)
    stored = exponent << width | h & (1 << width) - 1
    if kind == "any":
        special = _hashed(rows, k, device, seed + 3) % (4 * max(k, 1))
        stored = torch.where(special == 0, (high + 1 << width) + h % 2, stored)  # an infinity, or a NaN
    return (stored - (h >> 31 << 15)).to(torch.int16).view(DTYPES[dtype])


def _hashed(rows, k, device, seed):
    return bits.hashed(torch.arange(rows * k, dtype=torch.int64, device=device).view(rows, k), seed)


def check(matmuls: Mapping[str, Callable], dtype: str, lengths=LENGTHS, size: int = 512, device=None) -> Iterator[dict]:
    """Compare each matmul with the chain of the adder probed in it: a row of tensor_core.csv for every k and input.

    matmul(x, weight) -> float32, `size` x `size` outputs. Raises ValueError if one of them adds in no known way.
    """
    device = device or runtime.device()
    adders = {name: tensor_core.probe(matmul, DTYPES[dtype], device) for name, matmul in matmuls.items()}
    for k in lengths:
        for kind in kinds(dtype):
            x, weight = inputs(kind, size, size, k, dtype, device, seed=k)
            nearest = (x.double() @ weight.double().T).float()
            chains = {adder: tensor_core.chain(x, weight, adder) for adder in set(adders.values())}
            for name, matmul in matmuls.items():
                expected = chains[adders[name]]
                found = tensor_core.differences(expected, matmul(x, weight))
                yield {"instruction": name, "dtype": dtype, "k": k, "input": kind, **vars(adders[name]),
                       "outputs": found.outputs, "mismatches": found.mismatches,
                       "not_nearest": bits.elements_differ(expected, nearest), **_counts(expected),
                       "recorded_at": records.now(), "source": provenance.source(__file__)}


def _counts(y) -> dict[str, int]:
    subnormal = (y != 0) & (y.abs() < torch.finfo(torch.float32).smallest_normal)
    return {name: int(where.sum()) for name, where in (("nan", y.isnan()), ("infinite", y.isinf()),
                                                       ("subnormal", subnormal), ("zero", y == 0))}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels tensor-core", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=list(EXPONENTS), choices=list(EXPONENTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="values of k")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of each result")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if not runtime.HAS_GPU:
        print("error: this compares a GPU's tensor cores with arithmetic/tensor_core.py; there is no GPU here",
              file=sys.stderr)
        return 2
    try:
        folder = records.open_machine(a.out, a.machine)
        rows = [row for dtype in a.dtypes for row in _checked(dtype, a.lengths, a.size)]
        TENSOR_CORE.merge(folder, rows)
        records.note_machine(folder, TENSOR_CORE.file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _report(rows)


def _checked(dtype, lengths, size) -> Iterator[dict]:
    matmuls = {instruction(DTYPES[dtype], tile): partial(dot, tile=tile) for tile in TILES}
    total = len(lengths) * len(kinds(dtype)) * len(matmuls)
    return tqdm(check(matmuls, dtype, lengths, size), desc=f"{dtype}, {', '.join(matmuls)}", total=total,
                file=sys.stderr)


def _report(rows) -> int:
    wrong = [row for row in rows if row["mismatches"]]
    for row in wrong:
        print(f"{row['instruction']} {row['dtype']} k={row['k']} {row['input']}: {row['mismatches']:,} mismatches")
    print(f"{sum(row['outputs'] for row in rows):,} outputs compared, "
          f"{sum(row['mismatches'] for row in rows):,} differ from the chain")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
