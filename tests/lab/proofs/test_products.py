"""Random products: what is drawn, that a planted bit is counted and told, and that a run goes on where it ended."""
import re
from dataclasses import replace
from random import Random

import pytest
import torch

from kernels import runtime
from kernels.lab.proofs import products
from kernels.lab.proofs import products_drawn as drawn
from kernels.lab.proofs.certificates import TRUSTED, rows_of
from kernels.lab.proofs.products_drawn import Form, Kind, Scale
from kernels.op import Op
from kernels.ops.matmul.order import order
from kernels.ops.matmul.schedule import Schedule

needs_interpreter = pytest.mark.skipif(bool(runtime.WHY_NOT) or runtime.HAS_GPU,
                                       reason=runtime.WHY_NOT or "runs Triton's interpreter")
SMALL = Scale(16, 1, 5, 5, 5)
CPU = torch.device("cpu")
GOOD = Schedule("pointer", 16, 16, 32, 1, 2)
KIND = Kind("bfloat16", True, ((5, 20), (21, 20)))


# what is drawn


def test_kinds_are_of_all_sorts():
    draw = Random(3)
    kinds = [drawn.kind_of(draw, drawn.ON_GPU) for _ in range(300)]
    assert {kind.cut for kind in kinds} == {kind.bias for kind in kinds} == {True, False}
    assert {kind.dtype for kind in kinds} == {"bfloat16", "float16"}
    for kind in kinds:
        assert {order(n, k).segments > 1 for n, k in kind.sizes} == {kind.cut}
        assert len({(n % 512, n == 1, k % 512, k == 1) for n, k in kind.sizes}) == 1  # so its kernels serve all
    sizes = [kind.sizes[-1] for kind in kinds]
    assert any(n == 1 for n, _ in sizes) and any(k == 1 for _, k in sizes)
    assert {k % 16 for _, k in sizes} >= {0, 1, 2, 4, 8, 15} and {n % 16 for n, _ in sizes} >= {0, 1, 15}


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="kernels say what they can carry out")
def test_forms_are_at_most_so_many_and_each_can_be_carried_out():
    found = drawn.forms(0, 100, drawn.ON_GPU, tma=True)
    assert 90 <= len(found) <= 100 and [f.number for f in found] == list(range(len(found)))
    assert found == drawn.forms(0, 100, drawn.ON_GPU, tma=True) != drawn.forms(1, 100, drawn.ON_GPU, tma=True)
    assert len({(f.kind, f.schedule) for f in found}) == len(found)
    assert {f.schedule.kind for f in found} == {"pointer", "tma", "hopper"}
    for f in found:
        counts = {drawn.tokens_of(Random(i), f, drawn.ON_GPU) for i in range(20)} - {0}
        assert all(drawn.suits(f.schedule, f.kind, n, k, count) for n, k in f.kind.sizes for count in counts)
        assert f.schedule.copy == (f.schedule.kind != "pointer" and f.kind.sizes[0][1] % 8 != 0)
    assert {f.schedule.kind for f in drawn.forms(0, 30, drawn.ON_CPU, tma=False)} == {"pointer"}


def test_tokens_are_none_one_and_edges_of_tiles():
    draw, s = Random(0), Schedule("hopper", 64, 128, 64, warps=4, stages=8, persistent=True)
    counts = [drawn.tokens_of(draw, Form(0, KIND, s), drawn.ON_GPU) for _ in range(500)]
    assert {0, 1, 63, 64, 65, 127, 129} < set(counts) and max(counts) <= 300 and len(set(counts)) > 100
    streams = replace(s, stream=True)
    assert max(drawn.tokens_of(draw, Form(0, KIND, streams), drawn.ON_GPU) for _ in range(100)) > 900
    locked, wide = replace(streams, lockstep=True), Kind("bfloat16", True, ((2049, 64), (2561, 64)))
    counts = [drawn.tokens_of(draw, Form(0, wide, locked), drawn.ON_GPU) for _ in range(500)]
    few = rows_of(locked, 2049)
    assert few in counts and min(counts) == few and 3400 >= max(counts) > 3000 and len(set(counts)) > 100


# what is compared


@needs_interpreter
def test_a_schedule_that_keeps_its_bits_differs_nowhere():
    tally, = products.compared(0, [Form(0, KIND, GOOD)], 6, SMALL, CPU)
    assert tally == (6, 0, "")


@needs_interpreter
def test_one_bit_is_counted_and_told(monkeypatch):
    """Of two schedules, one has a wrong bit wherever it has a number."""
    real, bad = Op.run_schedule, Schedule("pointer", 32, 16, 32, 1, 2)

    def off(op, schedule, *given):
        y = real(op, schedule, *given)
        if schedule == bad and y.numel():
            y.view(torch.int16)[-1, -1] ^= 1
        return y

    monkeypatch.setattr(Op, "run_schedule", off)
    good, wrong = products.compared(0, [Form(3, KIND, GOOD), Form(4, KIND, bad)], 8, SMALL, CPU)
    assert good == (8, 0, "") and wrong.cases == 8 and 0 < wrong.differ <= 8
    assert re.fullmatch(rf"N=\d+,K=\d+,bias=True,bfloat16 \w+ case \d+ tokens=\d {re.escape(str(bad))}: 1 elements; "
                        r"row \d, column \d+: \S+ for \S+", wrong.first), wrong.first


@needs_interpreter
def test_inputs_are_drawn_again_to_be_told():
    one, two = (drawn.case_of(Random("0 5"), KIND, 5, SMALL, CPU) for _ in range(2))
    assert one.what == two.what and torch.equal(one.x.view(torch.int16), two.x.view(torch.int16))
    assert one.trusted.shape == (5, one.weight.shape[0]) and TRUSTED.kind == "pointer"


@needs_interpreter
def test_there_are_rows_of_no_numbers(monkeypatch):
    monkeypatch.setattr(drawn, "EMPTY", 1.0)
    shapes = {drawn.case_of(Random(i), KIND, 5, SMALL, CPU).weight.shape for i in range(20)}
    assert {0 in shape for shape in shapes} == {True} and len({shape.index(0) for shape in shapes}) == 2
    assert products.compared(0, [Form(0, KIND, GOOD)], 4, SMALL, CPU)[0] == (4, 0, "")


# the command


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Two kinds of small weights, and where a run is kept."""
    kinds = (KIND, Kind("float16", False, ((3, 17),)))
    monkeypatch.setattr(products, "forms", lambda seed, most, scale, tma: [
        Form(i, kind, GOOD) for i, kind in enumerate(kinds[:most])])
    monkeypatch.setattr(products, "ON_CPU", SMALL)
    return ["--out", str(tmp_path), "--machine", "here", "--cases", "8"]


@needs_interpreter
def test_a_run_is_kept_and_goes_on_where_it_ended(few, tmp_path, capsys):
    assert products.main([*few, "--part", "2/2"]) == 0 and "0 of 4 cases differ" in capsys.readouterr().out
    rows = products.PRODUCTS.read(tmp_path / "here")
    assert rows.form.tolist() == [1] and rows.cases.tolist() == [4] and rows.differ.tolist() == [0]
    assert (rows.weights.tolist(), rows.segments.tolist()) == (["N 3, K 17"], ["one"])
    assert rows.schedule.tolist() == [str(GOOD)] and rows["first"].isna().all() and rows.source.str.len().eq(12).all()
    assert products.main(few) == 0 and "0 of 4 cases differ" in capsys.readouterr().out  # the other kind alone
    assert len(products.PRODUCTS.read(tmp_path / "here")) == 2
    assert products.main(few) == 0 and "0 of 0 cases differ" in capsys.readouterr().out
    assert products.main([*few, "--cases", "12"]) == 0 and "0 of 12 cases differ" in capsys.readouterr().out  # more
    assert products.main([*few, "--seconds", "0", "--seed", "1"]) == 0
    assert set(products.PRODUCTS.read(tmp_path / "here").seed) == {0}  # what was not compared is not kept


@needs_interpreter
def test_a_bit_that_moves_fails_the_run(few, tmp_path, monkeypatch, capsys):
    real = Op.run_schedule
    monkeypatch.setattr(Op, "run_schedule", lambda op, s, *given: real(op, s, *given) * (1 if s == TRUSTED else 2))
    assert products.main(few) == 1
    said = capsys.readouterr().out
    differ = products.PRODUCTS.read(tmp_path / "here").differ.sum()
    assert f"{differ} of 8 cases differ" in said and differ > 2 and "row 0, column 0" in said


@needs_interpreter
def test_a_kind_that_fails_costs_no_other(few, tmp_path, monkeypatch, capsys):
    real = Op.run_schedule

    def fails(op, schedule, x, weight, *rest):
        if schedule != TRUSTED and weight.dtype == torch.bfloat16:
            raise RuntimeError("out of registers")
        return real(op, schedule, x, weight, *rest)

    monkeypatch.setattr(Op, "run_schedule", fails)
    assert products.main(few) == 1 and "RuntimeError: out of registers" in capsys.readouterr().out
    assert products.PRODUCTS.read(tmp_path / "here").form.tolist() == [1]


def test_what_does_not_compile_is_told_and_left_out(monkeypatch):
    found, held = [Form(0, KIND, GOOD), Form(1, KIND, TRUSTED)], []
    monkeypatch.setattr(products, "check_trusted", lambda *given: held.append(given))
    monkeypatch.setattr(products, "prove_all", lambda jobs, workers: ["", "RuntimeError: moved bits"])
    good, wrong = products._compiled([found], 1, CPU)
    assert held == [(21, 20, torch.bfloat16, CPU)]  # the trusted schedule, to the specification, once a kind
    assert good == [found[:1]] and len(wrong) == 1 and "moved bits" in wrong[0] and str(TRUSTED) in wrong[0]
    assert products.jobs(found)[0] == {"schedule": str(GOOD), "n": 21, "k": 20, "dtype": "bfloat16",
                                       "kinds": ["residue"]}


@pytest.mark.parametrize("options", [["--cases", "0"], ["--forms", "0"], ["--part", "5/4"]])
def test_a_run_of_nothing_is_refused(options):
    with pytest.raises(SystemExit):
        products.main(options)
