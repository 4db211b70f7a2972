"""No recorded row is lost or mixed: atomic writes, one machine a folder, sweeps that stop, resume and share a file."""
import errno
import json
import os
import subprocess
import sys
import threading

import pandas as pd
import pytest
import torch

from kernels import bits, rms_norm
from kernels.lab import bench, records
from kernels.lab.sweep import measure as sweep


def row(tokens=1, implementation="cuda", us=1.0, **other):
    values = dict.fromkeys(records.TOKEN_SWEEP.columns, 0.0) | {
        "op": "rms_norm", "implementation": implementation, "dtype": "float32", "shape": "D=8", "tokens": tokens,
        "clock": "call", "us_p50": us, "same_bits": True, "digest": "00ff", "source": "000000000000"}
    return values | other


def small_sweep(**changes):
    options = {"tokens": (1, 2, 4), "implementations": ("cuda", "python"), "dtypes": ("float32",), "shapes": ("D=32",),
               "passes": 1, "repeats": 2, "device": torch.device("cpu")}
    return sweep.Sweep(rms_norm, **(options | changes))


def test_rows_replace_those_with_their_key_and_keep_the_rest(tmp_path):
    records.TOKEN_SWEEP.merge(tmp_path, [row(1, us=1.0), row(2, us=2.0)])
    table = records.TOKEN_SWEEP.merge(tmp_path, [row(2, us=9.0), row(2, "triton", us=3.0)])
    assert sorted(zip(table.tokens, table.implementation, table.us_p50, strict=True)) == [
        (1, "cuda", 1.0), (2, "cuda", 9.0), (2, "triton", 3.0)]
    again = records.TOKEN_SWEEP.read(tmp_path)
    assert tuple(again.columns) == records.TOKEN_SWEEP.columns
    assert again.digest.tolist() == ["00ff"] * 3


@pytest.mark.parametrize("content, word", [
    ("a,b\n1,2\n", "not a token_sweep.csv"), ("", "not a readable"), ("\xff\xfe\x00", "token_sweep")])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content, word):
    path = tmp_path / "token_sweep.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=word):
        records.TOKEN_SWEEP.merge(tmp_path, [row()])
    assert path.read_bytes() == content.encode("latin-1")


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    records.TOKEN_SWEEP.merge(tmp_path, [row(1)])
    before = (tmp_path / "token_sweep.csv").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="token_sweep.csv.*unchanged.*No space left"):
        records.TOKEN_SWEEP.merge(tmp_path, [row(2)])
    assert (tmp_path / "token_sweep.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_two_processes_writing_one_file_lose_no_row(tmp_path):
    program = ("import sys, tests.lab.test_records as t\nfrom kernels.lab import records\n"
               "for i in range(15): records.TOKEN_SWEEP.merge(sys.argv[1], [t.row(i + 1, sys.argv[2])])")
    command = [sys.executable, "-c", program, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], cwd=records.ROOT) for name in ("cuda", "triton")]
    assert [w.wait(timeout=60) for w in writers] == [0, 0]
    assert records.TOKEN_SWEEP.read(tmp_path).groupby("implementation").size().tolist() == [15, 15]


def test_a_folder_belongs_to_one_machine(tmp_path):
    own = records.open_machine(tmp_path)
    records.note_machine(own, "token_sweep.csv", copy_gbytes_per_s=1.0)
    assert records.open_machine(tmp_path) == own
    machine = json.loads((own / "machine.json").read_text())
    (own / "machine.json").write_text(json.dumps(machine | {"torch": "0.1"}))
    assert records.open_machine(tmp_path).name == own.name + "-2"
    with pytest.raises(ValueError, match="torch was 0.1"):
        records.open_machine(tmp_path, own.name)


def test_every_recording_command_is_kept(tmp_path, monkeypatch):
    for text in ("one", "two", "one"):
        monkeypatch.setattr(records, "command", lambda text=text: text)
        machine = records.note_machine(tmp_path, "token_sweep.csv")
    assert machine["command"] == {"token_sweep.csv": ["one", "two"]}


def test_ceilings_that_are_noted_stay_and_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "copy_gbytes_per_s", lambda device: 20.04)
    monkeypatch.setattr(bench, "matmul_tflops", lambda device: 0.1234)
    first = bench.ceilings(torch.device("cpu"))
    assert first == {"copy_gbytes_per_s": 20.0, "matmul_tflops": 0.123}
    records.note_machine(tmp_path, "a.csv", copy_gbytes_per_s=7.0)
    again = bench.ceilings(torch.device("cpu"), records.read_machine(tmp_path))
    assert again == {"copy_gbytes_per_s": 7.0, "matmul_tflops": 0.123}
    machine = records.note_machine(tmp_path, "b.csv", **first)
    assert (machine["copy_gbytes_per_s"], machine["matmul_tflops"]) == (7.0, 0.123)


def test_unreadable_machine_json_is_named(tmp_path):
    (tmp_path / "machine.json").write_text("{")
    with pytest.raises(ValueError, match="machine.json is not readable"):
        records.read_machine(tmp_path)


def test_a_sweep_measures_every_point_and_holds_bits_against_the_largest():
    rows = pd.DataFrame([r for point in sweep.sweep(small_sweep(), progress=False) for r in point])
    assert sorted(rows.groupby("implementation").tokens.apply(list).to_dict().items()) == [
        ("cuda", [1, 2, 4]), ("python", [1, 2, 4])]
    assert (rows.us_p05 <= rows.us_p50).all() and (rows.us_p50 <= rows.us_p95).all() and (rows.us_p05 > 0).all()
    expected = bits.digest((rms_norm.python(*rms_norm.inputs(4, "D=32", torch.float32)),))[:16]
    assert rows[(rows.implementation == "python") & (rows.tokens == 4)].digest.item() == expected
    assert rows[rows.implementation == "python"].same_bits.all()


def test_a_sweep_sees_bits_move():
    wanted = small_sweep(implementations=("split",), tokens=(1, 128), shapes=("D=4096",), repeats=1)
    rows = pd.DataFrame([r for point in sweep.sweep(wanted, progress=False) for r in point])
    assert rows.same_bits.tolist() == [False, True]
    assert rows.elements_differ[0] > 0


def test_a_shorter_sweep_holds_bits_against_the_largest_recorded(tmp_path):
    wanted = small_sweep(implementations=("split",), tokens=(1, 128), shapes=("D=4096",), repeats=1)
    first = [r for point in sweep.sweep(wanted, progress=False) for r in point]
    records.TOKEN_SWEEP.merge(tmp_path, first)
    shorter = small_sweep(implementations=("split",), tokens=(1,), shapes=("D=4096",), repeats=1, again=True)
    (again,), = sweep.sweep(shorter, done=records.TOKEN_SWEEP.read(tmp_path), progress=False)
    assert not again["same_bits"] and [again[k] for k in ("elements_differ", "digest")] == [
        first[0][k] for k in ("elements_differ", "digest")]
    assert not list(sweep.sweep(small_sweep(implementations=("split",), tokens=(1,), shapes=("D=4096",), repeats=1),
                                done=records.TOKEN_SWEEP.read(tmp_path), progress=False))


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    stop, taken = threading.Event(), []
    for rows in sweep.sweep(small_sweep(), stop=stop, progress=False):
        records.TOKEN_SWEEP.merge(tmp_path, rows)
        taken.append(rows[0]["tokens"])
        stop.set()
    assert taken == [1]
    rest = list(sweep.sweep(small_sweep(), done=records.TOKEN_SWEEP.read(tmp_path), progress=False))
    assert [rows[0]["tokens"] for rows in rest] == [2, 4]


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    real, calls = sweep._measure_point, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweep, "_measure_point", interrupted)
    monkeypatch.setattr(bench, "copy_gbytes_per_s", lambda *_: 1.0)
    monkeypatch.setattr(bench, "matmul_tflops", lambda *_: 1.0)
    options = ["--tokens", "1", "2", "--shapes", "D=32", "--dtypes", "float32", "--clocks", "call", "--passes", "1"]
    assert sweep.main(["rms_norm", *options, "--implementations", "cuda", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(records.load(out=tmp_path)) == 1


def test_a_failing_contender_is_told_and_the_others_go_on():
    told = []
    wanted = small_sweep(implementations=("flashinfer", "python"), shapes=("D=32",))
    rows = [r for point in sweep.sweep(wanted, on_error=lambda where, error: told.append(where), progress=False)
            for r in point]
    assert {r["implementation"] for r in rows} == {"python"}
    assert len(told) == 3 and all("flashinfer" in where for where in told)


@pytest.mark.parametrize("changes, word", [
    ({"implementations": ("cudda",)}, "no implementation 'cudda'"), ({"dtypes": ("float8",)}, "dtype"),
    ({"tokens": (0,)}, "tokens"), ({"shapes": ("D=",)}, "shape"), ({"clocks": ("sundial",)}, "clock")])
def test_a_bad_sweep_is_named(changes, word):
    with pytest.raises(ValueError, match=word):
        small_sweep(**changes)
