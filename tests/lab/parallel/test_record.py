"""The record of a model on several ranks: its chart, figure and widget; what is recorded here; older rows of a sum."""
import gc
import json
import types
import weakref
from contextlib import nullcontext

import matplotlib.colors
import pandas as pd
import pytest
import torch

from figures import tensor_parallel
from figures.page import PAGES
from kernels.lab import older, records, style
from kernels.lab.parallel import chart, measure, sums
from kernels.lab.parallel.measure import TENSOR_PARALLEL, Point, points, prompt_of
from kernels.lab.parallel.widget import GpuChart
from kernels.lab.proofs import model as proof
from kernels.ops.all_reduce import all_reduce

GOLDEN = records.ROOT / "tests" / "lab" / "proofs" / "recorded"


def row(ops, gpus, phase, batch, ms, digest):
    return {"model": "llama-3.1-8b", "ops": ops, "gpus": gpus, "phase": phase, "batch": batch, "context": 512,
            "ms_p05": 0.9 * ms, "ms_p50": ms, "ms_p95": 1.2 * ms, "logit_digest": digest * 8, "recorded_at": "",
            "source": ""}


ROWS = [row(ops, gpus, phase, batch, 10 / gpus + (ops == "invariant"), "a0b1c2d3" if ops == "invariant" else
            f"{gpus:x}f00{batch:04}") for ops in ("default", "invariant") for gpus in (1, 2)
        for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 8))]


@pytest.fixture
def data(tmp_path):
    TENSOR_PARALLEL.merge(tmp_path / "h200", ROWS)
    (tmp_path / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200"}))
    return tmp_path


def test_the_claim_counts_the_digests(data):
    rows = chart.recorded("h200", data)
    assert chart.claim(rows) == "One model on 1, 2 GPUs: default ops 2 digests, invariant ops 1 digest"
    moved = rows.assign(logit_digest=[f"{i}" for i in range(len(rows))])
    assert "invariant ops 2 digests" in chart.claim(moved)


def test_another_digest_is_drawn_as_moved(data):
    left, right = chart.chart(chart.recorded("h200", data), "NVIDIA H200").axes
    fills = {text.get_text(): matplotlib.colors.to_hex(text.get_bbox_patch().get_facecolor()) for text in left.texts}
    assert fills["a0b1c2 ✓"] == style.SAME[1] and fills["2f0000 ✗"] == style.MOVED[1]
    assert len(left.texts) == len(ROWS) and [t.get_text() for t in left.get_xticklabels()] == ["1", "2"]
    line = next(drawn for drawn in right.lines if drawn.get_label() == "invariant, decode of 8 behind 512")
    assert line.get_ydata().tolist() == [11.0, 6.0] and line.get_xdata().tolist() == [1, 2]


@pytest.mark.parametrize("page", PAGES)
def test_the_figure_is_drawn_for_every_page_from_data_alone(page, data):
    figure = tensor_parallel.draw(data, page=PAGES[page])
    assert len(figure.axes) == 2 and "CUDA graphs" in figure._supxlabel.get_text().replace("\n", " ")
    words = tensor_parallel.words(data)
    assert "invariant, prefill of 512 tokens: a0b1c2 in 11 ms on 1, a0b1c2 in 6 ms on 2" in words


def test_a_cpus_chart_speaks_of_processes_and_a_slow_run_is_said(data):
    rows = chart.recorded("h200", data)
    assert chart.unit(rows) == "GPUs" and chart.unit(rows.assign(cpu=True)) == "processes"
    assert "an oversubscribed CPU" in chart.caption(rows.assign(cpu=True), "a CPU").replace("\n", " ")
    assert "slowest" not in chart.caption(rows, "NVIDIA H200")
    slow = rows.assign(ms_p95=rows.ms_p95.where(rows.index > 0, 99.0))
    assert "the slowest 95th percentile is 99 ms" in chart.caption(slow, "NVIDIA H200")


def test_sums_say_which_bits_moved(monkeypatch):
    def moving(part, bias, dtype, group):
        return part.to(dtype) + (len(part) == 3)
    words = {"cuda": moving, "python": lambda part, bias, dtype, group: part.to(dtype)}
    fake = types.SimpleNamespace(implementations=words, name="all_reduce", inputs=all_reduce.inputs,
                                 work=all_reduce.work)
    monkeypatch.setattr(sums, "all_reduce", fake)
    monkeypatch.setattr(sums, "_wall", lambda run, ranks: [run(), 5.0][1])
    monkeypatch.setattr(sums.words, "told_objects", lambda value, group: [value])
    ranks = types.SimpleNamespace(rank=0, size=2, device=torch.device("cpu"), group=None)
    rows = [row for rows in sums.measured(ranks, "N=16", (1, 2, 3), repeats=2) for row in rows]
    found = {(row["implementation"], row["tokens"]): (row["same_bits"], row["elements_differ"]) for row in rows}
    assert found == {("cuda", 1): (False, 16), ("cuda", 2): (False, 32), ("cuda", 3): (True, 0),
                     **{("python", n): (True, 0) for n in (1, 2, 3)}}
    assert {(row["shape"], row["us_p50"], row["repeats"]) for row in rows} == {("N=16,gpus=2", 5.0, 2)}


def test_the_widget_draws_the_chosen_gpus(data):
    widget = GpuChart(data)
    assert widget.gpus.options == (1, 2) and "prefill of 512" in widget.words.value
    widget.phase.value = "decode"
    assert "decode of 8 behind 512" in widget.words.value and "prefill" not in widget.words.value.split(". Two")[1]
    widget.gpus.value = ()
    assert "nothing is recorded of decode on no GPUs; have 1, 2" in widget.errors.value


def test_without_a_record_the_widget_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="torchrun --standalone --nproc-per-node N -m kernels parallel --rec"):
        GpuChart(tmp_path)


# What is recorded.

@pytest.mark.parametrize("machine", records.machines(TENSOR_PARALLEL.file))
def test_the_recorded_digests_are_one_for_the_invariant_ops(machine):
    """Every point of the byte model is there on several numbers of GPUs, and some point of any other model."""
    rows = chart.recorded(machine)
    ours = rows[rows.ops == "invariant"].groupby(["model", "phase", "batch", "context"])
    several = ours.gpus.nunique() > 1
    assert (ours.logit_digest.nunique() == 1).all() and several["byte"].all() and several.groupby("model").any().all()
    recorded = proof.recorded("cpu", GOLDEN).query("shared == 8 and form == 'window' and tokens == 64 and "
                                                   "part == 'logits'").digest.iloc[0]
    byte = rows.query("model == 'byte' and ops == 'invariant' and phase == 'prefill' and context == 64")
    assert set(byte.logit_digest) == {recorded}


def test_points_are_what_the_command_was_asked_for():
    asked = types.SimpleNamespace(phases=["prefill", "decode"], batches=[1, 8], contexts=[16, 64])
    assert list(points(asked)) == [Point("prefill", 1, 16), Point("prefill", 1, 64), Point("decode", 1, 16),
                                   Point("decode", 1, 64), Point("decode", 8, 16), Point("decode", 8, 64)]


def test_prompts_stay_in_the_vocabulary():
    model = types.SimpleNamespace(whole=types.SimpleNamespace(name="tiny", vocab_size=50))
    assert set(prompt_of(model, 200)) <= set(range(50)) and len(prompt_of(model, 200)) == 200


def test_rows_of_a_sum_are_older_by_the_code_of_all_reduce():
    made = dict.fromkeys(records.TOKEN_SWEEP.columns, "") | {
        "op": "all_reduce", "implementation": "triton", "dtype": "bfloat16", "shape": "N=4096,gpus=2", "tokens": 8,
        "clock": "graph", "schedule": "one_shot block=512 warps=4"}
    rows = pd.DataFrame([{**made, "source": source} for source in (sums.source(), "0123456789ab")])
    assert older.mark(rows).older.tolist() == [False, True]


@pytest.mark.parametrize("captured", [
    lambda tensor: measure._graph(lambda: tensor.add_(1)),
    lambda tensor: sums._run(lambda part, *_: part, tensor, torch.float32, types.SimpleNamespace(
        device=torch.device("cuda"), group=None))[0]], ids=["forward", "sum"])
def test_a_graph_holds_what_it_reads(captured, monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "synchronize": lambda: None,
                        "stream": lambda side: nullcontext(), "graph": lambda graph: nullcontext(),
                        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    tensor = torch.zeros(3)
    alive, replay = weakref.ref(tensor), captured(tensor)
    del tensor
    gc.collect()
    replay()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None
