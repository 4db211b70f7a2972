"""Windows of tokens, measured on the smallest model: right rows, resumed, stopped, refused."""
import json
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import OPS, runtime
from kernels.lab import bench, records
from kernels.lab.window import measure as window_cost
from kernels.lab.window.measure import VERIFY_COST, Ceilings, Watch
from kernels.model import ops as model_ops
from kernels.model.config import PRESETS
from kernels.model.llama import Llama

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbytes_per_s=20.0, matmul_tflops=0.1)
CURVES = window_cost.curves_on(runtime.device())
BOTH = window_cost.ops_on(runtime.device())
COLUMNS = ("curve,ops,tokens,prefix,group,ms_p05,ms_p50,ms_p95,ms_per_token_p50,floor_ms,recorded_at,source")


def measure(windows=(1, 8), model="tiny", **options):
    return window_cost.window_cost(model, windows, **{"runs": 3, "warmups": 1, "ceilings": CEILINGS, **options})


@pytest.fixture
def quick(monkeypatch):
    """Ceilings known without measuring them."""
    monkeypatch.setattr(bench, "copy_gbytes_per_s", lambda device=None: CEILINGS.copy_gbytes_per_s)
    monkeypatch.setattr(bench, "matmul_tflops", lambda device=None: CEILINGS.matmul_tflops)


def test_every_point_has_its_row():
    rows = measure(windows=(8, 1, 8), ops=BOTH)
    assert ",".join(rows.columns) == COLUMNS
    points = list(rows[["tokens", "ops", "curve"]].itertuples(index=False, name=None))
    assert points == [(w, o, c) for w in (1, 8) for o in BOTH for c in CURVES]
    assert ((rows.ms_p05 > 0) & (rows.ms_p05 <= rows.ms_p50) & (rows.ms_p50 <= rows.ms_p95)).all()
    assert (rows.ms_per_token_p50 * rows.tokens - rows.ms_p50).abs().max() < 1e-9
    assert set(rows.prefix) == {0} and set(rows.group) == {1} and set(rows.source) == {window_cost.source()}


def test_percentiles_are_those_of_the_timed_runs_after_the_warm_ups(monkeypatch):
    """A clock that advances by 1, 2, 3 ... ms a round: of 11 rounds the first warms up, 2..11 ms are timed."""
    now, readings = 0.0, []

    def clock():
        nonlocal now
        readings.append(now)
        now += (len(readings) + 1) // 2 / 1e3 if len(readings) % 2 else 0.0
        return readings[-1]

    monkeypatch.setattr(window_cost.time, "perf_counter", clock)
    row = measure(windows=(4,), curves=["paper"], runs=10, warmups=1, model=Llama("tiny")).iloc[0]
    assert (row.ms_p05, row.ms_p50, row.ms_p95) == pytest.approx((2.45, 6.5, 10.55))


@pytest.fixture
def forwards(monkeypatch):
    """(model, tokens, cache, options, logits) of every forward over a window."""
    seen, real = [], Llama.__call__

    def forward(model, tokens, cache, **options):
        logits = real(model, tokens, cache, **options)
        seen.append((model, tokens.clone(), cache, options, logits))
        return logits

    monkeypatch.setattr(Llama, "__call__", forward)
    return seen


def prompt(window):
    return [[(7919 * i + 13) % 256 for i in range(window)]]


@pytest.mark.parametrize("ops", BOTH)
def test_each_round_is_one_forward_over_the_whole_window_with_these_ops(ops, forwards):
    measure(windows=(3, 8), curves=["paper"], ops=(ops,), runs=2, warmups=1)
    assert [tokens.shape for _, tokens, *_ in forwards] == [(1, 3)] * 3 + [(1, 8)] * 3
    for model, tokens, cache, options, logits in forwards:
        window = tokens.shape[1]
        assert model.ops_name == ops and model.ops == model_ops.choose(ops, model.device, model.dtype)
        assert tokens.tolist() == prompt(window) and not options
        assert cache.capacity == window and logits.shape == (1, 256)


def test_ops_are_those_that_this_device_can_be_timed_with():
    assert window_cost.ops_on(torch.device("cuda")) == ("default", "invariant", "fused")
    assert window_cost.ops_on(CPU) == ("default", "tiled")
    assert model_ops.choose("tiled", CPU, torch.float32).rms_norm is OPS["rms_norm"].python


def test_the_ops_of_a_curve_take_turns(forwards):
    measure(windows=(4,), curves=["paper"], ops=BOTH, runs=2, warmups=1)
    assert [model.ops_name for model, *_ in forwards] == [*BOTH] * 3


def test_the_chosen_token_is_read_back_within_the_time(forwards, monkeypatch):
    clock, read = iter(range(100)), []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: read.append("item") or real(t))
    monkeypatch.setattr(window_cost.time, "perf_counter", lambda: read.append("clock") or next(clock))
    model = Llama("tiny")
    measure(model=model, windows=(4,), curves=["paper"], runs=2, warmups=0)
    assert read == ["clock", "item", "clock"] * 2
    token = window_cost.paper_pass(model, 4)()
    assert token == int(forwards[-1][-1].argmax()) and type(token) is int


class PlayedModel:
    """Chooses a token by a sum, when its graph is replayed."""

    device, config = CPU, PRESETS["tiny"]

    def cache(self, requests, capacity):
        return SimpleNamespace(batch=lambda tokens, prefixes: (requests, capacity, tokens, prefixes))

    def forward(self, tokens, batch, cache):
        self.given, self.token = (tokens, batch), torch.tensor([-1])
        return SimpleNamespace(argmax=lambda dim: self.token)

    def replay(self):
        self.token.fill_(int((self.given[0] * torch.arange(1, 6)).sum()))


def test_a_graph_takes_the_prompt_from_the_host_at_each_replay(monkeypatch):
    model, replays = PlayedModel(), []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: replays.append(1) or model.replay())
    for name, value in {"Stream": lambda device: stream, "current_stream": lambda device: stream,
                        "stream": lambda side: nullcontext(), "graph": lambda graph: nullcontext(),
                        "CUDAGraph": lambda: graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    step = window_cost.graph_pass(model, 5)
    wanted = sum(token * (i + 1) for i, token in enumerate(prompt(5)[0]))
    for count in (1, 2):
        assert step() == wanted and len(replays) == count
        tokens, batch = model.given
        assert (tokens.tolist(), batch) == (prompt(5)[0], (1, 5, [5], [0]))
        tokens.zero_()


def test_a_graph_holds_the_batch_and_the_cache_that_it_reads(monkeypatch):
    test_a_graph_takes_the_prompt_from_the_host_at_each_replay(monkeypatch)
    model = PlayedModel()
    step = window_cost.graph_pass(model, 2)
    assert any(held is model.given[1] for held in step.__defaults__[0])


def test_callbacks_see_every_row_and_every_round():
    seen, counted = [], []
    watch = Watch(on_point=seen.append, on_run=lambda done, total: counted.append((done, total)))
    rows = measure(windows=(1, 2), watch=watch)
    assert seen == rows.to_dict("records")
    assert counted == [(i, 8) for i in range(1, 9)]


def test_stop_ends_after_the_round_and_keeps_the_finished_windows():
    stop, counted = threading.Event(), []

    def on_run(done, total):
        counted.append(done)
        if done == 6:  # the second of the second window's four rounds
            stop.set()

    rows = measure(windows=(1, 2, 4), watch=Watch(on_run=on_run, stop=stop))
    assert list(rows.tokens.unique()) == [1]
    assert len(counted) == 6


def test_a_stop_set_beforehand_measures_nothing():
    stop = threading.Event()
    stop.set()
    assert measure(watch=Watch(stop=stop), model=Llama("tiny")).empty


def test_rows_of_this_code_are_not_measured_again():
    first = measure(windows=(1, 2))
    older = first.assign(source="0123456789ab")
    counted = []
    again = measure(windows=(1, 2, 3), done=first, watch=Watch(on_run=lambda *n: counted.append(n)))
    assert list(again.tokens.unique()) == [3] and len(counted) == 4
    assert list(measure(windows=(1, 2), done=older).tokens.unique()) == [1, 2]
    assert measure(windows=(2, 1), done=first).empty


@pytest.mark.parametrize("name", ["llama-3.1-8b", "tiny"])
def test_the_floor_counts_every_matrix_product(name):
    """PyTorch's own count of a forward on the meta device, where only shapes are worked out."""
    model = Llama(name, device="meta", dtype=torch.bfloat16,
                  weights=lambda _, shape: torch.empty(shape, device="meta", dtype=torch.bfloat16))
    tokens = torch.zeros(1, 24, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens, model.cache(1, 24))
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert sum(2 * m * n * k for m, n, k in window_cost.products(model.config, 24)) == flops["aten.mm"]


def test_the_floor_by_pencil():
    """8 tokens through two layers of `tiny`: bytes decide the first two products and the head, FLOPs the others."""
    ceilings = Ceilings(copy_gbytes_per_s=10.0, matmul_tflops=0.034)
    numbers = {"qkv": 8 * 64 + 128 * 64 + 8 * 128, "output": 8 * 64 + 64 * 64 + 8 * 64, "head": 64 + 256 * 64 + 256}
    flops = {"gate_up": 2 * 8 * 384 * 64, "down": 2 * 8 * 64 * 192}
    layer = 4 * (numbers["qkv"] + numbers["output"]) / 10e9 + (flops["gate_up"] + flops["down"]) / 34e9
    wanted = 1e3 * (2 * layer + 4 * numbers["head"] / 10e9)
    assert window_cost.floor_ms(PRESETS["tiny"], 8, torch.float32, ceilings) == pytest.approx(wanted, rel=1e-12)
    layer = (2 * 8 * 128 * 64 + 2 * 8 * 64 * 64 + flops["gate_up"] + flops["down"]) / 34e9
    wanted = 1e3 * (2 * layer + 2 * numbers["head"] / 10e9)
    assert window_cost.floor_ms(PRESETS["tiny"], 8, torch.bfloat16, ceilings) == pytest.approx(wanted, rel=1e-12)


def test_a_row_has_the_floor_of_its_window_and_of_the_models_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        rows = measure(model=Llama("tiny", dtype=dtype), windows=(1, 8), curves=["paper"], runs=1)
        assert rows.floor_ms.tolist() == [
            window_cost.floor_ms(PRESETS["tiny"], window, dtype, CEILINGS) for window in (1, 8)]


def test_the_floor_is_weights_once_at_first_and_flops_at_last():
    config, ceilings = PRESETS["llama-3.1-8b"], Ceilings(4250.0, 735.0)
    weights = 2 * (config.parameters - config.vocab_size * config.hidden_size)  # the embedding is looked up

    def floor(tokens):
        return window_cost.floor_ms(config, tokens, torch.bfloat16, ceilings)

    assert floor(1) == pytest.approx(weights / 4250e9 * 1e3, rel=0.01)
    assert floor(16) == pytest.approx(floor(1), rel=0.02)
    flops = sum(2 * m * n * k for m, n, k in window_cost.products(config, 4096)[:-1])
    head = 2 * config.vocab_size * config.hidden_size / 4250e9
    assert floor(4096) == pytest.approx(1e3 * (flops / 735e12 + head), rel=0.001)
    assert all(floor(2 * n) > floor(n) for n in (1, 16, 128, 512))


@pytest.mark.parametrize("options, message", [
    ({"windows": (0,)}, r"windows must be whole numbers in 1\.\.1024"),
    ({"windows": (1025,)}, "context of tiny, got 1025"), ({"windows": (1.5,)}, "windows"),
    ({"curves": ["floor"]}, "curve must be paper or graph"), ({"ops": ["fast"]}, f"ops must be {' or '.join(BOTH)} on"),
    ({"runs": 0}, "runs"), ({"warmups": -1}, "warmups"), ({"model": "llama-4"}, "model must be one of"),
])
def test_what_cannot_be_measured_names_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        measure(**options)


@pytest.mark.skipif(runtime.HAS_GPU, reason="this machine can replay a CUDA graph")
def test_a_graph_on_a_cpu_says_why_not(capsys, tmp_path):
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        measure(curves=["paper", "graph"])
    assert window_cost.main(["--model", "tiny", "--curves", "graph", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_window_that_does_not_fit_names_the_sizes(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = Llama("tiny")
    monkeypatch.setattr(window_cost, "paper_pass", full)
    with pytest.raises(MemoryError, match=r"window of 8 tokens does not fit beside tiny, whose weights take 0\.0 GB"):
        measure(windows=(8,), model=model)


# Recording: files, resumption, other models, interruption.

def command(folder, *extra):
    return window_cost.main(["--model", "tiny", "--windows", "1", "4", "--out", str(folder), *extra])


def test_the_command_records_resumes_and_replaces(tmp_path, quick, capsys):
    assert command(tmp_path, "--machine", "here") == 0
    file = tmp_path / "here" / "verify_cost.csv"
    lines = file.read_text().splitlines()
    assert lines[0] == COLUMNS and len(lines) == 1 + 2 * len(CURVES)
    machine = json.loads((tmp_path / "here" / "machine.json").read_text())
    assert machine["verify_cost_model"] == "tiny"
    assert machine["copy_gbytes_per_s"] == 20.0 and machine["matmul_tflops"] == 0.1
    assert ("needs a CUDA GPU" in capsys.readouterr().err) is not runtime.HAS_GPU

    before = file.read_bytes()
    assert command(tmp_path, "--machine", "here") == 0
    assert file.read_bytes() == before
    assert command(tmp_path, "--machine", "here", "--again") == 0
    assert len(file.read_text().splitlines()) == len(lines) and file.read_bytes() != before
    table = VERIFY_COST.read(tmp_path / "here")
    assert not table.duplicated(list(VERIFY_COST.key)).any()


def test_a_second_model_gets_a_file_of_its_own(tmp_path, quick):
    records.note_machine(tmp_path, "verify_cost.csv", verify_cost_model="llama-3.1-8b")
    window_cost.record("tiny", tmp_path, [2], runs=2, warmups=0)
    assert [p.name for p in tmp_path.glob("*.csv")] == ["verify_cost.tiny.csv"]
    assert records.read_machine(tmp_path)["verify_cost_model"] == "llama-3.1-8b"
    assert window_cost.table_for("llama-3.1-8b", tmp_path).file == "verify_cost.csv"


def test_an_interrupt_keeps_what_was_measured(tmp_path, quick, monkeypatch, capsys):
    measured = window_cost._measure

    def interrupted(model, window, *rest):
        if window == 4:
            raise KeyboardInterrupt
        return measured(model, window, *rest)

    monkeypatch.setattr(window_cost, "_measure", interrupted)
    assert command(tmp_path, "--machine", "here") == 130
    assert "goes on from there" in capsys.readouterr().err
    assert set(VERIFY_COST.read(tmp_path / "here").tokens) == {1}
    monkeypatch.setattr(window_cost, "_measure", measured)
    first = VERIFY_COST.read(tmp_path / "here").recorded_at.tolist()
    assert command(tmp_path, "--machine", "here") == 0
    table = VERIFY_COST.read(tmp_path / "here")
    assert set(table.tokens) == {1, 4}
    assert table[table.tokens == 1].recorded_at.tolist() == first


def test_a_model_too_large_leaves_no_trace(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr("kernels.model.cache.free_memory", lambda device: 1000)
    assert command(tmp_path, "--machine", "here") == 1
    assert "tiny in" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("arguments", [["--runs", "49"], ["--curves", "floor"], ["--model", "llama-4"]])
def test_the_command_refuses_what_it_cannot_record(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path, *arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("ops", BOTH)
def test_the_graph_chooses_the_token_that_eager_code_does(ops):
    model = Llama("tiny", ops=ops)
    assert window_cost.graph_pass(model, 8)() == window_cost.paper_pass(model, 8)()
