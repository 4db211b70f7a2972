"""The demos of notebook 02: each source moves bits where it must, and what stops it does."""
from __future__ import annotations

import ast
import math
import re

import nbformat
import pytest
import torch

from kernels import bits, rms_norm, runtime
from kernels.arithmetic import sums
from kernels.lab import records
from kernels.lab.atlas import measure as atlas
from kernels.lab.notebook import exercises
from kernels.lab.notebook import run as notebook
from kernels.lab.sources import chart as sources_chart
from kernels.lab.sources import claims as sources
from kernels.lab.sources import collectives as sources_collectives
from kernels.lab.sources import device, server
from kernels.lab.sources import host as sources_host

HERE = runtime.device()
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "-")


# Sorting by bits.

def test_group_puts_the_same_bits_together_and_keeps_the_labels_in_order():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0])
    assert device.group({1: a, 2: b, 3: a.clone(), 4: b.clone()}) == [[1, 3], [2, 4]]
    assert device.group({}) == []


def test_digests_counts_the_results_of_a_call():
    results = iter([torch.zeros(1), torch.ones(1), torch.zeros(1)])
    assert len(device.digests(lambda: next(results), runs=3)) == 2


# Atomic additions.

def test_block_sums_are_the_pairwise_sums_of_blocks():
    x = bits.portable(1, 8 * device.BLOCK, device=HERE)[0]
    assert bits.same_bits(device.block_sums(x), sums.add_neighbours(x.view(8, -1))[:, 0])


def test_block_sums_without_triton_are_the_same(monkeypatch):
    x = bits.portable(1, 4 * device.BLOCK, device=HERE)[0]
    kernel = device.block_sums(x)
    monkeypatch.setattr(runtime, "WHY_NOT", "no Triton")
    assert bits.same_bits(device.block_sums(x), kernel)
    with pytest.raises(runtime.Unavailable, match="no Triton"):
        device.atomic_sum(x)


@needs_triton
def test_atomic_sum_is_the_sum():
    x = bits.portable(1, 4 * device.BLOCK, device=HERE)[0]
    assert math.isclose(device.atomic_sum(x).item(), x.double().sum().item(), rel_tol=1e-4)


@pytest.mark.gpu
def test_atomics_race_on_a_gpu_and_own_cells_do_not():
    x = bits.portable(1, 4096 * device.BLOCK, device=HERE)[0]
    assert len(device.digests(lambda: device.atomic_sum(x), runs=40)) > 1
    assert len(device.digests(lambda: sums.ordered_sum(device.block_sums(x)), runs=40)) == 1


@pytest.mark.parametrize("shape", [(0,), (1000,), (2, 1024)])
def test_block_sums_names_a_bad_shape(shape):
    with pytest.raises(ValueError, match="x must have one dimension, a multiple of 1024 long, got shape"):
        device.block_sums(torch.zeros(shape))


@pytest.mark.parametrize("call", [device.block_sums, device.atomic_sum, device.tf32])
@pytest.mark.parametrize("x, what", [(torch.zeros(1024, dtype=torch.float64), "torch.float64"),
                                     (torch.zeros(1024, dtype=torch.bfloat16), "torch.bfloat16"), ([0.0], "list")])
def test_numbers_of_another_dtype_are_named(call, x, what):
    with pytest.raises(TypeError, match=f"x must be a float32 tensor, got {what}"):
        call(x)


def test_the_order_of_arrival_decides_the_bits_and_a_seed_decides_the_order():
    parts = bits.portable(1, 64)[0]
    assert len(device.group({seed: device.sum_on_arrival(parts, seed) for seed in range(20)})) > 1
    assert bits.same_bits(device.sum_on_arrival(parts, 3), device.sum_on_arrival(parts, 3))


# Products and attention.

def test_ordered_product_is_the_product_and_invariant():
    x, w = bits.portable(9, 96, device=HERE), bits.portable(96, 20, device=HERE, seed=1)
    assert torch.allclose(device.ordered_product(x, w).double(), x.double() @ w.double(), atol=1e-5)
    assert bits.check_invariance(device.ordered_product, (x, w))


def test_ordered_attention_is_attention_and_takes_any_number_of_queries():
    q, k, v = (bits.portable(n, 32, device=HERE, seed=n) for n in (7, 50, 51))
    v = v[:50]
    whole = device.ordered_attention(q, k, v)
    reference = torch.nn.functional.scaled_dot_product_attention(*(t.double()[None] for t in (q, k, v)))[0]
    assert torch.allclose(whole.double(), reference, atol=1e-5)
    for n in (1, 2, 5):
        assert bits.same_bits(device.ordered_attention(q[-n:], k, v), whole[-n:])


def test_a_split_product_moves_with_its_parts_and_not_with_its_batch():
    x, w = bits.portable(8, 512, device=HERE), bits.portable(512, 32, device=HERE, seed=1)
    assert len(device.group({parts: device.split_product(x, w, parts) for parts in (1, 2, 4, 8)})) > 1
    assert bits.check_invariance(lambda rows: device.split_product(rows, w, 4), (x,))


def test_padding_on_the_right_is_neutral_and_on_the_left_is_not():
    row = bits.portable(1, 3000)[0]
    alone, right, left = (sums.ordered_sum(torch.nn.functional.pad(row, pad)) for pad in ((0, 0), (0, 72), (72, 0)))
    assert bits.same_bits(alone, right) and not bits.same_bits(alone, left)


# Precision.

def test_tf32_is_the_nearest_number_with_ten_stored_bits():
    x = torch.cat([bits.portable(1, 4096, device=HERE)[0], torch.tensor([0.0, -0.0, 1.0, -2.0, 3e38], device=HERE)])
    rounded = device.tf32(x)
    assert (rounded.view(torch.int32) & 0x1FFF == 0).all()
    mantissa, exponent = torch.frexp(x.double())
    assert torch.equal(rounded.double(), torch.ldexp((mantissa * 2.0**11).round(), exponent - 11))
    assert bits.same_bits(device.tf32(rounded), rounded)


def test_tf32_breaks_ties_to_even_and_keeps_infinities_and_nan():
    half = 2.0**-11
    x = torch.tensor([1 + half, 1 + 3 * half, float("inf"), -float("inf"), float("nan")])
    expected = torch.tensor([1.0, 1 + 4 * half, float("inf"), -float("inf"), float("nan")])
    assert bits.same_bits(device.tf32(x), expected)


def test_the_switches_are_put_back_even_after_an_error():
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(ZeroDivisionError), device.float32_precision("medium"), device.bfloat16_partial_sums(False):
        assert torch.get_float32_matmul_precision() == "medium"
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        raise ZeroDivisionError
    after = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert before == after
    with pytest.raises(ValueError, match="name must be one of highest, high, medium, got 'low'"), \
            device.float32_precision("low"):
        pass


def test_parts_kept_in_bfloat16_cost_accuracy():
    x = bits.portable(4, 1024, torch.bfloat16).float()
    w = bits.portable(1024, 16, torch.bfloat16, seed=1).float()
    exact = x.double() @ w.double()
    wide, narrow = (device.split_product(x, w, 8, keep).double() for keep in (torch.float32, torch.bfloat16))
    assert (narrow - exact).abs().mean() > 100 * (wide - exact).abs().mean()


# The choice of a kernel.

def test_convolutions_agree_but_for_rounding():
    images = bits.portable(1, 4 * 8 * 8, device=HERE).view(1, 4, 8, 8)
    found = device.convolutions(images, bits.portable(6, 36, device=HERE, seed=1).view(6, 4, 3, 3))
    one, other = found.values()
    assert torch.allclose(one, other, atol=1e-4) and all("DNN" in name for name in found)


def test_the_tile_is_the_order():
    rows = bits.portable(8, 4096, device=HERE)
    assert len(device.group({tile: device.tiled_sum(rows, tile) for tile in (64, 256, 1024)})) == 3
    assert bits.same_bits(device.tiled_sum(rows, sums.CHUNK), sums.ordered_sum(rows)[:, 0])


def test_a_race_goes_to_the_faster():
    def slow():
        torch.linspace(0, 1, 1 << 21).sort()

    assert device.race({"slow": slow, "fast": lambda: None}) == "fast"


def test_what_cannot_be_compiled_says_why():
    def broken(x):
        raise TypeError("no such thing")

    torch._dynamo.reset()
    assert device.compiled(broken, (torch.ones(1),)).startswith("not here: ")


# Threads, vector units, versions.

def test_threads_are_put_back_and_do_not_move_our_order():
    before = torch.get_num_threads()
    row = bits.portable(1, 1 << 18)[0]
    found = sources_host.by_threads(lambda: (sums.ordered_sum(row), torch.tensor(torch.get_num_threads())))
    assert [count.item() for _, count in found.values()] == list(found) == [1, 2, 3, 4]
    assert len(device.group({count: total for count, (total, _) in found.items()})) == 1
    assert torch.get_num_threads() == before


def test_another_vector_unit_keeps_the_specification():
    here = sources_host.digests()
    narrow = sources_host.elsewhere(sources_host.VECTOR_UNITS["SSE4"])
    assert list(narrow) == list(here) == list(sources_host.DEFAULTS)
    assert narrow[sources_host.SPECIFICATION] == here[sources_host.SPECIFICATION]


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET.*: .*"):
        sources_host.elsewhere({"PYTHONPATH": "", "TRITON_INTERPRET": "1", "PYTHONHOME": "/nowhere"})


def test_versions_of_another_device_stay_out(tmp_path):
    for name, cpu, version, digest in (("cpu-x", "one", "2.9.0+cpu", "a"), ("cpu-x-2", "one", "2.13.1", "b"),
                                          ("cpu-x-3", "two", "2.10.0", "c"), ("cpu-xy", "one", "2.10.0", "d")):
        rows = [{"op": op, "torch": version, "capability": "X", "digest": digest * 64} for op in sources_host.DEFAULTS]
        sources_host.HOST_DIGESTS.merge(tmp_path / name, rows)
        (tmp_path / name / "machine.json").write_text(f'{{"device": "{cpu}"}}')
    table = sources_host.by_version("cpu-x", tmp_path)
    assert list(table.columns) == ["2.9.0", "2.13.1"] and list(table.iloc[0]) == ["a" * 8, "b" * 8]
    with pytest.raises(FileNotFoundError, match="no host_digests.csv is recorded for cpu-y"):
        sources_host.by_version("cpu-y", tmp_path)


def test_recorded_versions_reproduce_the_specification():
    table = sources_host.by_version()
    assert list(table.index) == list(sources_host.DEFAULTS) and table.shape[1] >= 2
    assert table.notna().all(axis=None)
    specification = sources_host.digests()[sources_host.SPECIFICATION][:8]
    assert set(table.loc[sources_host.SPECIFICATION]) == {specification}


def test_recording_digests_writes_a_folder(tmp_path):
    folder = tmp_path / sources_host.record(tmp_path)
    rows = sources_host.HOST_DIGESTS.read(folder)
    assert dict(zip(rows.op, rows.digest, strict=True)) == sources_host.digests()
    assert set(rows.torch) == {torch.__version__} and (folder / "machine.json").exists()


# Processes.

@pytest.fixture(scope="module")
def worlds():
    return sources_collectives.run()


def test_all_reduce_moves_with_the_number_of_processes_and_the_ordered_sum_does_not(worlds):
    assert {way: list(results) for way, results in worlds.items()} == {"all_reduce": [1, 2, 4], "in_order": [1, 2, 4]}
    assert len(device.group(worlds["all_reduce"])) > 1
    assert len(device.group(worlds["in_order"])) == 1


def test_every_world_gives_the_product(worlds):
    x, w = sources_collectives.inputs()
    exact = x.double() @ w.double()
    for results in worlds.values():
        assert all(torch.allclose(y.double(), exact, atol=1e-4) for y in results.values())
    alone = sources_collectives.add_in_sequence(sources_collectives.segment_products(x, w))
    assert bits.same_bits(worlds["in_order"][4], alone)


def test_a_failing_process_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    monkeypatch.setattr(sources_collectives.sys, "platform", "elsewhere")
    with pytest.raises(RuntimeError, match="the processes failed: .*no-such-interface"):
        sources_collectives.run()


# The server and its samples.

def requests(*arrivals):
    return [server.Request(prompt, tick) for prompt, tick in enumerate(arrivals)]


def test_the_server_answers_everybody_in_batches_formed_by_arrival():
    first, second, late = server.serve(requests(0, 2, 100), server.invariant_product, length=5)
    assert (first.batches, second.batches, late.batches) == ([1, 1, 2, 2, 2], [2, 2, 2, 1, 1], [1] * 5)
    assert all(len(r.text) == 5 and r.text.islower() for r in (first, second, late))


def test_the_server_takes_at_most_its_largest_batch():
    answers = server.serve(requests(*[0] * 10), server.invariant_product, length=3)
    assert [r.batches for r in answers[:8]] == [[8] * 3] * 8 and answers[9].batches == [2] * 3


def test_a_moving_product_changes_the_text_and_the_invariant_one_does_not():
    crowds = [server.alone(), server.crowd(1, others=4)]
    assert len({server.serve(crowd, server.split_by_batch)[0].text for crowd in crowds}) == 2
    assert len({server.serve(crowd, server.invariant_product)[0].text for crowd in crowds}) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_bit_becomes_another_letter_within_20(seed):
    """The notebook's three crowds, with a product that rounds otherwise beside a neighbour."""
    def nudged(x, w):
        y = server.invariant_product(x, w)
        return torch.nextafter(y, y + (len(x) > 1)) if len(x) > 1 else y

    for product in (server.split_by_batch, nudged):
        alone, crowd = (server.serve(requests, product, length=20)[0].text
                        for requests in (server.alone(), server.crowd(seed)))
        assert alone != crowd and alone[0] == crowd[0]


def test_the_same_crowd_gives_the_same_text():
    one, two = (server.serve(server.crowd(2, others=6), server.split_by_batch, length=30)[0] for _ in range(2))
    assert one == two and len(set(one.batches)) > 1


@pytest.mark.gpu
def test_the_invariant_text_is_the_same_on_a_cpu():
    one, two = (server.serve(server.crowd(2), server.invariant_product, device=d)[0] for d in ("cuda", "cpu"))
    assert one == two


def test_the_product_that_the_notebook_serves_with_moves():
    _, product = server.moving_product()
    w = server.model()
    x = bits.portable(server.LARGEST_BATCH, server.WIDTH, device=w.device)
    assert len(device.group({n: product(x[:n], w)[:1] for n in range(1, 9)})) > 1


def test_a_default_that_moves_nothing_is_replaced_and_said(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__matmul__", server.invariant_product)
    name, product = server.moving_product()
    assert product is server.split_by_batch and "moved nothing here" in name


def test_a_shared_generator_gives_the_neighbours_our_numbers_and_a_counter_does_not():
    weights = bits.portable(1, 50, device=HERE)[0].abs()
    weights = weights / weights.sum()
    shared, own = ({tuple(sample(weights, n, steps=8)) for n in (0, 1, 3, 7)}
                   for sample in (server.sample_shared, server.sample_by_counter))
    assert len(shared) > 1 and len(own) == 1


def test_the_counter_draws_what_the_probabilities_say():
    weights = torch.tensor([0.1, 0.0, 0.9], device=HERE)
    tokens = [server.sample_by_counter(weights, 0, 1, seed)[0] for seed in range(400)]
    assert 1 not in tokens and 340 < tokens.count(2) < 380
    draws = [server.uniform(0, step) for step in range(1000)]
    assert 0 <= min(draws) < max(draws) < 1 and len(set(draws)) == 1000


@pytest.mark.parametrize("draw, token", [(0.0, 1), (0.5, 2), (1 - 2.0**-32, 2)])
def test_no_draw_chooses_a_token_of_weight_0(draw, token, monkeypatch):
    monkeypatch.setattr(server, "uniform", lambda seed, step: draw)
    weights = torch.tensor([0.0, 0.5, 0.5, 0.0], device=HERE)
    assert server.sample_by_counter(weights, 1, 1) == [token]


# The table.

def test_every_source_breaks_something_and_says_what_stops_it():
    assert len(set(sources.names())) == len(sources.SOURCES) == 14
    assert all(s.breaks and set(s.breaks) <= set(sources.PROPERTIES) for s in sources.SOURCES)
    assert all(0 < len(s.fix) <= 50 for s in sources.SOURCES)  # pandas cuts longer text in a notebook


def test_the_table_marks_what_each_source_breaks():
    seen = dict.fromkeys(sources.names(), True) | {"torch.compile": "not here: no compiler", "thread count": False}
    table = sources.table(seen)
    assert list(table.loc["library and autotuning", ["run", "batch", "schedule"]]) == ["×", "", "×"]
    assert list(table.here[["batch size", "thread count", "torch.compile"]]) == [
        "moved", "did not move", "not here: no compiler"]


def test_the_table_names_a_source_that_is_missing():
    with pytest.raises(ValueError, match="missing or unknown: thread count, threads"):
        sources.table({**dict.fromkeys(set(sources.names()) - {"thread count"}, True), "threads": True})


# What machines recorded.

TOY = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
    "from kernels.lab import sources\nsources.observe('batch size', 'rows?', 3)")])


def test_what_the_notebook_saw_is_recorded_and_shown_beside(tmp_path, monkeypatch, capsys):
    path = tmp_path / "98_toy.ipynb"
    nbformat.write(TOY, path)
    monkeypatch.setattr(records, "slug", lambda: "toy")
    assert sources.record(tmp_path, str(path)) == "toy"
    rows = sources.OBSERVED.read(tmp_path / "toy")
    assert rows[["name", "question", "value"]].values.tolist() == [["batch size", "rows?", 3]]
    assert records.read_machine(tmp_path / "toy")["device"] == records.device_name()
    assert sources.answers("batch size", "rows?", out=tmp_path) == {"toy": "3 recorded"}
    assert sources.answers("batch size", "other?", cpu=True, out=tmp_path) == {"toy's CPU": "not recorded yet"}
    monkeypatch.setattr(sources, "answers", lambda *asked: {"toy": "3 recorded"})
    sources.observe("batch size", "rows?", 2)
    assert capsys.readouterr().out.endswith("; 3 recorded on toy\n")


def test_an_observation_of_no_source_is_refused():
    with pytest.raises(ValueError, match="name must be one of atomic additions, .*, got 'luck'"):
        sources.observe("luck", "how much?", 1)


def test_each_recorded_answer_has_its_question_in_the_notebook():
    cells = notebook.read(notebook.find(["02"])[0]).cells
    asked = {ast.literal_eval(f"({call})") for cell in cells if cell.cell_type == "code"
             for call in re.findall(r'sources\.observe\(("[^"]+", "[^"]+"),', cell.source)}
    assert len(asked) == sum(cell.source.count("sources.observe(") for cell in cells) >= 10
    assert {name for name, _ in asked} <= set(sources.names())
    for machine in records.machines(sources.OBSERVED.file):
        rows = sources.OBSERVED.read(records.DATA / machine)
        assert set(zip(rows.name, rows.question, strict=True)) == asked, f"{machine}: record it again"


def test_without_races_few_ops_move_with_their_place_and_none_with_their_neighbours():
    for machine in ("h200", "cpu-avx512"):
        rows = atlas.recorded(machine)
        racing = set(rows.op[(rows.property == "run") & (rows.verdict == "varies")])
        assert not sources.moved(machine, "run") and not sources.moved(machine, "batch") & racing
        assert sources.moved(machine, "neighbours") == set()
        assert {"dropout", "multinomial"} <= sources.moved(machine, "position")
        assert sources.moved(machine, "position") <= {"dropout", "multinomial", "gelu[tanh]"}
    assert "mm" in sources.moved("h200", "batch")


# The chart.

def test_the_chart_counts_the_ops_with_several_answers():
    found = {"one": [[1, 2, 3]], "two": [[1], [2, 3]], "three": [[1], [2], [3]]}
    assert sources_chart.claim(found) == "Row 0 has several answers in 2 of 3 ops"
    axes = sources_chart.answers(found, "a machine").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two", "three"]
    colours = {round(bar.get_y()): set() for bar in axes.patches}
    for bar in axes.patches:
        colours[round(bar.get_y())].add(bar.get_facecolor())
    assert sorted(map(len, colours.values())) == [1, 2, 3]
    assert sources_chart.claim({"one": [[1, 2]]}) == "Row 0 has one answer at every batch size"


# The exercises.

@pytest.mark.parametrize("name, answer, hint", [
    ("02.2", lambda f, x: 2, "row 0 has other bits first at 5 rows"),
    ("02.2", lambda f, x: next((n for n in range(2, len(x) + 1) if not torch.equal(f(x[:n])[:1], f(x[:1])[:1])), None),
     "other bits: compare with bits.same_bits"),
    ("02.2", lambda f, x: next((n for n in range(2, len(x) + 1) if not bits.same_bits(
        f(x[:n])[: n - 1], f(x[: n - 1]))), None), "row 0"),
    ("02.3", lambda ranks: sum(rank.sum(0) for rank in ranks), "does each process add its own pieces first"),
    ("02.3", lambda ranks: ranks[0].sum(0), "not the sum of the eight pieces"),
    ("02.3", lambda ranks: torch.cat(ranks), "left the shape"),
])
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    exercises.grade(name, answer)
    assert hint in capsys.readouterr().out


def test_the_sweep_that_section_10_reads_holds_both_digests():
    sweep = records.load()
    sweep = sweep[sweep.op == "rms_norm"]
    rows = sweep[(sweep["shape"] == "D=4096") & (sweep.dtype == "float32") & (sweep.tokens == 128)]
    recorded = rows.drop_duplicates("implementation").set_index("implementation").digest
    here = rms_norm.python(*rms_norm.inputs(128, "D=4096", torch.float32))
    assert {"cuda", "python"} <= set(recorded.index) and recorded["python"] == bits.digest(here)[:16]
