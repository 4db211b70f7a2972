"""What bench's numbers are numbers of: microseconds a call, bytes read and written, two operations a product."""
import pytest
import torch

from kernels.lab import bench

CPU = torch.device("cpu")


def test_percentiles_are_named_after_their_share():
    assert bench.Timing([float(n) for n in range(100, -1, -1)]).percentiles() == {
        "us_p05": 5.0, "us_p20": 20.0, "us_p50": 50.0, "us_p80": 80.0, "us_p95": 95.0}


@pytest.mark.parametrize("us", [0.5, 40.0, 30000.0])
def test_a_timing_is_microseconds_a_call(us, monkeypatch):
    """A clock that only the calls move on: as many a round as there are, each takes what it takes."""
    now = [100.0]

    def call(x):
        now[0] += us / 1e6

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    timing = bench.measure({"it": call}, lambda i: (i,), "call", device=CPU, set_bytes=4, repeats=3)["it"]
    assert timing.us == pytest.approx([us] * 3, rel=1e-6)


def test_a_copy_counts_bytes_read_and_bytes_written(monkeypatch):
    monkeypatch.setattr(bench, "LARGE_COPY", {"cpu": 1000})
    monkeypatch.setattr(bench, "_best", lambda function, device, repeats: 0.5)
    assert bench.copy_gbytes_per_s(CPU) == pytest.approx(2 * 4000 / 0.5 / 1e9)


def test_a_large_product_counts_an_addition_and_a_multiplication(monkeypatch):
    monkeypatch.setattr(bench, "_best", lambda function, device, repeats: len(function()) / 1e3)
    assert bench.matmul_tflops(CPU) == pytest.approx(2 * 1024**3 / 1.024 / 1e12)
