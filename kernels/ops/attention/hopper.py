"""Causal attention of many queries on Hopper, written in Gluon: a schedule of the order in order.py.

One warp copies tiles into shared memory. Two groups of four warps own 64 query rows each of a tile of 128 positions;
tiles begin at multiples of 128 positions of their sequence, so that the block of keys on the diagonal is always the
first one. Walking down from there, a group makes the scores of a block while the tensor cores still add the values of
the block before it. At a leaf's end its sums join those of the newer leaves, which wait in shared memory; meanwhile
the tensor cores make the next scores.
hopper_jobs.py says which program does what. call.py imports this file on sm_90 alone.
"""
from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from ...launch import Step, Tiles
from ...runtime import Compiled, current_stream
from ..matmul.descriptors import Descriptor
from .form import Form
from .hopper_jobs import jobs
from .hopper_load import STAGES, produce
from .hopper_parts import BLOCK, ROWS
from .hopper_tile import consume
from .sequences import Sequences


def steps(form: Form, sequences: Sequences, rows: int, capacity: int, programs: int = 132) -> list[Step]:
    """The launch for k, v (rows, capacity, kv_heads, width)."""
    table = jobs(sequences, form.heads, programs)
    return [step(form, sequences.tokens, rows, capacity, len(table), programs)]


def step(form: Form, tokens: int, rows: int, capacity: int, waves: int, programs: int) -> Step:
    """The launch for q (tokens, heads, width) and k, v (rows, capacity, kv_heads, width).

    jobs_ptr points to the table of hopper_jobs.jobs, (waves, programs, 4); o_ptr to (tokens, heads, width), lse_ptr to
    (tokens, heads) float32 or nothing, both contiguous.
    """
    high = (ROWS.value, 1, form.columns)
    q_shape = (tokens, form.heads, form.width)
    return Step(kernel, programs,
                {"q_desc": Tiles(form.dtype, q_shape, (*form.strides[:2], 1), high, with_layout),
                 **cache_tiles(form, rows, capacity),
                 "o_desc": Tiles(form.dtype, q_shape, (form.heads * form.width, form.width, 1), high, with_layout),
                 "o_ptr": form.dtype, "lse_ptr": torch.float32 if form.lse else None, "pages_ptr": torch.int32,
                 "jobs_ptr": torch.int32},
                {"waves": waves, "table_width": form.table, "scale": form.scalars["scale"]},
                {"HEADS": form.heads, "GROUP": form.group, "WIDTH": form.width, "PAGE": form.page}, {"num_warps": 4},
                {"o_desc": "o_ptr"})


def cache_tiles(form: Form, rows: int, capacity: int, most: int = BLOCK.value) -> dict[str, Tiles]:
    """Bulk copies of k and v (rows, capacity, kv_heads, width), in pieces of at most `most` keys, in one page each."""
    shape, block = (rows, capacity, form.kv_heads, form.width), (1, min(form.page or most, most), 1, 64)
    return {name: Tiles(form.dtype, shape, (*form.strides[at : at + 3], 1), block, with_layout)
            for name, at in (("k_desc", 2), ("v_desc", 5))}


class Described:
    """The descriptors of a step's tensors, by their addresses, made once: layers come back to the same few."""

    def __init__(self, code: Compiled, step: Step, names: tuple[str, ...]):
        self.code, self.tiles = code, [step.pointers[name] for name in names]
        self.made: dict[tuple, tuple] = {}

    def __call__(self, *addresses: int) -> tuple:
        """What a launch takes for them. Raises ValueError unless all are multiples of 16 bytes."""
        return self.made.get(addresses) or self._make(addresses)

    def _make(self, addresses):
        if any(at % 16 for at in addresses):
            raise ValueError("bulk copies need q, k and v at multiples of 16 bytes")
        if len(self.made) >= 1024:
            self.made.clear()
        made = self.code.described([Descriptor(at, tiles) for at, tiles in zip(addresses, self.tiles, strict=True)])
        self.made[addresses] = made
        return made


class HopperReady:
    """A call of the sequences that are `chosen` made ready on GPU `index`, sm_90: called as `ready.Ready` is.

    rows, capacity  of k: its first two dimensions
    Raises ValueError where q, k or v do not begin at a multiple of 16 bytes.
    """

    def __init__(self, form: Form, sequences: Sequences, rows: int, capacity: int, index: int, chosen=None):
        programs = torch.cuda.get_device_properties(index).multi_processor_count
        table = jobs(sequences, form.heads, programs, chosen)
        self.table, self.index, self.lse = sequences.put(table), index, form.lse
        self.pages = self.table if sequences.table is None else sequences.put(sequences.table)
        launch = step(form, sequences.tokens, rows, capacity, len(table), programs)
        self.code = _compiled(form, len(table), programs, index)
        self.described = Described(self.code, launch, ("q_desc", "k_desc", "v_desc", "o_desc"))

    def __call__(self, q, k, v, y, sums, device):
        self.code(current_stream(self.index), *self.described(q, k, v, y), y, sums if self.lse else None,
                  self.pages.data_ptr(), self.table.data_ptr())


@cache
def _compiled(form: Form, waves: int, programs: int, index: int) -> Compiled:
    """The code, which does not depend on shapes; Triton keeps it, and this its numbers."""
    return step(form, 1, 1, 1, waves, programs).compiled(index)


def with_layout(descriptor) -> TensorDescriptor:
    """A plain descriptor as Gluon wants it: with the layout of its tiles in shared memory."""
    block = list(descriptor.block_shape)
    dtype = gl.bfloat16 if descriptor.base.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, block, layout)


@gluon.jit(do_not_specialize=["waves"])
def kernel(q_desc, k_desc, v_desc, o_desc, o_ptr, lse_ptr, pages_ptr, jobs_ptr, waves, table_width, scale,
           HEADS: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, PAGE: gl.constexpr, PDL: gl.constexpr):
    """Programs do their columns of the table of jobs. scale: of the scores, times log2(e). Launched with 4 warps, which
    are the first group. WIDTH: of a head, GROUP: heads of q that share keys. lse_ptr: (queries, heads), or None."""
    if PDL:
        gdc_wait()
    WIDE: gl.constexpr = q_desc.block_shape[2]
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDE], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, WIDE], shared)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, WIDE], shared)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, WIDE], shared)
    held = gl.allocate_shared_memory(gl.float32, [2, WIDE // 8, 128, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    staging = held._reinterpret(dtype, [4, ROWS, WIDE], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(v_raw, count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (consume, (o_desc, o_ptr, lse_ptr, jobs_ptr, q_tiles, k_tiles, v_tiles, held, staging, q_full, q_empty, k_full,
                    v_full, waves, scale, 0, HEADS, WIDTH)),
        (consume, (o_desc, o_ptr, lse_ptr, jobs_ptr, q_tiles, k_tiles, v_tiles, held, staging, q_full, q_empty, k_full,
                    v_full, waves, scale, 1, HEADS, WIDTH)),
        (produce, (q_desc, k_desc, v_desc, pages_ptr, jobs_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full,
                    v_full, v_raw, waves, table_width, GROUP, PAGE)),
    ], [4, 1], [240, 24])
