"""TokenSweep without a browser, and the chart under it."""
import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kernels import OPS, bits, runtime
from kernels.lab import bench, records, style
from kernels.lab.sweep import chart, estimate
from kernels.lab.sweep import measure as sweep
from kernels.lab.sweep.progress import Clock
from kernels.lab.sweep.widget import TokenSweep
from kernels.lab.widgets import jobs, process
from kernels.lab.widgets import parts as widget_parts

COLUMNS = list(records.TOKEN_SWEEP.columns)
TOKENS = [1, 8, 32, 128, 256, 512, 1024, 2048, 4096]
SLOPES = {"cuda": 3.0, "python": 20.0, "triton": 1.0, "compile": 1.2, "flashinfer": 1.1, "split": 9.0}


def rows_of(names=("cuda", "python", "triton"), tokens=TOKENS, clock="cold", moved=(), **other):
    """Rows as data/ has them: a contender's time is its slope times (5 + tokens / 50) us."""
    rows = []
    for name in names:
        for t in tokens:
            us, same = SLOPES[name] * (5 + t / 50), not (name in moved and t != tokens[-1])
            rows.append({
                "op": "rms_norm", "implementation": name, "dtype": "bfloat16", "shape": "D=8192,residual", "tokens": t,
                "clock": clock, "us_p05": 0.9 * us, "us_p20": 0.95 * us, "us_p50": us, "us_p80": 1.1 * us,
                "us_p95": 1.3 * us, "repeats": 21, "gbytes_per_s": 65.5 * t / us, "tflops": 0.1, "same_bits": same,
                "elements_differ": 0 if same else 7 * t, "digest": "0123456789abcdef", "schedule": None,
                "recorded_at": "2026-11-01T00:00:00Z", "source": "0123456789ab"} | other)
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture
def out(tmp_path):
    """A data folder with two recorded machines and the published points."""
    for machine, device in (("h100", "NVIDIA H100 PCIe"), ("h200", "NVIDIA H200")):
        records.TOKEN_SWEEP.merge(tmp_path / machine, pd.concat([rows_of(), rows_of(clock="graph", shape="D=4096")]))
        (tmp_path / machine / "machine.json").write_text(json.dumps({"device": device}))
    shutil.copytree(records.DATA / "llm42", tmp_path / "llm42")
    return tmp_path


def small(out, contenders=("cuda", "python"), tokens="1 2 4", shape="D=256,residual", **kwargs):
    """A widget set to a sweep that takes a moment."""
    widget = TokenSweep("rms_norm", out=out, passes=kwargs.pop("passes", 1), repeats=2, **kwargs)
    widget.tokens.value, widget.shape.value = tokens, shape
    for name, box in widget.implementations.items():
        box.value = name in contenders
    return widget


def ran(widget):
    widget.run()
    widget.join(120)
    assert not widget.running
    return widget


# What a widget's process can run in place of jobs.token_sweep. It lives on, so each leaves it as it was.

@contextlib.contextmanager
def replaced(name, contender):
    """rms_norm with another contender of this name."""
    op = OPS["rms_norm"]
    OPS["rms_norm"] = dataclasses.replace(op, extras={**op.extras, name: contender})
    try:
        yield
    finally:
        OPS["rms_norm"] = op


def at_four_tokens(what):
    """split, which does `what` instead where it gets four rows."""
    return lambda *arguments: what() if len(arguments[0]) == 4 else OPS["rms_norm"].python(*arguments)


def with_a_sleeper(report, stop, op, options):
    with replaced("split", at_four_tokens(lambda: time.sleep(60))):
        jobs.token_sweep(report, stop, op, options)


def with_a_busy_one(report, stop, op, options):
    """One call of PyTorch that takes a minute."""
    big = torch.ones(1 << 12, 1 << 12)
    with replaced("split", at_four_tokens(lambda: torch.linalg.matrix_power(big, 1 << 60))):
        jobs.token_sweep(report, stop, op, options)


def with_one_that_exits(report, stop, op, options):
    def leave():
        print("something <went> wrong", file=sys.stderr, flush=True)
        os._exit(3)

    with replaced("split", at_four_tokens(leave)):
        jobs.token_sweep(report, stop, op, options)


def with_one_that_is_killed(report, stop, op, options):
    with replaced("split", at_four_tokens(lambda: os.kill(os.getpid(), signal.SIGKILL))):
        jobs.token_sweep(report, stop, op, options)


def without_flashinfer(report, stop, op, options):
    before = sys.modules.get("flashinfer", sys)
    sys.modules["flashinfer"] = None  # as if it were not installed
    try:
        jobs.token_sweep(report, stop, op, options)
    finally:
        sys.modules.pop("flashinfer")
        if before is not sys:
            sys.modules["flashinfer"] = before


def broken(report, stop, op, options):
    raise RuntimeError("no <memory> left")


def telling_when(report, stop, op, options):
    """Also reports when each point was measured, and where."""
    measure = sweep._measure_point

    def measured(*arguments):
        start = time.monotonic()
        rows = measure(*arguments)
        report("measured", (os.getpid(), start, time.monotonic()))
        return rows

    sweep._measure_point = measured
    try:
        jobs.token_sweep(report, stop, op, options)
    finally:
        sweep._measure_point = measure


@pytest.fixture
def job(monkeypatch):
    """Lets TokenSweep's process run another function."""
    return lambda function: monkeypatch.setattr(TokenSweep, "JOB", staticmethod(function))


@pytest.fixture
def measured(job, monkeypatch):
    """(process, begin, end) of each point, which are filled in while it is measured."""
    found = []
    job(telling_when)
    monkeypatch.setattr(TokenSweep, "_on_measured", lambda self, value: found.append(value), raising=False)
    return found


def until_split_runs(widget, kept):
    """The widget, once `kept` rows have come and split runs at 4 tokens."""
    widget.run()
    end = time.monotonic() + 60
    while (len(widget.rows) < kept or "split at 4 tokens" not in widget.status.value) and time.monotonic() < end:
        widget._take()
        time.sleep(0.01)
    return widget


# --- the widget

@pytest.mark.serial  # it is timed
def test_it_opens_on_recorded_rows_within_a_second(out):
    seconds = []
    for _ in range(4):  # the first figure of a process also loads fonts
        start = time.perf_counter()
        widget = TokenSweep("rms_norm", out=out)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert widget.machine.value == "h200" and widget.recording.value == "D=8192,residual · bfloat16 · cold"
    assert len(widget.shown) == 3 * len(TOKENS) and widget.rows.empty
    assert Image.open(io.BytesIO(widget.chart.value)).size[0] == 1350
    assert "4,096" in widget.table.value and not widget.errors.value


def test_a_sweep_gives_the_rows_the_plain_function_gives(out):
    widget = small(out, ("cuda", "python", "triton"))
    before = widget.chart.value
    ran(widget)
    wanted = sweep.Sweep(OPS["rms_norm"], [1, 2, 4], ("cuda", "python", "triton"), [widget.dtype.value],
                      ["D=256,residual"], [widget.clock.value], 1, 2)
    plain = pd.DataFrame([row for rows in sweep.sweep(wanted, progress=False) for row in rows], columns=COLUMNS)
    key = [*records.TOKEN_SWEEP.key, "same_bits", "elements_differ", "digest", "schedule", "repeats", "source"]
    assert list(widget.rows.columns) == COLUMNS
    pd.testing.assert_frame_equal(widget.rows[key], plain[key])
    assert widget.chart.value != before
    assert widget.shown.equals(widget.rows)
    assert "done" in widget.status.value and widget.progress.value == widget.progress.max == 3
    assert not widget.run_button.disabled and widget.stop_button.disabled


def test_more_passes_refine_the_same_points(out):
    widget = ran(small(out, ("cuda",), passes=3))
    assert list(widget.rows.tokens) == [1, 2, 4]
    assert set(widget.rows.repeats) == {6}
    assert widget.progress.max == 9


def test_stop_ends_early_and_keeps_rows(out):
    widget = small(out, ("python",), tokens=" ".join(map(str, range(1, 40))))
    widget.run()
    while len(widget.rows) < 2:
        widget._take()
        time.sleep(0.005)
    widget.stop()
    widget.join(60)
    assert 2 <= len(widget.rows) < 39
    assert "stopped after" in widget.status.value and widget.progress.bar_style == "warning"
    assert "while" not in widget.status.value, "it ended between two contenders"
    assert not widget.run_button.disabled


@pytest.mark.parametrize("what", [with_a_sleeper, with_a_busy_one])
@pytest.mark.serial  # it is timed
def test_stop_ends_an_op_that_runs_within_two_seconds(out, job, what, seconds_to_stop):
    job(what)
    widget = until_split_runs(small(out, ("python", "split"), "1 2 4 8"), 4)
    assert seconds_to_stop(widget) < 2.0 and not widget.running
    assert list(widget.rows.tokens) == [1, 1, 2, 2], "finished points are kept"
    assert "stopped after 2 of 4 points" in widget.status.value
    assert "while running split at 4 tokens" in widget.status.value
    assert widget.errors.value == "" and widget.table.value.count("<tr") == 3
    on_disk = pd.read_csv(widget.file)
    assert list(on_disk.columns) == COLUMNS and sorted(on_disk.tokens) == [1, 1, 2, 2]
    assert str(widget.file) in widget.downloads.value
    job(jobs.token_sweep)
    assert len(ran(widget).rows) == 8 and "done" in widget.status.value


@pytest.mark.serial  # it is timed
def test_stop_while_the_process_starts(out, seconds_to_stop):
    process.end_idle()
    widget = small(out)
    widget.run()
    assert "starting a process" in widget.status.value
    assert seconds_to_stop(widget) < 2.0 and not widget.running
    assert "stopped after 0 of 3 points" in widget.status.value and widget.rows.empty and widget.file is None


@pytest.mark.parametrize(("what", "said"), [
    (with_one_that_exits, "the measuring process ended with code 3: something &lt;went&gt; wrong"),
    (with_one_that_is_killed, "the measuring process was killed (SIGKILL, as the system does where memory runs out)")])
def test_a_process_that_ends_is_said_in_a_line_and_the_next_run_works(out, job, what, said):
    job(what)
    widget = ran(small(out, ("python", "split"), "1 2 4 8"))
    assert said in widget.errors.value and widget.errors.value.count("<div") == 1
    assert "broke off after 2 of 4 points" in widget.status.value
    assert "while running split at 4 tokens" in widget.status.value
    assert list(widget.rows.tokens) == [1, 1, 2, 2] and len(pd.read_csv(widget.file)) == 4
    job(jobs.token_sweep)
    assert len(ran(widget).rows) == 8 and widget.errors.value == ""


def test_rows_are_on_disk_before_they_are_shown(out, monkeypatch):
    widget = small(out, ("cuda",))
    lines = []
    monkeypatch.setattr(widget, "_on_rows", lambda rows: lines.append(len(pd.read_csv(widget.file))))
    ran(widget)
    assert len(lines) == 3 and all(line >= n for n, line in enumerate(lines, 1))


def test_a_disk_that_is_full_is_said_and_costs_nothing(out, monkeypatch):
    def full(*_):
        raise OSError(28, "could not write <it>")

    monkeypatch.setattr(records.Table, "merge", full)
    widget = ran(small(out, ("cuda",)))
    assert "could not write &lt;it&gt;" in widget.errors.value and len(widget.rows) == 3 and widget.file is None


def test_one_process_serves_one_run_after_the_other(out, measured):
    process.end_idle()
    ran(small(out, ("cuda",)))
    ran(small(out, ("cuda",)))
    assert len({pid for pid, _, _ in measured}) == 1 and len(process._idle) == 1


ORPHAN = """
import sys, time
sys.path[:0] = {path!r}
import test_widgets as t
from kernels.lab.widgets.process import Process
import threading
p = Process()
print(p._process.pid, flush=True)
for what, value in p.run(t.with_a_sleeper, ("rms_norm", dict(tokens=[4], implementations=["split"], shapes=["D=64"])),
                         threading.Event()):
    print(what, value, flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs /proc")
def test_a_process_does_not_outlive_its_kernel():
    code = ORPHAN.format(path=[os.path.dirname(__file__)])
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    measuring = int(kernel.stdout.readline())
    while not kernel.stdout.readline().startswith("doing"):
        assert kernel.poll() is None
    kernel.kill()
    kernel.wait()
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{measuring}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{measuring}")
    kernel.stdout.close()


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT)
def test_the_next_cell_can_use_triton_while_a_sweep_runs(out):
    widget, op = small(out, ("python", "triton"), "1 2 4 8", "D=64"), OPS["rms_norm"]
    x, weight = bits.portable(3, 64, device=runtime.device()), torch.ones(64, device=runtime.device())
    calls, expected = 0, op.python(x, weight)
    widget.run()
    while widget.running:
        assert bits.same_bits(op.triton(x, weight), expected)
        widget._take()
        calls += 1
    assert calls >= 10 and len(widget.rows) == 8 and widget.errors.value == ""
    assert "done" in widget.status.value and widget.rows.same_bits.all()


def test_the_buttons_run_and_stop_and_come_back(out):
    widget = small(out, ("python",), tokens=" ".join(map(str, range(1, 40))))
    widget.run_button.click()
    assert widget.running and widget.run_button.disabled and not widget.stop_button.disabled
    widget.stop_button.click()
    widget.join(60)
    assert len(widget.rows) < 39
    assert not widget.run_button.disabled and widget.stop_button.disabled


def test_a_click_that_overtakes_an_edit_waits_for_it(out):
    async def in_a_notebook():
        widget = small(out, ("cuda",))
        widget.run_button.click()
        widget.tokens.value = "3 5"
        while not widget.running:
            await asyncio.sleep(0.01)
        while widget.running:
            await asyncio.sleep(0.01)
        return widget

    assert list(asyncio.run(in_a_notebook()).rows.tokens) == [3, 5]


def test_a_second_run_while_one_is_on_changes_nothing(out):
    widget = small(out, ("python",), tokens="1 2 3 4 5 6")
    widget.run()
    worker = widget._worker
    widget.run()
    assert widget._worker is worker
    widget.join(60)
    assert len(widget.rows) == 6


LONG = "7" * 5000


BAD = {
    "shape": [("", "must read like"), ("D=many", "must read like"), ("8192", "must read like"),
              ("D=-1", "must read like"), ("D=0", "needs a shape like"), ("residual", "needs a shape like"),
              ("D", "needs a shape like"), ("D=64,residual=2", "needs a shape like"),
              ("N=64,K=64", "needs a shape like"), ("D=64,D=128", "got &#x27;D&#x27; more than once"),
              ("D=64,residual,residual", "got &#x27;residual&#x27; more than once"),
              (f"D={LONG}", "got 5002 characters"), ("<b>=1", "&lt;b&gt;")],
    "tokens": [("", "whole numbers of at least 1"), ("1 2 many", "got &#x27;many&#x27;"), ("0 4", "got &#x27;0&#x27;"),
               ("1.5", "got &#x27;1.5&#x27;"), ("-4", "got &#x27;-4&#x27;"), ("1e6", "got &#x27;1e6&#x27;"),
               ("²", "got &#x27;²&#x27;"), (LONG, "got &#x27;777777777777777777&#x27;..."), ("<b>", "&lt;b&gt;")],
}


@pytest.mark.parametrize("control", BAD)
def test_bad_input_is_said_beside_its_field_and_nothing_runs(out, control):
    widget = small(out)
    good = getattr(widget, control).value
    for text, message in BAD[control]:
        getattr(widget, control).value = text
        said = widget.notes[control].value
        assert message in said, f"at once, for {text[:20]!r}"
        widget.run()
        assert not widget.running and widget.notes[control].value == said and widget.errors.value == ""
        assert [name for name, note in widget.notes.items() if note.value] == [control]
        getattr(widget, control).value = good
        assert widget.notes[control].value == ""


def test_every_bad_field_is_said_at_once(out):
    widget = small(out, ())
    widget.tokens.value, widget.shape.value = "", "D"
    widget.run()
    assert not widget.running and all(note.value for note in widget.notes.values())


def test_numbers_that_stand_twice_are_said_and_measured_once(out):
    widget = small(out, ("cuda",), "8 1 8 1 1 2")
    assert "8, 1 stand there more than once, and will be measured once" in widget.notes["tokens"].value
    assert list(ran(widget).rows.tokens) == [1, 2, 8]
    widget.tokens.value = "4 4"
    assert "4 stands there more than once" in widget.notes["tokens"].value
    widget.tokens.value = " ".join(f"{n} {n}" for n in range(1, 100))
    assert "1, 2, 3, 4, 5 and 94 more stand" in widget.notes["tokens"].value


def test_no_contender_is_said(out):
    widget = small(out, ())
    widget.run()
    assert not widget.running and "at least one contender" in widget.notes["contenders"].value


@pytest.mark.parametrize("options", [{"passes": 0}, {"repeats": 0}, {"passes": -1}])
def test_counts_below_one_are_refused(out, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, got"):
        TokenSweep("rms_norm", out=out, **options)


# --- what a run takes

@pytest.fixture
def nothing_made(monkeypatch):
    """Fails the test if more than a few numbers, or a process, are made."""
    portable = bits.portable

    def made(rows, width, *arguments):
        assert rows * width < 100, "something was allocated"
        return portable(rows, width, *arguments)

    monkeypatch.setattr(bits, "portable", made)
    monkeypatch.setattr(process.Process, "__init__", lambda self: pytest.fail("a process was started"))


HUGE = r"1000000 tokens of D=8192,residual in float32 need about [45]\d\d GB, and [\d.]+ GB are free: choose fewer"


def test_what_cannot_fit_is_refused_before_anything_is_allocated(out, monkeypatch, nothing_made):
    monkeypatch.setattr(estimate, "free_memory", lambda device: 20_000_000_000)
    widget = small(out, ("cuda", "python", "triton"), "1 1000000", "D=8192,residual")
    assert re.search(HUGE, widget.errors.value), "before Run"
    widget.run()
    assert not widget.running and re.search(HUGE, widget.errors.value)
    assert widget.errors.value.count("<div") == 1 and not widget.run_button.disabled


@pytest.mark.parametrize(("tokens", "shape"), [
    ("9" * 18, "D=256"), ("1", "D=" + "9" * 60), ("9" * 18, "D=" + "9" * 60), ("1", "D=1000000000000000")])
def test_sizes_that_no_tensor_has_are_refused(out, tokens, shape, nothing_made):
    widget = small(out, tokens=tokens, shape=shape)
    widget.run()
    assert not widget.running and "need about" in widget.errors.value and "GB are free" in widget.errors.value


def test_a_sweep_by_hand_refuses_too(nothing_made):
    wanted = sweep.Sweep(OPS["rms_norm"], [10**9], ("python",), ["float32"], ["D=8192"], passes=1)
    with pytest.raises(MemoryError, match="1000000000 tokens of D=8192 in float32 need about"):
        next(sweep.sweep(wanted, progress=False))


def test_the_command_refuses_with_a_line_and_2(tmp_path, capsys, nothing_made):
    command = ["rms_norm", "--tokens", "1000000000", "--dtypes", "float32", "--out", str(tmp_path)]
    assert sweep.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 1000000000 tokens of D=8192,residual in float32 need about")
    assert said.count("\n") == 1 and not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("flag", ["--passes", "--repeats", "--tokens"])
def test_the_command_refuses_counts_below_one(flag, tmp_path, capsys):
    assert sweep.main(["rms_norm", flag, "0", "--out", str(tmp_path)]) == 2
    assert f"{flag[2:]} must be" in capsys.readouterr().err


def test_the_largest_count_on_record_counts(monkeypatch, nothing_made):
    wanted = sweep.Sweep(OPS["rms_norm"], [8], ("python",), ["float32"], ["D=8192"], passes=1,
                         device=torch.device("cpu"))
    monkeypatch.setattr(estimate, "free_memory", lambda device: 10**9)
    estimate.refuse_too_large(wanted)
    done = rows_of(("python",), [100_000], dtype="float32", shape="D=8192")
    with pytest.raises(MemoryError, match="8 tokens of D=8192 in float32, which are compared with the 100000 on"):
        next(sweep.sweep(wanted, done=done, progress=False))


def test_before_a_run_the_status_says_what_it_takes(out):
    widget = small(out, ("cuda",), "1 2")
    said = r"a run takes about (\d+) (s|min|h) and ([\d.]+) GB"
    quick = re.search(said, widget.status.value)
    assert quick[2] == "s" and float(quick[3]) < 1
    for name in ("python", "triton"):
        widget.implementations[name].value = True
    widget.tokens.value = "1 100000"
    long = re.search(said, widget.status.value)
    assert float(long[3]) > float(quick[3]) and (long[2] != "s" or runtime.HAS_GPU or runtime.WHY_NOT)
    widget.tokens.value = "many"
    assert widget.status.value == long.string, "the last one stays"


@pytest.mark.skipif(runtime.HAS_GPU or bool(runtime.WHY_NOT), reason="Triton's interpreter does not run here")
@pytest.mark.parametrize(("op", "shape", "tokens", "programs"), [
    ("rms_norm", "D=1024,residual", 5, [5]), ("rms_norm", "D=1024", 70, [70]), ("softmax", "D=1024", 3, [3]),
    ("matmul", "N=64,K=64", 32, [2]), ("rotary", "H=40,D=16,context=9", 3, [15]), ("swiglu", "F=600", 5, [15])])
def test_programs_of_the_interpreter_are_counted(op, shape, tokens, programs):
    assert list(estimate.interpreted(OPS[op], tokens, shape, torch.float32)) == programs


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_inputs_and_results_are_exact(op, dtype):
    small = {"matmul": "N=6,K=9,bias", "rms_norm": "D=10,residual", "rotary": "H=3,D=10,context=7",
             "swiglu": "F=10"}.get(op, "D=10")
    if op.startswith("attention"):
        small, dtype = "H=4,KV=2,D=8,context=9", torch.float16 if dtype == torch.float32 else dtype
    arguments = [a for a in OPS[op].inputs(3, small, dtype, "cpu", 0) if isinstance(a, torch.Tensor)]
    results = bits.as_tuple(OPS[op].python(*OPS[op].inputs(3, small, dtype, "cpu", 0)))
    assert estimate.input_bytes(OPS[op], 3, small, dtype) == sum(a.nbytes for a in arguments)
    assert estimate.result_bytes(OPS[op], 3, small, dtype) == sum(r.nbytes for r in results)


PEAK = """
import gc, json, re, sys
import torch
from kernels import OPS
from kernels.lab.sweep import estimate
from kernels.lab.sweep.measure import Sweep, sweep
estimate.FIXED = 4 << 20  # for peaks as small as these

def status(key):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(rf"{key}:\\s*(\\d+) kB", file.read())[1])

for op, shape, tokens, dtype, names in json.loads(sys.argv[1]):
    wanted = Sweep(OPS[op], [tokens], names, [dtype], [shape], passes=1, repeats=1, device=torch.device("cpu"))
    list(sweep(Sweep(OPS[op], [1], names, [dtype], [shape], passes=1, repeats=1), progress=False))
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    list(sweep(wanted, progress=False))
    print(estimate.bytes_needed(wanted, wanted.points()[0]) / (status("VmHWM") - before), op, shape, dtype, names)
"""


@pytest.mark.skipif(runtime.HAS_GPU or not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
def test_the_bytes_estimated_are_a_processes_real_peak_and_at_most_three_times_it():
    points = [("rms_norm", "D=4096,residual", 256, dtype, ["cuda", "python", "split"])
              for dtype in ("float32", "bfloat16")]
    points += [("mean", "D=4096", 512, "bfloat16", ["python"]), ("softmax", "D=32000", 16, "float32", ["python"]),
               ("matmul", "N=1024,K=16", 1024, "bfloat16", ["cuda", "python", "tiled"])]
    done = subprocess.run([sys.executable, "-c", PEAK, json.dumps(points)], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})  # what is freed goes back at once
    assert done.returncode == 0, done.stderr
    ratios = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(ratios) == len(points) and all(1.0 <= ratio <= 3.0 for ratio in ratios), done.stdout


def test_a_good_run_clears_the_message_of_a_bad_one(out):
    widget = small(out)
    widget.tokens.value = "x"
    widget.run()
    widget.tokens.value = "1, 2; 4"
    ran(widget)
    assert not widget.notes["tokens"].value and list(widget.rows.tokens.unique()) == [1, 2, 4]


def test_a_failed_contender_shows_its_error_and_the_others_go_on(out, job):
    job(without_flashinfer)
    widget = ran(small(out, ("cuda", "flashinfer")))
    assert set(widget.rows.implementation) == {"cuda"} and len(widget.rows) == 3
    assert "flashinfer at 1 tokens" in widget.errors.value and "and 2 more points: Unavailable" in widget.errors.value
    assert widget.errors.value.count("<div") == 1
    assert widget.progress.bar_style == "warning" and not widget.run_button.disabled


def test_a_sweep_that_breaks_says_so(out, job):
    job(broken)
    widget = ran(small(out))
    assert "no &lt;memory&gt; left" in widget.errors.value
    assert "broke off after 0 of 3 points" in widget.status.value
    assert len(widget.shown) == 3 * len(TOKENS), "the recorded chart stays"
    assert not widget.run_button.disabled


def test_bits_that_move_show_in_the_title_and_the_table(out):
    widget = small(out, ("python", "split"), tokens="1 2 64", shape="D=4096")
    widget.dtype.value = "float32"
    ran(widget)
    moved = widget.rows[~widget.rows.same_bits.astype(bool)]
    assert set(moved.implementation) == {"split"}
    assert "Bits moved: split at" in chart.claim(widget.rows)
    assert widget.table.value.count(">✗ ") == len(moved)


def test_the_recorded_machine_is_overlaid_when_asked(out, monkeypatch):
    calls = []
    draw = chart.sweep_chart
    monkeypatch.setattr(chart, "sweep_chart", lambda rows, **k: (calls.append(k), draw(rows, **k))[1])
    widget = small(out)
    widget.overlay.value = False
    ran(widget)
    assert calls[-1]["overlays"] == []
    alone = widget.chart.value
    widget.overlay.value = True
    assert list(calls[-1]["overlays"][0].machine.unique()) == ["h200"]
    assert widget.chart.value != alone
    widget.machine.value = "h100"
    assert list(calls[-1]["overlays"][0].machine.unique()) == ["h100"]
    widget.machine.value = None
    assert calls[-1]["overlays"] == []


def test_choosing_a_recording_brings_it_into_a_live_chart(out):
    widget = small(out)
    widget.overlay.value = False
    ran(widget)
    widget.recording.value = "D=4096 · bfloat16 · graph"
    assert widget.overlay.value
    assert set(widget.recorded["shape"]) == {"D=4096"} and set(widget.recorded.clock) == {"graph"}


def test_published_points_are_drawn_when_asked(out):
    widget = TokenSweep("rms_norm", out=out)
    before = widget.chart.value
    widget.published.value = True
    assert widget.chart.value != before and not widget.errors.value
    (out / "llm42" / "rms_norm.csv").write_text("a,b\n1,2\n")
    widget.log_axes.value = False
    assert "rms_norm.csv" in widget.errors.value
    widget.published.value = False
    assert not widget.errors.value


def test_the_csv_link_holds_the_rows_and_the_png_link_the_chart(out):
    widget = ran(small(out))
    links = dict(re.findall(r'download="[^"]*\.(csv|png)" href="data:[a-z/]+;base64,([^"]*)"', widget.downloads.value))
    rows = pd.read_csv(io.BytesIO(base64.b64decode(links["csv"])), dtype={"digest": str, "source": str})
    assert list(rows.columns) == COLUMNS
    exact = [*records.TOKEN_SWEEP.key, "same_bits", "elements_differ", "digest", "source"]
    pd.testing.assert_frame_equal(rows[exact], widget.rows[exact], check_dtype=False)
    np.testing.assert_allclose(rows.us_p50, widget.rows.us_p50.astype(float), rtol=1e-5)
    assert base64.b64decode(links["png"]) == widget.chart.value


def test_the_main_thread_draws_and_another_process_measures(out, monkeypatch, measured):
    drew, draw = [], chart.sweep_chart
    this = threading.current_thread
    monkeypatch.setattr(chart, "sweep_chart", lambda *a, **k: (drew.append(this()), draw(*a, **k))[1])

    async def in_a_notebook():
        widget = small(out)
        from_elsewhere = threading.Thread(target=widget.run_button.click)  # a subshell of the kernel is another thread
        from_elsewhere.start()
        while not widget.running:
            await asyncio.sleep(0.01)
        while widget.running:
            await asyncio.sleep(0.01)
        from_elsewhere.join()
        return widget

    widget = asyncio.run(in_a_notebook())
    assert len(widget.rows) == 6
    assert len(drew) >= 4 and set(drew) == {threading.main_thread()}
    assert len(measured) == 3 and os.getpid() not in {pid for pid, _, _ in measured}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two processes' clocks are compared")
def test_nothing_is_measured_while_the_chart_is_drawn(out, monkeypatch, measured):
    drawn, draw = [], chart.sweep_chart

    def slow_draw(*args, **kwargs):
        start = time.monotonic()
        time.sleep(0.05)
        figure = draw(*args, **kwargs)
        drawn.append((start, time.monotonic()))
        return figure

    widget = small(out)
    monkeypatch.setattr(chart, "sweep_chart", slow_draw)
    ran(widget)
    assert len(measured) == 3 and len(drawn) >= 3
    assert not [1 for _, start, end in measured for began, done in drawn if start < done and began < end]


def test_drawing_leaves_the_readers_matplotlib_as_it_was(out):
    before = dict(mpl.rcParams)
    TokenSweep("rms_norm", out=out)
    assert dict(mpl.rcParams) == before


def test_without_recorded_data_it_says_what_to_do_and_still_runs(tmp_path):
    widget = small(tmp_path)
    assert widget.machine.value is None and widget.shown.empty and not widget.errors.value
    assert bytes(widget.chart.value[:4]) == b"\x89PNG"
    ran(widget)
    assert len(widget.rows) == 6


def test_a_chart_without_points_names_no_machine(out, monkeypatch):
    captions, draw = [], chart._caption
    monkeypatch.setattr(chart, "_caption", lambda *a: captions.append(draw(*a)) or captions[-1])
    widget = TokenSweep("rms_norm", out=out)
    widget.op.value = "mean"
    assert widget.recorded.empty
    assert ["H200" in caption for caption in captions] == [True, False]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "token_sweep.csv").write_text("a,b\n1,2\n"), "is not a token_sweep.csv of this suite"),
    (lambda f: (f / "token_sweep.csv").write_bytes(b"\xff\xfe\x00\x81"), "not"),
    (lambda f: (f / "token_sweep.csv").write_text(""), "not a readable CSV"),
    (lambda f: (f / "machine.json").write_text("{"), "not readable JSON"),
    (lambda f: (f / "machine.json").write_text("[]"), "machine.json"),
    (lambda f: rows_of().astype({"us_p50": object}).assign(us_p50="fast").to_csv(f / "token_sweep.csv", index=False),
     "us_p50"),
    (lambda f: rows_of().assign(us_p50=-1.0).to_csv(f / "token_sweep.csv", index=False), "us_p50"),
    (lambda f: rows_of().assign(same_bits="maybe").to_csv(f / "token_sweep.csv", index=False), "same_bits"),
    (lambda f: rows_of().assign(implementation=None).to_csv(f / "token_sweep.csv", index=False),
     "implementation"),
])
def test_foreign_data_is_said_and_the_widget_still_works(out, damage, message):
    damage(out / "h200")
    widget = small(out)
    assert message in widget.errors.value and "h200" in widget.errors.value
    assert widget.shown.empty
    widget.machine.value = "h100"
    assert not widget.errors.value and len(widget.shown) == 3 * len(TOKENS)


def test_an_unknown_machine_is_said(out):
    widget = TokenSweep("rms_norm", "b300", out=out)
    assert "no recorded machine &#x27;b300&#x27;" in widget.errors.value and "h100" in widget.errors.value
    widget.machine.value = "h100"
    assert not widget.errors.value


def test_on_a_gpu_it_asks_for_the_published_experiment(out, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_GPU", True)
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(bench, "l2_bytes", lambda device: 50 << 20)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 80_000_000_000)
    widget = TokenSweep("rms_norm", out=out)
    assert widget.shape.value == "D=8192,residual" and widget.dtype.value == "bfloat16"
    assert widget.clock.value == "cold" and widget.clock.options == ("cold", "graph", "call")
    assert widget_parts.whole_numbers(widget.tokens.value) == TOKENS
    assert "a run takes about" in widget.status.value


@pytest.mark.gpu
def test_a_live_sweep_on_the_gpu(out):
    widget = TokenSweep("rms_norm", out=out, passes=1, repeats=3)
    widget.tokens.value = "1 8 64"
    ran(widget)
    assert set(zip(widget.rows.implementation, widget.rows.tokens, strict=True)) == {
        (name, t) for name in ("cuda", "python", "triton") for t in (1, 8, 64)}
    assert set(widget.rows.clock) == {"cold"}


def test_an_unknown_op_is_refused(out):
    with pytest.raises(ValueError, match="op must be one of rms_norm.*got 'rms'"):
        TokenSweep("rms", out=out)


def test_its_text_form_is_one_line(out):
    assert repr(TokenSweep("rms_norm", out=out)) == "TokenSweep('rms_norm'): run this cell in JupyterLab to use it"


def test_a_time_estimate_uses_what_points_took():
    clock = Clock(["a", "b"] * 2, [2.0, 6.0, 2.0, 6.0])
    assert clock.text() == "0 of 4 points, about 16 s left"
    clock._last -= 3.0
    clock.tick()
    assert clock.text() == "1 of 4 points, about 21 s left"  # 3 s known, 6 s and 6 s half as long again
    clock._last -= 1.0
    clock.tick()
    assert clock.text() == "2 of 4 points, about 4 s left"


# --- the chart

def drawn(rows, **kwargs):
    """The figure's two axes, after a layout."""
    figure = chart.sweep_chart(rows, **{"clock": "cold", **kwargs})
    figure.draw_without_rendering()
    return figure, *figure.axes


def boxes(artists):
    return [a.get_window_extent() for a in artists if a.get_visible() and a.get_text()]


def overlapping(found):
    return [(a, b) for i, a in enumerate(found) for b in found[i + 1:]
            if a.x0 < b.x1 - 0.5 and b.x0 < a.x1 - 0.5 and a.y0 < b.y1 - 0.5 and b.y0 < a.y1 - 0.5]


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_contenders_of_one_op_are_told_apart(op):
    looks = [style.contender(name) for name in ("cuda", "python", "triton", *op.extras)]
    for part in ("color", "marker", "label"):
        assert len({look[part] for look in looks}) == len(looks), part


def test_one_line_and_one_band_a_contender():
    _, axes, _ = drawn(rows_of())
    assert [line.get_label() for line in axes.lines] == [
        "PyTorch's default", "Specification", "Schedule (Triton)"]
    assert [line.get_marker() for line in axes.lines] == ["o", "s", "^"]
    assert len(axes.collections) == 3
    np.testing.assert_allclose(axes.lines[2].get_ydata(), [5 + t / 50 for t in TOKENS])
    band = axes.collections[2].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.95 * 5.02) and band[:, 1].max() == pytest.approx(1.1 * 86.92)


def test_axes_say_what_they_show():
    figure, axes, strip = drawn(rows_of(), title="Triton is fastest", machine="NVIDIA H200")
    assert [t.get_text() for t in strip.get_xticklabels()] == [str(t) for t in TOKENS]
    assert list(strip.get_xticks()) == list(range(9))
    assert strip.get_xlabel() == "# Tokens" and axes.get_ylabel() == "Time a call (µs)"
    assert axes.get_title(loc="left") == "Triton is fastest"
    assert figure.get_supxlabel().replace("\n", " ") == (
        "NVIDIA H200 · rms_norm D=8192,residual bfloat16 · clock cold: device time, inputs out of cache · "
        "medians, band 20-80 % · counts evenly spaced, time from zero")
    assert axes.get_ylim()[0] == 0


def test_log_axes_stand_at_the_token_counts():
    figure, axes, strip = drawn(rows_of(), log=True)
    assert figure.get_supxlabel().replace("\n", " ").endswith(" · both axes logarithmic")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert list(strip.get_xticks()) == TOKENS
    ticks = [t.get_text() for t in axes.get_yticklabels()]
    assert "10" in ticks and "100" in ticks


def test_long_times_are_in_ms():
    _, axes, _ = drawn(rows_of(tokens=[1, 32768]))
    assert axes.get_ylabel() == "Time a call (ms)"
    assert axes.lines[1].get_ydata()[1] == pytest.approx(20 * (5 + 32768 / 50) / 1000)


def test_the_strip_has_a_verdict_for_every_point():
    _, _, strip = drawn(rows_of(moved=("cuda",)))
    glyphs = [t.get_text() for t in strip.texts]
    assert glyphs == ["✗"] * 8 + ["✓"] * 19
    assert [t.get_text() for t in strip.get_yticklabels()] == ["cuda", "python", "triton"]


def test_a_missing_verdict_has_no_cell():
    rows = rows_of(("cuda",)).astype({"same_bits": object})
    rows.loc[0, "same_bits"] = None
    _, _, strip = drawn(rows)
    assert len(strip.texts) == 8


def test_only_the_rows_of_the_clock_are_drawn():
    _, axes, strip = drawn(pd.concat([rows_of(), rows_of(("cuda",), [3, 5], clock="call")]), clock="call")
    assert len(axes.lines) == 1 and [t.get_text() for t in strip.get_xticklabels()] == ["3", "5"]


@pytest.mark.parametrize("other", [{"shape": "D=4096"}, {"dtype": "float32"}, {"op": "softmax"}])
def test_mixed_experiments_are_refused(other):
    with pytest.raises(ValueError, match=f"a chart shows one {next(iter(other))}"):
        chart.sweep_chart(pd.concat([rows_of(), rows_of(**other)]), clock="cold")


def test_overlays_are_thin_dashed_and_named():
    overlay = rows_of(("cuda", "flashinfer"), clock="call").assign(machine="h100")
    _, axes, _ = drawn(rows_of(), overlays=[overlay])
    assert len(axes.lines) == 5
    thin = axes.lines[3:]
    assert all(line.get_linewidth() < 1.5 and line.get_alpha() < 1 and line.get_linestyle() == "--" for line in thin)
    labels = [t.get_text() for legend in _legends(axes) for t in legend.get_texts()]
    assert "h100 (recorded, call clock)" in labels
    assert labels.count("FlashInfer") == labels.count("PyTorch's default") == 1


def test_published_points_are_marks_without_lines():
    published = pd.read_csv(records.DATA / "llm42" / "rms_norm.csv", comment="#")
    _, axes, _ = drawn(rows_of(), published=published)
    marks = axes.lines[3:]
    assert len(marks) == 3 and all(m.get_linestyle() == "None" and m.get_alpha() < 0.6 for m in marks)
    assert marks[0].get_ydata()[0] == pytest.approx(30.0)  # 0.03 ms


def test_the_copy_ceiling_is_the_bytes_over_the_bandwidth():
    _, axes, _ = drawn(rows_of(), ceiling=4250.0)
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [65.5 * t / 4250 for t in TOKENS])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("case", [
    {"rows": rows_of()}, {"rows": rows_of(tuple(SLOPES), moved=("split",))}, {"rows": rows_of(tokens=[64])},
    {"rows": rows_of(tokens=list(range(1, 65)))}, {"rows": rows_of(())}, {"rows": rows_of((), []), "tokens": [1, 2]},
    {"rows": rows_of(), "overlays": [rows_of().assign(machine="h100")], "ceiling": 4250.0, "title": "a claim " * 14},
], ids=["three", "six", "one-point", "dense", "empty", "awaited", "everything"])
def test_no_labels_overlap_and_nothing_is_cut_off(case, log):
    figure, axes, strip = drawn(**case, log=log)
    low, high = axes.get_ylim()
    in_view = [t.label1 for t in axes.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
    legends = [legend.get_window_extent() for legend in _legends(axes)]
    found = legends + boxes([*strip.get_xticklabels(), *strip.get_yticklabels(), strip.xaxis.label, axes.yaxis.label,
                             *in_view, axes._left_title, strip._left_title, figure._supxlabel])
    assert not overlapping(found)
    assert all(b.y0 >= axes.bbox.y1 for b in legends), "a legend lies over the data"
    width, height = figure.canvas.get_width_height()
    assert all(b.x0 >= -1 and b.x1 <= width + 1 and b.y0 >= -1 and b.y1 <= height + 1 for b in found)


def _legends(axes):
    return [a for a in axes.get_children() if isinstance(a, mpl.legend.Legend)]


def test_the_same_rows_give_the_same_bytes():
    assert widget_parts.png(chart.sweep_chart(rows_of(), clock="cold")) == widget_parts.png(
        chart.sweep_chart(rows_of().sample(frac=1, random_state=1), clock="cold"))


@pytest.mark.parametrize(("rows", "text"), [
    (rows_of(()), "Nothing measured yet"),
    (rows_of(), "Same bits at every token count: cuda, python and triton"),
    (rows_of(tokens=[8]), "One token count: its bits have nothing to be compared with"),
    (rows_of(moved=("cuda",)), "Bits moved: cuda at 8 of 9 token counts. Same bits: python and triton"),
    (rows_of(("split", "cuda"), moved=("split", "cuda")),
     "Bits moved: cuda at 8 of 9 token counts and split at 8 of 9"),
])
def test_the_claim_is_what_the_verdicts_say(rows, text):
    assert chart.claim(rows) == text
