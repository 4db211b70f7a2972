"""python -m kernels train: what it writes, says and refuses."""
import csv
import json
import re

import pytest
import torch
from trained import library

from kernels.__main__ import main
from kernels.bits import digest
from kernels.model.folder import load
from kernels.training.card import card

QUICK = ["--model", "tiny", "--steps", "2", "--batch", "2", "--length", "16", "--scored", "1", "--every", "1",
         "--version", "3.11.7", "--device", "cpu"]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return str(library(tmp_path_factory.mktemp("stdlib") / "lib"))


@pytest.fixture(scope="module")
def folder(lib, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    assert main(["train", *QUICK, "--stdlib", lib, "--out", str(out), "--twice"]) == 0
    return out


def test_the_folder_holds_a_model_and_what_decided_it(folder):
    facts = json.loads((folder / "training.json").read_text())
    one, other = facts["runs"]
    assert one["digest"] == other["digest"] and one["loss"] == other["loss"]
    model = load(folder, device="cpu")
    assert model.dtype == torch.bfloat16 and digest(model.weights()) == one["digest"]
    assert facts["parameters"] == model.config.parameters and facts["config"]["name"] == "tiny"
    assert facts["recipe"]["steps"] == 2 and facts["corpus"]["python"] == "3.11.7"
    assert len((folder / "held_out.txt").read_bytes()) == 65536
    assert (folder / "LICENSE-PYTHON.txt").read_text() == "a licence\n"


def test_the_curve_is_a_table(folder):
    rows = list(csv.DictReader((folder / "loss.csv").open()))
    assert list(rows[0]) == ["step", "loss", "held_out_loss", "seconds"] and [r["step"] for r in rows] == ["1", "2"]
    assert all(4 < float(row["loss"]) < 7 and 4 < float(row["held_out_loss"]) < 7 for row in rows)


def test_the_card_is_made_of_the_numbers(folder):
    facts, text = json.loads((folder / "training.json").read_text()), (folder / "model_card.md").read_text()
    assert text == card(facts)
    digests = [run["digest"] for run in facts["runs"]]
    for wanted in (*digests, facts["corpus"]["sha256"], facts["corpus"]["held_out_sha256"], "131,392", "| 3.11.7 |",
                   "Python Software Foundation", facts["command"]):
        assert wanted in text
    assert text.count("\n| 1 | ") == 1 and text.count("\n| 2 | ") == 1  # the curve's two lines
    facts["curve"] = [dict(facts["curve"][0], step=i + 1) for i in range(40)]
    assert "\n| 40 | " in card(facts) and 9 <= card(facts).count("| 7.") + card(facts).count("| 8.") <= 12


def test_two_runs_that_differ_are_an_error(lib, tmp_path, monkeypatch, capsys):
    from kernels.training.parameters import Parameters
    answers = iter("ab")
    monkeypatch.setattr(Parameters, "digest", lambda self: next(answers))
    assert main(["train", *QUICK, "--stdlib", lib, "--out", str(tmp_path), "--twice"]) == 1
    said = capsys.readouterr()
    assert "two runs gave other weights" in said.err and "weights a\nweights b" in said.out


def test_a_library_without_its_licence_is_said(tmp_path, capsys):
    lines = library(tmp_path / "lib")
    (lines / "LICENSE.txt").unlink()
    out = tmp_path / "out"
    assert main(["train", *QUICK, "--stdlib", str(lines), "--out", str(out)]) == 0
    assert "no LICENSE.txt: put Python's licence into" in capsys.readouterr().err
    assert not (out / "LICENSE-PYTHON.txt").exists()


@pytest.mark.parametrize("words, says", [
    (["--steps", "0"], "steps must be .*0"), (["--length", "1025"], "context of 1024, got 2 and 1025"),
    (["--scored", "5000"], "scored windows must fit"), (["--device", "nowhere"], "--device must name"),
    (["--every", "0"], "every must be .*0"), (["--model", "small"], "tied_embeddings must be False")])
def test_what_cannot_be_trained_is_said_in_one_line(words, says, lib, tmp_path, capsys):
    assert main(["train", *QUICK, "--stdlib", lib, "--out", str(tmp_path), *words]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and re.search(says, line)


def test_out_must_be_a_folder(lib, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", *QUICK, "--stdlib", lib, "--out", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
