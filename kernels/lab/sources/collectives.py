"""One product over 1, 2 and 4 processes, joined by gloo on this machine: what the number of processes does to bits.

    python -m kernels.lab.sources.collectives FOLDER     start four processes, write FOLDER/results.pt; see `run`

A linear layer y = x @ w is cut along k, as in tensor parallelism. Each process multiplies its share, and the shares'
results are added across processes.

all_reduce   each process adds up its whole share, then torch.distributed.all_reduce adds the processes' results:
             the number of processes decides where the sum is cut
in_order     k is cut in 8 segments whatever the number of processes; every process keeps its segments' results
             apart, all are gathered, and all are added in sequence
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from ... import bits
from ...arithmetic import sums
from .. import records

WORLDS = (1, 2, 4)
SEGMENTS = 8
ROWS, K, N = 4, 2048, 32


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x (ROWS, K) and w (K, N), the same in every process."""
    return bits.portable(ROWS, K), bits.portable(K, N, seed=1)


def segment_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (rows, k), w (k, N) -> (segments, rows, N): one product for each K / SEGMENTS of k, each in a fixed order."""
    step = K // SEGMENTS
    return torch.stack([sums.ordered_sum(x[:, None, i : i + step] * w.t()[None, :, i : i + step])[..., 0]
                        for i in range(0, x.shape[1], step)])


def add_in_sequence(parts: torch.Tensor) -> torch.Tensor:
    """(n, ...) -> (...): parts[0] + parts[1] + ..., from the left."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def all_reduce(x, w, group) -> torch.Tensor:
    """The usual way. Every process of the group returns the whole sum."""
    total = add_in_sequence(segment_products(x, w))
    dist.all_reduce(total, group=group)
    return total


def in_order(x, w, group) -> torch.Tensor:
    """Gather every segment's result, then add all of them in sequence."""
    mine = segment_products(x, w)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    return add_in_sequence(torch.cat(gathered))


def run(timeout: float = 100) -> dict[str, dict[int, torch.Tensor]]:
    """{"all_reduce": {1: y, 2: y, 4: y}, "in_order": ...}: the results of four processes of this machine's CPU.

    Worlds of one and two are groups of the same four. Raises RuntimeError with a failing process's last line.
    """
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # no other interface is needed
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", __name__, folder], cwd=records.ROOT, env=settings,
                              capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"the processes failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return torch.load(Path(folder) / "results.pt")


def _work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=max(WORLDS),
                            timeout=timedelta(seconds=60))
    x, w = inputs()
    found: dict = {"all_reduce": {}, "in_order": {}}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            share = slice(rank * K // world, (rank + 1) * K // world)
            for way in (all_reduce, in_order):
                found[way.__name__][world] = way(x[:, share], w[share], group)
    if rank == 0:
        torch.save(found, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    method = "fork" if sys.platform == "linux" else "spawn"  # forked, the four share one import of torch
    torch.multiprocessing.start_processes(_work, (Path(sys.argv[1]),), nprocs=max(WORLDS), start_method=method)
