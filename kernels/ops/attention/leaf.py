"""What every kernel of attention does alike: one leaf of keys, joining leaves, and the end of a row.

The operations and their order are those of order.py; a tile of rows is queries x heads that read one head of k and v.
"""
from __future__ import annotations

from ...arithmetic.elementary import LN2, for_kernels, tl_fma, tl_log
from ...arithmetic.ex2 import tl_ex2
from ...runtime import device_function, tl
from ..matmul.tiles import dot
from .order import BLOCK

_BLOCK, _LN2, _NONE = map(for_kernels, (BLOCK, LN2, float("-inf")))


@device_function
def lane_sums(p):
    """[R, 128] or [R, 32] -> [R, 4]; every sum is of two, and has no order. Zeros behind 32 would change no weight."""
    R: tl.constexpr = p.shape[0]
    EACH: tl.constexpr = p.shape[1] // 8
    x = tl.reshape(tl.permute(tl.reshape(p, [R, EACH, 4, 2]), [0, 2, 1, 3]), [R, 4, 2 * EACH])
    for half in tl.static_range(4 if EACH == 16 else 2):
        x = tl.sum(tl.reshape(x, [R, 4, 2, EACH >> half]), axis=2)
    return tl.sum(x, axis=2)


@device_function
def add_lanes(sums):
    """[R, 4] -> [R]"""
    return tl.sum(tl.sum(tl.reshape(sums, [sums.shape[0], 2, 2]), axis=2), axis=1)


@device_function
def join(M, L, A, m, part, acc):
    """The largest number, sum and values of newer leaves, and those of the next: [R], [R], [R, D] each."""
    top = tl.maximum(M, m)
    safe = tl.where(top == _NONE, 0.0, top)
    a = tl_ex2(M - safe)
    c = tl_ex2(m - safe)
    L = tl_fma(L, a, part * c)
    A = tl_fma(A, tl.broadcast_to(a[:, None], A.shape), acc * c[:, None])
    return top, L, A


@device_function
def weights_of(p, like, ADDER: tl.constexpr):
    """p rounded to the dtype of `like`, or to the one that ADDER names, for the interpreter, which holds float32."""
    if ADDER == "bfloat16":  # the interpreter would cut
        bits = p.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        weights = tl.where(p == p, rounded.to(tl.float32, bitcast=True), p)
    elif ADDER == "float16":
        weights = p.to(tl.float16).to(tl.float32)
    else:
        weights = p.to(like.dtype)
    return weights


@device_function
def keys_at(pages_ptr, key, inside, batch_stride, row_stride, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """Where the keys at these positions lie, counted from the cache's begin, or without pages from the sequence's."""
    if PAGE == 0:
        at = key.to(tl.int64) * row_stride
    else:
        if MASKED:
            page = tl.load(pages_ptr + key // PAGE, mask=inside, other=0)
        else:
            page = tl.load(pages_ptr + key // PAGE)
        at = page.to(tl.int64) * batch_stride + (key % PAGE).to(tl.int64) * row_stride
    return at


@device_function
def rows_of(base_ptr, at, inside, column, D: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
            FRESH: tl.constexpr):
    """[keys, columns] of a cache: 0 where no key is, and where D has no column. FRESH (then MASKED): not through L1."""
    place = base_ptr + at[:, None] + column[None, :]
    if FRESH:
        x = tl.load(place, mask=inside[:, None] & (column < D)[None, :], other=0.0, cache_modifier=".cg")
    elif MASKED and EVEN:
        x = tl.load(place, mask=inside[:, None], other=0.0)
    elif MASKED:
        x = tl.load(place, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    elif EVEN:
        x = tl.load(place)
    else:
        x = tl.load(place, mask=(column < D)[None, :], other=0.0)
    return x


@device_function
def scores_of(q, k, key, position, window, WINDOW: tl.constexpr, MASKED: tl.constexpr, ADDER: tl.constexpr):
    """[ROWS, keys]: the scores of a block or of a part of one, -inf for keys that a row does not see."""
    s = dot(q, k, tl.zeros([q.shape[0], k.shape[0]], tl.float32), False, ADDER)
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        s = tl.where(seen, s, _NONE)
    return s


@device_function
def add_block(s, top, v, m, sums, acc, scale, ADDER: tl.constexpr):
    """A leaf's (m, sums, acc) after a block of scores s [ROWS, 128] and values v; top: the largest score so far.

    Of 32 columns: the others' weights would be 0, and no sum would change.
    """
    ROWS: tl.constexpr = s.shape[0]
    safe = tl.where(top == _NONE, 0.0, top)
    p = tl_ex2(tl_fma(s, tl.zeros(s.shape, tl.float32) + scale, tl.broadcast_to(-safe[:, None], s.shape)))
    f = tl_ex2(m - safe)
    sums = tl_fma(sums, tl.broadcast_to(f[:, None], [ROWS, 4]), lane_sums(p))
    acc = dot(weights_of(p, v, ADDER), tl.trans(v), acc * f[:, None], False, ADDER)
    return top, sums, acc


@device_function
def nothing(ROWS: tl.constexpr, VALUES: tl.constexpr):
    """(m, sums, acc) where a leaf begins."""
    return (tl.full([ROWS], _NONE, tl.float32), tl.zeros([ROWS, 4], tl.float32), tl.zeros([ROWS, VALUES], tl.float32))


@device_function
def keys_and_values(k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, key, inside, value0, VALUES: tl.constexpr,
                    WIDTH: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """k [keys, WIDTH] and v [keys, VALUES], its columns from value0 on; with MASKED 0 for keys not `inside`."""
    k = rows_of(k_ptr, keys_at(pages_ptr, key, inside, k_batch, k_row, PAGE, MASKED), inside, tl.arange(0, WIDTH), D,
                WIDTH == D, MASKED, False)
    v = rows_of(v_ptr, keys_at(pages_ptr, key, inside, v_batch, v_row, PAGE, MASKED), inside,
                value0 + tl.arange(0, VALUES), D, WIDTH == D, MASKED, False)
    return k, v


@device_function
def after_block(q, k, v, key, position, window, scale, m, sums, acc, WINDOW: tl.constexpr, MASKED: tl.constexpr,
                ADDER: tl.constexpr):
    """A leaf's (m, sums, acc) after one more block, or after its first 32 keys if no row sees the others."""
    s = scores_of(q, k, key, position, window, WINDOW, MASKED, ADDER)
    return add_block(s, tl.maximum(m, tl.max(s, axis=1) * scale), v, m, sums, acc, scale, ADDER)


@device_function
def one_leaf(q, k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, leaf, newest, oldest, length, position, window,
             scale, value0, m, sums, acc, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
             MASKED: tl.constexpr, LEAF: tl.constexpr, STAGES: tl.constexpr, ADDER: tl.constexpr):
    """A leaf's blocks from `newest` down to position `oldest`, for a tile q [ROWS, WIDTH]: (m, l, acc).

    m, sums, acc: those before its blocks, acc of the columns of v from value0 on. MASKED: a row does not see some of
    the keys, or some are not there.
    """
    first = tl.maximum(leaf * LEAF, oldest) // _BLOCK
    last = tl.minimum((leaf * LEAF + LEAF - 1) // _BLOCK, newest)
    for i in tl.range(last - first + 1, num_stages=STAGES):
        key = (last - i) * _BLOCK + tl.arange(0, _BLOCK)
        k, v = keys_and_values(k_ptr, v_ptr, pages_ptr, k_batch, k_row, v_batch, v_row, key, key < length, value0,
                               acc.shape[1], q.shape[1], D, PAGE, MASKED)
        m, sums, acc = after_block(q, k, v, key, position, window, scale, m, sums, acc, WINDOW, MASKED, ADDER)
    return m, add_lanes(sums), acc


@device_function
def spans(line_ptr, k_ptr, v_ptr, pages_ptr, head, k_batch, k_head, v_batch, v_head, table_width, PAGE: tl.constexpr):
    """Where one head's keys, values and pages begin, for the sequence of a line of work."""
    place = tl.load(line_ptr + 5).to(tl.int64)
    k_ptr += tl.cast(head, tl.int64) * k_head
    v_ptr += tl.cast(head, tl.int64) * v_head
    if PAGE == 0:
        k_ptr += place * k_batch
        v_ptr += place * v_batch
    else:
        pages_ptr += place * table_width
    return k_ptr, v_ptr, pages_ptr


@device_function
def wholly_seen(leaf, least, newest, window, LEAF: tl.constexpr, WINDOW: tl.constexpr):
    """Whether rows from position `least` to `newest` see every key of a leaf."""
    seen = leaf * LEAF + LEAF - 1 <= least
    if WINDOW:
        seen = seen & (leaf * LEAF > newest - window)
    return seen


@device_function
def finish(M, L, A, o_ptr, lse_ptr, at, real, column, D: tl.constexpr, LSE: tl.constexpr):
    """Divide, round once, store: rows at numbers `at` of o (T * H, D) and lse (T * H,), where they are real."""
    y = A * tl.div_rn(tl.full(L.shape, 1.0, tl.float32), L)[:, None]
    y = tl.where((M == _NONE)[:, None], 0.0, y)
    tl.store(o_ptr + at[:, None] * D + column[None, :], y.to(o_ptr.dtype.element_ty),
             mask=real[:, None] & (column < D)[None, :])
    if LSE:
        tl.store(lse_ptr + at, tl_fma(M, _LN2, tl_log(L)), mask=real)
