"""Kind hopper_spread: a leaf of a tile of rows at a time, with Hopper's bulk copies and wgmma, written in Gluon.

A tile is 64 or 128 rows, queries x the heads that share a head of k, so that few queries read their keys once. One warp
copies, and groups of four warps own 64 rows each. A program does leaf after leaf without a pause in its copies: what
leaves give is joined by the launch of join.py, or is the result where every tile has one leaf.
call.py imports this file on sm_90 alone.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ...launch import Launch, Step, Tiles
from ...runtime import Compiled, current_stream
from .form import Form
from .hopper import Described, cache_tiles, with_layout
from .hopper_jobs import deal, short_between
from .hopper_leaf import consume, produce
from .hopper_parts import BLOCK, ROWS
from .join import join_step, partial_rows
from .schedule import Schedule
from .sequences import Sequences
from .work import Work, work_of

PIECE = 64  # keys of a copy: none behind a sequence's last piece are read where its cache is longer
# rows of a tile -> tiles of queries in shared memory: with two, copies need not wait. 128 rows leave no room for it
QUERIES = {64: 2, 128: 1}
OPTIONS = {64: {"num_warps": 4, "maxnreg": 168}, 128: {"num_warps": 4}}


def steps(schedule: Schedule, form: Form, work: Work, waves: int, tokens: int, rows: int, capacity: int,
          programs: int = 132) -> list[Step]:
    """The launch for q (tokens, heads, width) and k, v (rows, capacity, kv_heads, width), and the one that joins."""
    direct = work.slots == work.real  # every tile has one leaf
    height = 1 << max(work.most - 1, 0).bit_length()  # few rows lie close together
    count = partial_rows(form, work, height)
    # a tile's rows are neighbours: the heads of one query, then those of the next
    q = Tiles(form.dtype, (tokens, form.kv_heads, form.group, form.width),
              (form.strides[0], form.strides[1] * form.group, form.strides[1], 1),
              (ROWS.value // form.group, 1, form.group, 64), with_layout)
    first = Step(kernel, programs,
                 {"q_desc": q, **cache_tiles(form, rows, capacity, PIECE),
                  "o_ptr": form.dtype if direct else None, "lse_ptr": torch.float32 if direct and form.lse else None,
                  "part_ptr": None if direct else torch.float32, "pages_ptr": torch.int32, "work_ptr": torch.int32},
                 {"waves": waves, "count": count, "height": height, "table_width": form.table,
                  "scale": form.scalars["scale"]},
                 {"KV_HEADS": form.kv_heads, "GROUP": form.group, "WIDTH": form.width, "WIDE": form.columns,
                  "PAGE": form.page, "GROUPS": schedule.rows // ROWS.value, "STAGES": schedule.stages,
                  "QUERIES": QUERIES[schedule.rows]},
                 OPTIONS[schedule.rows], {"work_ptr": "leaves_ptr"}, leaves=0 if direct else count * (form.columns + 2))
    return [first] if direct else [first, join_step(form, work, height)]


def planned(schedule: Schedule, form: Form, sequences: Sequences, rows: int, capacity: int, leaf: int,
            programs: int = 132, chosen=None) -> tuple[list[Step], Work, np.ndarray]:
    """The launches for k (rows, capacity, ..) and the sequences that are `chosen`, their work, and the table of it."""
    work = work_of(sequences, schedule.rows, form.group, form.window, True, leaf, chosen)
    table = dealt(work, form.kv_heads, programs)
    return steps(schedule, form, work, len(table), sequences.tokens, rows, capacity, table.shape[1]), work, table


def dealt(work: Work, kv_heads: int, programs: int) -> np.ndarray:
    """(waves, programs, FIELDS) int32: work's lines of leaves, one a head of k, whose slot counts heads too: the number
    of the partial results. A line of no rows is no job."""
    lines = np.repeat(work.lines, kv_heads, axis=0)
    lines[:, 7] = lines[:, 7] * kv_heads + np.tile(np.arange(kv_heads), len(work.lines))
    blocks = np.repeat(-(-work.seen // BLOCK.value), kv_heads)
    empty = np.array([0, 0, 0, 0, 0, 0, -1, 0, 0])  # and as the last, blocks
    table = deal(np.column_stack([lines, blocks]), blocks, min(programs, len(lines)), empty)
    return np.ascontiguousarray(short_between(table, table[:, :, -1])[:, :, :-1])


class SpreadReady:
    """A call of the sequences that are `chosen` made ready on GPU `index`, sm_90: called as `ready.Ready` is."""

    def __init__(self, schedule: Schedule, form: Form, sequences: Sequences, rows: int, capacity: int, leaf: int,
                 index: int, chosen=None):
        programs = torch.cuda.get_device_properties(index).multi_processor_count
        self.steps, self.work, table = planned(schedule, form, sequences, rows, capacity, leaf, programs, chosen)
        self.dealt, self.index, self.lse = sequences.put(table), index, form.lse
        self.pages = self.dealt if sequences.table is None else sequences.put(sequences.table)
        self.code = _compiled(_Key(self.steps[0]), index)
        self.join = _joining(_Key(self.steps[1]), index) if len(self.steps) == 2 else None
        self.described = Described(self.code, self.steps[0], ("q_desc", "k_desc", "v_desc"))

    def __call__(self, q, k, v, y, sums, device):
        stream, made = current_stream(self.index), self.described(q, k, v)
        tables = self.pages.data_ptr(), self.dealt.data_ptr()
        if self.join is None:
            self.code(stream, *made, y, sums if self.lse else None, None, *tables)
            return
        part = torch.empty(self.steps[0].leaves, dtype=torch.float32, device=device)
        self.code(stream, *made, None, None, part.data_ptr(), *tables)
        self.join(0, part.data_ptr(), self.work.tiles.data_ptr(), y, sums)


class _Key:
    """A step under all that its code and its numbers depend on; shapes that only descriptors hold are no part."""

    def __init__(self, step: Step):
        self.step = step
        pointers = tuple((n, p.dtype, p.block) if isinstance(p, Tiles) else (n, p) for n, p in step.pointers.items())
        self.key = step.programs, pointers, *(tuple(d.items()) for d in (step.scalars, step.constants, step.options))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


@lru_cache(1024)
def _compiled(key: _Key, index: int) -> Compiled:
    return key.step.compiled(index)


@lru_cache(1024)
def _joining(key: _Key, index: int) -> Launch:
    return Launch(key.step, index)


@gluon.jit(do_not_specialize=["waves", "count", "height"])
def kernel(q_desc, k_desc, v_desc, o_ptr, lse_ptr, part_ptr, pages_ptr, work_ptr, waves, count, height, table_width,
           scale, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, WIDE: gl.constexpr,
           PAGE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, PDL: gl.constexpr):
    """Programs do their columns of the table of work. scale: of the scores, times log2(e). Launched with 4 warps, which
    are the first group. part_ptr: as in spread.py, or None where the result goes to o_ptr and lse_ptr at once."""
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, WIDE], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [QUERIES * GROUPS, ROWS, WIDE], shared)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, WIDE], shared)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, WIDE], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES * GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES * GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUERIES * GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    if GROUPS == 1:
        gl.warp_specialize([
            (consume, (o_ptr, lse_ptr, part_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, v_full,
                        waves, count, height, scale, 0, KV_HEADS, GROUP, WIDTH, QUERIES, PDL)),
            (produce, (q_desc, k_desc, v_desc, pages_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty,
                        k_full, v_full, waves, table_width, KV_HEADS, GROUP, PAGE, QUERIES, PDL)),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (consume, (o_ptr, lse_ptr, part_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, v_full,
                        waves, count, height, scale, 0, KV_HEADS, GROUP, WIDTH, QUERIES, PDL)),
            (consume, (o_ptr, lse_ptr, part_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, v_full,
                        waves, count, height, scale, 1, KV_HEADS, GROUP, WIDTH, QUERIES, PDL)),
            (produce, (q_desc, k_desc, v_desc, pages_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty,
                        k_full, v_full, waves, table_width, KV_HEADS, GROUP, PAGE, QUERIES, PDL)),
        ], [4, 1], [240, 24])
