"""Speed of a served model: what a cell is, whose turn it is, what a row says, and times under random arrivals."""
from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.lab import bench
from kernels.lab.serving import arrivals, measure, recorded, speed
from kernels.lab.serving.speed import Cell
from kernels.model import Llama
from kernels.model.ops import choose

TINY = Llama("tiny", dtype=torch.bfloat16, device="cpu")
NAMES = ("default", "tiled")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_loaded", lambda dtype, device: TINY)
    monkeypatch.setattr(bench, "ceilings", lambda device, known: {"copy_gbytes_per_s": 10.0})
    return tmp_path


@pytest.mark.parametrize(("text", "cell"), [("8x1024", Cell("decode", 8, 1024)), ("512", Cell("prefill", 1, 512))])
def test_a_cell_is_read_as_it_is_asked_for(text, cell):
    assert speed.parsed(text) == cell


@pytest.mark.parametrize("text", ["x8", "8x", "0x8", "8x0", "8*8", "", "-8", "1x2x3"])
def test_a_cell_that_there_is_not_is_named(text):
    with pytest.raises(ValueError, match=f"a cell must be BATCHxCONTEXT.*got {re.escape(repr(text))}"):
        speed.parsed(text)


def test_a_gpu_records_every_cell_that_was_asked_for():
    cells = list(speed.cells("cuda"))
    decode = {(cell.batch, cell.context) for cell in cells if cell.phase == "decode"}
    assert {(batch, 1024) for batch in (1, 8, 32, 64, 128, 256)} | {(32, 8192), (64, 8192)} <= decode
    assert {cell.context for cell in cells if cell.phase == "prefill"} == {512, 1024, 2048, 4096, 8192}
    assert speed.OPS["cuda"] == ("default", "invariant", "frozen")


def test_decode_is_one_token_behind_the_context_and_prefill_the_whole_prompt():
    seen = []

    def forward(tokens, batch, cache):
        seen.append((len(tokens), batch.sequences.queries.tolist(), batch.sequences.keys.tolist()))
        return torch.tensor([[0.0, 1.0]] * len(batch))

    model = SimpleNamespace(config=TINY.config, device=TINY.device, forward=forward)
    for cell in (Cell("decode", 3, 7), Cell("prefill", 1, 5)):
        assert speed.step(model, TINY.cache(cell.batch, cell.behind + cell.new), cell)() == [1] * cell.batch
    assert seen == [(3, [1, 1, 1], [8, 8, 8]), (5, [5], [5])]


def test_contenders_take_turns_and_warm_ups_do_not_count(monkeypatch):
    turns = []
    monkeypatch.setattr(speed, "step", lambda model, cache, cell: lambda: turns.append(model.ops_name))
    found = speed.measure({name: TINY.using(name) for name in NAMES}, Cell("decode", 1, 4), runs=3, warmups=2)
    assert turns == [*NAMES] * 5 and {name: len(ms) for name, ms in found.items()} == dict.fromkeys(NAMES, 3)


def test_a_context_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=f"context must fit in tiny's {TINY.config.context} tokens"):
        speed.measure({"default": TINY}, Cell("decode", 1, TINY.config.context))


def test_a_row_holds_milliseconds_and_as_many_tokens_a_second():
    row = speed.row("byte", "default", Cell("decode", 8, 64), [float(ms) for ms in range(1, 102)])
    assert (row["ms_p05"], row["ms_p50"], row["ms_p95"]) == (6, 51, 96)
    assert row["tokens_per_s_p50"] == pytest.approx(8e3 / 51) and row["tokens_per_s_p05"] == pytest.approx(8e3 / 96)
    prefill = speed.row("byte", "default", Cell("prefill", 1, 64), [2.0])
    assert prefill["tokens_per_s_p95"] == pytest.approx(32e3) and set(prefill) == set(speed.SERVING.columns)


def test_a_record_is_resumed_and_what_does_not_fit_is_named(folder, monkeypatch):
    cells, said = [Cell("decode", 2, 4), Cell("prefill", 1, 4)], []
    rows = speed.record("byte", folder, NAMES, cells[:1], runs=2, said=said.append)
    assert rows.ops.tolist() == [*NAMES] and "decode, batch 2, context 4: default " in said[0]
    plain, asked = speed.measure, []

    def measured(models, cell, runs):
        asked.append(cell)
        if cell.batch == 9:
            raise MemoryError("it does not fit")
        return plain(models, cell, runs)

    monkeypatch.setattr(speed, "measure", measured)
    rows = speed.record("byte", folder, NAMES, [*cells, Cell("decode", 9, 4)], runs=2, said=said.append)
    assert asked == [cells[1], Cell("decode", 9, 4)] and len(rows) == 4 and said[-1] == "left out: it does not fit"


def test_the_shareable_contender_has_the_same_weights_in_the_order_of_eight_gpus():
    config = replace(TINY.config, heads=8, kv_heads=8, hidden_size=64, intermediate_size=256)
    first = Llama(config, dtype=torch.bfloat16, device="cpu")
    other = speed.contender(first, speed.SHAREABLE)
    assert other.config == replace(config, shared=8) and other.ops_name == "tiled"
    assert all(other.weights()[name] is weight for name, weight in first.weights().items())
    assert speed.contender(first, "tiled").config == config


@pytest.mark.parametrize(("words", "said"), [
    (["--ops", "shareable"], "--ops shareable is timed beside others, such as invariant"),
    (["--ops", "tiled", "shareable"], "--ops shareable is timed in decode and prefill: name --phases or --cells")])
def test_the_shareable_contender_is_timed_beside_others_in_a_step(words, said, capsys):
    with pytest.raises(SystemExit):
        speed.main(words)
    assert said in capsys.readouterr().err


def test_frozen_ops_are_a_gpus_alone():
    with pytest.raises(ValueError, match="ops='frozen' are one schedule each of a GPU's kernels and need a CUDA GPU"):
        choose("frozen", torch.device("cpu"), torch.bfloat16)


def test_fewer_runs_than_a_record_needs_are_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--runs", "3"])
    assert "--runs must be at least 50 for a recorded cell, got 3" in capsys.readouterr().err


# random arrivals

def test_gaps_are_exponential_and_follow_from_the_seed():
    gaps = arrivals.gaps(4.0, 4000)
    assert gaps == arrivals.gaps(4.0, 4000) != arrivals.gaps(4.0, 4000, seed=1)
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.1) and np.mean(np.array(gaps) > 0.25) == pytest.approx(
        math.exp(-1), rel=0.1)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_there_is_not_is_named(rate):
    with pytest.raises(ValueError, match=f"rate must be a number of arrivals a second above 0, got {rate}"):
        arrivals.gaps(rate, 3)


def test_times_count_from_the_arrival_and_between_the_tokens_of_one_request():
    one, other = SimpleNamespace(times=[2.0, 2.5, 3.5], answer=[1, 2, 3]), SimpleNamespace(times=[5.0], answer=[1])
    first, between, rate = arrivals._times([(1.0, one), (4.5, other)])
    assert (first, between) == ([1000.0, 500.0], [500.0, 1000.0]) and rate == 1.0


def test_a_rate_is_served_three_times_by_each_in_turns(folder, monkeypatch):
    turns, warm = [], []
    monkeypatch.setattr(arrivals, "ready", lambda model, load: warm.append(model.ops_name) or model.ops_name)
    monkeypatch.setattr(arrivals, "serve", lambda engine, load, rate: turns.append((engine, rate))
                        or ([1.0, 3.0], [2.0], 7.0))
    rows = arrivals.record("byte", folder, NAMES, (5.0, 6.0), 2, said=lambda line: None)
    assert turns == [(name, rate) for rate in (5.0, 6.0) for name in [*NAMES] * 3] and warm == [*NAMES]
    assert tuple(rows) == arrivals.LATENCY.columns and rows.first_ms_p50.tolist() == [2.0] * 4
    assert rows.tokens_per_s.tolist() == [7.0] * 4
    arrivals.record("byte", folder, NAMES, (5.0,), 2, said=lambda line: None)
    assert len(turns) == 12, "what this code has recorded is not served again"


def test_every_request_of_a_load_is_answered_by_an_engine_that_is_ready(monkeypatch):
    monkeypatch.setattr(arrivals.Engine, "warm_up", lambda engine: setattr(engine, "warm", True))
    load = arrivals.crowd(TINY, 4)
    engine = arrivals.ready(TINY, load)
    assert engine.warm and engine.number == 4 and not engine.scheduler.requests, "it has served all of them once"
    first, between, rate = arrivals.serve(engine, load, 1000.0)
    assert len(first) == 4 and min(first) > 0 and len(between) > 0 and rate > 0


def test_no_pass_finds_what_an_earlier_one_left():
    load = arrivals.crowd(TINY, 1)
    ours = arrivals.loads.Load("one", load.server, tuple(call for call in load.calls if call.seed is None)[:1])
    engine = arrivals.ready(TINY, ours)
    arrivals.serve(engine, ours, 1000.0)
    assert engine.cache.known and engine.scheduler.hits == 0
    engine.check()


def test_the_model_is_the_trained_one_or_of_a_named_shape():
    assert recorded.model_of("byte", "default", torch.device("cpu")).config.name == "byte"
    assert recorded.model_of("tiny", "tiled", torch.device("cpu")).ops_name == "tiled"
