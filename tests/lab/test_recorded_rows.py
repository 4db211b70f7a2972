"""What a recorded row holds: units, bits and samples of its own point, text as it is written, ops really used."""
from contextlib import nullcontext

import pytest
import torch

from kernels import OPS, bits, runtime
from kernels.lab import bench, records
from kernels.lab.proofs.tensor_core import TENSOR_CORE
from kernels.lab.sweep.measure import Sweep, sweep
from kernels.lab.window import measure as window_cost
from kernels.model.llama import Llama
from kernels.op import DTYPES
from kernels.ops.all_reduce import all_reduce


def test_a_row_is_of_its_own_shape_dtype_and_samples(monkeypatch):
    """Two passes of two known samples; a result kept from another shape or dtype would give another digest."""
    passes = iter([[2.0, 4.0]] * 8 + [[6.0, 16.0]] * 8)
    monkeypatch.setattr(bench, "measure", lambda contenders, *_, **__: {"python": bench.Timing(next(passes))})
    op = OPS["sum"]
    wanted = Sweep(op, (1, 3), ("python",), ("float32", "bfloat16"), ("D=40", "D=33"), ("call",), passes=2,
                   repeats=2, device=torch.device("cpu"))
    rows = [row for rows in sweep(wanted, progress=False) for row in rows]
    assert [row["repeats"] for row in rows] == [2] * 8 + [4] * 8
    for row in rows:
        work, dtype = op.work(row["tokens"], row["shape"], DTYPES[row["dtype"]]), DTYPES[row["dtype"]]
        us = 3.0 if row["repeats"] == 2 else 5.0
        assert row["us_p50"] == us and row["same_bits"] and row["elements_differ"] == 0
        assert row["gbytes_per_s"] == pytest.approx(work.bytes / (us * 1e-6) / 1e9)
        assert row["tflops"] == pytest.approx(work.flops / (us * 1e-6) / 1e12)
        assert row["digest"] == bits.digest(op.python(*op.inputs(row["tokens"], row["shape"], dtype)))[:16]


def test_percentiles_rise_and_rates_follow_the_median_in_every_recorded_row():
    """A number that was changed by hand breaks one of them; both are written with six digits."""
    ops = {**OPS, all_reduce.name: all_reduce}
    for machine in records.machines(records.TOKEN_SWEEP.file):
        rows = records.load(machine=machine)
        percentiles = rows[["us_p05", "us_p20", "us_p50", "us_p80", "us_p95"]].to_numpy()
        assert len(rows) > 100 and (percentiles[:, :-1] <= percentiles[:, 1:]).all()
        work = [ops[r.op].work(r.tokens, r.shape, DTYPES[r.dtype]) for r in rows.itertuples()]
        assert (rows.gbytes_per_s * rows.us_p50).tolist() == pytest.approx([w.bytes / 1e3 for w in work], rel=2e-5)
        assert (rows.tflops * rows.us_p50).tolist() == pytest.approx([w.flops / 1e6 for w in work], rel=2e-5)


def test_a_digest_of_digits_alone_stays_text(tmp_path):
    row = {"op": "sum", "implementation": "cuda", "dtype": "float32", "shape": "D=8", "tokens": 1, "clock": "call",
           "digest": "0012345678901234", "source": "000000000012"}
    records.TOKEN_SWEEP.merge(tmp_path, [row])
    read = records.TOKEN_SWEEP.read(tmp_path).iloc[0]
    assert (read["digest"], read["source"]) == (row["digest"], row["source"])


def test_writers_of_machine_json_wait_for_each_other_whatever_they_record(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(records, "turn", lambda path: waited.append(path) or nullcontext())
    records.note_machine(tmp_path, "one.csv")
    records.note_machine(tmp_path, "other.csv")
    assert waited == [tmp_path / "machine.json"] * 2


def test_a_window_is_measured_with_the_ops_it_names_and_its_token_is_read_back(monkeypatch):
    used, tokens, plain = [], [], window_cost.paper_pass

    def watched(model, window):
        used.append(model.ops_name)
        step = plain(model, window)
        return lambda: tokens.append(step())

    monkeypatch.setattr(window_cost, "paper_pass", watched)
    window_cost.window_cost(Llama("tiny"), (2,), ("paper",), window_cost.ops_on(runtime.device()), runs=1, warmups=0,
                            ceilings=window_cost.Ceilings(10.0, 0.1))
    assert used == [*window_cost.ops_on(runtime.device())] and [type(token) for token in tokens] == [int, int]


def test_the_sums_that_the_readme_counts_are_those_recorded():
    rows = records.load(TENSOR_CORE, "h200")
    readme = (records.ROOT / "README.md").read_text(encoding="utf-8")
    assert f": {rows.outputs.sum():,} sums of this GPU's" in readme and rows.mismatches.sum() == 0


def test_cold_is_what_an_eager_call_takes_after_a_flush():
    """The other way adds the event pair and the launch gap, a few microseconds, to a call that is short."""
    rows = records.load(machine="h200")
    us = rows[rows.clock.isin(["cold", "flush"])].pivot_table(
        index=["op", "implementation", "dtype", "shape", "tokens"], columns="clock", values="us_p50").dropna()
    assert len(us) >= 20 and {"cuda", "triton"} <= set(us.index.unique("implementation"))
    over = us.flush - us.cold
    assert (over < 6).all() and (us.flush > 0.95 * us.cold).all()
    assert over[us.cold < 10].between(1, 6).all() and (us.cold < 10).any()
