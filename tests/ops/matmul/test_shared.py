"""The order of products that GPUs may share: eight leaves of k added in pairs, and the parts that each GPU adds up.

In Triton's interpreter a 16-bit product is the tensor core's chain written out, so that schedules are compared on
numbers that round.
"""
import math
from dataclasses import replace

import pytest
import torch
from common import HERE, INF, NAN, both, dtypes, every_dtype, needs_triton, whole_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_product
from reference import product as pencil

from kernels import OPS, runtime
from kernels.bits import ADVERSARIAL, adversarial, check_invariance, digest, elements_differ, portable, same_bits
from kernels.ops.matmul import hopper_tree
from kernels.ops.matmul.gradients import Linear
from kernels.ops.matmul.order import Tree, asked, chain, is_tree, leaves, order, shared_order
from kernels.ops.matmul.product import Product, product_of
from kernels.ops.matmul.schedule import Schedule, Unsuitable
from kernels.ops.matmul.shared import SHARES, joined, share, shared_part
from kernels.ops.matmul.steps import kind_of, memory, steps

OP = OPS["matmul"]
sizes = {"m": st.integers(1, 5), "n": st.integers(1, 6), "k": st.integers(1, 900), "dtype": dtypes,
         "seed": st.integers(0, 99)}


def residue(m, n, k, dtype=torch.bfloat16, seed=0, device=HERE):
    """Inputs and their tree; the bias takes the first row's rounded sum away and leaves its last bits."""
    x, weight, _ = OP.inputs(m, f"N={n},K={k}", dtype, device, seed)
    tree = shared_order(n, k)
    return x, weight, -OP.python(x, weight, None, tree)[0], tree


# the order


def test_the_order_of_shapes_that_matter():
    """Written out, because changing one changes recorded bits."""
    lengths = {(4096, 4096): 512, (4096, 14336): 1792, (8192, 28672): 3584, (256, 512): 64, (256, 768): 96,
               (5120, 25600): 3200, (896, 896): 128, (2560, 9728): 1216, (7, 530): 96, (3, 40): 64, (3, 1): 64}
    assert {nk: shared_order(*nk) for nk in lengths} == {nk: (8, length, 3) for nk, length in lengths.items()}
    assert all(shared_order(*nk, gpus=1) == order(*nk) for nk in lengths)


@given(n=st.integers(1, 20_000), k=st.integers(0, 60_000))
def test_leaves_cover_k_and_follow_k_alone(n, k):
    tree = shared_order(n, k)
    assert tree.segments * tree.length >= k and tree.length % 32 == 0 and tree.length >= 64
    assert tree.length == 64 or 8 * (tree.length - 32) < k
    assert tree == shared_order(1, k, 8) == asked(list(tree), n, k)
    assert k % 256 or k < 512 or 8 * tree.length == k


@pytest.mark.parametrize("gpus", [0, 2, 4, 16, None, "8"])
def test_a_number_of_gpus_that_no_order_is_for_is_refused(gpus):
    with pytest.raises(ValueError, match=f"gpus must be 1 or 8.*got {gpus!r}"):
        shared_order(4096, 4096, gpus)


@needs_triton
@pytest.mark.parametrize("bad, message", [
    ((4, 128, 3), r"\(8, length, 3\).*got \(4, 128, 3\)"), ((8, 64, 2), r"\(8, length, 3\).*got \(8, 64, 2\)"),
    ((8, 48, 3), "at least 64.*got"), ((8, 80, 3), "multiple of 32.*got"),
    ((8, 64, 3), r"an eighth of k = 520, got \(8, 64, 3\)"), ((8, True, 3), "two integers .*three.*got"),
    ((8, 96.0, 3), "two integers .*three.*got"), ((8, 96, 3, 1), "two integers .*three.*got"), ("tree", "got 'tree'")])
@pytest.mark.parametrize("name", ["python", "triton"])
def test_a_tree_that_cannot_be_is_refused(bad, message, name):
    x, weight, _ = OP.inputs(2, "N=3,K=520", torch.float32, HERE)
    with pytest.raises((TypeError, ValueError), match=f"^order .*{message}"):
        OP.implementation(name)(x, weight, None, bad)


def test_a_shape_may_name_the_gpus():
    x, weight, bias, tree = OP.inputs(3, "N=4,K=520,bias,gpus=8", device="cpu")
    assert tree == (8, 96, 3) and is_tree(tree)
    assert OP.inputs(3, "N=4,K=520,gpus=1")[3] == order(4, 520) and len(OP.inputs(3, "N=4,K=520")) == 3
    assert same_bits(OP.python(x, weight, bias, tree), OP.python(x, weight, bias, [*tree]))


# the specification


def pairs(chains):
    """Eight numbers added as the docstring of order.py says, a plus for a plus."""
    a, b, c, d, e, f, g, h = chains
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@every_dtype
@pytest.mark.parametrize("k, length", [(512, 64), (530, 96), (768, 96), (449, 64), (40, 64)])
def test_the_specification_is_the_docstring(k, length, dtype):
    x, weight, bias, tree = residue(3, 5, k, dtype, device="cpu")
    assert tree.length == length
    total = pairs([chain(x[:, i : i + length], weight[:, i : i + length]) for i in range(0, 8 * length, length)])
    for b in (None, bias):
        wanted = (torch.zeros(3, 5) + total) + (0 if b is None else b.float())
        assert same_bits(OP.python(x, weight, b, tree), wanted.to(dtype))


def test_a_leaf_is_the_pencils_chain():
    x, weight, _ = OP.inputs(2, "N=3,K=600", torch.float32, "cpu")
    wanted = [pencil(OP, x[:, i : i + 96], weight[:, i : i + 96], None, [0]) for i in range(0, 600, 96)]
    assert same_bits(OP.python(x, weight, None, shared_order(3, 600)), pairs([*wanted, torch.zeros(2, 3)]))


@every_dtype
def test_a_tree_is_no_sequence(dtype):
    """Inverse test: eight leaves in sequence, one chain, and a tree of other neighbours have other bits."""
    x, weight, bias, tree = residue(1, 1024, 1024, dtype, device="cpu")
    wanted = OP.python(x, weight, bias, tree)
    parts = [chain(x[:, i : i + 128], weight[:, i : i + 128]) for i in range(0, 1024, 128)]
    crossed = (pairs([parts[i] for i in (0, 2, 1, 3, 4, 5, 6, 7)]) + bias.float()).to(dtype)
    for other in (OP.python(x, weight, bias, (8, 128)), OP.python(x, weight, bias, (1, 1024)), crossed):
        assert elements_differ(wanted, other) > 10


@both
@every_dtype
def test_a_sum_of_nothing_is_plus_zero(name, dtype):
    """Products that are -0, or negative and too small for a number."""
    k = 512 if runtime.HAS_GPU or name == "python" else 64
    x, weight = torch.zeros(2, k, dtype=dtype, device=HERE), -torch.ones(3, k, dtype=dtype, device=HERE)
    tiny = torch.finfo(torch.float32).smallest_normal if dtype != torch.float16 else 0
    for a, b in ((x, weight), (x + tiny, weight * tiny)):
        assert same_bits(OP.implementation(name)(a, b, None, shared_order(3, k)), torch.zeros_like(x[:, :3]))
    empty = OP.implementation(name)(x[:, :0], weight[:, :0], None, shared_order(3, 0))
    assert same_bits(empty, torch.zeros_like(x[:, :3]))
    assert OP.implementation(name)(x[:0], weight, None, shared_order(3, k)).shape == (0, 3)


# what each GPU adds up


@settings(deadline=None, max_examples=30)
@given(**sizes)
def test_parts_of_any_number_of_gpus_are_the_whole(m, n, k, dtype, seed):
    x, weight, bias, tree = residue(m, n, k, dtype, seed, "cpu")
    wanted = OP.python(x, weight, bias, tree)
    for gpus in SHARES:
        shares = [share(tree, k, gpus, rank) for rank in range(gpus)]
        assert [i for s in shares for i in range(k)[s]] == [*range(k)]
        parts = [shared_part(x[:, s], weight[:, s], tree, gpus) for s in shares]
        assert all(part.dtype == torch.float32 and part.shape == (m, n) for part in parts)
        assert same_bits(joined(parts, bias, dtype), wanted), gpus


@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_parts_are_the_whole_on_hostile_numbers(kind, dtype):
    x, weight, tree = adversarial(kind, 4, 530, dtype, "cpu"), adversarial(kind, 6, 530, dtype, "cpu", 1), Tree(8, 96)
    wanted = OP.python(x, weight, None, tree)
    for gpus in SHARES:
        shares = [share(tree, 530, gpus, rank) for rank in range(gpus)]
        parts = [shared_part(x[:, s], weight[:, s], tree, gpus) for s in shares]
        assert same_bits(joined(parts, None, dtype), wanted), gpus


def test_parts_in_another_order_are_another_sum():
    """Inverse test: what arrives is added by rank, not as it comes."""
    x, weight, bias, tree = residue(1, 512, 1024, torch.float32, device="cpu")
    parts = [shared_part(x[:, s], weight[:, s], tree, 8) for s in (share(tree, 1024, 8, r) for r in range(8))]
    assert elements_differ(joined(parts[1:] + parts[:1], bias), joined(parts, bias)) > 100
    assert elements_differ(sum(parts) + bias, joined(parts, bias)) > 100


def test_a_part_has_the_leading_dimensions_of_x_and_no_gradient():
    x, weight, _, tree = residue(6, 5, 512, torch.float32, device="cpu")
    part = shared_part(x.view(2, 3, 512)[..., :128].requires_grad_(), weight[:, :128], tree, 4)
    assert part.shape == (2, 3, 5) and not part.requires_grad
    assert same_bits(part.view(6, 5), leaves(x[:, :128].detach(), weight[:, :128], 64, 2))


X, W, TREE = torch.ones(2, 128), torch.ones(3, 128), Tree(8, 64)


@pytest.mark.parametrize("call, error, message", [
    (lambda: share(TREE, 512, 3, 0), ValueError, "gpus must be 1, 2, 4 or 8, got 3"),
    (lambda: share(TREE, 512, 4, 4), ValueError, "rank must be a whole number from 0 to 3, got 4"),
    (lambda: share(TREE, 512, 4, True), ValueError, "rank .*got True"),
    (lambda: share((8, 64), 512, 4, 0), TypeError, r"order must be a Tree.*got \(8, 64\)"),
    (lambda: shared_part(X, W, order(3, 512), 4), TypeError, "order must be a Tree.*got Order"),
    (lambda: shared_part(X, W, TREE, 8), ValueError, r"weight_part .*1 leaves of 64, got shape \(3, 128\)"),
    (lambda: shared_part(X, W[0], TREE, 4), ValueError, r"weight_part .*two dimensions.*\(128,\)"),
    (lambda: shared_part(X[:, 1:], W, TREE, 4), ValueError, r"x_part .*128.*\(2, 127\)"),
    (lambda: shared_part(X, W.bfloat16(), TREE, 4), TypeError, "weight_part .*x_part's dtype.*bfloat16"),
    (lambda: shared_part([1.0], W, TREE, 4), TypeError, "x_part must be a tensor, got list"),
    (lambda: joined([X, X, X]), ValueError, "parts must be 1, 2, 4 or 8 tensors.*got 3"),
    (lambda: joined([X, X.half()]), ValueError, "parts must be float32 of one shape, got torch.float16"),
    (lambda: joined([X, X[:1]]), ValueError, r"parts .*\(1, 128\) at 1 and torch.float32 \(2, 128\) at 0")])
def test_parts_that_cannot_be_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# schedules against the specification


@needs_triton
@every_dtype
@pytest.mark.parametrize("m, n, k", [(3, 20, 530), (2, 16, 768), (5, 5, 40)])
def test_every_schedule_is_the_specification(m, n, k, dtype):
    found = OP.schedules(f"N={n},K={k},gpus=8", dtype)
    if not runtime.HAS_GPU:  # a second each: every size and dtype has its share of them; float32 goes one k at a time
        found = [s for s in found if s.kind == "pointer"][n % 3 :: 3]
        n, k = (5, 64) if dtype == torch.float32 else (n, k)
    given_ = residue(m, n, k, dtype)
    wanted = OP.python(*given_)
    assert found
    for schedule in found:
        assert same_bits(OP.run_schedule(schedule, *given_), wanted), schedule


@needs_triton
@settings(deadline=None, max_examples=6)
@given(**{**sizes, "k": st.integers(1, 300), "dtype": st.sampled_from([torch.bfloat16, torch.float16])},
       schedule=st.sampled_from([
           Schedule("pointer", 16, 16, 32, 4, 2), Schedule("pointer", 16, 16, 32, 4, 2, swap=True, split=True),
           Schedule("pointer", 16, 16, 32, 4, 2, split=True, reduce=True)]))
def test_schedules_are_the_specification_at_any_size(m, n, k, dtype, seed, schedule):
    given_ = residue(m, n, k, dtype, seed)
    assert same_bits(OP.run_schedule(schedule, *given_), OP.python(*given_))


@needs_triton
@every_dtype
def test_calls_of_several_orders_are_not_taken_for_one_another(dtype):
    """In turn, on the same tensors; a list is the same order."""
    x, weight, bias, tree = residue(1, 16, 200, dtype)
    wanted = {given_: OP.python(x, weight, bias, given_) for given_ in (tree, (4, 64), (1, 200))}
    assert len({digest(y) for y in wanted.values()}) == 3 or dtype == torch.bfloat16
    for given_ in (*wanted, (4, 64), [8, 64, 3], (8, 64, 3)):
        assert same_bits(OP.triton(x, weight, bias, given_), wanted[tuple(given_)]), given_


@needs_triton
def test_torch_compile_sees_a_tree_as_integers():
    x, weight, bias, tree = residue(2, 5, 512, torch.float16)
    assert same_bits(torch.ops.same_bits.matmul(x, weight, bias, tree)[0], OP.python(x, weight, bias, tree))
    compiled = torch.compile(lambda x: OP.triton(x, weight, bias, tree) * 2, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x), OP.python(x, weight, bias, tree) * 2)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name, dtype", [("python", torch.float32), ("python", torch.float16),
                                         pytest.param("triton", torch.bfloat16, marks=needs_triton)])
def test_a_row_ignores_its_batch(name, dtype, bad):
    """Alone, in batches and beside rows of NaN."""
    call, (x, weight, bias, tree) = OP.implementation(name), residue(7, 6, 100, dtype)
    x[1::2] = bad
    report = check_invariance(call, (x, weight, bias, tree), OP.per_token,
                              [slice(0, 1), slice(0, 3), slice(2, 7), slice(4, 5)])
    assert report, str(report)


@both
def test_gradients_have_the_orders_they_have_without_a_tree(name):
    x, weight, bias = (t.requires_grad_() for t in OP.inputs(3, "N=4,K=72,bias", torch.float32, HERE))
    dy = portable(3, 4, torch.float32, HERE, 5)
    OP.implementation(name)(x, weight, bias, shared_order(4, 72)).backward(dy)
    found = [t.grad.clone() for t in (x, weight, bias)]
    Linear.apply(*(t.detach().requires_grad_() for t in (x, weight, bias)), None, OP.python)
    with torch.no_grad():
        ones = torch.ones(1, 3, device=HERE)
        wanted = (OP.python(dy, weight.t()), OP.python(dy.t(), x.t(), None, (1, 3)),
                  OP.python(dy.t(), ones, None, (1, 3))[:, 0])
    assert all(map(same_bits, found, wanted))


# schedules that do not suit


def product(k=4096, **changes):
    """300 tokens and a weight of 512 rows in bfloat16."""
    return replace(Product(300, 512, k, torch.bfloat16, (k, 1), (k, 1), shared_order(512, k), False), **changes)


@needs_triton
@pytest.mark.parametrize("line, message", [
    ("pointer 16x32x512 warps=4 stages=2 group=8", "block_k must divide.*512, at least twice"),
    ("pointer 16x32x1024 warps=4 stages=2 group=8 split", "block_k must divide.*512"),
    ("tma 64x64x64 warps=4 stages=4 group=8 persistent", "kind tma walks the leaves of one tile a program"),
    ("tma 64x64x64 warps=4 stages=4 group=8 store", "kind tma .*stores by pointer"),
    ("hopper 192x128x64 warps=12 stages=3 group=8 persistent", "kind hopper walks a tree with 4 or 8 warps"),
    ("hopper 128x256x64 warps=8 stages=3 group=8 persistent", "three and the sums that wait have room"),
    ("hopper 128x128x64 warps=8 stages=6 group=8 persistent", "three and the sums that wait have room"),
    ("hopper 64x80x64 warps=4 stages=4 group=8 persistent", "sides are powers of 2"),
    ("hopper 64x64x64 warps=4 stages=4 group=8 persistent stream", "a chain is carried over"),
    ("hopper 128x128x64 warps=8 stages=4 group=8 persistent pingpong", "take turns"),
    ("hopper 64x64x64 warps=4 stages=4 group=8 persistent split", "which a second kernel adds")])
def test_a_schedule_that_cannot_carry_out_a_tree_is_unsuitable(line, message):
    with pytest.raises(Unsuitable, match=message):
        steps(Schedule.parse(line), product())


@needs_triton
def test_a_tree_has_kernels_of_its_own_and_a_split_leaves_its_leaves_to_a_second_one():
    for kind in ("pointer", "tma", "hopper"):
        s = Schedule(kind, 64, 64, 64, 4, 4, persistent=kind == "hopper")
        alone, = steps(s, product())
        sequence, = steps(s, product(order=order(4096, 4096)))
        first, second = steps(replace(s, split=True, reduce=True), product())
        assert alone.kernel is not sequence.kernel and first.kernel is sequence.kernel
        assert "leaves" in second.kernel.fn.__module__ and second.constants == {"BLOCK": 1024, "BIAS": False}
        assert kind_of(s, product()).__name__.endswith(".hopper_tree" if kind == "hopper" else ".tree")
    assert memory(Schedule("pointer", 64, 64, 64, split=True), product()) == (8 * 5 * 8 * 64 * 64, 5 * 8)
    assert memory(s, product()) == (0, 0) and memory(replace(s, split=True, reduce=True), product())[0] == 8 * 300 * 512


@needs_triton
def test_sums_of_four_wait_in_shared_memory_where_registers_are_full():
    waits = {(64, 64, 4): False, (128, 64, 8): False, (64, 128, 4): True, (128, 128, 8): True, (16, 64, 4): False}
    for (m, n, warps), held in waits.items():
        s = Schedule("hopper", m, n, 64, warps, 4, swap=m == 16, persistent=True)
        assert steps(s, product())[0].constants["HELD"] == held
        assert hopper_tree.memory(s, product()) == (0, 0)


def test_a_product_of_a_tree_is_what_the_call_says():
    x, weight, bias, tree = residue(3, 5, 520, device="cpu")
    p = product_of(x, weight, bias, [*tree], 99, "bfloat16")
    assert (p.order, p.bias, p.multiprocessors, p.adder, p.cut) == (tree, True, 99, "bfloat16", True)
    assert is_tree(p.order) and product_of(x, weight, bias, (1, 520)) == Product.of(x, weight, bias, (1, 520))


# on a GPU, the same assertions on rounded numbers


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", ["N=4096,K=4096", "N=512,K=768", "N=100,K=1200", "N=333,K=904", "N=100,K=1001"])
def test_every_schedule_is_the_specification_on_a_gpu(shape, dtype):
    x, weight, _, tree = OP.inputs(150, f"{shape},gpus=8", dtype, HERE)
    columns = min(len(weight), 256)
    rows = torch.cat([x, *(adversarial(kind, 4, x.shape[1], dtype, HERE) for kind in ADVERSARIAL)])
    bias = portable(1, len(weight), dtype, HERE, 3)[0]
    total = torch.zeros(len(rows), columns, device=HERE) + leaves(rows, weight[:columns], tree.length)
    wanted = (total + bias[:columns].float()).to(dtype)
    last_bits, whole, ran = -OP.triton(x[:1], weight, None, tree)[0], None, 0
    residues = OP.triton(x[:1], weight, last_bits, tree)
    for schedule in OP.schedules(f"{shape},gpus=8", dtype):
        try:
            y = OP.run_schedule(schedule, rows, weight, bias, tree)
        except Unsuitable:
            assert schedule.kind != "pointer"
            continue
        ran, whole = ran + 1, y if whole is None else whole
        assert same_bits(y[:, :columns], wanted), schedule
        assert same_bits(y, whole), schedule
        assert same_bits(OP.run_schedule(schedule, x[:1].repeat(70, 1), weight, last_bits, tree),
                         residues.expand(70, -1)), schedule
    assert ran >= 5


@pytest.mark.gpu
@pytest.mark.parametrize("line", ["hopper 128x128x64 warps=8 stages=5 group=8 persistent store",
                                  "hopper 128x128x64 warps=8 stages=4 group=8 swap persistent store",
                                  "hopper 64x128x64 warps=4 stages=8 group=8 persistent"])
def test_sums_wait_for_every_tile_of_a_program(line):
    x, weight, _, tree = OP.inputs(9000, "N=1024,K=4096,gpus=8", torch.bfloat16, HERE)
    plain = Schedule("pointer", 32, 32, 32, 4, 2)
    last_bits = -OP.run_schedule(plain, x[:1], weight, None, tree)[0]
    wanted = OP.run_schedule(plain, x, weight, last_bits, tree)
    assert same_bits(OP.run_schedule(Schedule.parse(line), x, weight, last_bits, tree), wanted)


@pytest.mark.gpu
@every_dtype
def test_a_row_ignores_a_large_batch_on_a_gpu(dtype):
    batches = [slice(0, n) for n in (1, 2, 15, 16, 17, 33, 64, 65, 128, 129, 300, 513, 1024)] + [slice(700, 1100)]
    x, weight, _, tree = OP.inputs(1300, "N=1024,K=4096,gpus=8", dtype, HERE)
    report = check_invariance(OP.triton, (x, weight, None, tree), OP.per_token, batches)
    assert report, str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_a_captured_graph_has_the_bits_of_the_tree(tokens):
    x, weight, _, tree = OP.inputs(tokens, "N=4096,K=4096,gpus=8", torch.bfloat16, HERE)
    wanted = OP.triton(x, weight, None, tree)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = [OP.triton(x, weight, None, tree) for _ in range(3)]
    for _ in range(5):
        for y in results:
            y.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(y, wanted) for y in results)


@pytest.mark.gpu
def test_exact_sums_on_a_gpu():
    given_ = whole_inputs(200, 2100, 520)
    tree = shared_order(2100, 520)
    wanted = exact_product(*given_).bfloat16()
    assert math.prod(wanted.shape) == 420_000
    for schedule in OP.schedules("N=2100,K=520,gpus=8", torch.bfloat16):
        assert same_bits(OP.run_schedule(schedule, *given_, tree), wanted), schedule
