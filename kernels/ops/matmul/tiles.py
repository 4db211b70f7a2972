"""What the kernels of a matrix product do with a tile: place it, multiply, add segments, store."""
from __future__ import annotations

from functools import cache

from ...arithmetic.elementary import tl_fma
from ...arithmetic.tensor_core import tl_chain
from ...runtime import device_function, tl, triton
from .product import Product
from .schedule import Schedule


def memory(schedule: Schedule, product: Product) -> tuple[int, int]:
    """(float32 numbers, counters) with which the programs of a split add its segments."""
    if not schedule.split or schedule.reduce:
        return 0, 0
    return product.programs(schedule) * schedule.block_m * schedule.block_n, product.tiles(schedule)


def for_k(k: int, kernel):
    """The kernel, compiled so that Triton does not know a k of 1.

    It would take the 1 for a constant and unroll the loop over k. A product that begins at zero would then meet the
    addition of the bias, and Triton makes of both a product that begins at the bias: the tensor core cuts that sum off.
    """
    return kernel if k != 1 else _of_one(kernel)


@cache
def _of_one(kernel):
    return triton.jit(do_not_specialize=["M", "K"])(kernel.fn)


@device_function
def place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile number -> first token, first weight row: GROUP tiles of tokens pass over the weights together."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    width = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // width * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    return (first + tile % width % size) * BLOCK_M, tile % width // size * BLOCK_N


@device_function
def dot(x, weight, total, SWAP: tl.constexpr, ADDER: tl.constexpr):
    """total + x @ weight.T, or its transpose: tiles x [BLOCK_M, BLOCK_K], weight [BLOCK_N, BLOCK_K].

    ADDER names the dtype whose chain is written out, for the interpreter; "" leaves it to the tensor core.
    """
    if ADDER == "":
        if SWAP:
            total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
        else:
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    elif ADDER == "float32":
        if SWAP:
            total = _fma_chain(weight, x, total)
        else:
            total = _fma_chain(x, weight, total)
    else:
        SMALLEST: tl.constexpr = 2.0**-14 if ADDER == "float16" else 2.0**-126
        if SWAP:
            total = tl_chain(weight, x, total, SMALLEST)
        else:
            total = tl_chain(x, weight, total, SMALLEST)
    return total


@device_function
def _fma_chain(a, b, total):
    """[A, K], [B, K] float32 -> total [A, B] and the products, one fused multiply-add after the other."""
    for k in range(a.shape[1]):
        a_k = tl.gather(a, tl.full([a.shape[0], 1], k, tl.int32), axis=1)
        b_k = tl.gather(b, tl.full([b.shape[0], 1], k, tl.int32), axis=1)
        total = tl_fma(a_k, tl.trans(b_k), total)
    return total


@device_function
def finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
            BIAS: tl.constexpr):
    """Add the bias, round once, store: total [BLOCK_M, BLOCK_N] (or its transpose) at token m0, weight row n0."""
    n = n0 + tl.arange(0, BLOCK_N)
    if BIAS:
        b = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        total += b[:, None] if SWAP else b[None, :]
    y = total.to(y_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    m = m0 + tl.arange(0, BLOCK_M)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + place, y, mask=(m < M)[:, None] & (n < N)[None, :])


@device_function
def add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments):
    """Leave this segment's chain; whoever comes last adds all of them in sequence. -> the sum, whether we are last."""
    SIZE: tl.constexpr = chain.shape[0] * chain.shape[1]
    place = tl.arange(0, chain.shape[0])[:, None] * chain.shape[1] + tl.arange(0, chain.shape[1])[None, :]
    first_ptr = partial_ptr + (tile * segments).to(tl.int64) * SIZE + place
    tl.store(first_ptr + segment * SIZE, chain)
    tl.debug_barrier()  # every thread's numbers are stored before one thread says so
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == segments - 1
    total = tl.zeros_like(chain)
    if last:
        for s in range(segments):
            total += tl.load(first_ptr + s * SIZE, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return total, last


@device_function
def keep_segment(chain, partial_ptr, segment, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  SWAP: tl.constexpr):
    """Leave this segment's chain in partial (segments, M, N), for reduce_kernel to add."""
    if SWAP:
        chain = tl.trans(chain)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    place = (segment.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(partial_ptr + place, chain, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def reduce_kernel(partial_ptr, bias_ptr, y_ptr, size, N, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
                  BIAS: tl.constexpr, PDL: tl.constexpr):
    """y (M, N) of `size` numbers from partial (SEGMENTS, M, N): added in sequence, the bias, one rounding."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SEGMENTS):
        total += tl.load(partial_ptr + size * s + i, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=inside)
