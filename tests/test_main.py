"""The commands: what a reader can mend is one line and a status, `record` is sized for the machine."""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from kernels import OPS, runtime
from kernels.__main__ import VERBS, main
from kernels.lab import bench, command, recorder, records

ROOT = records.ROOT
QUICK = {"sweep": ["rms_norm", "--shapes", "D=32", "--tokens", "1", "--implementations", "cuda", "--clocks", "call",
                   "--passes", "1", "--repeats", "1"],
         "atlas": ["--ops", "mm", "--properties", "run", "--dtypes", "float32", "--trials", "1"],
         "digests": ["mean"], "window": ["--model", "tiny", "--windows", "1"], "host": ["--record"], "record": ["mean"],
         "tune": ["--shape", "64,64"], "tensor-core": ["--lengths", "1"], "verify": ["--record"]}


def said(capsys) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert len(errors) == 1, errors
    return errors[0]


def fresh(*words, cwd=ROOT, **env):
    """`python WORDS` in a fresh interpreter."""
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, *words], cwd=cwd, env=given, capture_output=True, text=True, timeout=120)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "copy_gbytes_per_s", lambda *_: 1.0)
    monkeypatch.setattr(bench, "matmul_tflops", lambda *_: 1.0)
    monkeypatch.setattr(recorder, "RECORDED_DTYPES", ("float32",))
    monkeypatch.setattr(recorder, "means", lambda name, device: recorder.Means((1, 2), 5.0, 1 << 16, 1, 1))


# One line.

@pytest.mark.parametrize("error, line", [
    (OSError(28, "could not write x (the file there is unchanged): No space left on device"),
     "could not write x (the file there is unchanged): No space left on device"),
    (PermissionError(13, "Permission denied", "/data/x.csv"), "/data/x.csv: Permission denied"),
    (ValueError("tokens must be at least 1, got 0"), "tokens must be at least 1, got 0"),
    (RuntimeError("compiling failed:\n  many\n  lines\nlast\n"), "compiling failed: ... last"),
    (MemoryError(), "MemoryError"),
    (ModuleNotFoundError("No module named 'seaborn'", name="seaborn"),
     "seaborn is not installed here: pip install -r requirements.txt"),
    (runtime.Unavailable("there is no GPU"), "there is no GPU")])
def test_what_a_reader_can_mend_is_one_line(error, line, capsys):
    def fails():
        raise error
    assert command.in_one_line(fails) == 1
    assert said(capsys) == f"error: {line}"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError):
        command.in_one_line(lambda: len(3))


def test_ctrl_c_is_no_traceback(capsys):
    def stopped():
        raise KeyboardInterrupt
    assert command.in_one_line(stopped) == 130
    assert said(capsys) == "stopped"


def test_an_unknown_verb_lists_those_there_are(capsys):
    assert main(["swep"]) == 2
    line = said(capsys)
    assert all(verb in line for verb in VERBS)


@pytest.mark.parametrize("verb", QUICK)
def test_out_must_be_a_folder(verb, tmp_path, capsys, quick):
    (tmp_path / "file").touch()
    assert main([verb, *QUICK[verb], "--out", str(tmp_path / "file")]) in (1, 2)
    line = said(capsys)
    assert "there is no GPU" in line or "there is none here" in line or f"{tmp_path / 'file'} is a file" in line


@pytest.mark.parametrize("form", ["[]", "null", "3", '"a text"', "{", '{"command": "python -m x"}', '{"device": 3}',
                                  '{"command": {"token_sweep.csv": "python -m old"}}', '{"copy_gbytes_per_s": "fast"}'])
def test_a_machine_json_of_another_form_is_named_and_left_alone(form, tmp_path, capsys, quick):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "machine.json").write_text(form)
    assert main(["sweep", *QUICK["sweep"], "--out", str(tmp_path), "--machine", "m"]) in (1, 2)
    assert str(tmp_path / "m" / "machine.json") in said(capsys)
    assert (tmp_path / "m" / "machine.json").read_text() == form


def test_a_damaged_table_is_named(tmp_path, capsys, quick):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "token_sweep.csv").write_text("a,b\n")
    assert main(["sweep", *QUICK["sweep"], "--out", str(tmp_path), "--machine", "m"]) in (1, 2)
    assert "token_sweep.csv is not a" in said(capsys)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b"])
def test_a_machines_name_is_a_plain_one(name, tmp_path, capsys, quick):
    assert main(["sweep", *QUICK["sweep"], "--out", str(tmp_path / "data"), "--machine", name]) == 2
    assert "--machine must be a plain name" in said(capsys)


def test_the_recorded_command_can_be_pasted(tmp_path, monkeypatch):
    words = ["sweep", "rms_norm", "--out", str(tmp_path / "my data"), "it's"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/kernels", *words])
    assert shlex.split(records.command())[-len(words):] == words


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's pipe")
def test_a_pipe_that_closes_early_and_a_full_disk():
    closed = subprocess.run(f"{shlex.quote(sys.executable)} -m kernels | head -1", shell=True, cwd=ROOT, timeout=120,
                            capture_output=True, text=True)
    assert closed.stderr == "" and "rms_norm" in closed.stdout
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "kernels"], cwd=ROOT, timeout=120, text=True, stdout=full,
                                  stderr=subprocess.PIPE)
        assert done.returncode == 1 and done.stderr.splitlines() == ["error: No space left on device"]


def test_a_terminal_without_our_signs_and_a_developer_who_wants_the_traceback(tmp_path):
    plain = fresh("-m", "kernels", PYTHONIOENCODING="ascii:strict")
    assert plain.returncode == 0, plain.stderr
    (tmp_path / "file").touch()
    words = ("-m", "kernels", "host", "--record", "--out", str(tmp_path / "file"))
    assert "Traceback" not in fresh(*words).stderr
    assert "Traceback" in fresh("-X", "dev", "-W", "ignore", *words).stderr


def test_another_package_called_kernels_is_named(tmp_path):
    """A stub stands for the one that transformers uses."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    done = fresh("-c", "import sys, kernels\nfrom importlib.util import spec_from_file_location, module_from_spec\n"
                 f"spec = spec_from_file_location('command', {str(ROOT / 'kernels' / 'lab' / 'command.py')!r})\n"
                 "command = module_from_spec(spec); spec.loader.exec_module(command)\n"
                 "def late(): from kernels import rms_norm\n"
                 "sys.exit(command.in_one_line(late))", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: another package called kernels is in the way, {tmp_path / 'kernels'}")


# record

def test_record_measures_every_op_after_an_estimate(tmp_path, capsys, quick):
    assert main(["record", "--estimate", "--out", str(tmp_path / "none")]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{op}: about " in told for op in OPS) and "in all" in told.splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_record_writes_what_it_measures_and_goes_on_where_it_was(tmp_path, capsys, quick):
    words = ["record", "mean", "rms_norm", "--out", str(tmp_path), "--machine", "m"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert told.index("in all") < told.index("recorded in")
    rows = records.TOKEN_SWEEP.read(tmp_path / "m")
    assert set(rows.op) == {"mean", "rms_norm"} and {"cuda", "python"} <= set(rows.implementation)
    assert ("triton" in set(rows.implementation)) or not runtime.HAS_TRITON
    assert rows[rows.implementation == "python"].same_bits.all() and set(rows.tokens) <= {1, 2}
    assert json.loads((tmp_path / "m" / "machine.json").read_text())["copy_gbytes_per_s"] == 1.0
    assert main(words) == 0
    assert capsys.readouterr().out.count("was recorded already") == 2


def test_ctrl_c_keeps_what_record_measured(tmp_path, capsys, quick, monkeypatch):
    real, calls = recorder.sweep, []

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(recorder, "sweep", interrupted)
    assert main(["record", "mean", "--out", str(tmp_path), "--machine", "m"]) == 130
    assert "the same command goes on" in said(capsys)
    assert len(records.TOKEN_SWEEP.read(tmp_path / "m"))


CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_cpu_records_small_shapes_and_the_first_of_a_gpus(op):
    chosen = recorder.shapes(op, CPU)
    assert op.shapes[0] in chosen and len(chosen) >= 2
    assert op.work(1, chosen[0], torch.bfloat16).flops <= 1 << 20
    assert recorder.means("triton", CPU).tokens[-1] <= 8 and recorder.means("python", CPU).bytes <= 1 << 24


class Paced:
    """An op whose call takes `call(tokens)` seconds; keeps which token counts were tried."""

    name, shapes, work = "mean", ("D=8",), staticmethod(OPS["mean"].work)

    def __init__(self, call, monkeypatch):
        self.tried: list[int] = []
        monkeypatch.setattr(recorder, "_cost", lambda op, name, count, *_: (
            self.tried.append(count) or recorder.Cost(call(count), 0.0)))


@pytest.mark.parametrize("call, fits", [(lambda n: 1e-6, 512), (lambda n: 0.01, 512), (lambda n: 0.004 * n, 32),
                                        (lambda n: 1.0, 0)])
def test_a_contender_is_measured_as_far_as_it_is_quick(call, fits, monkeypatch):
    op = Paced(call, monkeypatch)
    found = recorder.tried(op, "python", "D=8", "float32", CPU, {})
    assert max(found, default=0) == fits
    assert sum(map(call, op.tried)) < 3 * recorder.means("python", CPU).seconds + 1.0


def test_what_would_take_minutes_is_not_tried(monkeypatch):
    op, pace = Paced(lambda n: 0.1, monkeypatch), {}
    recorder.tried(op, "python", "D=8", "float32", CPU, pace)
    op.tried.clear()
    assert recorder.tried(op, "python", "D=8000000", "float32", CPU, pace) == {} and op.tried == []


def test_a_contender_that_cannot_run_is_told_and_costs_no_other(monkeypatch, quick):
    def broken(*_, **__):
        raise runtime.Unavailable("there is no Triton")
    real = recorder.tried
    monkeypatch.setattr(recorder, "tried", lambda op, name, *rest: broken() if name == "triton" else real(
        op, name, *rest))
    plan = recorder.plan(OPS["mean"], CPU)
    assert all("triton cannot: there is no Triton" in line for line in plan.words)
    assert {tuple(part.sweep.implementations) for part in plan.parts} == {("cuda", "python")}
