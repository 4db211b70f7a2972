"""The atlas' widget without a browser: it opens on records, filters them, measures, and shows what goes wrong."""
import base64
import io
import os
import re
import threading
import time

import pandas as pd
import pytest

from kernels.lab.atlas import measure as atlas
from kernels.lab.atlas.measure import ATLAS
from kernels.lab.atlas.widget import ANY, Atlas, table_html
from kernels.lab.widgets import jobs

PNG = b"\x89PNG"


# What a widget's process can run in place of jobs.atlas_cells. It lives on, so each leaves it as it was.

def with_a_sleeper(report, stop, cells, trials):
    """One that sleeps in the third property."""
    test = atlas.test
    atlas.test = lambda *cell, **options: test(*cell, **options) if cell[2] != atlas.PROPERTIES[2] else time.sleep(60)
    try:
        jobs.atlas_cells(report, stop, cells, trials)
    finally:
        atlas.test = test


def failing(report, stop, cells, trials):
    raise RuntimeError("the <device> is gone\nsecond line")


def exiting(report, stop, cells, trials):
    jobs.atlas_cells(report, stop, cells[:1], trials)
    report("doing", "leaving")
    os._exit(7)


def slow(report, stop, cells, trials):
    """A job that ends between two cells."""
    for cell in cells:
        if stop.is_set():
            return
        jobs.atlas_cells(report, stop, [cell], trials)
        time.sleep(0.2)


def telling_where(report, stop, cells, trials):
    report("where", os.getpid())
    jobs.atlas_cells(report, stop, cells, trials)


@pytest.fixture
def job(monkeypatch):
    """Lets the widget's process run another function."""
    return lambda function: monkeypatch.setattr(Atlas, "JOB", staticmethod(function))


def row(op, property, verdict, dtype="float32", share=0.25):
    applies = verdict in ("same", "varies")
    return {"op": op, "dtype": dtype, "shape": "M=8,D=16", "property": property, "verdict": verdict,
            "share_differ": share if applies else None, "largest_ulp": 3 if applies else None,
            "distinct": 2 if applies else None, "trials": 20 if applies else 0,
            "recorded_at": "2026-11-01T00:00:00Z", "source": "0123456789ab"}


@pytest.fixture
def data(tmp_path):
    """A data folder in which a GPU and a CPU recorded an atlas."""
    ATLAS.merge(tmp_path / "h200", [row("mm", "run", "same", share=0), row("mm", "batch", "varies", "bfloat16"),
                                    row("sum", "batch", "same", share=0), row("mm", "threads", "not applicable")])
    ATLAS.merge(tmp_path / "cpu-x", [row("mm", "batch", "varies"), row("sdpa[cudnn]", "run", "not here: no kernel"),
                                     row("sdpa[math]", "query", "varies", "bfloat16", 1e-6)])
    for machine, device in (("h200", "NVIDIA H200"), ("cpu-x", "A CPU")):
        (tmp_path / machine / "machine.json").write_text(f'{{"device": "{device}", "torch": "2.13.0"}}')
    return tmp_path


def widget(data, op="sum", property="position", **options):
    made = Atlas(out=data, **options)
    made.live_op.value, made.live_property.value = op, property
    return made


def png(made) -> bytes:
    return bytes(made.chart.value)


def text(html) -> str:
    return re.sub(r"<[^>]*>", " ", html.value)


@pytest.mark.serial  # it is timed
def test_it_opens_on_the_first_machine_in_a_second(data):
    seconds = []
    for _ in range(3):  # matplotlib looks for its fonts the first time
        start = time.monotonic()
        made = Atlas(out=data)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1.0
    assert made.machine.options == ("h200", "cpu-x") and set(made.shown.op) == {"mm", "sum"}
    assert png(made).startswith(PNG) and "csv" in made.downloads.value and made.errors.value == ""
    assert "25 %" in text(made.table) and "bfloat16" in text(made.table)


def test_it_opens_without_any_record(tmp_path):
    made = Atlas(out=tmp_path)
    assert made.machine.options == ("none",) and made.shown.empty and made.downloads.value == ""
    assert "No recorded row" in text(made.table) and made.chart.layout.display == "none"


def test_an_unknown_machine_is_said_and_another_is_shown(data):
    made = Atlas("b200", out=data)
    assert "b200" in text(made.errors) and "h200, cpu-x" in text(made.errors) and made.machine.value == "h200"
    assert Atlas("cpu-x", out=data).machine.value == "cpu-x"


@pytest.mark.parametrize("filters, ops", [
    ({"text": "SDPA"}, ["sdpa[cudnn]", "sdpa[math]"]), ({"text": "sdpa math"}, ["sdpa[math]"]),
    ({"text": "[c"}, ["sdpa[cudnn]"]), ({"property": "batch"}, ["mm"]), ({"verdict": "varies"}, ["mm", "sdpa[math]"]),
    ({"verdict": "not here"}, ["sdpa[cudnn]"]), ({"dtype": "bfloat16"}, ["sdpa[math]"]),
    ({"dtype": "float32", "verdict": "varies"}, ["mm"]), ({"text": "nothing"}, [])])
def test_filters_choose_rows_and_the_chart_follows(data, filters, ops):
    made = Atlas("cpu-x", out=data)
    before = png(made)
    for name, value in filters.items():
        getattr(made, name).value = value
    assert list(made.shown.op) == ops and png(made) != before
    assert bool(ops) == png(made).startswith(PNG) and (made.chart.layout.display == "none") == (not ops)


def test_what_does_not_apply_is_shown_when_it_is_asked_for(data):
    made = Atlas("h200", out=data)
    assert "threads" not in set(made.shown.property)
    made.verdict.value = "not applicable"
    assert list(made.shown.property) == ["threads"] and png(made).startswith(PNG)


def test_another_machine_replaces_the_rows(data):
    made = Atlas(out=data)
    made.machine.value = "cpu-x"
    assert "sdpa[math]" in text(made.table) and "h200" not in made.downloads.value


def test_one_cell_is_measured_and_stands_beside_every_record(data):
    made = widget(data, "sum", "batch")
    made.run()
    assert made.run_button.disabled and not made.stop_button.disabled
    made.join()
    (found,) = made.rows.to_dict("records")
    assert (found["op"], found["property"], found["dtype"]) == ("sum", "batch", "float32")
    assert found["verdict"] == atlas.test("sum", "float32", "batch")["verdict"] and found["trials"] >= 20
    live = text(made.live)
    assert "now" in live and "h200, recorded" in live and "cpu-x: not recorded" in live
    assert not made.running and not made.run_button.disabled and "done" in text(made.status)


def test_all_properties_of_an_op(data):
    made = widget(data, "amax", ANY, trials=2)
    made.run()
    made.join()
    assert list(made.rows.property) == list(atlas.PROPERTIES) and made.progress.value == len(atlas.PROPERTIES)
    assert "varies" not in set(made.rows.verdict)


def after(made, count):
    """Run until so many rows have come."""
    made.run()
    end = time.monotonic() + 60
    while len(made.rows) < count and time.monotonic() < end:
        made._take()
        time.sleep(0.01)


def test_stop_keeps_what_is_finished(data, job):
    job(slow)
    made = widget(data, "amax", ANY, trials=2)
    after(made, 1)
    made.stop()
    made.join()
    assert 1 <= len(made.rows) < len(atlas.PROPERTIES) and "stopped after" in text(made.status)
    assert "while" not in text(made.status), "it ended between two properties"


@pytest.mark.serial  # it is timed
def test_stop_ends_an_op_that_runs_within_two_seconds(data, job, seconds_to_stop):
    job(with_a_sleeper)
    made = widget(data, "amax", ANY, trials=2)
    after(made, 2)
    time.sleep(0.5)  # now it sleeps in the third
    assert seconds_to_stop(made) < 2.0 and not made.running
    assert list(made.rows.property) == list(atlas.PROPERTIES[:2]), "finished rows are kept"
    assert f"stopped after 2 of {len(atlas.PROPERTIES)} properties" in text(made.status)
    assert f"while testing amax, {atlas.PROPERTIES[2]}" in text(made.status)
    assert len(pd.read_csv(made.file)) == 2 and str(made.file) in made.live.value
    job(jobs.atlas_cells)
    made.run()
    made.join()
    assert len(made.rows) == len(atlas.PROPERTIES) and "done" in text(made.status)


def test_a_failing_measurement_is_shown(data, job):
    job(failing)
    made = widget(data)
    made.run()
    made.join()
    assert "RuntimeError: the &lt;device&gt; is gone" in made.errors.value and not made.running
    job(exiting)
    made.live_property.value = ANY
    made.run()
    made.join()
    assert "the measuring process ended with code 7" in made.errors.value and len(made.rows) == 1
    assert "broke off after 1 of" in text(made.status) and "while leaving" in text(made.status)
    job(jobs.atlas_cells)
    made.live_property.value = "position"
    made.run()
    made.join()
    assert made.errors.value == "" and len(made.rows) == 1


def test_a_second_run_replaces_the_first(data):
    made = widget(data, "amax", "run")
    made.run()
    made.join()
    made.live_op.value = "sum"
    made.run()
    made.run()  # while the other runs: nothing
    made.join()
    assert list(made.rows.op) == ["sum"]


def test_the_table_is_measured_by_one_process_and_drawn_by_another(data, job, monkeypatch):
    job(telling_where)
    made, drawn, seen = widget(data), [], set()
    monkeypatch.setattr(made, "_on_where", seen.add, raising=False)
    monkeypatch.setattr(made, "_draw", lambda: drawn.append(threading.get_ident()))
    made.run()
    made.join()
    assert len(seen) == 1 and os.getpid() not in seen and set(drawn) == {threading.get_ident()}


@pytest.mark.parametrize("filter_text", ["", "   ", "7" * 5000, "<b>", "-1 0", "mm mm"])
def test_any_text_can_be_looked_for(data, filter_text):
    made = Atlas(out=data)
    made.text.value = filter_text
    assert made.errors.value == "" and "<b>mm" not in made.table.value
    assert made.shown.empty == (filter_text.strip() not in ("", "mm mm"))
    assert not made.shown.empty or "No recorded row" in text(made.table)


def test_trials_below_one_are_refused(data):
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        Atlas(out=data, trials=0)


@pytest.mark.parametrize("damage, told", [
    (lambda s: s.replace("property", "proprety"), "proprety"), (lambda s: s.replace("0.25", "much"), "share_differ"),
    (lambda s: s.replace(",varies,", ",,"), "verdict")])
def test_damaged_records_are_named_and_the_widget_still_opens(data, damage, told):
    path = data / "h200" / ATLAS.file
    path.write_text(damage(path.read_text()))
    made = Atlas(out=data)
    assert told in text(made.errors) and made.shown.empty
    made.machine.value = "cpu-x"
    assert made.errors.value == "" and len(made.shown) == 3


def test_the_downloads_hold_the_filtered_rows(data):
    made = Atlas("cpu-x", out=data)
    made.verdict.value = "varies"
    csv = base64.b64decode(re.search(r"text/csv;base64,([^\"]+)", made.downloads.value)[1])
    rows = pd.read_csv(io.BytesIO(csv))
    assert list(rows.op) == ["mm", "sdpa[math]"] and tuple(rows.columns) == ATLAS.columns


def test_a_long_table_says_what_it_leaves_out():
    rows = pd.DataFrame([row(f"op{i}", "run", "same") for i in range(75)])
    assert "and 15 more rows" in table_html(rows) and table_html(rows.head(60)).count("<tr") == 61


def test_text_from_a_record_is_escaped(data):
    ATLAS.merge(data / "h200", [row("<b>mm</b>", "run", "not here: <script>")])
    made = Atlas("h200", out=data)
    assert "<script>" not in made.table.value and "<b>mm</b>" not in made.table.value


def test_what_a_saved_notebook_keeps(data):
    assert repr(Atlas(out=data)) == "Atlas(): run this cell in JupyterLab to use it"


def test_the_chart_fits_a_notebook_and_the_table_brings_its_own_paper():
    widget = Atlas()
    assert int(widget.chart.layout.width.removesuffix("px")) <= 800, "beside JupyterLab's own panels at 1400 pixels"
    assert widget.layout.max_width == "100%"
    table = re.search(r'<table style="([^"]*)"', widget.table.value)[1]
    assert "background:#ffffff" in table and "color:#262626" in table, "its ticks are dark, and a page may be too"
