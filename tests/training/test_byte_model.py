"""The trained model that travels with the suite: its files agree with each other, and its text is this Python's."""
import csv
import hashlib
import json
import math
import platform
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from kernels.bits import digest
from kernels.lab.records import DATA
from kernels.model.config import preset
from kernels.model.folder import load
from kernels.training.backward import implementation_on
from kernels.training.card import card
from kernels.training.corpus import PIECE, PIECES, gather
from kernels.training.forward import loss
from kernels.training.places import Places

FOLDER = DATA / "models" / "byte"
FACTS = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def model():
    return load(FOLDER, ops="invariant", device="cpu")


def test_the_weights_are_those_that_two_runs_gave(model):
    digests = {run["digest"] for run in FACTS["runs"]}
    assert len(FACTS["runs"]) >= 2 and digests == {digest(model.weights())}


def test_it_is_the_preset_and_small(model):
    byte = preset("byte")
    assert {**vars(model.config), "name": "byte"} == vars(byte) and byte.parameters <= 4_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000 and model.dtype == torch.bfloat16
    assert all(size % 128 == 0 for name, shape in byte.shapes.items() for size in shape)


def test_the_card_and_the_curve_are_made_of_the_numbers():
    assert (FOLDER / "model_card.md").read_text() == card(FACTS)
    with (FOLDER / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == FACTS["curve"]
    assert FACTS["curve"][-1]["step"] == FACTS["recipe"]["steps"]
    first, last = (FACTS["curve"][i]["held_out_loss"] for i in (0, -1))
    assert last < 1.2 < first < math.log(256)  # nats a byte, the last a guess's


def is_as_released() -> bool:
    """Whether this Python's library is CPython's own, and not one that a distribution has changed."""
    managed = Path(sysconfig.get_paths()["stdlib"], "EXTERNALLY-MANAGED").exists()
    return not managed and "packaged by" not in sys.version


def test_the_text_is_that_of_its_python():
    """Where that very version runs, the whole text is made again."""
    excerpt, corpus = (FOLDER / "held_out.txt").read_bytes(), FACTS["corpus"]
    assert len(excerpt) == PIECES * PIECE and {len(corpus["sha256"]), len(corpus["held_out_sha256"])} == {64}
    assert b"Python Software Foundation" in (FOLDER / "LICENSE-PYTHON.txt").read_bytes()
    if platform.python_version() == corpus["python"] and is_as_released():
        found = gather()
        assert (found.sha256, found.held_out_sha256) == (corpus["sha256"], corpus["held_out_sha256"])
        assert hashlib.sha256(excerpt).digest() == hashlib.sha256(found.excerpt).digest()


def test_it_predicts_held_out_text(model):
    """Two short windows by the specification, far below a guess's 5.5 nats a byte."""
    excerpt, length = (FOLDER / "held_out.txt").read_bytes(), 64
    rows = torch.tensor([list(excerpt[i * PIECE : i * PIECE + length]) for i in (0, 9)])
    with torch.no_grad():
        found = loss(model.weights(), model.config, rows, Places(model.config, 2, length - 1, model.device), "python")
    assert 0 < found.item() < 2.5


@pytest.mark.gpu
def test_its_score_on_a_gpu_is_the_recorded_one():
    device = torch.device("cuda", torch.cuda.current_device())
    model, (count, length) = load(FOLDER, device=device), (FACTS["recipe"][n] for n in ("scored", "length"))
    text = torch.frombuffer(bytearray((FOLDER / "held_out.txt").read_bytes()), dtype=torch.uint8).to(device).long()
    with torch.no_grad():
        found = loss(model.weights(), model.config, text[: count * length].view(count, length),
                     Places(model.config, count, length - 1, device), implementation_on(device))
    assert found.item() == FACTS["curve"][-1]["held_out_loss"] and math.isfinite(found.item())
