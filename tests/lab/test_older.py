"""Today's kernels are those that were proved: a kernel that changes by one operation makes its recorded rows old."""
from types import SimpleNamespace

import pandas as pd
import pytest

import figures
from kernels import OPS, runtime, tables
from kernels.lab import closure, older, provenance, records
from kernels.lab.proofs.certificates import CERTIFICATES, KINDS, stand_in
from kernels.lab.proofs.digests import DIGESTS
from kernels.ops.matmul.schedule import Schedule

GPUS = ("h200", "h100")
POINTER = "pointer 16x32x256 warps=4 stages=5 group=1 swap"


def stored(gpu):
    """(dtype, N, K, schedule) of each choice in a GPU's table."""
    return {(dtype, n, k, str(schedule))
            for dtype, shapes in tables.load(gpu, Schedule.parse)["matmul"].items()
            for (n, k), column in shapes.items() for schedule in column.values()}


@pytest.mark.parametrize("gpu", GPUS)
def test_every_stored_schedule_was_proved_as_it_is_today(gpu):
    """Red? A GPU has to prove the kernels again: python -m kernels certificates"""
    rows = older.mark(records.load(CERTIFICATES, gpu))
    good = rows[~rows.older].groupby(["dtype", "shape", "schedule"]).input.agg(set).to_dict()
    unproved = [choice for choice in sorted(stored(gpu)) if good.get(
        (choice[0], "N={},K={}".format(*stand_in(*choice[1:3])), choice[3])) != set(KINDS)]
    assert not unproved and len(stored(gpu)) > 50


@pytest.mark.parametrize("op", OPS)
def test_every_digest_of_a_gpu_is_of_the_code_of_today(op):
    """Red? A GPU has to record them again: python -m kernels digests"""
    rows = older.mark(records.load(DIGESTS, "h200"))
    mine = rows[rows.op == op]
    assert len(mine) > (7 if op.startswith("attention") else 50)
    assert set(mine.implementation) == {"triton"} and not mine.older.any()


def test_certificates_keep_the_code_that_a_compiler_made_and_its_version():
    rows = records.load(CERTIFICATES, "h200")
    today = rows[~older.mark(rows).older]
    assert today.ptx.str.fullmatch("[0-9a-f]{12}").all() and set(today.triton) == {"3.6.0"}
    assert (today.groupby("schedule").ptx.nunique() <= today.groupby("schedule")["shape"].nunique()).all()


@pytest.fixture
def changed(monkeypatch):
    """changed(old, new): kernels whose source reads otherwise."""
    real = closure.inspect.getsource

    def change(old, new):
        read = []

        def getsource(function):
            read.append(real(function))
            return read[-1].replace(old, new)

        monkeypatch.setattr(closure.inspect, "getsource", getsource)
        for cached in (closure.closure, older._todays, older.of_stored, older.known_as):
            cached.cache_clear()
        return read
    yield change
    monkeypatch.undo()
    for cached in (closure.closure, older._todays, older.of_stored, older.known_as):
        cached.cache_clear()


def launched(schedule=POINTER, op="matmul", shape="N=512,K=4096", dtype="bfloat16", tokens=16):
    return closure.of_launches(provenance.launches(OPS[op], schedule, dtype, shape, tokens))


@pytest.mark.parametrize("old, new", [("total += chain", "total += 2 * chain"), ("(k < end)", "(k <= end)"),
                                      ("tile % width // size", "tile % width % size")])
def test_one_operation_of_a_kernel_or_of_what_it_calls(changed, old, new):
    before = launched()
    read = changed(old, new)
    assert launched() != before and any(old in text for text in read)


def test_a_changed_kernel_makes_its_certificates_old_and_no_others(changed):
    rows = records.load(CERTIFICATES, "h200")
    kinds = rows.schedule.str.partition(" ")[0]
    fresh = ~older.mark(rows).older
    changed("(k < end)", "(k <= end)")
    after = ~older.mark(rows).older
    assert fresh[kinds == "pointer"].any() and not after[kinds == "pointer"].any()
    assert fresh[kinds == "hopper"].any() and (after == fresh)[kinds == "hopper"].all()
    assert older.mark(records.load(CERTIFICATES, "h100")).older.all()  # held by same_code.csv, all or none


def test_a_comment_and_the_host_make_nothing_old(changed):
    before = launched()
    changed("tl.program_id(0)", "tl.program_id(\n    0)  # which program\n")
    assert launched() == before


@pytest.mark.parametrize("change", [{"schedule": POINTER.replace("stages=5", "stages=4")}, {"tokens": 17},
                                    {"shape": "N=528,K=4096"}, {"dtype": "float16"}])
def test_what_a_launch_is_told_counts(change):
    assert launched() != launched(**change)


def test_a_switch_that_says_where_code_runs_does_not_count():
    from kernels.arithmetic import elementary
    assert "_INTERPRETED" in vars(elementary)
    assert not [name for name in closure.closure(closure.bare(elementary.tl_fma)) if "_INTERPRETED" in name]


def module(tmp_path, monkeypatch, text):
    import importlib
    import sys
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(closure, "PROJECT", "made")
    (tmp_path / "made.py").write_text(text)
    sys.modules.pop("made", None)
    importlib.invalidate_caches()
    return importlib.import_module("made")


MADE = "SCALE = 3\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    return half(x) * SCALE\n"


@pytest.mark.parametrize("old, new", [("x / 2", "x / 4"), ("= 3", "= 4"), ("* SCALE", "+ SCALE"), ("half(x) *", "x *")])
def test_a_constant_and_a_function_that_is_called_count(tmp_path, monkeypatch, old, new):
    seen = []
    for i, text in enumerate((MADE, MADE.replace(old, new), MADE.replace("/ 2", "/ 2  # halved"))):
        (folder := tmp_path / str(i)).mkdir()
        seen.append(closure.of_functions(module(folder, monkeypatch, text).f))
    assert seen[0] == seen[2] != seen[1]


def test_the_specification_follows_what_it_calls():
    named = closure.closure(closure.bare(OPS["matmul"].python))
    assert {"kernels.arithmetic.tensor_core.Adder", "kernels.arithmetic.elementary.fma"} <= set(named)


def test_older_rows_are_listed_by_machine_op_and_implementation(tmp_path):
    table = records.load(CERTIFICATES, "h200").drop(columns="machine")
    folder = tmp_path / "m"
    CERTIFICATES.merge(folder, table.head(6).assign(source="0" * 12))
    assert older.listed(CERTIFICATES, tmp_path) == ["m certificates.csv matmul: 6 of 6 rows"]
    CERTIFICATES.merge(folder, table[~older.mark(table).older].head(6))
    assert older.listed(CERTIFICATES, tmp_path) in ([], ["m certificates.csv matmul: 6 of 12 rows"])


def test_a_schedule_that_is_no_more_is_older_code():
    row = SimpleNamespace(op="softmax", implementation="triton", dtype="bfloat16", shape="D=333", rows=8,
                          schedule="spiral", source="0" * 12)
    assert older.is_older(row)
    with pytest.raises(ValueError, match="softmax has no schedule 'spiral'"):
        provenance.launches(OPS["softmax"], "spiral", "bfloat16", "D=333", 8)


def test_an_unknown_source_is_older_whatever_the_implementation():
    today = {name: provenance.of_row(OPS["rms_norm"], name, "float32", "D=64", 4)
             for name in ("cuda", "python", "compile")}
    frame = pd.DataFrame([{"op": "rms_norm", "implementation": name, "dtype": "float32", "shape": "D=64", "tokens": 4,
                           "clock": clock, "schedule": None, "source": source}
                          for name in today for clock in ("call", "graph") for source in (today[name], "1" * 12)])
    assert older.mark(frame).older.tolist() == [False, True] * 6


def test_a_calls_time_is_of_today_where_the_files_are_or_were_compared():
    rows = records.load(machine="h200").query("op == 'rms_norm' and implementation == 'triton' and clock == 'call'")
    assert len(rows) == 80 and not older.mark(rows).older.any()
    assert older.mark(rows.assign(source="0" * 12)).older.all()


def test_without_triton_it_is_said_of_which_points_nothing_can_be_told(monkeypatch):
    """Schedules in Gluon cannot be imported there; the other rows are told apart as ever."""
    rows = records.load(machine="h200").query("op == 'attention_decode' and clock == 'cold' and dtype == 'bfloat16'")
    rows = pd.concat(rows[rows.implementation == name].head(4) for name in ("triton", "cuda")).assign(source="0" * 12)
    real = provenance.of_row

    def refused(op, implementation, *rest):
        if implementation == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return real(op, implementation, *rest)
    monkeypatch.setattr(provenance, "of_row", refused)
    older._todays.cache_clear()
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    marked, ours = older.mark(rows), rows.implementation == "triton"
    assert 0 < ours.sum() < len(rows)
    assert marked.untold.tolist() == ours.tolist() and marked.older.tolist() == (~ours).tolist()
    assert f"without Triton it cannot be told whether {ours.sum()} of 8 points" in figures.of_older_code(marked)
    assert "without" not in figures.of_older_code(marked[~marked.untold])
    older._todays.cache_clear()
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    with pytest.raises(ModuleNotFoundError):
        older.mark(rows)
    older._todays.cache_clear()
