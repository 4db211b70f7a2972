"""Figures come out byte for byte from data/ alone, and say nothing that the data does not."""
import contextlib
import json
import os
import subprocess
import sys

import matplotlib as mpl
import pytest

import figures
from figures.__main__ import main
from kernels.lab import records, style
from kernels.lab.atlas.measure import ATLAS
from kernels.lab.window.measure import VERIFY_COST

OF_DATA = [name for name in figures.names() if name != "adder"]
RECORDED = {table.file: (table, table.read(records.DATA / "h200"))
            for table in (records.TOKEN_SWEEP, ATLAS, VERIFY_COST)}
MACHINE = records.read_machine(records.DATA / "h200")


@pytest.mark.parametrize("name", figures.names())
def test_bytes_are_those_in_the_repository(name):
    for kind, content in figures.render(name).items():
        assert content == (figures.FOLDER / f"{name}.{kind}").read_bytes(), f"{name}.{kind}: run `make figures`"


def test_a_fresh_process_with_another_hash_seed_draws_the_same_bytes():
    command = [sys.executable, "-m", "figures", "rms_norm_time", "--check"]
    run = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert run.returncode == 0, run.stdout + run.stderr


# A reader's settings.

@pytest.fixture
def own_settings():
    """The settings of matplotlib as they were, afterwards."""
    with mpl.rc_context():
        yield


def test_the_theme_is_the_same_whatever_was_set_before(own_settings):
    window = {"backend_fallback", "docstring.hardcopy", "figure.max_open_warning", "figure.raise_window",
              "interactive", "tk.window_focus", "webagg.open_in_browser", "webagg.port", "webagg.port_retries"}
    style.theme()
    wanted = dict(mpl.rcParams)
    for name, value in wanted.items():
        if isinstance(value, (bool, int, float)) and name not in window:
            with contextlib.suppress(ValueError, RuntimeError):  # more than it may be
                mpl.rcParams[name] = not value if isinstance(value, bool) else value + 1
    assert sum(mpl.rcParams[name] != value for name, value in wanted.items()) > 100
    mpl.rcParams.update({"font.family": "serif", "image.cmap": "gray", "savefig.bbox": "tight", "svg.hashsalt": None,
                         "path.sketch": (1, 2, 3), "axes.prop_cycle": mpl.cycler(color=["red"])})
    style.theme()
    assert {name for name, value in wanted.items() if mpl.rcParams[name] != value} == set()


@pytest.mark.parametrize("backend", ["TkAgg", "no_such_backend", "module://matplotlib_inline.backend_inline"])
def test_a_readers_matplotlibrc_and_backend_move_no_byte(backend, tmp_path):
    (tmp_path / "matplotlibrc").write_text(
        "savefig.bbox: tight\nfont.size: 20\nlines.linewidth: 9\nsavefig.transparent: True\nno.such.key: 1\n"
        "svg.fonttype: none\npath.simplify: False\naxes.formatter.use_locale: True\nfigure.dpi: 30\n")
    env = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": backend}
    command = [sys.executable, "-m", "figures", "adder", "rms_norm_bandwidth", "--check"]
    run = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr


# Another machine, and a part of a record.

def record(folder, keep=lambda rows: rows, machine=MACHINE):
    """A machine of which a part of the H200's record is known."""
    folder.mkdir(parents=True)
    for table, rows in RECORDED.values():
        some = keep(rows)
        if len(some):
            table.merge(folder, some)
    (folder / "machine.json").write_text(json.dumps(machine))


def words(name, data, machine=None) -> str:
    """All text of a figure that is drawn."""
    style.theme()
    figure = __import__(f"figures.{name}", fromlist=["draw"]).draw(data, machine)
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def test_a_whole_record_of_another_name_gives_our_bytes(tmp_path):
    record(tmp_path / "mine")
    for name in ("rms_norm_bandwidth", "matmul_roofline"):
        for kind, content in figures.render(name, data=tmp_path, machine="mine").items():
            assert content == (figures.FOLDER / f"{name}.{kind}").read_bytes(), name


PARTS = {
    "one op": lambda rows: rows[rows.op == "rms_norm"] if "op" in rows else rows,
    "one contender": lambda rows: rows[rows.implementation == "cuda"] if "implementation" in rows else rows[:0],
    "our kernel alone": lambda rows: rows[rows.implementation == "triton"] if "implementation" in rows else rows,
    "the clock call": lambda rows: rows[rows.clock == "call"] if "clock" in rows else rows[rows.curve == "paper"]
    if "curve" in rows else rows,
    "the clock graph": lambda rows: rows[rows.clock == "graph"] if "clock" in rows else rows[rows.curve == "graph"]
    if "curve" in rows else rows,
    "float32": lambda rows: rows[rows.dtype == "float32"] if "dtype" in rows else rows,
    "one token": lambda rows: rows[rows.tokens == rows.tokens.min()] if "tokens" in rows else rows[:3],
    "the largest count": lambda rows: rows[rows.tokens == rows.tokens.max()] if "tokens" in rows else rows[-3:],
    "one shape": lambda rows: rows[rows["shape"].isin(["D=4096", "N=512,K=4096"])] if "shape" in rows else rows,
    "one row": lambda rows: rows[:1], "the last row": lambda rows: rows[-1:], "nothing": lambda rows: rows[:0],
    "every third row": lambda rows: rows[::3],
    "no verdicts": lambda rows: rows.assign(same_bits=None) if "same_bits" in rows else rows,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_record_is_drawn_or_refused_by_name(part, tmp_path):
    machines = (MACHINE, {}, {"device": "AMD EPYC, 2 threads", "torch": "2.13.0"})
    record(tmp_path / "mine", PARTS[part])
    for i, name in enumerate(OF_DATA):
        (tmp_path / "mine" / "machine.json").write_text(json.dumps(machines[(i + len(part)) % 3]))
        try:
            assert words(name, tmp_path)
        except (ValueError, FileNotFoundError) as error:
            assert any(word in str(error) for word in ("recorded", "no row")), f"{name}: {error}"


@pytest.mark.parametrize("name, keep, said", [
    ("rms_norm_time", lambda rows: rows[rows.clock == "call"], "nothing recorded on the clock graph"),
    ("rms_norm_time", lambda rows: rows[rows.implementation != "triton"], "not recorded: triton"),
    ("rms_norm_bandwidth", lambda rows: rows[rows.implementation != "triton"], "not recorded: triton"),
    ("reductions_speed", lambda rows: rows[(rows.op != "softmax") & (rows.dtype == "bfloat16")],
     "not recorded: softmax\nnot recorded: float32"),
    ("matmul_speed", lambda rows: rows[rows.implementation.isin(["cuda", "triton"])], "not recorded: tiled, "),
    ("matmul_roofline", lambda rows: rows[rows.implementation != "frozen"], "not recorded: frozen"),
    ("attention_speed", lambda rows: rows[(rows.op != "attention_chunk") & (rows.implementation != "frozen")],
     "not recorded: frozen\nnot recorded: attention_chunk")])
def test_a_figure_says_what_is_missing(name, keep, said, tmp_path):
    record(tmp_path / "mine", lambda rows: keep(rows) if "implementation" in rows else rows[:0])
    assert said in words(name, tmp_path, "mine")


def test_titles_of_another_machine_are_true_of_it(tmp_path):
    slower = RECORDED["token_sweep.csv"][1].assign(us_p50=lambda rows: rows.us_p50.where(
        rows.implementation != "triton", 3 * rows.us_p50))
    record(tmp_path / "mine", lambda rows: slower if "clock" in rows else rows)
    assert "beats the default" not in words("rms_norm_time", tmp_path)
    assert "times the default's time" in words("rms_norm_time", tmp_path)


def test_a_cpu_is_drawn_with_its_own_words(tmp_path):
    rows = RECORDED["token_sweep.csv"][1].query("clock == 'call'")
    record(tmp_path / "laptop", lambda some: rows if "clock" in some else some[:0],
           {"device": "AMD EPYC, 2 threads", "torch": "2.13.0"})
    for name in ("rms_norm_time", "matmul_speed", "matmul_roofline", "rms_norm_bandwidth"):
        found = words(name, tmp_path, "laptop")
        assert "AMD EPYC" in found and "cuBLAS" not in found and "(CUDA)" not in found, name


# The command.

def test_a_readers_machine_goes_into_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("figures.__main__.FOLDER", tmp_path / "figures")
    record(tmp_path / "data" / "mine", lambda rows: rows[rows.op == "rms_norm"] if "clock" in rows else rows[:0])
    assert main(["--data", str(tmp_path / "data"), "--machine", "mine"]) == 0
    drawn = {path.name for path in (tmp_path / "figures" / "mine").iterdir()}
    possible = {"adder", "rms_norm_bandwidth", "rms_norm_time"}
    assert drawn == {f"{name}.{kind}" for name in possible for kind in ("svg", "png")}
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[:2] for line in told) == [["not drawn", name] for name in figures.names()
                                                             if name not in possible]
    assert any("python -m kernels sweep matmul" in line for line in told)
    assert main(["verify_cost", "--data", str(tmp_path / "data"), "--machine", "mine"]) == 1
    assert main(["adder", "--data", str(tmp_path / "data"), "--machine", "mine", "--check"]) == 0


def test_out_chooses_the_folder(tmp_path, capsys):
    assert main(["adder", "--out", str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b" / "adder.svg").read_bytes() == (figures.FOLDER / "adder.svg").read_bytes()
    (tmp_path / "file").touch()
    assert main(["adder", "--out", str(tmp_path / "file")]) == 1
    assert "file is a file" in capsys.readouterr().err


@pytest.mark.parametrize("words_, said", [
    (["--machine", "no-such"], "is recorded for no-such"), (["--data", "no-such-folder"], "--data must be a folder"),
    (["rms_norm_time", "--data", str(records.DATA / "llm42")], "is recorded for any machine")])
def test_what_is_not_recorded_is_named(words_, said, capsys, tmp_path):
    assert main([*words_, "--out", str(tmp_path)]) in (0, 1, 2)
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_a_full_disk_leaves_the_old_figure(tmp_path, monkeypatch, capsys):
    (tmp_path / "adder.svg").write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert main(["adder", "--out", str(tmp_path)]) == 1
    assert "adder.svg (the file there is unchanged)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adder.svg"]
    assert (tmp_path / "adder.svg").read_text() == "old"


@pytest.mark.parametrize("name", figures.names())
def test_every_figure_has_words(name):
    module = __import__(f"figures.{name}", fromlist=["words"])
    assert len(module.words().split()) > 20


def test_check_notices_a_changed_byte(monkeypatch, tmp_path):
    monkeypatch.setattr("figures.__main__.FOLDER", tmp_path)
    assert main(["rms_norm_bandwidth", "--check"]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_check_notices_one_changed_byte_of_a_figure(kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("figures.__main__.FOLDER", tmp_path)
    for path in figures.FOLDER.glob("rms_norm_bandwidth.*g"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert main(["rms_norm_bandwidth", "--check"]) == 0 and "as it was" in capsys.readouterr().out
    path = tmp_path / f"rms_norm_bandwidth.{kind}"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert main(["rms_norm_bandwidth", "--check"]) == 1 and "changed" in capsys.readouterr().out
    assert path.read_bytes() == whole, "it writes nothing"


def test_check_notices_one_changed_number_of_the_data(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "drawn"
    (data / "h200").mkdir(parents=True)
    for name in ("token_sweep.csv", "machine.json"):
        (data / "h200" / name).write_bytes((records.DATA / "h200" / name).read_bytes())
    options = ["rms_norm_bandwidth", "--data", str(data), "--out", str(out)]
    assert main(options) == 0 and main([*options, "--check"]) == 0
    rows = records.TOKEN_SWEEP.read(data / "h200")
    drawn = rows.query("op == 'rms_norm' and implementation == 'triton' and clock == 'cold' and dtype == 'bfloat16' "
                       "and shape == 'D=8192,residual'").iloc[-1:]
    assert len(drawn) == 1
    records.TOKEN_SWEEP.merge(data / "h200", drawn.assign(gbytes_per_s=drawn.gbytes_per_s * 1.02))
    assert main([*options, "--check"]) == 1


def test_an_unknown_figure_is_named(capsys):
    assert main(["no_such"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_what_the_titles_claim_is_in_the_data():
    rows = records.load()
    rows = rows[(rows.dtype == "bfloat16") & (rows["shape"] == "D=8192,residual")]
    for clock in ("cold", "graph", "call"):
        us = rows[rows.clock == clock].pivot(index="tokens", columns="implementation", values="us_p50")
        assert (us.triton < us.cuda).all(), clock
    assert rows[rows.implementation == "triton"].same_bits.all()


def test_what_the_reductions_words_say_is_in_the_data():
    rows = records.load(machine="h200").query("clock == 'cold' and op in ['softmax', 'log_softmax', 'mean']")
    us = rows.pivot(index=["tokens", "dtype", "op", "shape"], columns="implementation", values="us_p50")
    ratio = us.cuda / us.triton
    few, many = (ratio[ratio.index.get_level_values("tokens").isin(some)] for some in (range(33), [4096]))
    assert ratio.min() > 1, "lie above it"
    words = __import__("figures.reductions_speed", fromlist=["words"]).words()
    assert f"{many.min():.1f} to {many.max():.1f} at 4096 tokens" in words
    assert f"{few.min():.1f} to {few.max():.1f} at 32 or fewer" in words


def test_the_bandwidth_title_is_of_the_most_tokens():
    rows = records.load(machine="h200").query(
        "op == 'rms_norm' and clock == 'cold' and dtype == 'bfloat16' and shape == 'D=8192,residual'")
    last = rows[(rows.implementation == "triton") & (rows.tokens == rows.tokens.max())].gbytes_per_s.item()
    copy = records.read_machine(records.DATA / "h200")["copy_gbytes_per_s"]
    found = __import__("figures.rms_norm_bandwidth", fromlist=["words"]).words()
    assert found.startswith(f"At {rows.tokens.max()} tokens RMSNorm in a fixed order runs at {last / copy:.0%} of")
