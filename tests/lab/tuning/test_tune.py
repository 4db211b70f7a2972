"""The tuner: few candidates that can run, no schedule that moves a bit is kept, whole files."""
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels import runtime, tables
from kernels.lab import bench, records
from kernels.lab.proofs import certificates as proofs
from kernels.lab.proofs.certificates import CERTIFICATES, TRUSTED, prove
from kernels.lab.tuning import tune
from kernels.lab.tuning.candidates import candidates
from kernels.lab.tuning.shared_candidates import shared_candidates
from kernels.lab.tuning.tune import best_schedule, fastest, store
from kernels.op import Op
from kernels.ops.matmul import choice, cost, schedule
from kernels.ops.matmul.order import order, shared_order
from kernels.ops.matmul.schedule import Schedule

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
SHAPES = ((4096, 4096), (28672, 4096), (1280, 8192), (512, 4096), (4096, 14336), (4096, 1000))
GOOD = Schedule("pointer", 16, 16, 32, 1, 2)


def stored(folder) -> dict:
    """The table of an H200 in this folder, as the ops read it."""
    return tables.load("h200", Schedule.parse, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_suit_the_order_and_the_gpu(dtype):
    for n, k in SHAPES:
        segments, length = order(n, k)
        for tokens in tune.TOKENS:
            found = candidates(n, k, tokens, dtype)
            assert 8 <= len(found) <= 80 and len(set(found)) == len(found), (n, k, tokens, len(found))
            assert all(segments == 1 or length % s.block_k == 0 for s in found)
            held = [s.waiting_bytes if segments > 1 and not s.split else 0 for s in found]
            assert all(s.shared_bytes * dtype.itemsize // 2 + h <= 227 * 1024 for s, h in zip(found, held, strict=True))
            assert dtype == torch.float32 or any(held) == (segments > 1 and tokens > 128)
            assert segments == 1 or tokens > 1024 or any(s.split for s in found)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_for_several_gpus_suit_the_leaves(dtype):
    for n, k in SHAPES[:1] + SHAPES[3:5]:
        length = shared_order(n, k).length
        for tokens in (1, 32, 128, 4096):
            found = shared_candidates(n, k, tokens, dtype)
            assert 5 <= len(found) <= 80 and len(set(found)) == len(found), (n, k, tokens, len(found))
            assert not any(length % s.block_k or s.stream or s.pingpong for s in found)
            assert dtype == torch.float32 or {s.kind for s in found} >= {"pointer", "tma", "hopper"}
            assert {s.kind for s in shared_candidates(n, k, tokens, dtype, tma=False)} == {"pointer"}
    assert any(s.split for s in shared_candidates(4096, 4096, 1))


@pytest.mark.parametrize("tokens, rows", [(16, {16}), (17, {32}), (32, {32}), (33, {64})])
def test_tiles_of_candidates_hold_few_tokens(tokens, rows):
    assert {s.block_m for s in candidates(4096, 4096, tokens)} == rows


def test_a_gpu_without_bulk_copies_gets_no_candidates_with_them():
    assert {s.kind for tokens in tune.TOKENS for s in candidates(4096, 4096, tokens, tma=False)} == {"pointer"}


# timing and keeping


@needs_triton
def test_the_fastest_are_ranked_beside_the_default():
    found = [replace(GOOD, block_m=m) for m in (16, 32)]
    ranked = fastest(6, 18, 2, torch.bfloat16, found, runtime.device(), finalists=1, repeats=2)
    names = [name for name, _ in ranked]
    assert len(names) == 2 and "cuda" in names and len(set(names) & set(found)) == 1
    assert [us for _, us in ranked] == sorted(us for _, us in ranked) and ranked[0][1] > 0


def test_the_best_is_ours_and_its_ratio_is_the_defaults_time_over_its():
    assert best_schedule([("cuda", 10.0), (GOOD, 20.0), (TRUSTED, 30.0)]) == (GOOD, 0.5)
    assert best_schedule([(GOOD, 5.0), ("cuda", 10.0)]) == (GOOD, 2.0)
    assert math.isnan(best_schedule([(GOOD, 5.0)])[1])  # the default failed


def test_few_tokens_prefer_a_pointer_that_is_nearly_as_fast():
    bulk, plain = Schedule("tma", 16, 64, 64), Schedule("pointer", 16, 32, 64)
    near, far = ([(bulk, 10.0), (plain, us), ("cuda", 11.0)] for us in (10.2, 10.5))
    assert best_schedule(near, 64)[0] == plain and best_schedule(near, 65)[0] == bulk
    assert best_schedule(far, 1)[0] == bulk and best_schedule(near, 1)[1] == 11.0 / 10.2


def test_contenders_that_fail_are_left_out_of_the_ranking():
    timings = {"a": bench.Timing([3.0]), "b": ValueError("no"), "c": bench.Timing([1.0])}
    assert tune._ranked(timings) == [("c", 1.0), ("a", 3.0)]


def test_the_ranking_is_by_medians():
    """One slow sample makes nothing slower, one quick sample nothing faster."""
    timings = {"a": bench.Timing([2.0, 2.0, 2.0, 90.0]), "b": bench.Timing([0.1, 3.0, 3.0, 3.0])}
    assert tune._ranked(timings) == [("a", 2.0), ("b", 3.0)]


def test_what_is_stored_is_what_is_chosen_and_the_rest_stays(tmp_path):
    store("h200", "bfloat16", "N=4096,K=4096", {16: GOOD, 64: TRUSTED}, tmp_path)
    store("h200", "bfloat16", "N=512,K=4096", {16: TRUSTED}, tmp_path)
    path = store("h200", "bfloat16", "N=4096,K=4096", {16: TRUSTED}, tmp_path)
    assert stored(tmp_path) == {"matmul": {"bfloat16": {(4096, 4096): {16: TRUSTED, 64: TRUSTED},
                                                                         (512, 4096): {16: TRUSTED}}}}
    table = json.loads(path.read_text())
    assert table["machine"] == records.this_machine()["device"] and table["torch"] == torch.__version__


@pytest.mark.parametrize("text", ["{\"matmul\": ", "[]", "{\"matmul\": {\"bfloat16\": {\"N=4,K=4\": {}}}}"])
def test_a_damaged_table_is_moved_aside(text, tmp_path, capsys):
    (tmp_path / "h200.json").write_text(text)
    store("h200", "bfloat16", "N=4096,K=4096", {16: GOOD}, tmp_path)
    assert stored(tmp_path) == {"matmul": {"bfloat16": {(4096, 4096): {16: GOOD}}}}
    assert (tmp_path / "h200.json.damaged").read_text() == text and "is damaged" in capsys.readouterr().out


def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = store("h200", "bfloat16", "N=4096,K=4096", {16: GOOD}, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        store("h200", "bfloat16", "N=4096,K=4096", {16: TRUSTED}, tmp_path)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


# what the model of time expects


def test_the_models_best_are_tried_beside_what_is_chosen_today(monkeypatch):
    monkeypatch.setattr(tables, "slug", lambda index: "h200")
    for module in (schedule, choice):
        monkeypatch.setattr(module, "gpu", lambda index: ((9, 0), 132))
    cost.quantities.cache_clear()
    try:
        few, more = (tune.expected(6144, 4096, 256, torch.bfloat16, 0, most) for most in (4, 12))
        today = next(choice.choose("matmul", "N=6144,K=4096", torch.bfloat16, 256, 0))
        monkeypatch.setattr(tune, "choose", lambda *asked: iter([TRUSTED, today]))  # which no model expects
        other = tune.expected(6144, 4096, 256, torch.bfloat16, 0, 4)
    finally:
        cost.quantities.cache_clear()
    assert more[:4] == few[:4] and len(set(more)) == len(more) in (12, 13)
    assert today in few and today in more and other == [*more[:4], TRUSTED]


def test_without_a_model_of_time_its_best_are_refused():
    with pytest.raises(ValueError, match="no model of time for this GPU"):
        tune.expected(6144, 4096, 256, torch.bfloat16, -1, 4)


# the command


@pytest.mark.parametrize("words", [["--best", "0"], ["--best", "8", "--gpus", "8"]])
def test_the_models_best_need_a_number_and_the_order_of_one_gpu(words, capsys):
    assert tune.main(["--shape", "64,64", *words]) == 1
    assert "--best takes a number from 1" in capsys.readouterr().err


@pytest.mark.skipif(runtime.HAS_GPU, reason="without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert tune.main(["--shape", "64,64"]) == 1
    assert "CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64", "64,", "0,64", "64x64", "a,b", "1,2,3"])
def test_a_shape_of_another_form_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--shape", text])
    assert "must read like 4096,14336" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize("gpus, section", [(1, "matmul"), (8, "matmul_shared")])
def test_several_shapes_are_proved_together_and_stored_one_by_one(gpus, section, monkeypatch, tmp_path, capsys):
    """The command, with three candidates: one that would cost a bit, and one that the order of one shape forbids."""
    few = [GOOD, replace(GOOD, block_m=32), replace(GOOD, block_n=32)]
    real, here = Op.run_schedule, runtime.device()
    monkeypatch.setattr(proofs, "ROWS", 19 if gpus == 1 else 3)  # a tree walks eight leaves of 64 at least
    monkeypatch.setattr(proofs, "KINDS", ("portable", "residue") if gpus == 1 else ("portable",))
    def off(op, schedule, *given):
        return real(op, schedule, *given) + (schedule == few[1])
    def in_this_process(jobs, workers, progress):
        asked.extend(jobs)
        return [_answer(job, here) for job in jobs]
    asked: list = []
    monkeypatch.setattr(Op, "run_schedule", off)
    monkeypatch.setattr(tune, "prove_all", in_this_process)
    monkeypatch.setattr(tune, "candidates" if gpus == 1 else "shared_candidates", lambda *a, **k: few)
    monkeypatch.setattr(tune, "fastest", partial(tune.fastest, repeats=1))
    monkeypatch.setattr(tune.runtime, "HAS_GPU", True)
    monkeypatch.setattr(tune.runtime, "has_pdl", lambda index: False)
    monkeypatch.setattr(tune.runtime, "device", lambda: here)
    monkeypatch.setattr(runtime, "slug", lambda index: "h200")
    monkeypatch.setattr(records, "this_machine", lambda: {"device": "a GPU", "torch": "1", "triton": "1"})
    command = ["--shape", "6,4", "9,4", "--tokens", "2", "3", "--dtype", "float32", "--out", str(tmp_path),
               "--machine", "here", "--gpus", str(gpus)]
    assert tune.main(command) == 0
    table = stored(tmp_path / "schedules")[section]["float32"]
    assert set(table) == {(6, 4), (9, 4)} and all(set(column) == {2, 3} for column in table.values())
    assert all(schedule in (few[0], few[2]) for column in table.values() for schedule in column.values())
    rows = CERTIFICATES.read(tmp_path / "here")
    kept = {(shape, str(schedule)) for shape, column in table.items() for schedule in column.values()}
    assert len(asked) == 6 and len(rows) == len(kept) * len(proofs.KINDS)
    assert rows.groupby(["shape", "input"]).digest.nunique().max() == 1
    assert capsys.readouterr().out.count("left out") == 2


def _answer(job, device):
    try:
        prove(Schedule.parse(job["schedule"]), job["n"], job["k"], torch.float32, device, job["gpus"])
        return ""
    except RuntimeError as error:
        return str(error)


@pytest.mark.gpu
def test_a_small_shape_is_tuned_from_end_to_end(tmp_path, monkeypatch, capsys):
    few = [GOOD, replace(GOOD, block_k=64), Schedule("tma", 64, 64, 64)]
    monkeypatch.setattr(tune, "candidates", lambda *a, **k: few)
    assert tune.main(["--shape", "512,1024", "--tokens", "4", "70", "--out", str(tmp_path), "--machine", "here"]) == 0
    table = tables.load(runtime.slug(runtime.device().index), Schedule.parse, tmp_path / "schedules")
    assert set(table["matmul"]["bfloat16"][512, 1024]) == {4, 70}
    assert len(CERTIFICATES.read(tmp_path / "here")) >= len(proofs.KINDS)
    assert "compiled and compared" in capsys.readouterr().out
