"""Random products: what is drawn, that a planted bit is counted and told, and that a run goes on where it ended."""
import re
from dataclasses import replace
from random import Random

import pytest
import torch

from kernels import runtime
from kernels.lab import closure
from kernels.lab.proofs import products
from kernels.lab.proofs import products_drawn as drawn
from kernels.lab.proofs.certificates import TRUSTED, rows_of
from kernels.lab.proofs.products_drawn import Form, Kind, Scale
from kernels.op import DTYPES, Op
from kernels.ops.matmul.order import order
from kernels.ops.matmul.product import Product, product_of
from kernels.ops.matmul.schedule import Schedule
from kernels.ops.matmul.steps import steps

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
    assert not drawn.suits(locked, wide, 2049, 64, 300)
    assert few in counts and min(counts) == few and 3400 >= max(counts) > 3000 and len(set(counts)) > 100


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="kernels say what they can carry out")
def test_a_form_in_lockstep_is_drawn_only_where_it_is_carried_out(monkeypatch):
    """At every weight and token count that can be drawn, on a GPU of 132 multiprocessors or fewer."""
    kinds = [drawn.kind_of(Random(i), drawn.ON_GPU) for i in range(40)]
    every = [Form(0, kind, s) for kind in kinds if not kind.cut and min(kind.sizes)[0] >= 2048
             for s in drawn.schedules(kind, drawn.ON_GPU, tma=True) if s.lockstep]
    assert len({f.kind for f in every}) > 2 and len({f.schedule for f in every}) > 10
    for i, (kind, schedule) in enumerate(f[1:] for f in every):
        counts = {drawn.tokens_of(Random(j), every[i], drawn.ON_GPU) for j in range(5)}
        for n, k in {kind.sizes[0], kind.sizes[-1]}:
            p = Product(0, n, k, DTYPES[kind.dtype], (k, 1), (k, 1), order(n, k), kind.bias)
            for count in counts | {drawn.least(schedule, kind), 3400}:
                assert all(steps(schedule, replace(p, m=count, multiprocessors=sms)) for sms in (132, 128, 114))
    monkeypatch.setattr(drawn, "rows_of", lambda schedule, n: 1)  # at which none has a chain for every program
    assert not any(s.lockstep for s in drawn.schedules(every[0].kind, drawn.ON_GPU, tma=True))


# what is compared


@needs_interpreter
def test_a_schedule_that_keeps_its_bits_differs_nowhere():
    tally, = products.compared(0, [Form(0, KIND, GOOD)], 6, SMALL, CPU)
    assert tally[:3] == (6, 0, "")


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
    assert good[:3] == (8, 0, "") and wrong.cases == 8 and 0 < wrong.differ <= 8
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
    assert products.compared(0, [Form(0, KIND, GOOD)], 4, SMALL, CPU)[0][:3] == (4, 0, "")


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


@needs_interpreter
def test_a_form_that_fails_costs_no_other_of_its_kind(few, tmp_path, monkeypatch, capsys):
    """It fails at its third case; the other's cases are those that it has beside a form that does not fail."""
    real, bad, ran = Op.run_schedule, Schedule("pointer", 32, 16, 32, 1, 2), []
    monkeypatch.setattr(products, "forms", lambda *given: [Form(0, KIND, bad), Form(1, KIND, GOOD)])

    def fails(op, schedule, x, weight, *rest):
        if schedule != TRUSTED:
            ran.append((schedule, *x.shape, *weight.shape))
        if schedule == bad and fail and sum(s == bad for s, *_ in ran) > 2:
            raise RuntimeError("out of registers")
        return real(op, schedule, x, weight, *rest)

    monkeypatch.setattr(Op, "run_schedule", fails)
    fail = False
    products.compared(0, products.forms(), 8, SMALL, CPU)
    whole, fail = [given for given in ran if given[0] == GOOD], True
    ran.clear()
    assert products.main([*few, "--cases", "16"]) == 1
    assert [given for given in ran if given[0] == GOOD] == whole and len(whole) == 8
    assert f"{bad}: RuntimeError: out of registers" in (said := capsys.readouterr().out) and "0 of 10 cases" in said
    rows = products.PRODUCTS.read(tmp_path / "here")
    assert (rows.form.tolist(), rows.cases.tolist()) == ([0, 1], [2, 8])  # the first is not done


@needs_interpreter
def test_bits_that_moved_are_counted_though_their_form_fails_later(monkeypatch):
    """It fails at its third case and when it is computed again to be told."""
    real, bad, ran = Op.run_schedule, Schedule("pointer", 32, 16, 32, 1, 2), []

    def off_then_fails(op, schedule, x, weight, *rest):
        ran.append(schedule)
        if schedule == bad and ran.count(bad) > 2:
            raise RuntimeError("out of registers")
        y = real(op, schedule, x, weight, *rest)
        return y + 1 if schedule == bad else y

    monkeypatch.setattr(Op, "run_schedule", off_then_fails)
    monkeypatch.setattr(drawn, "EMPTY", 0.0)
    wrong, good = products.compared(0, [Form(0, KIND, bad), Form(1, KIND, GOOD)], 8, SMALL, CPU)
    assert good[:2] == (8, 0) and good.error is None and wrong.cases == 2 and 0 < wrong.differ <= 2
    assert str(wrong.error) == "out of registers" and wrong.error.__traceback__ is None
    assert "elements; computed again: RuntimeError: out of registers" in wrong.first
    rows, said = products._rows(0, [Form(0, KIND, bad)], [wrong])
    assert rows[0]["differ"] == wrong.differ and said == [f"{KIND} {bad}: RuntimeError: out of registers"]


LOCKED = Schedule("hopper", 128, 256, 64, warps=8, stages=3, persistent=True, store=True, stream=True, lockstep=True)


@pytest.mark.skipif(not runtime.HAS_TRITON or runtime.HAS_GPU, reason="kernels say what they can carry out")
@pytest.mark.parametrize("sms", [132, 128])
def test_the_row_of_a_form_in_lockstep_is_of_the_code_that_ran(few, tmp_path, monkeypatch, capsys, sms):
    """A GPU is played, whose products are zeros; like a GPU it refuses what it cannot carry out."""
    kind, ran = Kind("bfloat16", False, ((2049, 64), (2561, 64))), {}

    def run(op, schedule, x, weight, bias):
        if x.numel() and weight.numel():
            assert steps(schedule, product_of(x, weight, bias, None, sms))
            ran.setdefault(schedule, []).append((len(x) * weight.numel(), len(x), *weight.shape))
        return torch.zeros(len(x), len(weight), dtype=x.dtype)

    def case(draw, kind, rows, *_):
        n, k = draw.choice(kind.sizes)
        x, weight = torch.zeros(rows, k, dtype=torch.bfloat16), torch.zeros(n, k, dtype=torch.bfloat16)
        return drawn.Case("", x, weight, None, torch.zeros(rows, n, dtype=torch.bfloat16))

    monkeypatch.setattr(Op, "run_schedule", run)
    monkeypatch.setattr(products, "case_of", case)
    monkeypatch.setattr(products, "ON_CPU", drawn.ON_GPU)
    monkeypatch.setattr(products, "forms", lambda *given: [Form(0, kind, LOCKED), Form(1, kind, GOOD)])
    assert products.main(few) == 0 and "0 of 8 cases differ" in capsys.readouterr().out
    rows = products.PRODUCTS.read(tmp_path / "here").set_index("schedule")
    assert rows.cases.tolist() == [4, 4] and min(m for _, m, *_ in ran[LOCKED]) > 300
    for schedule, found in ran.items():
        _, m, n, k = max(found)
        step = steps(schedule, Product(m, n, k, torch.bfloat16, (k, 1), (k, 1), order(n, k), False))
        assert rows.source[str(schedule)] == closure.of_launches(step), "the largest case of its own"


@needs_interpreter
def test_a_row_that_cannot_be_written_costs_no_other(few, tmp_path, monkeypatch, capsys):
    real = products.row_of
    monkeypatch.setattr(products, "row_of", lambda seed, form, tally: real(seed, form, tally) if form.number else {}[0])
    assert products.main(few) == 1 and f"{GOOD}: KeyError: 0" in capsys.readouterr().out
    assert products.PRODUCTS.read(tmp_path / "here").form.tolist() == [1]


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="a row names the version of Triton")
def test_a_form_whose_cases_were_all_empty_launched_nothing():
    row = products.row_of(0, Form(0, KIND, LOCKED), products.Tally(4, 0, "", (0, 20, 5)))
    assert row["source"] == closure.of_launches([]) and row["cases"] == 4


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
