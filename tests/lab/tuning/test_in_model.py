"""Schedules chosen in a model: weight by weight, above the noise, and nothing stays behind."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels import runtime, tables
from kernels.lab.proofs.certificates import CERTIFICATES
from kernels.lab.tuning import in_model
from kernels.lab.tuning.shared_candidates import shared_candidates
from kernels.model.config import preset
from kernels.ops.matmul.learned import LEARNED
from kernels.ops.matmul.order import Order, shared_order
from kernels.ops.matmul.schedule import Schedule

A, B, C = (Schedule("hopper", size, 64, 64, warps=4, stages=4, persistent=True) for size in (64, 128, 192))
LARGE, SMALL = (28672, 4096), (4096, 4096)


class Told:
    """A forward whose times are known: of each weight's schedule, added up."""

    def __init__(self, us):
        self.us, self.asked = us, []

    def today(self, weight):
        return A

    def __call__(self, chosen):
        self.asked.append(dict(chosen))

    def time(self, chosen):
        return sum(times[chosen.get(weight, A)] for weight, times in self.us.items())


@pytest.fixture
def told(monkeypatch):
    def times(forward, each, repeats):
        return {s: forward.time(chosen) for s, chosen in each.items() if s is not C}, {C: ValueError("no room")}
    monkeypatch.setattr(in_model, "_times", times)
    return Told


def test_weights_are_those_that_see_all_tokens_the_largest_first(monkeypatch):
    plans = {i: SimpleNamespace(product=SimpleNamespace(n=n, k=k, m=m), index=0)
             for i, (n, k, m) in enumerate([(*SMALL, 64), (4096, 14336, 64), (128256, 4096, 1), (*LARGE, 64)])}
    monkeypatch.setattr(in_model, "CALL", SimpleNamespace(plans=SimpleNamespace(clear=list, values=plans.values)))
    monkeypatch.setattr(in_model, "Form", SimpleNamespace(of=lambda p, _: SimpleNamespace(n=p.n, k=p.k, tokens=p.m)))
    assert in_model.Forward(list, 64).weights == [LARGE, (4096, 14336), SMALL]


def test_of_an_order_that_gpus_share_the_weights_are_those_that_are_cut(monkeypatch):
    orders = {LARGE: None, (4096, 14336): shared_order(4096, 14336), SMALL: shared_order(*SMALL)}
    plans = {weight: SimpleNamespace(product=SimpleNamespace(weight=weight, order=orders[weight] or Order(8, 512)),
                                     index=0) for weight in orders}
    monkeypatch.setattr(in_model, "CALL", SimpleNamespace(plans=SimpleNamespace(clear=list, values=plans.values)))
    monkeypatch.setattr(in_model, "Form", SimpleNamespace(of=lambda p, _: SimpleNamespace(
        n=p.weight[0], k=p.weight[1], tokens=64, order=p.order)))
    assert in_model.Forward(list, 64, 8).weights == [(4096, 14336), SMALL]
    assert in_model.Forward(list, 64).weights == [LARGE, (4096, 14336), SMALL]


def test_the_faster_takes_the_place_of_todays_and_the_next_weight_is_timed_with_it(told):
    forward, said = told({LARGE: {A: 900, B: 800}, SMALL: {A: 100, B: 110}}), []
    chosen = in_model.fastest(forward, {LARGE: [B], SMALL: [B, A]}, progress=said.append)
    assert chosen == {LARGE: B}
    assert forward.asked == [{}, {LARGE: B}, {}], "the second weight's today is asked with the first one's choice"
    assert "1000.0 us" in said[0] and "0.9000" in said[0] and "900.0 us" in said[1] and "1.0000" in said[1]


@pytest.mark.parametrize(("us", "better"), [(996.5, False), (995.5, True)])
def test_what_is_within_the_noise_changes_nothing(told, us, better):
    forward = told({SMALL: {A: 1000, B: us}})
    assert in_model.fastest(forward, {SMALL: [B]}, progress=lambda line: None) == ({SMALL: B} if better else {})


def test_one_that_does_not_run_is_left_out_but_todays_must(told):
    forward = told({SMALL: {A: 1000, B: 1000, C: 1}})
    assert in_model.fastest(forward, {SMALL: [C]}, progress=lambda line: None) == {}
    forward.today = lambda weight: C
    with pytest.raises(RuntimeError, match=r"today's schedule of \(4096, 4096\) could not be .*: no room"):
        in_model.fastest(forward, {SMALL: [B]}, progress=lambda line: None)


@pytest.mark.skipif(runtime.HAS_GPU, reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(capsys):
    assert in_model.main(["--model", "tiny"]) == 1
    assert "schedules are tuned on a CUDA GPU, and there is none here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        in_model.main(["--tokens", "0"])
    assert "--tokens and --best take numbers from 1" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_forward_takes_the_schedules_that_it_is_given_and_forgets_them():
    forward = in_model.llama("small")(128)
    weight = forward.weights[0]
    before, plain = dict(LEARNED), forward({}).clone()
    other = next(s for s in (A, B) if s != forward.today(weight))
    assert torch.equal(forward({weight: other}), plain) and forward.today(weight) == other
    assert torch.equal(forward({}), plain) and forward.today(weight) != other and before == LEARNED


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 8])
def test_a_model_is_tuned_from_end_to_end(tmp_path, monkeypatch, gpus):
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "schedules")
    monkeypatch.setattr(in_model, "NOISE", -9.0)  # whatever was fastest is kept
    monkeypatch.setattr(in_model, "shared_candidates", lambda *given: shared_candidates(*given)[:2])
    said: list[str] = []
    made = in_model.llama("small", gpus)
    in_model.tune_in_model(made, [128], 2, tmp_path, "here", 2, progress=said.append, gpus=gpus)
    section = "matmul" if gpus == 1 else "matmul_shared"
    kept = tables.load(runtime.slug(0), Schedule.parse, tmp_path / "schedules")[section]["bfloat16"]
    cut = {part: shape for part, shape in preset("small").layer_shapes.items() if len(shape) == 2}
    assert set(kept) == ({*cut.values()} if gpus == 1 else {cut["output"], cut["down"]})
    assert all(set(column) == {128} for column in kept.values())
    proved = CERTIFICATES.read(tmp_path / "here")
    assert set(proved.schedule) >= {str(s) for column in kept.values() for s in column.values()}
    tables.forget()
