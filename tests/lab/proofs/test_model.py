"""A GPU's digests of a whole model, redone here by the specification; and what differs is named."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.__main__ import main
from kernels.bits import digest
from kernels.lab import records
from kernels.lab.proofs import model, model_forms
from kernels.lab.proofs.model_forms import CASES, FOLDER, Case, Run
from kernels.model import folder as folders
from kernels.model import steps

WINDOW = Case("byte", 8, "window", 64)
GOLDEN = Path(__file__).with_name("recorded")  # what the specification gave on a CPU: its bits are everywhere the same
OUT = records.DATA if records.machines(model.MODEL_DIGESTS.file, records.DATA) else GOLDEN


def machines() -> list[str]:
    found = records.machines(model.MODEL_DIGESTS.file, OUT)
    assert found
    return found


def table(machine=None, out=OUT):
    return model.recorded(machine or records.machines(model.MODEL_DIGESTS.file, out)[0], out)


def of(rows, case: Case) -> dict[str, str]:
    mine = rows[(rows[[*vars(case)]] == list(vars(case).values())).all(axis=1)]
    return dict(zip(mine.part, mine.digest, strict=True))


@pytest.fixture(scope="module")
def window() -> Run:
    return model_forms.run(WINDOW)


# The record, redone.

def test_a_machine_recorded_every_run():
    assert machines()
    for machine in machines():
        rows = table(machine)
        assert {Case(r.model, r.shared, r.form, r.tokens) for r in rows.itertuples()} == set(CASES)
        assert set(rows.implementation) == {"python" if machine.startswith("cpu") else "triton"}
        assert rows.digest.str.fullmatch("[0-9a-f]{64}").all()


@pytest.mark.parametrize("shared", [1, 8])
@pytest.mark.parametrize("tokens", [8, 64])
def test_a_window_and_its_decode_steps_were_recorded_with_the_same_digests(shared, tokens):
    rows = table()
    window = of(rows, Case("byte", shared, "window", tokens))
    assert window == of(rows, Case("byte", shared, "decode", tokens))
    assert set(window) == {"weights", "prompt", "embedding", "layer 0", "layer 1", "layer 2", "final norm", "logits"}


def test_the_weights_are_those_that_training_gave():
    facts = json.loads((FOLDER / "training.json").read_text())
    mine = table().query("model == 'byte' and part == 'weights'")
    assert set(mine.digest) == {run["digest"] for run in facts["runs"]}


def test_every_machine_recorded_the_same():
    first = table(out=GOLDEN)
    for machine in machines():
        other = table(machine)
        assert all(of(first, case) == of(other, case) for case in CASES)


def test_a_window_of_real_text_is_redone(window):
    for machine in machines():
        verdict = model.compared(table(machine), WINDOW, window)
        assert verdict and len(verdict.parts) == 8, verdict.why


def test_a_gpu_recorded_the_model_and_this_cpu_redoes_its_windows(window):
    """Of data/ itself: what a CPU recorded for these tests is no GPU's record."""
    gpus = [name for name in records.machines(model.MODEL_DIGESTS.file, records.DATA) if not name.startswith("cpu")]
    assert gpus
    for gpu in gpus:
        rows = table(gpu, records.DATA)
        assert set(rows.implementation) == {"triton"} and set(rows.shared) == {1, 8}
        assert model.compared(rows, WINDOW, window), "shared by up to eight"
        verdict = model.redo("window", 1, 64, machine=gpu, out=records.DATA)
        assert verdict and verdict.machine == gpu and len(verdict.parts) == 8, verdict.why


@pytest.mark.parametrize("form, shared, tokens", [("window", 1, 64), ("decode", 1, 8), ("decode", 8, 64),
                                                  ("layer", 8, None)])
def test_a_gpus_digests_are_redone(form, shared, tokens):
    machines()
    verdict = model.redo(form, shared, tokens, out=OUT)
    assert verdict and verdict.why == "" and len(verdict.parts) >= 6, verdict.why


def test_the_greedy_text_is_redone_as_one_window():
    """Its cached decode steps would take half a minute; the window has the same logits, and so the same bytes."""
    rows, case = table(), Case("byte", 1, "greedy", 64)
    text = next(row.text for row in rows.itertuples() if row.text and row.shared == 1)
    chosen, prompt = list(json.loads(text).encode("latin-1")), model_forms.prompt_in()
    assert len(chosen) == 64 and model_forms.written(chosen) == text
    logits = steps.logits(folders.load(FOLDER, ops="invariant", device="cpu"), [*prompt, *chosen[:-1]])[63:]
    assert digest(logits) == of(rows, case)["logits"] and logits.argmax(-1).tolist() == chosen
    assert digest(torch.tensor(chosen)) == of(rows, case)["tokens"]


@pytest.mark.parametrize("form, chunks", [("window", [8]), ("decode", [1] * 8)])
def test_decode_is_token_by_token(form, chunks, monkeypatch):
    """A window in its place would have the same digests, so they cannot tell."""
    real, taken = model_forms.steps.layer_digests, []
    monkeypatch.setattr(model_forms.steps, "layer_digests", lambda *given: taken.append(given[2]) or real(*given))
    model_forms.run(Case("byte", 1, form, 8))
    assert taken == [chunks]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_schedules_keep_the_record(case):
    verdict = model.compared(table(), case, model_forms.run(case, "cuda"))
    assert verdict, verdict.why


# What differs is named.

def test_another_order_is_noticed(window):
    """The digests of the order for one GPU are not those of the order for eight."""
    rows = table()
    verdict = model.compared(rows.assign(shared=9 - rows.shared), WINDOW, window)
    assert not verdict and [part.name for part in verdict.parts if part.same] == ["weights", "prompt", "embedding"]
    assert "byte, shared=8, window of 64 tokens: layer 0 is the first part whose bits differ from" in verdict.why


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "byte")


def test_one_bit_of_one_weight_is_noticed(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int16)[0, 0] ^= 1 << 12
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    verdict = model.redo("window", tokens=8, model=copied, out=OUT)
    assert [part.name for part in verdict.parts if part.same] == ["prompt", "embedding", "layer 0"]
    assert "the weights are not those of the record: recorded" in verdict.why


def test_another_text_is_noticed(copied):
    text = (copied / "held_out.txt").read_bytes()
    (copied / "held_out.txt").write_bytes(text.replace(b"processed", b"precessed", 1))
    verdict = model.redo("window", tokens=8, model=copied, out=OUT)
    assert [part.name for part in verdict.parts if part.same] == ["weights"]
    assert "the text is not that of the record" in verdict.why


# The command and its file, with runs that come out as they were made up.

def made_up(case: Case, device="cpu", folder=FOLDER) -> Run:
    parts = ("weights", "logits", "tokens") if case.form == "greedy" else ("weights", "layer 0", "logits")
    like = dataclasses.replace(case, form="window") if case.form == "decode" else case
    return Run({part: digest(torch.tensor(list(f"{like} {part}".encode()))) for part in parts},
               '"it\'s\\n#"' if case.form == "greedy" else "", 0.5)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A data folder into which a machine recorded runs that are made up."""
    monkeypatch.setattr(model, "run", made_up)
    assert main(["verify", "--record", "--device", "cpu", "--out", str(tmp_path), "--machine", "m"]) == 0
    return tmp_path


def test_a_record_has_a_row_for_each_part_and_its_command(out, capsys):
    rows = model.recorded("m", out)
    assert len(rows) == 3 * len(CASES) and set(rows.columns) == {*model.MODEL_DIGESTS.columns, "machine"}
    assert set(rows.implementation) == {"python"} and rows.source.str.fullmatch("[0-9a-f]{12}").all()
    assert set(rows[rows.text != ""].part) == {"tokens"} and set(rows.text) == {"", '"it\'s\\n#"'}
    assert model.MODEL_DIGESTS.file in records.read_machine(out / "m")["command"]
    assert main(["verify", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{len(CASES)} of {len(CASES)} runs have every digest as recorded" in printed
    assert "byte, shared=8, window of 64 tokens: m's record, the specification on a CPU here, 0.5 s" in printed


def change(out, old: str, new: str) -> None:
    path = out / "m" / model.MODEL_DIGESTS.file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("place", [0, 63])
def test_one_changed_digit_of_a_record_is_said(out, capsys, place):
    right = made_up(WINDOW).digests["layer 0"]
    wrong = right[:place] + ("0" if right[place] != "0" else "1") + right[place + 1 :]
    change(out, f"byte,8,window,64,layer 0,python,{right}", f"byte,8,window,64,layer 0,python,{wrong}")
    assert main(["verify", "--device", "cpu", "--out", str(out), "--form", "window"]) == 1
    printed = capsys.readouterr().out
    assert "3 of 4 runs" in printed and printed.count("✗") == 1
    assert "window of 64 tokens: layer 0 is the first part whose bits differ from m's: recorded" in printed
    assert main(["verify", "--device", "cpu", "--out", str(out), "--form", "decode", "layer"]) == 0


def test_a_part_that_was_not_recorded_is_no_success(out, capsys):
    rows = (out / "m" / model.MODEL_DIGESTS.file).read_text().splitlines(keepends=True)
    kept = [row for row in rows if not row.startswith("byte,1,greedy,64,logits")]
    (out / "m" / model.MODEL_DIGESTS.file).write_text("".join(kept))
    assert main(["verify", "--device", "cpu", "--out", str(out), "--form", "greedy"]) == 1
    assert "greedy of 64 tokens: m has no record of logits" in capsys.readouterr().out


def test_a_part_that_is_no_more_is_no_success(out):
    change(out, "llama-3.1-8b layer,8,layer,1,logits", "llama-3.1-8b layer,8,layer,1,spirits")
    verdict = model.redo("layer", 8, machine="m", out=out)
    assert not verdict and verdict.why.endswith("m has no record of logits")
    assert verdict.parts[-1] == model.Part("spirits", verdict.run.digests["logits"], "")


@pytest.mark.parametrize("old, new, said", [
    ("byte,8,window,64,layer 0", "byte,8,spiral,64,layer 0", "no run of this suite is byte, shared=8, spiral of 64"),
    (made_up(Case("byte", 8, "greedy", 64)).digests["tokens"], "cafe", "a digest of 64 hex digits, got 'cafe'"),
    ("model,shared,form", "model,form,shared", "is not a model_digests.csv of this suite"),
    ("byte,8,window,64,layer 0,python", "byte,8,window,64,layer 0", "9 cells instead of 10"),
])
def test_a_damaged_record_is_named(out, capsys, old, new, said):
    change(out, old, new)
    assert main(["verify", "--device", "cpu", "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    assert said in errors and model.MODEL_DIGESTS.file in errors and errors.count("\n") == 1


def test_nothing_recorded_and_an_unknown_machine_are_said(tmp_path, out, capsys):
    assert main(["verify", "--out", str(tmp_path / "none")]) == 1
    assert "on a GPU, python -m kernels verify --record" in capsys.readouterr().err
    assert main(["verify", "--out", str(out), "--machine", "other"]) == 1
    assert "no model_digests.csv is recorded for other" in capsys.readouterr().err


def test_a_window_that_differs_from_its_decode_steps_is_not_recorded(tmp_path, monkeypatch):
    def moving(case, *rest):
        done = made_up(case)
        return dataclasses.replace(done, digests=done.digests | {"logits": "0" * 64}) if case.form == "decode" else done
    monkeypatch.setattr(model, "run", moving)
    with pytest.raises(RuntimeError, match="window of 8 tokens and as decode steps differ on cpu; nothing is recorded"):
        model.record(tmp_path, "cpu")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_or_has_too_little_text_is_named(tmp_path, copied, capsys):
    machines()
    assert main(["verify", "--device", "cpu", "--form", "window", "--folder", str(tmp_path / "none"),
                 "--out", str(OUT)]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    (copied / "held_out.txt").write_bytes(b"  short")
    with pytest.raises(ValueError, match="held_out.txt must hold at least 64 bytes behind its first blanks, got 5"):
        model_forms.run(WINDOW, folder=copied)


@pytest.mark.parametrize("form, shared, tokens", [("spiral", 1, None), ("window", 2, None), ("decode", 1, 63)])
def test_a_run_that_there_is_not_is_said(form, shared, tokens):
    with pytest.raises(ValueError, match=f"there is no '{form}' with shared={shared} and tokens={tokens}"):
        model.redo(form, shared, tokens)
    with pytest.raises(ValueError, match="there is no such run as byte"):
        model_forms.run(Case("byte", shared, form, tokens or 64))


def test_recording_takes_no_form(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--record", "--form", "window"])
    assert "--record records every form" in capsys.readouterr().err
