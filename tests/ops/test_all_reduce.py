"""Parts of 1, 2, 4 and 8 ranks: one result, whoever adds it; the part of a product that a rank makes; bad input."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from common import needs_compiler, needs_triton

from kernels import OPS, matmul
from kernels.bits import elements_differ, same_bits
from kernels.lab import records
from kernels.lab.parallel import work
from kernels.lab.parallel.processes import Processes
from kernels.ops.all_reduce import all_reduce, ranks
from kernels.ops.all_reduce.kernel import PARTS, RESULTS, filled, join
from kernels.ops.all_reduce.part import part
from kernels.ops.all_reduce.schedule import KINDS, Schedule, choose, every
from kernels.ops.matmul.order import shared_order
from kernels.ops.matmul.schedule import Schedule as Tiles
from kernels.ops.matmul.schedule import Unsuitable
from kernels.ops.matmul.shared import joined, share, shared_part
from tests.ops import ranks_all_reduce as on_ranks

SIZES = (1, 2, 4, 8)


# The words, on ranks.

@needs_triton
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens, n, dtype, bias", [(5, 24, torch.bfloat16, True), (8, 16, torch.float32, False)])
def test_every_schedule_has_the_specifications_bits_on_every_rank(size, tokens, n, dtype, bias, processes):
    answers = processes.run(on_ranks.words, tokens, n, dtype, bias, size=size)
    parts, given = zip(*(on_ranks.of_rank(rank, tokens, n) for rank in range(size)), strict=True)
    expected = joined(parts, given[0].to(dtype) if bias else None, dtype)
    for result, same, default in answers:
        assert same_bits(result, expected)
        torch.testing.assert_close(default, expected, rtol=4e-2, atol=4e-2)
        assert len(same) == 1 + len(every(False)) and all(same.values()), same
    assert result.abs().max() > 0


def test_one_product_has_one_result_and_the_default_has_several(processes):
    ours, default = ([processes.run(work.product, ops, size=size) for size in SIZES]
                     for ops in ("invariant", "default"))
    x, weight, _, order = matmul.inputs(4, work.PRODUCT, torch.float32)
    whole = matmul.python(x, weight, None, order)
    for answers in ours:
        assert all(same_bits(y, whole) for y in answers)
    assert all(same_bits(y, answers[0]) for answers in default for y in answers)  # all ranks of one run agree
    assert len({y[0].numpy().tobytes() for y in default}) > 1


@pytest.mark.parametrize("size, tree", [(2, "0+1"), (4, "(0+1)+(2+3)"), (8, "((0+1)+(2+3))+((4+5)+(6+7))")])
def test_the_order_is_found_by_probing(size, tree, processes):
    sizes = processes.run(work.merged, "invariant", 3, size=size)[0]
    assert {work.tree_of(sizes, element) for element in range(3)} == {tree}


@pytest.mark.parametrize("sizes, tree", [
    ([[1, 2, 3], [2, 1, 3], [3, 3, 1]], "(0+1)+2"), ([[1, 3, 3], [3, 1, 3], [3, 3, 1]], "0+1+2"),
    ([[1, 4, 2, 4], [4, 1, 4, 2], [2, 4, 1, 4], [4, 2, 4, 1]], "(0+2)+(1+3)"), ([[1]], "0")])
def test_a_tree_is_read_from_where_parts_meet(sizes, tree):
    assert work.tree_of(torch.tensor(sizes)[:, :, None]) == tree


def test_no_tokens_give_an_empty_result(processes):
    assert processes.run(on_ranks.numbers_only, size=2) == [[(0, 8)] * 2] * 2


@pytest.mark.parametrize("kind, said", [
    ("bfloat16", "TypeError: part must be float32, which is rounded once after the last addition, got torch.bfloat16"),
    ("no tensor", "TypeError: part must be a tensor (..., N) of bfloat16, float16, float32, got list"),
    ("bias", "ValueError: bias must have shape (8,) on cpu, the N of part, got (3,) on cpu"),
    ("dtype", "TypeError: dtype must be one of bfloat16, float16, float32 or None, got torch.int32"),
    ("symmetric", "ValueError: schedule must be of kind gather or scatter where memory is not symmetric, got one_shot"),
    ("schedule", "TypeError: schedule must be a Schedule of all_reduce, got str 'gather'")])
def test_bad_input_is_said_by_name_before_anything_is_sent(kind, said, processes):
    assert all(answer.startswith(said) for answer in processes.run(on_ranks.refused, kind, size=2))


def test_a_process_that_is_no_rank_is_told_so():
    with pytest.raises(RuntimeError, match="this process is no rank: start it by torchrun"):
        all_reduce.python(torch.zeros(1, 4))


def test_another_number_of_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda group=None: 3)
    for word in (all_reduce.python, all_reduce.triton):
        with pytest.raises(ValueError, match="group must have 1, 2, 4 or 8 ranks, .* got 3"):
            word(torch.zeros(1, 4))


def test_it_is_an_op_by_its_words_and_not_in_ops():
    assert set(all_reduce.implementations) == {"cuda", "python", "triton"} and all_reduce.name not in OPS


@pytest.mark.parametrize("text", ["gather", "ring block=64 warps=1", "gather block=0 warps=4",
                                  "gather block=96 warps=1"])
def test_a_schedule_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="must"):
        Schedule.parse(text)


def test_a_schedule_prints_as_it_is_parsed_and_is_chosen_by_size():
    assert all(Schedule.parse(str(s)) == s for s in every(True)) and {s.kind for s in every(True)} == set(KINDS)
    assert [choose(n, 2, symmetric).kind for symmetric in (True, False) for n in (4096, 1 << 22, 1 << 24)] == [
        "one_shot", "two_shot", "push", "gather", "scatter", "scatter"]


# A rank that ends, or does not come.

def test_a_rank_that_ends_or_is_late_is_an_error_on_all_others():
    with Processes(2, timeout=2) as two:
        with pytest.raises(RuntimeError, match=r"process 0 of 2 rank 0 of 2 was in all_gather, and another rank ended "
                                               r"or did not come in time \("):
            two.run(on_ranks.sleeps, 1, 5)
        with pytest.raises(RuntimeError, match="these processes can do no more, for process 0 lost: start others"):
            two.run(on_ranks.numbers_only)
    with Processes(2, timeout=20) as two, \
            pytest.raises(RuntimeError, match="process 1 of 2 ended while it worked; rank 0 of 2 was in all_gather"):
        two.run(on_ranks.leaves, 1, seconds=30)


def test_processes_go_on_behind_an_error_and_end_with_one_that_is_late():
    with Processes(1) as one:
        with pytest.raises(ValueError, match="size must be one of 1, got 2"):
            one.run(on_ranks.numbers_only, size=2)
        with pytest.raises(RuntimeError, match="process 0 of 1 raised KeyError: 'this one'"):
            one.run(on_ranks.fails, "this one")
        assert one.run(on_ranks.numbers_only) == [[(0, 8)] * 2]
        with pytest.raises(RuntimeError, match=r"process 0 of 1 did not answer in 0.2 seconds"):
            one.run(on_ranks.sleeps, 0, 2, seconds=0.2)
        with pytest.raises(RuntimeError, match="these processes can do no more, for process 0 late: start others"):
            one.run(on_ranks.numbers_only)


@pytest.mark.parametrize("count", [0, 3, 16])
def test_another_number_of_processes_is_refused(count):
    with pytest.raises(ValueError, match="count must be 1, 2, 4 or 8 processes"):
        Processes(count)


# The part of a product.

@needs_triton
@pytest.mark.parametrize("gpus", SIZES[1:])
@pytest.mark.parametrize("tiles", [None, Tiles("pointer", 16, 16, 32, swap=True)], ids=str)
def test_a_part_is_the_ranks_own_leaves(gpus, tiles):
    """K is 530: the last leaves are short or empty."""
    x, weight, bias, order = matmul.inputs(3, "N=20,K=530,gpus=8,bias", torch.bfloat16)
    shares = [share(order, 530, gpus, rank) for rank in range(gpus)]
    parts = [part(x[:, mine], weight[:, mine], order, gpus, schedule=tiles) for mine in shares]
    assert all(p.dtype == torch.float32 for p in parts)
    assert sum(elements_differ(p, shared_part(x[:, mine], weight[:, mine], order, gpus) + 0.0)
               for p, mine in zip(parts, shares, strict=True)) == 0
    assert same_bits(joined(parts, bias, torch.bfloat16), matmul.python(x, weight, bias, order))


@pytest.mark.parametrize("change, said", [
    ({"gpus": 1}, "gpus must be 2, 4 or 8"), ({"gpus": 3}, "gpus must be 2, 4 or 8"),
    ({"order": (1, 512)}, "order must be a Tree"), ({"k": 300}, "K up to 4 leaves of 64"),
    ({"out": torch.zeros(2, 16, dtype=torch.bfloat16)}, r"out must be contiguous float32 \(2, 16\) on cpu")])
@needs_triton
def test_bad_parts_are_refused(change, said):
    k = change.pop("k", 256)
    x, weight = torch.zeros(2, k, dtype=torch.bfloat16), torch.zeros(16, k, dtype=torch.bfloat16)
    with pytest.raises((TypeError, ValueError), match=said):
        part(x, weight, **{"order": shared_order(16, 512), "gpus": 2, **change})


@needs_triton
@pytest.mark.parametrize("tiles", ["tma 64x64x64 warps=4 stages=4 group=8",
                                   "pointer 16x16x128 warps=4 stages=2 group=8",
                                   "pointer 16x16x32 warps=4 stages=2 group=8 split"])
def test_tiles_that_cannot_make_a_part_are_refused(tiles):
    x, weight = torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(16, 256, dtype=torch.bfloat16)
    with pytest.raises(Unsuitable):
        part(x, weight, shared_order(16, 512), 2, schedule=Tiles.parse(tiles))


@needs_triton
def test_every_place_gets_the_sum():
    parts, places = [torch.full((16,), 1.0 + i) for i in range(2)], [torch.zeros(16) for _ in range(8)]
    memory = {**dict(zip(PARTS, filled(parts), strict=True)), "bias_ptr": places[0],
              **dict(zip(RESULTS, places, strict=True))}
    join(2, 8, 0, 16, 8, torch.float32, None, 16, 4).interpret(memory)
    assert all((place == 3.0).all() for place in places)


# The generated code.

COMPILED = """
import json
import torch
from triton.runtime import driver
from kernels.lab.proofs.generated_code import Absent, bare_ptx
from kernels.ops.all_reduce import part
from kernels.ops.all_reduce.kernel import join
from kernels.ops.matmul.order import Order
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import Schedule, Unsuitable

def ptx(step, target):
    driver.set_active(Absent(target))
    made = step.kernel.warmup(*step.examples("cpu"), *step.arguments(target >= 90), grid=(1,),
                              **step.compile_options(target >= 90))
    return bare_ptx(made.asm["ptx"])

found = {}
for parts in (2, 4, 8):
    found[f"join {parts}"] = ptx(join(parts, parts, 0, 4096, 64, torch.bfloat16, None, 128, 4), 90)
for leaves in (1, 2, 4):
    shape = (leaves * 64, 1)
    product = Product(64, 64, leaves * 64, torch.bfloat16, shape, shape, Order(leaves, 64), False)
    for tiles in ("pointer 32x32x32 warps=4 stages=2 group=8", "hopper 64x64x32 warps=4 stages=4 group=8 persistent"):
        found[f"{tiles.split()[0]} {leaves}"] = ptx(part.step(Schedule.parse(tiles), product), 90)

def waits(leaves):
    shape = (leaves * 64, 1)
    product = Product(64, 256, leaves * 64, torch.bfloat16, shape, shape, Order(leaves, 64), False)
    try:
        part.step(Schedule.parse("hopper 64x256x32 warps=4 stages=4 group=8 persistent"), product)
    except Unsuitable as error:
        return "sums that wait have room" in str(error)

found["no room"] = [leaves for leaves in (1, 2, 4) if waits(leaves)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=records.ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_compiler
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_adding_kernel_adds_a_tree_and_fuses_nothing(parts, compiled):
    from tests.ops.matmul.ptx import Load, Thread

    code = compiled[f"join {parts}"]
    thread = Thread(code, [0, 4096, 64])

    def read(found):
        if isinstance(found, frozenset):
            return tuple(sorted(map(read, found), key=str))
        assert isinstance(found, Load), found
        return (found.address >> 40) - 1  # the pointer's number

    pairs = {2: (0, 1), 4: ((0, 1), (2, 3)), 8: (((0, 1), (2, 3)), ((4, 5), (6, 7)))}[parts]
    assert thread.rounded and {read(y) for y in thread.rounded if y is not None} == {pairs}
    assert "fma" not in code and ".ftz" not in code and "multimem" not in code
    loads = re.findall(r"ld\.global\S*", code)
    assert len(loads) >= parts and all(".cg" in load for load in loads)  # not through L1: others have written it


@needs_compiler
def test_a_large_tile_has_no_room_for_sums_that_wait(compiled):
    assert compiled["no room"] == [2, 4]


@needs_compiler
@pytest.mark.parametrize("kind", ["pointer", "hopper"])
@pytest.mark.parametrize("leaves", [1, 2, 4])
def test_a_parts_leaves_are_chains_from_zero_added_in_pairs(kind, leaves, compiled):
    from tests.ops.matmul.ptx import Chain, Thread

    strides = [leaves * 64] * 2 if kind == "pointer" else []
    sides = [32, 32] if kind == "pointer" else [64, 64]
    thread = Thread(compiled[f"{kind} {leaves}"], [*sides, leaves * 64, 64, *strides])
    each = thread.products // leaves

    def read(found):
        if isinstance(found, frozenset):
            return tuple(sorted(map(read, found), key=str))
        assert isinstance(found, Chain) and found.length == 4, found
        return found.first // each

    pairs = {1: 0, 2: (0, 1), 4: ((0, 1), (2, 3))}[leaves]
    assert thread.rounded and {read(y) for y in thread.rounded} == {pairs}


# On two GPUs.

TWO_GPUS = """
import torch
from kernels import matmul
from kernels.bits import same_bits
from kernels.model import parallel
from kernels.ops.all_reduce import all_reduce
from kernels.ops.all_reduce.part import choose, part, product_of
from kernels.ops.matmul.order import Order
from kernels.ops.matmul.shared import share, shared_part

ranks = parallel.join("cuda", 60)
found = all_reduce.schedules(ranks.device)
assert {s.kind for s in found} == {"gather", "scatter", "one_shot", "two_shot", "push"}, found
for tokens, n in ((1, 4096), (7, 4096), (64, 4096), (513, 4096), (5, 24)):
    given = all_reduce.inputs(tokens, f"N={n}", ranks.device, ranks.rank)[0]
    bias = torch.ones(n, dtype=torch.bfloat16, device=ranks.device)
    expected = all_reduce.python(given, bias, torch.bfloat16)
    for schedule in found:
        for again in range(3):
            assert same_bits(all_reduce.run_schedule(schedule, given, bias, torch.bfloat16), expected), schedule
    graph = torch.cuda.CUDAGraph()
    y = all_reduce.triton(given, bias, torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = all_reduce.triton(given, bias, torch.bfloat16)
    for again in range(5):
        graph.replay()
        assert same_bits(y, expected), tokens
for tokens in (1, 16, 64, 128, 512):
    x, weight, _, order = matmul.inputs(tokens, "N=4096,K=4096,gpus=8", torch.bfloat16, ranks.device)
    mine = share(order, 4096, ranks.size, ranks.rank)
    x, weight = x[:, mine].contiguous(), weight[:, mine].contiguous()
    expected = shared_part(x, weight, order, ranks.size) + 0.0
    product = product_of(x, weight, Order(8 // ranks.size, order.length))
    for schedule in (None, *choose(product, ranks.device.index)):
        assert same_bits(part(x, weight, order, ranks.size, schedule=schedule), expected), (tokens, schedule)
parallel.leave()
print(f"rank {ranks.rank} is done")
"""


@pytest.mark.gpu
def test_two_gpus_have_the_specifications_bits_in_every_schedule(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "two.py").write_text(TWO_GPUS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(tmp_path / "two.py")], cwd=records.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is done") == 2


# Groups of one.

@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_triton
def test_one_rank_alone_sends_nothing_and_rounds_once(alone):
    given = all_reduce.inputs(3, "N=16")[0]
    assert ranks.size() == 1
    for word in all_reduce.implementations.values():
        assert same_bits(word(given, None, torch.bfloat16), given.bfloat16())
        assert word(given).data_ptr() != given.data_ptr()  # the default's sum is in place, and not in the caller's
    with pytest.raises(RuntimeError, match="this process is no rank of the group"):
        all_reduce.python(given, group=dist.GroupMember.NON_GROUP_MEMBER)
    assert all_reduce.room((3, 16), "cpu").shape == (3, 16)
    assert all_reduce.schedule(3, "N=16", "cpu") == "gather block=512 warps=4"
    assert all_reduce.work(3, "N=16").bytes == 3 * 16 * 6

