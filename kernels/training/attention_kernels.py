"""The two kernels of attention's gradients: rows of dq, and rows of dk and dv. Their order is in attention.py."""
from __future__ import annotations

from ..arithmetic.elementary import LOG2_E, for_kernels, tl_fma
from ..arithmetic.ex2 import tl_ex2
from ..arithmetic.sums import tree
from ..ops.attention.leaf import weights_of
from ..ops.matmul.tiles import dot
from ..runtime import device_function, tl, triton

_LOG2_E = for_kernels(LOG2_E)


@device_function
def _rows(base_ptr, row, stride, inside, D: tl.constexpr):
    """[rows, D] of a tensor: 0 where no row is."""
    place = row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(base_ptr + place, mask=inside[:, None], other=0.0)


@device_function
def _weights(s, e, seen, scale):
    """p of a tile of scores s; e has its shape."""
    p = tl_ex2(tl_fma(s, tl.zeros_like(s) + scale, -e))
    return tl.where(seen, p, 0.0)


@triton.jit
def queries_kernel(q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dy_ptr, delta_ptr, dq_ptr, q_token, q_head, k_token, k_head,
                   v_token, v_head, length, scale, root, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                   QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, ADDER: tl.constexpr,
                   PDL: tl.constexpr):
    """dq of QUERIES queries of one head a program, its keys from the first on; their delta is left for the keys."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks = tl.cdiv(length, QUERIES)
    begin = tl.program_id(0) % blocks * QUERIES
    head = (tl.program_id(0) // blocks % HEADS).to(tl.int64)
    token = (tl.program_id(0) // blocks // HEADS).to(tl.int64) * length
    row = begin + tl.arange(0, QUERIES)
    inside = row < length
    q = _rows(q_ptr + token * q_token + head * q_head, row, q_token, inside, D)
    own = token * HEADS + head
    dy = _rows(dy_ptr + own * D, row, HEADS * D, inside, D)
    y = _rows(y_ptr + own * D, row, HEADS * D, inside, D)
    delta = tree(dy.to(tl.float32) * y.to(tl.float32))
    at = own + row.to(tl.int64) * HEADS
    tl.store(delta_ptr + at[:, None], delta, mask=inside[:, None])
    e = (tl.load(lse_ptr + at, mask=inside, other=0.0) * _LOG2_E)[:, None]
    k_ptr += token * k_token + head // GROUP * k_head
    v_ptr += token * v_token + head // GROUP * v_head
    dq = tl.zeros([QUERIES, D], tl.float32)
    for start in tl.range(0, tl.minimum(begin + QUERIES, length), KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k = _rows(k_ptr, key, k_token, key < length, D)
        v = _rows(v_ptr, key, v_token, key < length, D)
        s = dot(q, k, tl.zeros([QUERIES, KEYS], tl.float32), False, ADDER)
        seen = (key[None, :] <= row[:, None]) & inside[:, None]
        p = _weights(s, tl.broadcast_to(e, [QUERIES, KEYS]), seen, scale)
        t = dot(dy, v, tl.zeros([QUERIES, KEYS], tl.float32), False, ADDER)
        dq = dot(weights_of(p * (t - delta), k, ADDER), tl.trans(k), dq, False, ADDER)
    place = own * D + row.to(tl.int64)[:, None] * HEADS * D + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + place, (dq * root).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def keys_kernel(q_ptr, k_ptr, v_ptr, lse_ptr, dy_ptr, delta_ptr, dk_ptr, dv_ptr, q_token, q_head, k_token, k_head,
                v_token, v_head, length, scale, root, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, ADDER: tl.constexpr,
                PDL: tl.constexpr):
    """dk and dv of KEYS keys of one head a program: the queries of each head that shares it, from the first on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    KV_HEADS: tl.constexpr = HEADS // GROUP
    blocks = tl.cdiv(length, KEYS)
    begin = tl.program_id(0) % blocks * KEYS
    kv_head = (tl.program_id(0) // blocks % KV_HEADS).to(tl.int64)
    token = (tl.program_id(0) // blocks // KV_HEADS).to(tl.int64) * length
    key = begin + tl.arange(0, KEYS)
    there = key < length
    k = _rows(k_ptr + token * k_token + kv_head * k_head, key, k_token, there, D)
    v = _rows(v_ptr + token * v_token + kv_head * v_head, key, v_token, there, D)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        own = token * HEADS + head
        for start in tl.range(begin, length, QUERIES, num_stages=STAGES):
            row = start + tl.arange(0, QUERIES)
            inside = row < length
            q = _rows(q_ptr + token * q_token + head * q_head, row, q_token, inside, D)
            dy = _rows(dy_ptr + own * D, row, HEADS * D, inside, D)
            at = own + row.to(tl.int64) * HEADS
            e = (tl.load(lse_ptr + at, mask=inside, other=0.0) * _LOG2_E)[None, :]
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0)[None, :]
            s = dot(k, q, tl.zeros([KEYS, QUERIES], tl.float32), False, ADDER)
            seen = (key[:, None] <= row[None, :]) & inside[None, :]
            p = _weights(s, tl.broadcast_to(e, [KEYS, QUERIES]), seen, scale)
            dv = dot(weights_of(p, dy, ADDER), tl.trans(dy), dv, False, ADDER)
            t = dot(v, dy, tl.zeros([KEYS, QUERIES], tl.float32), False, ADDER)
            dk = dot(weights_of(p * (t - delta), q, ADDER), tl.trans(q), dk, False, ADDER)
    place = ((token + key) * KV_HEADS + kv_head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + place, (dk * root).to(dk_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=there[:, None])
