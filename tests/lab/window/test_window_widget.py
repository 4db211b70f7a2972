"""WindowCost without a browser: it opens on records, runs to the end, stops, and shows what goes wrong."""
import base64
import re
import threading
import time

import pytest

from kernels import runtime
from kernels.lab import records
from kernels.lab.window import measure as window_cost
from kernels.lab.window.measure import VERIFY_COST, Ceilings
from kernels.lab.window.widget import WindowCost, _Clock

CURVES = window_cost.curves_on(runtime.device())
PNG = b"\x89PNG"


def row(curve="paper", ops="default", tokens=16, ms=19.0):
    return {"curve": curve, "ops": ops, "tokens": tokens, "prefix": 0, "group": 1, "ms_p05": 0.98 * ms,
            "ms_p50": ms, "ms_p95": 1.05 * ms, "ms_per_token_p50": ms / tokens, "floor_ms": 3.5,
            "recorded_at": "2026-11-01T00:00:00Z", "source": "0123456789ab"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings known without measuring them."""
    monkeypatch.setattr(Ceilings, "measured", classmethod(lambda cls, device: cls(20.0, 0.1)))


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
    made.windows.value = windows
    return made


def png(made) -> bytes:
    return bytes(made.chart.value)


def text(html) -> str:
    return re.sub(r"<[^>]*>", " ", html.value)


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


def test_a_run_measures_every_window_and_shows_it(data):
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
    assert png(made) != before and len(tables) >= 3, "the chart and table grow as windows are measured"
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
    made.ops["invariant"].value = not runtime.WHY_NOT or not runtime.HAS_GPU
    made.run()
    made.join(60)
    assert set(made.rows.ops) == {name for name, box in made.ops.items() if box.value}


def test_only_the_worker_measures_and_only_the_maker_draws(data, monkeypatch):
    made, measuring, drawing = widget(data, "1 2"), set(), set()
    measure, draw = window_cost.window_cost, made._draw
    monkeypatch.setattr(window_cost, "window_cost",
                        lambda *a, **k: (measuring.add(threading.get_ident()), measure(*a, **k))[1])
    monkeypatch.setattr(made, "_draw", lambda: (drawing.add(threading.get_ident()), draw()))
    made.run()
    made.join(60)
    here = threading.get_ident()
    assert len(measuring) == 1 and here not in measuring and drawing == {here}


def test_stop_keeps_the_finished_windows(data):
    made = widget(data, "1 2 4 8 16", runs=100)
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


@pytest.mark.parametrize(("windows", "said"), [
    ("1 many", "'many'"), ("", "''"), ("0 4", "'0'"), ("1 2000", "1..1024, the context of tiny, got 2000")])
def test_windows_that_cannot_be_are_said_at_once(data, windows, said):
    made = widget(data, windows)
    before = png(made)
    made.run()
    assert not made.running and said in text(made.errors).replace("&#x27;", "'") and png(made) == before
    made.windows.value = "1"
    made.run()
    made.join(60)
    assert made.errors.value == "" and len(made.rows)


def test_nothing_chosen_is_said(data):
    made = widget(data)
    for boxes in (made.curves, made.ops):
        for box in boxes.values():
            box.value = False
        made.run()
        assert not made.running and "choose at least one of" in text(made.errors)
        boxes["paper" if boxes is made.curves else "default"].value = True


@pytest.mark.skipif(runtime.HAS_GPU, reason="this machine can replay a CUDA graph")
def test_a_graph_cannot_be_chosen_on_a_cpu(data):
    made = widget(data)
    assert made.curves["graph"].disabled and "needs a CUDA GPU" in made.curves["graph"].description


def test_a_model_that_does_not_fit_is_said(data, monkeypatch):
    monkeypatch.setattr("kernels.model.cache.free_memory", lambda device: 1000)
    made = widget(data)
    made.run()
    made.join(60)
    assert "MemoryError: tiny in" in text(made.errors) and "GB free" in text(made.errors)
    assert "broke off after 0 of 3 windows" in text(made.status)
    assert made.progress.bar_style == "warning" and not made.run_button.disabled


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
