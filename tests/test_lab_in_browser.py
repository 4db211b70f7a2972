"""A real JupyterLab in headless Chromium: notebooks are opened and run, and their widgets used as a reader would."""
import contextlib
import csv
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
import torch

from kernels.lab import records
from kernels.lab.adder import chart as adder_chart
from kernels.lab.atlas import measure as atlas
from kernels.lab.orders import chart as orders_chart
from kernels.lab.orders import measure as orders
from kernels.lab.serving import chart as serving_chart
from kernels.lab.serving import tree as answer_tree
from kernels.lab.serving.loads import Server
from kernels.lab.verifying import Costs
from kernels.lab.verifying import chart as verifying_chart
from kernels.lab.widgets import parts as widget_parts
from tests.browsers import chromium

pytestmark = pytest.mark.browser
PATIENCE = 120  # seconds: other tests run beside these, and a slow page is no fault

NOTEBOOKS = {
    "sweep": "from kernels.lab.sweep import TokenSweep\nTokenSweep('rms_norm', out='data', passes=1)",
    "orders": "from kernels.lab.orders import SumOrders\nSumOrders()",
    "atlas": "from kernels.lab.atlas import Atlas\nAtlas()",
    "adder": "from kernels.lab.adder import AdderSteps\nAdderSteps()",
    "serving": "import torch\nfrom kernels.lab.serving import BatchSlider\ntorch.set_num_threads(1)\n"
               "BatchSlider(count=4)",
    "server": "import torch\nfrom kernels.lab.serving import ServerSettings\ntorch.set_num_threads(1)\n"
              "ServerSettings(2, 4)",
    "mix": "from kernels.lab.verifying import Costs, MixExplorer\nMixExplorer(costs=Costs(10.0, 12.0, 20.0))",
    "matmul": "from kernels.lab.sweep import TokenSweep\nTokenSweep('matmul', out='data', passes=1)",
}
IMAGE = ".jp-OutputArea img.widget-image"
DIGEST_OF_IMAGE = """async selector => {
  const bytes = await (await fetch(document.querySelector(selector).src)).arrayBuffer();
  return [...new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))].join();
}"""
SCROLL_IMAGE = """selector => {
  const image = document.querySelector(selector), box = image.parentElement;
  box.scrollLeft = 1e6;
  return [image.clientWidth, image.naturalWidth, box.scrollLeft];
}"""
WATCH_IMAGE = """selector => {
  window.frames_seen = 0; window.frames_without_image = 0;
  const look = () => {
    const image = document.querySelector(selector);
    window.frames_seen += 1;
    if (!image || image.clientHeight < 200) window.frames_without_image += 1;
    window.watching = requestAnimationFrame(look);
  };
  look();
}"""


def _recorded_point(implementation, tokens, us):
    return dict.fromkeys(records.TOKEN_SWEEP.columns, 1.0) | {
        "op": "rms_norm", "implementation": implementation, "dtype": "bfloat16", "shape": "D=8192,residual",
        "tokens": tokens, "clock": "cold", "us_p05": us * 0.95, "us_p20": us * 0.98, "us_p50": us, "us_p80": us * 1.04,
        "us_p95": us * 1.1, "repeats": 21, "gbytes_per_s": 64 * tokens / us, "same_bits": True, "elements_differ": 0,
        "digest": "0123456789abcdef", "schedule": None, "recorded_at": "2026-11-01T00:00:00Z", "source": "0123456789ab"}


def _record(data: Path):
    """A data folder with one recorded machine, as the real one has."""
    us = {"cuda": (15.8, 16.1, 107.0), "python": (98.0, 54.0, 690.0), "triton": (5.3, 7.8, 72.0)}
    records.TOKEN_SWEEP.merge(data / "h200", [
        _recorded_point(name, tokens, t) for name, times in us.items()
        for tokens, t in zip((1, 128, 4096), times, strict=True)])
    (data / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200"}))
    shutil.copytree(records.DATA / "llm42", data / "llm42")


@pytest.fixture(scope="module")
def browser():
    with chromium("notebook") as launched:
        yield launched


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback over a folder with NOTEBOOKS; gives a notebook's address, with {0} for its name."""
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    _record(root / "data")
    for name, code in NOTEBOOKS.items():
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": kernel})
        nbformat.write(notebook, root / f"{name}.ipynb")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    token, port = secrets.token_hex(16), _free_port()
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "share", "JUPYTER_RUNTIME_DIR": "runtime",
              "IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={root}"]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                  env=os.environ | {k: str(home / v) for k, v in places.items()})
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "log.txt")
            yield f"http://127.0.0.1:{port}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={token}"
        finally:
            _shut_down(server, port, token)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(address, server, log, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended with {server.returncode}: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {seconds} s: {log.read_text()[-2000:]}")


def _shut_down(server, port, token):
    """Ask the server to end its kernels and itself; it is ours, so insist if it does not."""
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/shutdown", method="POST",
                                         headers={"Authorization": f"token {token}"})
        urllib.request.urlopen(request, timeout=10).close()
        server.wait(15)
    except (OSError, subprocess.TimeoutExpired):
        server.terminate()
        server.wait(15)


@pytest.fixture(scope="module")
def page(browser, lab, tmp_path_factory):
    """TokenSweep of RMSNorm on the screen."""
    with _opened("sweep", browser, lab, tmp_path_factory) as page:
        yield page


@pytest.fixture
def open_widget(browser, lab, tmp_path_factory):
    """Opens a notebook of NOTEBOOKS; no script of its page may have failed in the end."""
    with contextlib.ExitStack() as opened:
        pages = []

        def open_widget(name):
            pages.append(opened.enter_context(_opened(name, browser, lab, tmp_path_factory)))
            return pages[-1]

        yield open_widget
        assert [error for page in pages for error in page.page_errors] == []


@contextlib.contextmanager
def _opened(name, browser, lab, tmp_path_factory):
    """The page of a notebook, opened and run, with its widget on the screen."""
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.set_default_timeout(1000 * PATIENCE)
    page.page_errors = []
    page.on("pageerror", lambda error: page.page_errors.append(str(error)))
    try:
        page.goto(lab.format(name))
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function("s => document.querySelector(s)?.naturalWidth > 0", arg=IMAGE)
    except Exception:
        _screenshot(page, tmp_path_factory.mktemp("failed"), f"{name}_did_not_open")
        raise
    yield page
    page.close()


def _screenshot(page, tmp_path, name):
    folder = Path(os.environ.get("SAME_BITS_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")
    return folder / f"{name}.png"


def _button(page, name):
    return page.locator(".jp-OutputArea button.widget-button", has_text=name)


def _type_tokens(page, text):
    box = page.get_by_label("Token counts")
    box.fill(text)
    box.press("Tab")


def test_it_opens_on_the_recorded_sweep(page, tmp_path):
    table = page.locator(".jp-OutputArea table")
    assert "4,096" in table.inner_text()
    assert table.inner_text().count("✓") == 9
    assert _button(page, "Run").is_enabled() and _button(page, "Stop").is_disabled()
    assert page.locator(IMAGE).bounding_box()["width"] > 600
    assert _screenshot(page, tmp_path, "widget_at_rest").stat().st_size > 20_000


def test_a_sweep_replaces_the_chart_and_shows_verdicts(page, tmp_path):
    before, source = page.evaluate(DIGEST_OF_IMAGE, IMAGE), page.locator(IMAGE).get_attribute("src")
    _type_tokens(page, "1 3 8")
    page.evaluate(WATCH_IMAGE, IMAGE)
    _button(page, "Run").click()
    page.get_by_text("done, ").wait_for()
    page.evaluate("cancelAnimationFrame(window.watching)")
    assert page.locator(IMAGE).get_attribute("src") != source
    assert page.evaluate(DIGEST_OF_IMAGE, IMAGE) != before
    assert page.evaluate("window.frames_seen") > 10
    assert page.evaluate("window.frames_without_image") == 0, "the chart vanished for a moment"
    lines = page.locator(".jp-OutputArea table tr").all_inner_texts()
    assert [line.split()[0] for line in lines] == ["tokens", "1", "3", "8"]
    assert all("✓" in line for line in lines[1:])
    assert _button(page, "Run").is_enabled()
    _screenshot(page, tmp_path, "widget_after_a_sweep")


def test_overlays_redraw_the_chart(page, tmp_path):
    for name in ("recorded beside live", "LLM-42's published points"):
        before, end = page.evaluate(DIGEST_OF_IMAGE, IMAGE), time.monotonic() + PATIENCE
        page.get_by_label(name).check()
        while page.evaluate(DIGEST_OF_IMAGE, IMAGE) == before:
            assert time.monotonic() < end, f"{name} did not change the chart"
            page.wait_for_timeout(100)
    _screenshot(page, tmp_path, "widget_with_overlays")


def test_the_csv_link_downloads_the_rows(page, tmp_path):
    with page.expect_download() as download:
        page.get_by_text("Download CSV").click()
    assert download.value.suggested_filename.endswith(".csv")
    download.value.save_as(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == records.TOKEN_SWEEP.columns
    assert {row["tokens"] for row in rows} == {"1", "3", "8"}


def test_stop_ends_a_sweep_early_and_keeps_its_rows(page, tmp_path):
    _type_tokens(page, "1 2 4 8 16 32 64 128")
    _button(page, "Run").click()
    page.get_by_text("of 8 points, about").wait_for()
    _button(page, "Stop").click()
    page.get_by_text("stopped after").wait_for()
    lines = page.locator(".jp-OutputArea table tr").count()
    assert 2 <= lines < 9
    assert _button(page, "Run").is_enabled() and _button(page, "Stop").is_disabled()
    _screenshot(page, tmp_path, "widget_stopped")


def test_what_cannot_fit_and_bad_input_are_said_in_the_widget(page, tmp_path):
    _type_tokens(page, "1 2")
    for name in ("triton", "split"):
        page.get_by_label(name, exact=True).uncheck()
    page.get_by_label("Shape").fill("D=1000000000000000")  # more than there are addresses
    page.get_by_label("Shape").press("Tab")
    _button(page, "Run").click()
    page.locator(".jp-OutputArea").get_by_text("are free: choose fewer tokens").wait_for()
    _screenshot(page, tmp_path, "widget_with_errors")
    _type_tokens(page, "1 many")
    _button(page, "Run").click()
    page.get_by_text("got 'many'").wait_for()
    assert page.page_errors == []


# The other widgets: the picture on the screen must be the one that the plain function draws.

def _wait_for_picture(page, figure):
    """Until the picture on the screen has the bytes of this figure."""
    wanted = ",".join(map(str, hashlib.sha256(widget_parts.png(figure)).digest()))
    end = time.monotonic() + PATIENCE
    while page.evaluate(DIGEST_OF_IMAGE, IMAGE) != wanted:
        assert time.monotonic() < end, "the picture on the screen is another one"
        page.wait_for_timeout(50)


def _press(page, line, key, times=1):
    """A key on the slider of the line that starts with this text."""
    handle = page.locator(".jp-OutputArea .widget-slider", has_text=line).get_by_role("slider")
    for _ in range(times):
        handle.press(key)


def test_orders_are_explored_with_sliders_and_boxes(open_widget, tmp_path):
    page = open_widget("orders")
    _wait_for_picture(page, orders_chart.study(4096)[0])
    _press(page, "Numbers", "ArrowLeft", 5)
    _wait_for_picture(page, orders_chart.study(8)[0])
    _press(page, "Sizes over", "ArrowRight", 3)
    page.get_by_label("Format").select_option("bfloat16")
    page.get_by_label("positive only").check()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Seed").press("Tab")
    chosen = {"n": 8, "dtype": torch.bfloat16, "spread": 3, "positive": True, "seed": 7}
    figure, words = orders_chart.study(**chosen)
    _wait_for_picture(page, figure)
    page.get_by_text("This figure in words").click()
    page.get_by_text(words).wait_for()
    for name in orders.KINDS:
        page.get_by_label(name, exact=True).uncheck()
    page.get_by_text("choose at least one way to add").wait_for()
    page.get_by_label("Kahan", exact=True).check()
    _wait_for_picture(page, orders_chart.study(**chosen, kinds=["Kahan"])[0])
    assert not page.get_by_text("choose at least one way to add").is_visible()
    _screenshot(page, tmp_path, "orders_of_eight")


def test_the_adder_follows_its_sliders(open_widget, tmp_path):
    page = open_widget("adder")
    _wait_for_picture(page, adder_chart.study((3, -6, -14, -27), -2)[0])
    _press(page, "product 0", "ArrowRight", 4)
    _press(page, "product 3", "ArrowLeft")
    _press(page, "accumulator", "ArrowLeft", 2)
    page.get_by_label("Adder", exact=True).select_option(label="Ampere: 24 bits below the largest")
    zeros = page.get_by_label("zero")  # the accumulator's, then those of products 0 to 3
    zeros.nth(2).check()
    figure, words = adder_chart.study((7, None, -14, -28), -4, adder_chart.ADDERS["Ampere"])
    _wait_for_picture(page, figure)
    page.get_by_text("This figure in words").click()
    page.get_by_text(words).wait_for()
    _screenshot(page, tmp_path, "adder_moved")
    for i in (0, 1, 3, 4):
        zeros.nth(i).check()
    page.get_by_text("all five are zero").wait_for()


def test_a_batch_is_chosen_with_a_slider_and_its_order_is_fixed_by_a_button(open_widget, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the notebook: the default's bits may follow them
    try:
        two, fixed = (serving_chart.study(2, fixed, count=4) for fixed in (False, True))
    finally:
        torch.set_num_threads(threads)
    page = open_widget("serving")
    page.locator(IMAGE).wait_for()
    _press(page, "Requests in the batch", "ArrowRight")
    _wait_for_picture(page, two[0])
    page.get_by_role("button", name="Fix the order").click()
    _wait_for_picture(page, fixed[0])
    page.get_by_text("This figure in words").click()
    page.get_by_text(fixed[1]).wait_for()
    _screenshot(page, tmp_path, "batch_of_two")


def test_a_mix_of_verified_requests_is_explored_with_sliders(open_widget, tmp_path):
    page, costs = open_widget("mix"), Costs(10.0, 12.0, 20.0)
    _wait_for_picture(page, verifying_chart.explored(16, 4, 0.5, 8, costs=costs)[0])
    _press(page, "Window W", "ArrowRight", 2)
    _press(page, "Deterministic, %", "ArrowRight", 3)
    figure, words = verifying_chart.explored(64, 4, 0.65, 8, costs=costs)
    _wait_for_picture(page, figure)
    page.get_by_text("This figure in words").click()
    page.get_by_text(words).wait_for()
    _screenshot(page, tmp_path, "mix_explored")


def test_a_servers_settings_are_turned_and_its_order_is_fixed_by_a_button(open_widget, tmp_path):
    at_rest = {"pages": 400, "page_size": 8, "max_batch": 16, "budget": 64, "chunk": 64}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the notebook: the default's bits may follow them
    try:
        figures = [answer_tree.study(Server(**at_rest | turned), fixed, 2, 4)
                   for turned, fixed in (({}, False), ({"chunk": 16}, False), ({"chunk": 16, "sharing": False}, True))]
    finally:
        torch.set_num_threads(threads)
    page = open_widget("server")
    _wait_for_picture(page, figures[0][0])
    _press(page, "Tokens a chunk", "ArrowLeft")
    _wait_for_picture(page, figures[1][0])
    page.get_by_role("button", name="Prefix cache").click()
    page.get_by_role("button", name="Fix the order").click()
    _wait_for_picture(page, figures[2][0])
    page.get_by_text("This figure in words").click()
    page.get_by_text(figures[2][1]).wait_for()
    _screenshot(page, tmp_path, "server_turned")


def test_the_atlas_is_filtered_and_one_cell_is_measured_again(open_widget, tmp_path):
    page = open_widget("atlas")
    drawn, real, scrolled = page.evaluate(SCROLL_IMAGE, IMAGE)
    assert drawn >= real / 1.5 - 1, "the chart is shrunk, so that its text cannot be read"  # its 150 dpi as 100
    assert drawn < 900 or scrolled > 0, "a chart wider than the page cannot be scrolled"
    before, rows = page.evaluate(DIGEST_OF_IMAGE, IMAGE), atlas.recorded(atlas.machines()[0])
    page.get_by_label("Op contains").fill("softmax")
    page.get_by_label("Op contains").press("Tab")
    page.get_by_label("Property").first.select_option("batch")
    page.get_by_label("Dtype").first.select_option("float32")
    wanted = rows[rows.op.str.contains("softmax") & (rows.property == "batch") & (rows.dtype == "float32")]
    table = page.locator(".jp-OutputArea table").last
    page.wait_for_function("n => [...document.querySelectorAll('.jp-OutputArea table')].at(-1).rows.length === n",
                           arg=1 + len(wanted))
    lines = [line.split("\t") for line in table.locator("tr").all_inner_texts()]
    assert [line[0] for line in lines[1:]] == list(wanted.op) and {line[3] for line in lines[1:]} == {"batch"}
    assert page.evaluate(DIGEST_OF_IMAGE, IMAGE) != before
    page.get_by_label("Op", exact=True).select_option("amax")
    page.get_by_label("Property").last.select_option("position")
    _button(page, "Run").click()
    page.get_by_text("done, ").wait_for()
    live = page.locator(".jp-OutputArea table").first.inner_text()
    assert "now" in live and "position" in live and live.count(", recorded") == len(atlas.machines())
    assert page.locator(".jp-OutputArea").get_by_text("amax in float32").is_visible()
    assert _button(page, "Run").is_enabled()
    assert page.get_by_text("Pale: the same bits.").is_visible()
    _screenshot(page, tmp_path, "atlas_filtered_and_measured")
    page.get_by_label("Op contains").fill("no such op")
    page.get_by_label("Op contains").press("Tab")
    page.get_by_text("No recorded row passes these filters.").wait_for()
    assert not page.locator(IMAGE).is_visible() and page.get_by_text("Pale: the same bits.").count() == 0


def test_a_sweep_of_a_product_starts_without_a_record(open_widget, tmp_path):
    page = open_widget("matmul")
    before = page.evaluate(DIGEST_OF_IMAGE, IMAGE)
    assert page.locator(".jp-OutputArea table").count() == 0
    _screenshot(page, tmp_path, "matmul_at_rest")
    _type_tokens(page, "1 2 16")
    page.get_by_label("tiled", exact=True).check()
    _button(page, "Run").click()
    page.get_by_text("done, ").wait_for()
    _screenshot(page, tmp_path, "matmul_after_a_sweep")
    lines = page.locator(".jp-OutputArea table tr").all_inner_texts()
    assert [line.split()[0] for line in lines] == ["tokens", "1", "2", "16"]
    assert lines[0].split()[1:] == ["cuda", "python", "triton", "tiled"]
    assert page.evaluate(DIGEST_OF_IMAGE, IMAGE) != before
