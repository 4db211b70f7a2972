"""Certificates: no schedule that moves a bit gets one, and workers that hang are ended."""
import sys
import time
from dataclasses import replace

import pytest
import torch

from kernels import runtime, tables
from kernels.lab.proofs import certificates as proofs
from kernels.lab.proofs.certificates import TRUSTED, certificates, prove_all
from kernels.lab.proofs.expected import WEIGHTS, expected
from kernels.op import Op
from kernels.ops.matmul import cost
from kernels.ops.matmul.order import order
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import Schedule

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
GOOD = Schedule("pointer", 16, 16, 32, 1, 2)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """The interpreter takes a millisecond a program and step of k."""
    monkeypatch.setattr(proofs, "ROWS", 19)
    proofs._case.cache_clear()
    yield
    proofs._case.cache_clear()


@needs_triton
def test_a_schedule_that_keeps_its_bits_is_certified():
    rows = certificates(GOOD, 6, 20, torch.float32, runtime.device())
    assert [row["input"] for row in rows] == list(proofs.KINDS)
    assert len({row["digest"] for row in rows}) == len(rows) and {row["trusted"] for row in rows} == {str(TRUSTED)}
    assert set(rows[0]) == set(proofs.CERTIFICATES.columns)
    proofs.check_trusted(6, 20, torch.float32, runtime.device(), columns=4)


@needs_triton
def test_the_order_of_eight_gpus_has_certificates_of_its_own(monkeypatch):
    monkeypatch.setattr(proofs, "KINDS", ("portable",))
    monkeypatch.setattr(proofs, "ROWS", 3)
    shared, = certificates(GOOD, 6, 80, torch.float32, runtime.device(), gpus=8)
    one, = certificates(GOOD, 6, 80, torch.float32, runtime.device())
    assert (shared["shape"], one["shape"]) == ("N=6,K=80,gpus=8", "N=6,K=80")
    assert shared["digest"] != one["digest"] and shared["source"] != one["source"]
    proofs.check_trusted(6, 80, torch.float32, runtime.device(), columns=4, gpus=8)


@needs_triton
def test_a_job_may_name_its_inputs():
    for kinds, count in ((["residue"], 1), (None, len(proofs.KINDS))):
        proofs.prove(GOOD, 6, 20, torch.float32, runtime.device(), kinds=kinds)
        assert proofs._case.cache_info().currsize == count


def test_both_sections_of_a_table_are_proved():
    shapes = {"bfloat16": {(64, 64): {1: GOOD, 2: GOOD}}}
    table = {"matmul": shapes, "matmul_shared": shapes}
    job = {"schedule": str(GOOD), "n": 64, "k": 64, "dtype": "bfloat16"}
    assert proofs.stored(table) == [{**job, "gpus": 1}, {**job, "gpus": 8}]
    assert len([j for j in proofs.stored(tables.load("h200", Schedule.parse)) if j["gpus"] == 8]) > 5


@needs_triton
def test_all_that_the_model_of_time_may_choose_is_proved():
    """In an order of one chain and in one of segments, each wherever it can be carried out."""
    known = cost.load("h200")
    jobs, every = expected(known, proofs.rows_of), {str(s) for ways in known.ways.values() for s in ways.schedules}
    assert [order(*weight).segments > 1 for weight in WEIGHTS] == [False, True]
    proved = {weight: {job["schedule"] for job in jobs if (job["n"], job["k"]) == weight} for weight in WEIGHTS}
    assert set().union(*proved.values()) == every and min(map(len, proved.values())) > 60
    assert all(" split" not in schedule for schedule in proved[WEIGHTS[0]])
    assert expected(None, proofs.rows_of) == []


def test_an_input_has_a_chain_for_every_program_in_lockstep():
    for line in ("hopper 128x256x64 warps=8 stages=3 group=8", "hopper 192x256x64 warps=8 stages=3 group=8 swap"):
        s = Schedule.parse(f"{line} persistent store stream lockstep")
        for n in (640, 2560, 4351):
            p = Product(proofs.rows_of(s, n), n, 64, torch.bfloat16, (64, 1), (64, 1), order(n, 64), False)
            assert p.programs(s) <= min(p.units(s), 132) and p.programs(s) > 66
    assert proofs.rows_of(replace(s, lockstep=False), 640) == 1283 and proofs.rows_of(GOOD, 640) == proofs.ROWS


@needs_triton
def test_a_schedule_that_moves_one_bit_is_not(monkeypatch):
    real = Op.run_schedule

    def off(op, schedule, *given):
        y = real(op, schedule, *given)
        if schedule != TRUSTED:
            y[-1, -1] += 1
        return y

    monkeypatch.setattr(Op, "run_schedule", off)
    with pytest.raises(RuntimeError, match="16x16x32.*moved bits of portable inputs"):
        certificates(GOOD, 7, 20, torch.float32, runtime.device())


@needs_triton
def test_a_trusted_schedule_that_is_not_the_specification_is_noticed(monkeypatch):
    real = Op.run_schedule
    monkeypatch.setattr(Op, "run_schedule", lambda *given: -real(*given))
    with pytest.raises(RuntimeError, match="trusted schedule and the specification differ on portable"):
        proofs.check_trusted(8, 20, torch.float32, runtime.device(), columns=4)


@pytest.mark.parametrize("n, k", [(1, 33), (4096, 4096), (6144, 14336), (28672, 4096), (128256, 8192), (5001, 5001),
                                  (512, 4096), (1280, 8192), (2048, 1000), (6208, 4096)])
def test_a_stand_in_has_the_same_order_and_remainders(n, k):
    small, short = proofs.stand_in(n, k)
    assert small <= 4351 and (short <= 4607 or order(n, k)[0] > 1)
    assert order(small, short) == (order(n, k) if order(n, k)[0] > 1 else (1, short))
    for block in (16, 32, 64, 128, 256, 512):
        assert (short % block == 0) == (k % block == 0) and (block > 256 or (small % block == 0) == (n % block == 0))


@needs_triton
def test_the_residue_shows_a_last_bit_that_rounding_hides():
    """One in the 24th bit of a sum: lost in bfloat16, plain once the rounded product has been taken away."""
    (x, weight, bias, _), _ = proofs._case(64, 40, torch.bfloat16, "residue", runtime.device())
    with_bias, without = (proofs.op.run_schedule(TRUSTED, x, weight, b).float() for b in (bias, None))
    total = x.double() @ weight.double().t()
    assert (with_bias.double() - (total + bias.double())).abs().max() < 1e-4 * total.abs().max()
    assert 0 < with_bias.abs().max() <= without.abs().max() * 2.0**-8


# workers


ECHO = "import sys\nfor line in sys.stdin:\n    print({!r} if 'bad' in line else '\"\"', flush=True)\n"


def workers(monkeypatch, script):
    class Worker(proofs._Process):
        started = 0

        def start(self):
            Worker.started += 1
            import subprocess
            self.process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    monkeypatch.setattr(proofs, "_Process", Worker)
    return Worker


def test_answers_come_in_the_order_of_the_jobs(monkeypatch):
    workers(monkeypatch, ECHO.format('"ValueError: no"'))
    seen = []
    jobs = [{"schedule": "bad" if i % 3 == 0 else "fine"} for i in range(12)]
    answers = prove_all(jobs, 2, progress=lambda done, total: seen.append((done, total)))
    assert answers == ["ValueError: no" if i % 3 == 0 else "" for i in range(12)]
    assert sorted(seen) == [(i + 1, 12) for i in range(12)]


def test_a_broken_context_gets_a_new_process(monkeypatch):
    worker = workers(monkeypatch, ECHO.format('"RuntimeError: CUDA error: an illegal access"'))
    assert prove_all([{"schedule": "bad"}, {"schedule": "fine"}], 1)[1] == ""
    assert worker.started == 2


def test_a_job_that_hangs_is_ended_and_the_next_one_runs(monkeypatch):
    script = ECHO.format("x").replace("print", "import time; 'bad' in line and time.sleep(60); print")
    workers(monkeypatch, script.replace("'x' if 'bad' in line else '\"\"'", "'\"\"'"))
    start = time.monotonic()
    answers = prove_all([{"schedule": "bad"}, {"schedule": "fine"}], 1, limit_s=2)
    assert answers == ["the process died or took too long", ""] and time.monotonic() - start < 30


def test_jobs_after_the_deadline_are_not_begun(monkeypatch):
    workers(monkeypatch, ECHO.format("x"))
    assert prove_all([{"schedule": "fine"}] * 3, 1, deadline=time.monotonic() - 1) == ["not begun in time"] * 3


@pytest.mark.skipif(not runtime.HAS_TRITON or runtime.HAS_GPU, reason="a worker without a GPU")
def test_a_real_worker_answers_with_what_went_wrong():
    job = {"schedule": str(GOOD), "n": 8, "k": 16, "dtype": "float32"}
    answer, = prove_all([job], 1)
    assert "Unavailable" in answer and "no GPU" in answer
