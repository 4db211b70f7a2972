"""WindowCost without a browser: it opens on records, runs to the end, stops, and shows what goes wrong."""
import base64
import os
import re
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from kernels import runtime
from kernels.lab import records
from kernels.lab.widgets import base, jobs, process
from kernels.lab.window import estimate
from kernels.lab.window import measure as window_cost
from kernels.lab.window.measure import VERIFY_COST, Ceilings
from kernels.lab.window.widget import WindowCost, _Clock

CURVES = window_cost.curves_on(runtime.device())
PNG = b"\x89PNG"


def row(curve="paper", ops="default", tokens=16, ms=19.0):
    return {"curve": curve, "ops": ops, "tokens": tokens, "prefix": 0, "group": 1, "ms_p05": 0.98 * ms,
            "ms_p50": ms, "ms_p95": 1.05 * ms, "ms_per_token_p50": ms / tokens, "floor_ms": 3.5,
            "recorded_at": "2026-11-01T00:00:00Z", "source": "0123456789ab"}


@pytest.fixture
def data(tmp_path):
    """A data folder with a GPU's record of a large model and a CPU's of a small one, and the published points."""
    for machine, model, device, ms in (("h200", "llama-3.1-8b", "NVIDIA H200", 19.0), ("cpu-x", "small", "A CPU", 9.0)):
        curves = ("paper", "graph") if machine == "h200" else ("paper",)
        VERIFY_COST.merge(tmp_path / machine, [row(c, tokens=t, ms=ms) for c in curves for t in (16, 64, 512)])
        records.note_machine(tmp_path / machine, VERIFY_COST.file, verify_cost_model=model)
        machine_json = tmp_path / machine / "machine.json"
        machine_json.write_text(re.sub(r'"device": "[^"]*"', f'"device": "{device}"', machine_json.read_text()))
    (tmp_path / "llm42").mkdir()
    (tmp_path / "llm42" / "verify_cost.csv").write_bytes((records.DATA / "llm42" / "verify_cost.csv").read_bytes())
    return tmp_path


def widget(data, windows="1 4 8", **options):
    made = WindowCost("tiny", out=data, **{"runs": 2, "warmups": 1, **options})
    made._ceilings = Ceilings(20.0, 0.1)  # known without measuring them
    made.windows.value = windows
    return made


# What a widget's process can run in place of jobs.window_cost. It lives on, so each leaves it as it was.

def with_a_sleeper(report, stop, model, options, ceilings):
    """One that sleeps in the window of 4 tokens."""
    passed = window_cost.paper_pass
    window_cost.paper_pass = lambda model, window: passed(model, window) if window != 4 else lambda: time.sleep(60)
    try:
        jobs.window_cost(report, stop, model, options, ceilings)
    finally:
        window_cost.paper_pass = passed


def with_one_that_exits(report, stop, model, options, ceilings):
    passed = window_cost.paper_pass
    window_cost.paper_pass = lambda model, window: passed(model, window) if window != 4 else os._exit(5)
    jobs.window_cost(report, stop, model, options, ceilings)


def telling_where(report, stop, model, options, ceilings):
    report("where", os.getpid())
    jobs.window_cost(report, stop, model, options, ceilings)


def png(made) -> bytes:
    return bytes(made.chart.value)


def text(html) -> str:
    return re.sub(r"<[^>]*>", " ", html.value)


@pytest.mark.serial  # it is timed
def test_it_opens_on_recorded_rows_in_a_second(data):
    seconds = []
    for _ in range(3):  # matplotlib looks for its fonts the first time
        start = time.monotonic()
        made = WindowCost("small", out=data)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1.0
    assert made.recording.options == ("h200 · llama-3.1-8b", "cpu-x · small", "none")
    assert set(made.shown.tokens) == {16, 64, 512} and set(made.shown.curve) == {"paper", "graph"}
    assert png(made).startswith(PNG) and "512" in made.table.value and "csv" in made.downloads.value
    assert made.errors.value == "" and not made.running


def test_another_recording_replaces_the_chart(data):
    made = widget(data)
    before = png(made)
    made.recording.value = "cpu-x · small"
    assert set(made.shown.curve) == {"paper"} and png(made) != before
    made.recording.value = "none"
    assert made.shown.empty and png(made).startswith(PNG) and made.downloads.value == ""


def test_it_opens_without_any_record(tmp_path):
    made = WindowCost("tiny", out=tmp_path)
    assert made.recording.options == ("none",) and made.shown.empty
    assert png(made).startswith(PNG) and made.errors.value == ""


def test_a_run_measures_every_window_and_shows_it(data, monkeypatch):
    monkeypatch.setattr(base, "SHOWN_SECONDS", 60.0)  # however slow this machine draws
    made = widget(data)
    before, tables = png(made), []
    made.table.observe(lambda change: tables.append(change["new"]), "value")
    made.run()
    assert made.running and made.run_button.disabled and not made.stop_button.disabled
    made.join(60)
    assert not made.running and not made.run_button.disabled and made.stop_button.disabled
    points = set(made.rows[["curve", "ops", "tokens"]].itertuples(index=False, name=None))
    assert points == {(c, "default", t) for c in CURVES for t in (1, 4, 8)}
    assert made.progress.value == made.progress.max == 9 and made.progress.bar_style == "success"
    assert text(made.status).strip().startswith("done, ")
    assert png(made) != before and len(tables) == 3 * len(CURVES), "the chart and table grow as windows are measured"
    assert list(made.shown.columns) == list(VERIFY_COST.columns) and made.errors.value == ""


def test_the_downloads_hold_the_rows_and_the_chart(data):
    made = widget(data, "1 2")
    made.run()
    made.join(60)
    csv, image = (base64.b64decode(code) for code in re.findall(r"base64,([^\"]+)", made.downloads.value))
    assert csv.decode().splitlines()[0] == ",".join(VERIFY_COST.columns)
    assert len(csv.decode().splitlines()) == 1 + 2 * len(CURVES)
    assert image == png(made)


def test_both_ops_are_measured_if_chosen(data):
    made = widget(data, "2")
    made.ops[window_cost.ops_on(runtime.device())[1]].value = not runtime.WHY_NOT or not runtime.HAS_GPU
    made.run()
    made.join(60)
    assert set(made.rows.ops) == {name for name, box in made.ops.items() if box.value}


def test_only_another_process_measures_and_only_the_maker_draws(data, monkeypatch):
    made, measuring, drawing = widget(data, "1 2"), set(), set()
    draw = made._draw
    monkeypatch.setattr(WindowCost, "JOB", staticmethod(telling_where))
    monkeypatch.setattr(made, "_on_where", measuring.add, raising=False)
    monkeypatch.setattr(made, "_draw", lambda: (drawing.add(threading.get_ident()), draw()))
    made.run()
    made.join(60)
    assert len(measuring) == 1 and os.getpid() not in measuring and drawing == {threading.get_ident()}


@pytest.mark.serial  # it is timed
def test_stop_ends_a_pass_that_runs_within_two_seconds(data, monkeypatch, seconds_to_stop):
    monkeypatch.setattr(WindowCost, "JOB", staticmethod(with_a_sleeper))
    made = widget(data, "1 2 4 8")
    made.curves["graph"].value = False
    made.run()
    end = time.monotonic() + 60
    while made.rows.tokens.nunique() < 2 and time.monotonic() < end:
        made._take()
        time.sleep(0.01)
    time.sleep(0.5)  # now it sleeps in the third
    assert seconds_to_stop(made) < 2.0 and not made.running
    assert sorted(made.rows.tokens) == [1, 2] and "stopped after 2 of 4 windows" in text(made.status)
    assert "while timing a window of 4" in text(made.status) and made.errors.value == ""
    assert sorted(pd.read_csv(made.file).tokens) == [1, 2] and str(made.file) in made.downloads.value
    monkeypatch.undo()
    made.run()
    made.join(60)
    assert sorted(made.rows.tokens) == [1, 2, 4, 8]


def test_a_process_that_ends_is_said_in_a_line(data, monkeypatch):
    monkeypatch.setattr(WindowCost, "JOB", staticmethod(with_one_that_exits))
    made = widget(data, "1 4")
    made.curves["graph"].value = False
    made.run()
    made.join(60)
    assert "the measuring process ended with code 5" in text(made.errors) and made.errors.value.count("<div") == 1
    assert "broke off after 1 of 2 windows" in text(made.status) and list(pd.read_csv(made.file).tokens) == [1]


def test_stop_keeps_the_finished_windows(data):
    made = widget(data, "1 2 4 8 16", runs=300)
    made.table.observe(lambda change: made.stop(), "value")
    made.run()
    made.join(60)
    assert not made.running and 1 <= made.rows.tokens.nunique() < 5
    assert "stopped after" in text(made.status) and made.progress.bar_style == "warning"
    made.run()
    assert made.running, "a stopped run can be followed by another"
    made.stop()
    made.join(60)


def test_a_second_run_while_one_is_under_way_is_none(data):
    made = widget(data)
    made.run()
    worker = made._worker
    made.run()
    assert made._worker is worker
    made.join(60)


def test_closing_stops_it(data):
    made = widget(data, "1 2 4 8 16", runs=200)
    made.run()
    worker = made._worker
    made.close()
    worker.join(60)
    assert not worker.is_alive()


def test_overlays_redraw_the_chart(data):
    made = widget(data, "16 64")
    made.overlay.value = False
    made.run()
    made.join(60)
    for toggle in (made.overlay, made.published):
        before = png(made)
        toggle.value = True
        assert png(made) != before
    assert made.errors.value == ""


def test_windows_that_cannot_be_are_said_beside_them_and_at_once(data):
    made = widget(data, "1")
    before = png(made)
    for windows, said in (("1 many", "'many'"), ("", "''"), ("0 4", "'0'"), ("-1", "'-1'"), ("1.5", "'1.5'"),
                          ("1 2000", "1..1024, the context of tiny, got 2000"), ("7" * 5000, "'777777777777777777'..")):
        made.windows.value = windows
        assert said in text(made.notes["windows"]).replace("&#x27;", "'")
        made.run()
        assert not made.running and png(made) == before and made.errors.value == ""
        assert said in text(made.notes["windows"]).replace("&#x27;", "'")
    made.windows.value = "2 2 1"
    assert "2 stands there more than once, and will be measured once" in text(made.notes["windows"])
    made.run()
    made.join(60)
    assert sorted(set(made.rows.tokens)) == [1, 2]


@pytest.mark.parametrize("options", [{"runs": 0}, {"warmups": -1}])
def test_counts_that_cannot_be_are_refused(data, options):
    with pytest.raises(ValueError, match="runs must be at least 1 and warmups at least 0"):
        WindowCost("tiny", out=data, **options)


def test_nothing_chosen_is_said(data):
    made = widget(data)
    for boxes in (made.curves, made.ops):
        for box in boxes.values():
            box.value = False
        made.run()
        assert not made.running and "choose at least one of" in text(made.notes["curves"])
        boxes["paper" if boxes is made.curves else "default"].value = True


@pytest.mark.skipif(runtime.HAS_GPU, reason="this machine can replay a CUDA graph")
def test_a_graph_cannot_be_chosen_on_a_cpu(data):
    made = widget(data)
    assert made.curves["graph"].disabled and "needs a CUDA GPU" in made.curves["graph"].description


def test_what_does_not_fit_is_refused_before_anything_starts(data, monkeypatch):
    made = widget(data)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 500_000_000)
    monkeypatch.setattr(process.Process, "__init__", lambda self: pytest.fail("a process was started"))
    made.model.value = "llama-3.1-8b"
    made.windows.value = "1 100000"
    said = r"llama-3.1-8b and a window of 100000 tokens need about \d\d+ GB, and 0.5 GB are free: choose a smaller"
    assert re.search(said, text(made.errors)), "before Run"
    made.run()
    assert not made.running and re.search(said, text(made.errors)) and not made.run_button.disabled
    monkeypatch.setattr(estimate, "free_memory", lambda device: 10**13)
    made.windows.value = "1"
    assert made.errors.value == "" and re.search(r"a run takes about \d+ (s|min|h) and \d+ GB", text(made.status))


PEAK = """
import gc, re
from kernels.lab.window import estimate
from kernels.lab.window.measure import paper_pass
from kernels.model.llama import Llama

def status(key):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(rf"{key}:\\s*(\\d+) kB", file.read())[1])

def pass_over(model, window):
    paper_pass(model, window)()

pass_over(Llama("tiny", device="cpu"), 4)
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = status("VmRSS")
model = Llama("tiny", device="cpu")
pass_over(model, 1024)
print((estimate.bytes_needed(model.config, 1024, 1, model.dtype) - estimate.FIXED) / (status("VmHWM") - before))
"""


@pytest.mark.skipif(runtime.HAS_GPU or not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
def test_the_bytes_estimated_are_a_processes_real_peak_and_at_most_three_times_it():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})  # what is freed goes back at once
    assert done.returncode == 0, done.stderr
    assert 0.8 <= float(done.stdout) <= 3.0, done.stdout


def test_its_text_form_is_one_line(data):
    assert repr(widget(data)) == "WindowCost('tiny'): run this cell in JupyterLab to use it"


def test_a_model_there_is_not_is_named():
    with pytest.raises(ValueError, match="model must be one of llama-3.1-8b, .* got 'llama-4'"):
        WindowCost("llama-4")


def test_damaged_records_are_said(data):
    csv = data / "h200" / VERIFY_COST.file
    csv.write_text(csv.read_text().replace("19,", "nineteen,"))
    (data / "cpu-x" / "machine.json").write_text("{")
    made = widget(data)
    assert "nineteen" in text(made.errors) and "cpu-x" in text(made.errors)
    assert made.shown.empty and png(made).startswith(PNG)


def test_missing_published_points_are_said(data):
    made = widget(data)
    (data / "llm42" / "verify_cost.csv").unlink()
    made.published.value = True
    assert "published points" in text(made.errors)
    made.published.value = False
    assert made.errors.value == ""


def test_the_time_left_follows_the_costs(monkeypatch):
    now = 0.0
    monkeypatch.setattr("kernels.lab.window.widget.time.monotonic", lambda: now)
    clock = _Clock([1.0] * 10 + [4.0] * 10)
    assert clock.text(2) == "measuring"
    now = 16.0
    assert clock.text(10) == "about 80 s left"
    now = 56.0
    assert clock.text(15) == "about 40 s left"
