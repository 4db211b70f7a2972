"""What kernels do with the leaves of a tree: join them where they are made, or when all of them are."""
from __future__ import annotations

from ...runtime import device_function, tl, triton


@device_function
def join(chain, leaf, low, mid, high):
    """Leaf number `leaf` of eight takes its place: -> sums of one, two and four leaves that wait for their neighbours.

    The last leaf leaves the whole sum in `high`. Selected without branches, which would cost more than the additions.
    """
    two = low + chain
    four = mid + two
    eight = high + four
    low = tl.where((leaf == 0) | (leaf == 2) | (leaf == 4) | (leaf == 6), chain, low)
    mid = tl.where((leaf == 1) | (leaf == 5), two, mid)
    high = tl.where(leaf == 3, four, tl.where(leaf == 7, eight, high))
    return low, mid, high


@device_function
def _four(first_ptr, step, mask):
    """The sum of four leaves' chains, `step` numbers apart; what lies outside the mask is anything."""
    left = tl.load(first_ptr, mask=mask, cache_modifier=".cg")
    left += tl.load(first_ptr + step, mask=mask, cache_modifier=".cg")
    right = tl.load(first_ptr + 2 * step, mask=mask, cache_modifier=".cg")
    right += tl.load(first_ptr + 3 * step, mask=mask, cache_modifier=".cg")
    return left + right


@device_function
def join_all(chain, partial_ptr, counter_ptr, tile, leaf):
    """Leave this leaf's chain; whoever comes last adds all eight. -> the sum, whether we are last."""
    SIZE: tl.constexpr = chain.shape[0] * chain.shape[1]
    place = tl.arange(0, chain.shape[0])[:, None] * chain.shape[1] + tl.arange(0, chain.shape[1])[None, :]
    first_ptr = partial_ptr + (tile * 8).to(tl.int64) * SIZE + place
    tl.store(first_ptr + leaf * SIZE, chain)
    tl.debug_barrier()  # every thread's numbers are stored before one thread says so
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == 7
    total = tl.zeros_like(chain)
    if last:
        total += _four(first_ptr, SIZE, None) + _four(first_ptr + 4 * SIZE, SIZE, None)
        tl.store(counter_ptr + tile, 0)
    return total, last


@triton.jit
def join_kernel(partial_ptr, bias_ptr, y_ptr, size, N, BLOCK: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):
    """y (M, N) of `size` numbers from partial (8, M, N): the tree of eight leaves, the bias, one rounding."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    four = _four(partial_ptr + i, size, inside)
    total = tl.zeros([BLOCK], tl.float32) + (four + _four(partial_ptr + 4 * size + i, size, inside))
    if BIAS:
        total += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=inside)
