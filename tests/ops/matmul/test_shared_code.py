"""The code that compilers make of a tree: run thread by thread with names for numbers, it is the order, plus for plus.

Eight chains of an eighth of k's products, each begun from zero, added in pairs: that no two leaves became one chain is
read from the PTX itself, leaves of 64 among them.
"""
import re

import pytest
from common import needs_compiler
from compiling import compile_ahead
from ptx import Chain, Load, Thread

from kernels.lab.proofs.generated_code import Job
from kernels.op import Shape
from kernels.ops.matmul.order import shared_order
from kernels.ops.matmul.schedule import Schedule

SMALL, OUTPUT, DOWN = "N=256,K=512,gpus=8", "N=4096,K=4096,gpus=8", "N=4096,K=14336,gpus=8"
CODE = [Job("matmul", shape, dtype, schedule, target) for shape, dtype, schedule, target in (
    (SMALL, "bfloat16", "pointer 16x16x32 warps=4 stages=4 group=1 swap", 90),
    (SMALL, "float16", "pointer 32x32x32 warps=4 stages=2 group=8", 80),
    (SMALL, "bfloat16", "pointer 32x64x16 warps=4 stages=3 group=8", 80),
    (SMALL, "bfloat16", "hopper 64x64x32 warps=4 stages=8 group=8 persistent", 90),
    ("N=256,K=768,gpus=8", "bfloat16", "pointer 32x32x32 warps=4 stages=2 group=8", 90),
    ("N=100,K=530,gpus=8", "bfloat16", "pointer 32x32x32 warps=4 stages=2 group=8", 80),
    ("N=256,K=512,gpus=8", "float32", "pointer 16x32x32 warps=4 stages=3 group=8", 90),
    (OUTPUT, "bfloat16", "pointer 16x32x256 warps=4 stages=6 group=1 swap", 90),
    (OUTPUT, "bfloat16", "hopper 16x64x128 warps=4 stages=8 group=1 swap persistent", 90),
    (OUTPUT, "float16", "hopper 64x128x64 warps=4 stages=8 group=8 persistent", 90),
    (DOWN, "bfloat16", "tma 64x64x128 warps=4 stages=6 group=1 swap", 90),
    (DOWN, "bfloat16", "hopper 64x64x128 warps=4 stages=6 group=8 persistent", 90),
    (DOWN, "bfloat16", "hopper 128x128x64 warps=8 stages=5 group=8 persistent store", 90))]
SPLIT = [Job("matmul", shape, dtype, schedule, target, second=second) for shape, dtype, schedule, target, second in (
    (SMALL, "bfloat16", "pointer 32x32x32 warps=4 stages=2 group=8 split", 80, False),
    (SMALL, "float32", "pointer 32x32x32 warps=4 stages=2 group=8 split", 90, False),
    (DOWN, "bfloat16", "tma 64x64x128 warps=4 stages=4 group=1 swap split", 90, False),
    (DOWN, "bfloat16", "tma 64x64x128 warps=4 stages=4 group=8 split reduce", 90, True))]
ELSEWHERE = [Job("matmul", shape, "bfloat16", schedule, 100) for shape, schedule in (
    (SMALL, "pointer 32x32x32 warps=4 stages=2 group=8"), (SMALL, "pointer 64x64x32 warps=4 stages=3 group=8 split"),
    (OUTPUT, "tma 64x64x64 warps=4 stages=6 group=8"))]
SEQUENCE = [Job("matmul", "N=512,K=4096", "bfloat16", "pointer 32x32x32 warps=4 stages=2 group=8", 90)]


@pytest.fixture(scope="module")
def compiled():
    every = CODE + SPLIT + ELSEWHERE + SEQUENCE
    return dict(zip(every, compile_ahead(every), strict=True))


def named(job):
    return f"sm_{job.target} {job.shape} {job.dtype} {job.schedule}"


def steps_of(job):
    """Products of a leaf: sixteen numbers of k each, or one."""
    shape = Shape.parse(job.shape)
    return shared_order(shape["N"], shape["K"]).length // (1 if job.dtype == "float32" else 16)


def run(code):
    """The first thread of the first program, where there is one tile; of a second launch, for 4096 numbers."""
    s, shape = Schedule.parse(code.job.schedule), Shape.parse(code.job.shape)
    if code.job.second:
        return Thread(code.ptx, [4096, 64])
    tree = "gpus" in shape
    rest = [shared_order(shape["N"], shape["K"]).length] if tree else [8, 512]
    strides = [shape["K"]] * 2 if s.kind == "pointer" else []
    numbers = [s.block_m, s.block_n, shape["K"], *(rest + strides if tree else strides + rest)]
    return Thread(code.ptx, numbers)


def tree_of(found):
    """((0, 1), (2, 3)), ((4, 5), (6, 7)) of nested sets of leaves, whichever side of a plus was written first."""
    if not isinstance(found, frozenset):
        return found
    return tuple(sorted((tree_of(each) for each in found), key=str))


PAIRS = (((0, 1), (2, 3)), ((4, 5), (6, 7)))


@needs_compiler
@pytest.mark.parametrize("job", CODE, ids=named)
def test_every_leaf_is_a_chain_from_zero_and_the_leaves_are_a_tree(job, compiled):
    thread, each = run(compiled[job]), steps_of(job)
    per_leaf, seen = thread.products // 8, set()

    def leaves(found):
        """Chains as the numbers of their leaves."""
        if isinstance(found, frozenset):
            return frozenset(map(leaves, found))
        assert isinstance(found, Chain) and found.length == each, found
        seen.add(found)
        return found.first // per_leaf

    assert thread.rounded and {tree_of(leaves(y)) for y in thread.rounded} == {PAIRS}
    assert per_leaf % each == 0 and len(seen) % 8 == 0


@needs_compiler
@pytest.mark.parametrize("job", SPLIT, ids=named)
def test_leaves_of_a_split_are_added_as_a_tree(job, compiled):
    """Whoever comes last, or a second kernel, loads eight numbers that lie as far apart as leaves do."""
    code, s = compiled[job], Schedule.parse(job.schedule)
    thread = run(code)
    apart, base = (4 * 4096, 1 << 40) if job.second else (4 * s.block_m * s.block_n, 5 << 40)
    if s.kind == "tma" and not job.second:
        base = 3 << 40  # two of the pointers are descriptors
    results = [y for y in thread.rounded if isinstance(y, frozenset)]
    chains = [y for y in thread.rounded if isinstance(y, Chain)]
    where = set()

    def leaves(found):
        if isinstance(found, frozenset):
            return frozenset(map(leaves, found))
        assert isinstance(found, Load), found
        where.add((found.address - base) % apart)
        return (found.address - base) // apart

    assert results and {tree_of(leaves(y)) for y in results} == {PAIRS} and len(where) == len(results)
    assert {c.length for c in chains} == (set() if job.second else {steps_of(job)})


@needs_compiler
def test_a_sequence_is_told_from_a_tree(compiled):
    """Inverse test: the order that adds eight segments one after the other, read in the same way."""
    thread = run(compiled[SEQUENCE[0]])
    found = tree_of(thread.rounded[0])
    assert found != PAIRS and str(found).count("Chain") == 8 and all(
        isinstance(each, Chain) and each.length == 32 for each in thread.rounded[0] if not isinstance(each, frozenset))


@needs_compiler
def test_nothing_else_rounds(compiled):
    for job, code in compiled.items():
        assert f".target sm_{job.target}" in code.ptx and code.shared_bytes <= 227 * 1024
        assert code.fused == 0 or job.dtype == "float32", job
        assert code.count(r"mul(\.rn)?\.f32") == 0 and code.flushes == 0 and not code.approximate, job
        assert not re.search(r"\btf32\b", code.ptx), job
