"""The matrix product's Triton kernels: the order of kernels/ops/matmul/op.py, in tiles.

Every kernel walks k in the order that `order(N, K)` gives one element, whatever its tile: a chain in one accumulator,
and where k is cut, chains that are added in sequence.
"""
from __future__ import annotations

from ...arithmetic.elementary import tl_fma
from ...runtime import tl, triton


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile number -> first token, first weight row: GROUP tiles of tokens pass over the weights together."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    width = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // width * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    return (first + tile % width % size) * BLOCK_M, tile % width // size * BLOCK_N


@triton.jit
def _dot(x, weight, total, SWAP: tl.constexpr, EXPLICIT: tl.constexpr):
    """total + x @ weight.T, or its transpose: tiles x [BLOCK_M, BLOCK_K], weight [BLOCK_N, BLOCK_K]."""
    if EXPLICIT:  # NumPy's product in the interpreter has an order of its own
        for k in range(x.shape[1]):
            here = tl.arange(0, x.shape[1])[None, :] == k
            x_k = tl.sum(tl.where(here, x, 0.0), axis=1)
            weight_k = tl.sum(tl.where(here, weight, 0.0), axis=1)
            if SWAP:
                total = tl_fma(weight_k[:, None], x_k[None, :], total)
            else:
                total = tl_fma(x_k[:, None], weight_k[None, :], total)
    elif SWAP:
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def _finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
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


@triton.jit
def _add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments):
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


@triton.jit
def _keep_segment(chain, partial_ptr, segment, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, x_stride, x_step,
                    weight_stride, weight_step, segments, length,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                    SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr,
                    BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, EXPLICIT: tl.constexpr,
                    PDL: tl.constexpr):
    """One tile of y a program (with SPLIT: one segment of one tile), any sizes and strides."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        if REDUCE:  # its blocks may come, and wait
            tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    segment = 0
    start = 0
    end = K
    if SPLIT:
        segment = tile % segments
        tile = tile // segments
        start = segment * length
        end = tl.minimum(K, start + length)
    m0, n0 = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    weight_row = weight_ptr + n.to(tl.int64)[:, None] * weight_stride
    m_inside = (m < M)[:, None]
    n_inside = (n < N)[:, None]
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros_like(chain)
    for block in tl.range(start, end, BLOCK_K):
        k = (block + tl.arange(0, BLOCK_K))[None, :]
        x_at = x_row + k.to(tl.int64) * x_step
        weight_at = weight_row + k.to(tl.int64) * weight_step
        if EVEN_K:
            x = tl.load(x_at, mask=m_inside, other=0.0)
        else:
            x = tl.load(x_at, mask=m_inside & (k < end), other=0.0)
        if EVEN_K and EVEN_N:
            weight = tl.load(weight_at)
        elif EVEN_K:
            weight = tl.load(weight_at, mask=n_inside, other=0.0)
        else:
            weight = tl.load(weight_at, mask=n_inside & (k < end), other=0.0)
        chain = _dot(x, weight, chain, SWAP, EXPLICIT)
        if CUT and not SPLIT:  # noqa: SIM102 - the second condition is run-time
            if (block + BLOCK_K) % length == 0:
                total += chain
                chain = tl.zeros_like(chain)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT and REDUCE:
        _keep_segment(chain, partial_ptr, segment, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP)
    elif SPLIT:
        total, last = _add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments)
        if last:
            _finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        total += chain
        _finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)


@triton.jit
def _tma_tile(tile, x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
              SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr, BIAS: tl.constexpr,
              STORE: tl.constexpr):
    segment = 0
    start = 0
    end = K
    if SPLIT:
        segment = tile % segments
        tile = tile // segments
        start = segment * length
        end = tl.minimum(K, start + length)
    m0, n0 = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros_like(chain)
    for k in tl.range(start, end, BLOCK_K):
        x = x_desc.load([m0, k])
        weight = weight_desc.load([n0, k])
        chain = _dot(x, weight, chain, SWAP, False)
        if CUT and not SPLIT:  # noqa: SIM102 - the second condition is run-time
            if (k + BLOCK_K) % length == 0:
                total += chain
                chain = tl.zeros_like(chain)
    if SPLIT and REDUCE:
        _keep_segment(chain, partial_ptr, segment, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP)
    elif SPLIT:
        total, last = _add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments)
        if last:
            _finish(total, y, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        total += chain
        if STORE:
            if BIAS:
                n = n0 + tl.arange(0, BLOCK_N)
                total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            y.store([m0, n0], total.to(x_desc.dtype))
        else:
            _finish(total, y, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)


@triton.jit(do_not_specialize=["M"])
def tma_kernel(x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr, BIAS: tl.constexpr,
                STORE: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
                PDL: tl.constexpr):
    """Tiles read by bulk copies (sm_90 and up), which fill what lies outside with zeros; K contiguous in both."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        if REDUCE:  # its blocks may come, and wait
            tl.extra.cuda.gdc_launch_dependents()
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN,
                             warp_specialize=SPECIALIZE):
            _tma_tile(tile, x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
                      BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, REDUCE, BIAS, STORE)
    else:
        _tma_tile(tl.program_id(0), x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments,
                  length, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, REDUCE, BIAS, STORE)
