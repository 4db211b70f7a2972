"""Two GPUs and NCCL: one digest in random batches and in the engine, and an error in time where a rank is lost."""
import json
import subprocess
import sys
import time

import pytest
import torch

from kernels.lab import records
from kernels.lab.parallel import work
from tests.model import ranks_parallel as on_ranks

BATCHES = 100
ANSWERS = f"""
import json, sys
from pathlib import Path

from kernels.lab.parallel import work
from kernels.model import parallel
from tests.model import ranks_parallel as on_ranks

ranks = parallel.join("cuda", 60)
found = {{"batches": work.batches(ranks, list(range({BATCHES}))), "served": on_ranks.served(ranks)}}
Path(sys.argv[1], f"{{ranks.rank}} of {{ranks.size}}").write_text(json.dumps(found))
parallel.leave()
"""
LOST = """
import os, sys, time

import torch

from kernels.lab.parallel import measure, work
from kernels.model import parallel

how, ops = sys.argv[1:]


def forward(ranks, a, folder, say):
    model = work.pocket_model(ranks).using(ops)
    work.batch_logits(model, 3)
    torch.cuda.synchronize()
    print(f"rank {ranks.rank} works", flush=True)
    if not ranks.first:
        os._exit(3) if how == "dies" else time.sleep(600)
    work.batch_logits(model, 3)
    torch.cuda.synchronize()
    print("nobody was missed", flush=True)


measure._cells = forward
measure.main(["--timeout", "20"])
"""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def started(gpus: int, script, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(gpus), str(script), *words], cwd=records.ROOT, capture_output=True, text=True,
                          timeout=240)


def test_random_batches_and_the_engine_have_the_bits_of_one_process_on_a_cpu(tmp_path, processes):
    (tmp_path / "answers.py").write_text(ANSWERS)
    batches, = processes.run(work.batches, list(range(BATCHES)), size=1)
    served, = processes.run(on_ranks.served, size=1)
    assert len(set(batches)) == BATCHES
    expected = json.loads(json.dumps({"batches": batches, "served": served}))
    for gpus in (1, 2):
        done = started(gpus, tmp_path / "answers.py", str(tmp_path))
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(json.loads((tmp_path / f"{rank} of {gpus}").read_text()) == expected for rank in range(gpus))


# of one that dies torchrun tells the others; of one that stands still they find out themselves
@pytest.mark.parametrize("how, ops, said", [("dies", "default", "exitcode  : 3"),
                                            ("dies", "invariant", "exitcode  : 3"),
                                            ("stands still", "default", "before timing out"),
                                            ("stands still", "invariant", "did not come in time")])
def test_a_rank_that_is_lost_ends_the_others_in_time_with_an_error(how, ops, said, tmp_path):
    (tmp_path / "lost.py").write_text(LOST)
    begin = time.monotonic()
    done = started(2, tmp_path / "lost.py", how, ops)
    seconds = time.monotonic() - begin
    assert done.stdout.count("works") == 2, done.stderr[-3000:]
    assert done.returncode != 0 and "nobody was missed" not in done.stdout
    assert said in done.stderr, done.stderr[-3000:]
    assert seconds < 120
