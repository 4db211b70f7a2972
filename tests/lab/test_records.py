"""No recorded row is lost or mixed: atomic writes, one machine a folder, sweeps that stop, resume and share a file."""
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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


DIGITS = ["0123456789012345", "1" * 16, "1e10000000000000", "0" * 16, "-inf"]


def test_a_digest_of_digits_alone_stays_text(tmp_path):
    for _ in range(2):
        rows = [row(i, digest=text, source=text[:12]) for i, text in enumerate(DIGITS, 1)]
        records.TOKEN_SWEEP.merge(tmp_path, rows)
        table = records.TOKEN_SWEEP.read(tmp_path)
        assert table.digest.tolist() == DIGITS and table.source.tolist() == [text[:12] for text in DIGITS]
    assert (tmp_path / "token_sweep.csv").read_text().count(",0123456789012345,") == 1


def test_numbers_are_written_with_six_digits(tmp_path):
    table = records.TOKEN_SWEEP.merge(tmp_path, [row(16384, us=1234.56789, gbytes_per_s=0.000123456789)])
    assert (table.us_p50[0], table.gbytes_per_s[0], table.tokens[0]) == (1234.57, 0.000123457, 16384)


def test_the_last_of_two_rows_with_one_key_counts(tmp_path):
    table = records.TOKEN_SWEEP.merge(tmp_path, [row(1, us=1.0), row(2, us=2.0), row(1, us=3.0)])
    assert table.us_p50.tolist() == [3.0, 2.0] == records.TOKEN_SWEEP.read(tmp_path).us_p50.tolist()


def test_each_clock_is_a_row_of_its_own(tmp_path):
    table = records.TOKEN_SWEEP.merge(tmp_path, [row(1, clock=clock) for clock in bench.CLOCKS])
    assert sorted(table.clock) == sorted(bench.CLOCKS)


@pytest.mark.parametrize("content, word", [
    ("a,b\n1,2\n", "not a token_sweep.csv"), ("", "not a readable"), ("\xff\xfe\x00", "token_sweep")])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content, word):
    path = tmp_path / "token_sweep.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=word):
        records.TOKEN_SWEEP.merge(tmp_path, [row()])
    assert path.read_bytes() == content.encode("latin-1")


LINES = ("op,implementation,dtype,shape,tokens,clock,us_p05,us_p20,us_p50,us_p80,us_p95,repeats,gbytes_per_s,tflops,"
         "same_bits,elements_differ,digest,schedule,recorded_at,source",
         'mean,cuda,bfloat16,"D=8,inner=2",1,call,1.0,1.10,1.2,1.3,1.4,7,12.60,1E-3,True,0,00e1,,2026-11-01T00:00:00Z,0b',
         "mean,cuda,bfloat16,D=8,8,call,1,1,1,1,1,7,1,1,TRUE,0,00ff,,2026-11-01T00:00:00Z,0b",
         "mean,triton,bfloat16,D=8,8,call,1,1,1,1,1,7,,,,0,00ff,one program,2026-11-01T00:00:00Z,0b")


def saved(folder, *lines, end="\n", bom=""):
    (folder / "token_sweep.csv").write_bytes((bom + end.join(lines) + end).encode())


@pytest.mark.parametrize("form", [{}, {"end": "\r\n"}, {"bom": "\ufeff"}, {"bom": "\ufeff", "end": "\r\n"}], ids=str)
@pytest.mark.parametrize("last", [(), ("," * 19,), ("," * 19, "," * 19), ("",)], ids=str)
def test_what_a_spreadsheet_saved_is_read_and_its_rows_keep_their_text(form, last, tmp_path):
    saved(tmp_path, *LINES, *last, **form)
    table = records.TOKEN_SWEEP.read(tmp_path)
    assert table.tokens.tolist() == [1, 8, 8] and table.digest.tolist() == ["00e1", "00ff", "00ff"]
    assert table.tokens.dtype == int and table.same_bits.tolist()[:2] == [True, True] and pd.isna(table.same_bits[2])
    records.TOKEN_SWEEP.merge(tmp_path, [row(77)])
    written = (tmp_path / "token_sweep.csv").read_text(encoding="utf-8").splitlines()
    assert set(LINES) < set(written) and len(written) == 5


def test_comments_stay(tmp_path):
    saved(tmp_path, "# my laptop, on battery", *LINES[:3])
    records.TOKEN_SWEEP.merge(tmp_path, [row(77)])
    assert (tmp_path / "token_sweep.csv").read_text().splitlines()[:2] == ["# my laptop, on battery", LINES[0]]
    assert len(records.TOKEN_SWEEP.read(tmp_path)) == 3


@pytest.mark.parametrize("old, new, said", [
    ("TRUE", "WAHR", "same_bits must be True or False, got 'WAHR'"), ("TRUE", "1", "same_bits must be True or False"),
    ("TRUE", "yes", "same_bits"), (",8,call", ",many,call", "tokens must be a number such as 1.5, got 'many'"),
    (",8,call", ",,call", "tokens is empty"), (",7,1,1,", ',7,"1,5",1,', "gbytes_per_s must be a number"),
    (",7,1,1,", ",7,1_0,1,", "gbytes_per_s must be a number"), ("mean,cuda", ",cuda", "op is empty"),
    (",00ff,,", ",00ff,", "19 cells instead of 20"), (",00ff,,", ",00ff,,,", "21 cells instead of 20"),
    (",00ff,,", ",00ff,\x00,", "not a readable CSV"), (",00ff,,", ',00ff,"never closed,', "not a readable CSV")])
def test_a_cell_that_means_nothing_is_refused_by_name(old, new, said, tmp_path):
    assert old in LINES[2]
    saved(tmp_path, *LINES[:2], LINES[2].replace(old, new))
    before = (tmp_path / "token_sweep.csv").read_bytes()
    for look in (records.TOKEN_SWEEP.read, lambda folder: records.TOKEN_SWEEP.merge(folder, [row()])):
        with pytest.raises(ValueError, match=f"token_sweep.csv.*{said}"):
            look(tmp_path)
    assert (tmp_path / "token_sweep.csv").read_bytes() == before


def test_a_key_that_is_there_twice_is_refused_until_it_is_recorded_again(tmp_path):
    saved(tmp_path, *LINES, LINES[2])
    with pytest.raises(ValueError, match="two rows have the key mean, cuda, bfloat16, D=8, 8, call"):
        records.TOKEN_SWEEP.read(tmp_path)
    records.TOKEN_SWEEP.merge(tmp_path, [row()])
    assert len(records.TOKEN_SWEEP.read(tmp_path)) == 4


@pytest.mark.parametrize("change", [{"same_bits": 0.0}, {"us_p50": "fast"}, {"op": ""}])
def test_rows_of_another_form_are_not_written(change, tmp_path):
    with pytest.raises(ValueError, match="rows for .*token_sweep.csv: "):
        records.TOKEN_SWEEP.merge(tmp_path, [row(), row(2) | change])
    assert not (tmp_path / "token_sweep.csv").exists()


def test_every_recorded_table_is_read_and_written_as_it_stands(tmp_path):
    from kernels.lab.atlas.measure import ATLAS
    from kernels.lab.moving.cost import MODE_COST
    from kernels.lab.parallel.measure import TENSOR_PARALLEL
    from kernels.lab.proofs.attention import WAYS
    from kernels.lab.proofs.certificates import CERTIFICATES
    from kernels.lab.proofs.digests import DIGESTS
    from kernels.lab.proofs.model import MODEL_DIGESTS
    from kernels.lab.proofs.products import PRODUCTS
    from kernels.lab.proofs.tensor_core import TENSOR_CORE
    from kernels.lab.serving.arrivals import LATENCY
    from kernels.lab.serving.recorded import ANSWERS, TEXTS
    from kernels.lab.serving.speed import SERVING
    from kernels.lab.sources.claims import OBSERVED
    from kernels.lab.sources.host import HOST_DIGESTS
    from kernels.lab.tuning.cost_times import COST_TIMES
    from kernels.lab.tuning.unseen_times import UNSEEN
    from kernels.lab.verifying.explore import MIX
    from kernels.lab.verifying.measure import ROLLBACKS
    from kernels.lab.window.measure import VERIFY_COST
    tables = (ANSWERS, ATLAS, CERTIFICATES, COST_TIMES, DIGESTS, HOST_DIGESTS, LATENCY, MIX, MODE_COST, MODEL_DIGESTS,
              OBSERVED, PRODUCTS, ROLLBACKS, SERVING, TENSOR_CORE, TENSOR_PARALLEL, TEXTS, UNSEEN, VERIFY_COST, WAYS,
              records.TOKEN_SWEEP)
    recorded = {path.name for path in records.DATA.glob("*/*.csv") if path.parent.name != "llm42"}  # that is published
    assert {table.file for table in tables} == recorded
    for table in tables:
        for machine in {*records.OURS} & {*records.machines(table.file)}:
            path = records.DATA / machine / table.file
            (tmp_path / table.file).write_bytes(path.read_bytes())
            table.merge(tmp_path, table.read(tmp_path).iloc[:2])
            assert (tmp_path / table.file).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("error, said", [
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    (NotImplementedError("FileSystem does not appear to support flock"), "support flock")])
def test_a_folder_that_cannot_be_written_is_named(error, said, tmp_path, monkeypatch):
    def refuse(_):
        raise error
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    for write in (lambda: records.TOKEN_SWEEP.merge(tmp_path, [row()]),
                  lambda: records.note_machine(tmp_path, "a.csv")):
        with pytest.raises(OSError, match=f"could not write .*{tmp_path.name}.*{said}"):
            write()


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file is a file"):
        records.open_machine(tmp_path / "file")
    with pytest.raises(OSError, match=r"file is a file"):
        records.open_machine(tmp_path / "file" / "below")


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


@pytest.mark.parametrize("field", ["device", "torch", "triton"])
def test_a_folder_belongs_to_one_machine(field, tmp_path):
    own = records.open_machine(tmp_path)
    records.note_machine(own, "token_sweep.csv", copy_gbytes_per_s=1.0)
    assert records.open_machine(tmp_path) == own
    machine = json.loads((own / "machine.json").read_text())
    (own / "machine.json").write_text(json.dumps(machine | {field: "0.1"}))
    assert records.open_machine(tmp_path).name == own.name + "-2"
    with pytest.raises(ValueError, match=f"{field} was 0.1, here {re.escape(str(machine[field]))}"):
        records.open_machine(tmp_path, own.name)


def test_what_may_change_on_a_machine_is_noted_anew(tmp_path):
    machine = records.note_machine(tmp_path, "a.csv", copy_gbytes_per_s=1.0)
    older = machine | {"driver": "1", "python": "3.0", "host_cpu": "older", "date": "2000-01-01T00:00:00Z"}
    (tmp_path / "machine.json").write_text(json.dumps(older))
    again = records.note_machine(tmp_path, "a.csv", copy_gbytes_per_s=2.0)
    assert again.pop("date") > machine.pop("date")[:10] and again == machine
    assert json.loads((tmp_path / "machine.json").read_text()).items() > machine.items()


def test_two_writers_of_machine_json_lose_no_command(tmp_path, monkeypatch):
    real = records.this_machine
    monkeypatch.setattr(records, "this_machine", lambda: time.sleep(0.01) or real())  # between a read and a write

    def write(name):
        for i in range(8):
            records.note_machine(tmp_path, f"{name}{i}.csv")

    with ThreadPoolExecutor(2) as writers:
        list(writers.map(write, "ab"))
    assert sorted(records.read_machine(tmp_path)["command"]) == [f"{name}{i}.csv" for name in "ab" for i in range(8)]


def cpu(monkeypatch, name):
    monkeypatch.setattr(records.runtime, "HAS_GPU", False)
    monkeypatch.setattr(records, "cpu_model", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.mark.parametrize("name, folder", [
    ("AMD EPYC 9654 96-Core Processor", "cpu-amd-epyc-9654-avx512"), ("AMD EPYC", "cpu-amd-epyc-avx512"),
    ("AMD Ryzen 9 7950X 16-Core Processor", "cpu-amd-ryzen-9-7950x-avx512"),
    ("Intel(R) Core(TM) i9-11900K CPU @ 3.50GHz", "cpu-intel-core-i9-11900k-avx512")])
def test_a_cpu_of_another_make_is_not_counted_into_our_series(name, folder, tmp_path, monkeypatch):
    cpu(monkeypatch, "Intel(R) Xeon(R) Processor")
    records.note_machine(records.open_machine(tmp_path), "a.csv")
    assert records.open_machine(tmp_path).name == "cpu-avx512"
    cpu(monkeypatch, name)
    assert records.open_machine(tmp_path).name == folder
    records.note_machine(tmp_path / folder, "a.csv")
    assert records.open_machine(tmp_path).name == folder
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert records.open_machine(tmp_path).name == f"{folder}-2"
    cpu(monkeypatch, "Intel(R) Xeon(R) Processor")
    assert records.open_machine(tmp_path).name == "cpu-avx512-2"


def test_a_readers_record_comes_after_ours(tmp_path):
    for name in ("z200", "cpu-neon", "a-laptop", "h200", "cpu-avx512"):
        records.TOKEN_SWEEP.merge(tmp_path / name, [row()])
        (tmp_path / name / "machine.json").write_text("{}")
    assert records.machines(out=tmp_path) == ["h200", "cpu-avx512", "a-laptop", "z200", "cpu-neon"]
    assert records.load(out=tmp_path).machine[0] == "h200"


def test_an_installation_without_data_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "DATA", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="installed without it.*pip install -r requirements.txt"):
        records.machines(out=tmp_path / "data")


@pytest.mark.parametrize("form, said", [
    ("[]", "must hold fields"), ("null", "must hold fields"), ('"text"', "must hold fields"),
    ('{"command": "python -m x"}', "command must give each file"), ('{"command": []}', "command must give each file"),
    ('{"command": {"a.csv": "python -m x"}}', "command must give a.csv a list of commands, got 'python -m x'"),
    ('{"command": {"a.csv": [3]}}', "a list of commands"), ('{"matmul_tflops": true}', "matmul_tflops"),
    ('{"copy_gbytes_per_s": 0}', "copy_gbytes_per_s"), ('{"torch": 2.13}', "torch must be a text"),
    ("[" * 100000, "not readable JSON")], ids=lambda text: text[:40])
def test_a_machine_json_of_another_form_is_refused_by_name(form, said, tmp_path):
    (tmp_path / "machine.json").write_text(form)
    for look in (records.read_machine, lambda folder: records.note_machine(folder, "a.csv")):
        with pytest.raises(ValueError, match=f"machine.json.*{said}"):
            look(tmp_path)
    assert (tmp_path / "machine.json").read_text() == form


def test_a_machine_json_saved_by_an_editor_is_read(tmp_path):
    (tmp_path / "machine.json").write_bytes("\ufeff{\"device\": \"Größe\"}".encode())
    assert records.read_machine(tmp_path) == {"device": "Größe"}


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
    assert sweep.to_measure(small_sweep(passes=2), records.TOKEN_SWEEP.read(tmp_path)) == small_sweep().points()


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
