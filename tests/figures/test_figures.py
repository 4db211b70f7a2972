"""Figures come out byte for byte from data/ alone, and say nothing that the data does not."""
import subprocess
import sys

import pytest

import figures
from figures.__main__ import main
from kernels.lab import records


@pytest.mark.parametrize("name", figures.names())
def test_bytes_are_those_in_the_repository(name):
    for kind, content in figures.render(name).items():
        assert content == (figures.FOLDER / f"{name}.{kind}").read_bytes(), f"{name}.{kind}: run `make figures`"


def test_a_fresh_process_with_another_hash_seed_draws_the_same_bytes():
    command = [sys.executable, "-m", "figures", "rms_norm_time", "--check"]
    run = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", figures.names())
def test_every_figure_has_words(name):
    module = __import__(f"figures.{name}", fromlist=["ALT"])
    assert len(module.ALT.split()) > 20


def test_check_notices_a_changed_byte(monkeypatch, tmp_path):
    monkeypatch.setattr("figures.__main__.FOLDER", tmp_path)
    assert main(["rms_norm_bandwidth", "--check"]) == 1
    assert not list(tmp_path.iterdir())


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
    words = __import__("figures.reductions_speed", fromlist=["ALT"]).ALT
    assert f"{many.min():.1f} to {many.max():.1f} at 4096 tokens" in words
    assert f"{few.min():.1f} to {few.max():.1f} at 32 or fewer" in words
    readme = (records.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"at {many.min():.1f} to {many.max():.1f} for 4096 tokens" in readme
    assert f"at {few.min():.1f} to {few.max():.1f} for 32 or fewer" in readme
