"""How a process becomes a rank: torchrun's variables, a backend, a timeout; and what is said where that fails."""
from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ... import runtime
from ...ops.all_reduce import symmetric
from ...ops.matmul.shared import SHARES

COMMAND = "torchrun --standalone --nproc-per-node N -m kernels parallel"
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 60.0  # seconds that ranks wait for one another
LOOK_EVERY = 1.0  # seconds between looks at whether the parent is there
_LEFT = threading.Event()


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    rank, size  its number, and how many there are
    device      where its tensors live
    group       of torch.distributed; None for all ranks
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    def __post_init__(self):
        if self.size not in SHARES:
            raise ValueError(f"the number of ranks must be 1, 2, 4 or 8, which divide the eight leaves of k, got "
                             f"{self.size}")
        if type(self.rank) is not int or not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be a whole number from 0 to {self.size - 1}, got {self.rank!r}")

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def __str__(self):
        return f"rank {self.rank} of {self.size} on {self.device}"


def join(device: str | torch.device | None = None, timeout: float = TIMEOUT) -> Ranks:
    """Become one of the ranks that torchrun started: NCCL on GPUs, one a rank, gloo on a CPU; over the loopback.

    A rank ends when the process that started it does.

    device   'cpu', or 'cuda' for the GPU of this rank's number; default: as `runtime.device` decides
    timeout  seconds after which a rank that does not come is an error on all others

    Raises RuntimeError where torchrun's variables are missing or its port is taken, ValueError for a number of ranks
    or a device that there is not.
    """
    given = _variables()
    ranks = Ranks(given["RANK"], given["WORLD_SIZE"], _device(device, given["LOCAL_RANK"]))
    _settings()
    symmetric.TIMEOUT_MS = int(1000 * timeout)
    _LEFT.clear()
    end_with_parent(_LEFT)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        torch.set_num_threads(1)  # ranks share the CPU, and the default's bits may follow the number of threads
    try:
        dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout),
                                rank=ranks.rank, world_size=ranks.size)
    except (RuntimeError, ValueError) as error:
        _LEFT.set()
        raise RuntimeError(_why(str(error), ranks)) from error
    return ranks


def leave() -> None:
    """Let go of the others. Safe after an error, and where this process is no rank."""
    _LEFT.set()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def ends_where_lost(ranks: Ranks) -> Iterator[None]:
    """End this process with a word where its GPU waited in vain for another rank's: a GPU that trapped does no more."""
    try:
        yield
    except RuntimeError as error:
        if "launch failure" not in str(error) or ranks.size == 1:
            raise
        traceback.print_exc()
        print(f"error: {ranks} waited for a rank that ended or did not come in time ({str(error).splitlines()[0]})",
              file=sys.stderr, flush=True)
        os._exit(1)


def end_with_parent(left: threading.Event) -> None:
    """End this process, whatever it waits for, when the one that started it is gone, until `left` is set.

    A torchrun that is killed leaves its ranks behind, and they would keep their GPUs.
    """
    parent = os.getppid()

    def look():
        while not left.wait(LOOK_EVERY):
            if os.getppid() != parent:
                os._exit(1)
    threading.Thread(target=look, daemon=True, name="parent").start()


def _variables() -> dict[str, int]:
    lacking = [name for name in VARIABLES if not os.environ.get(name)]
    if lacking:
        raise RuntimeError(f"this process was not started by torchrun ({', '.join(lacking)} not set): {COMMAND}, with "
                           "1, 2, 4 or 8 for N")
    found = {}
    for name in VARIABLES[:3]:
        if not os.environ[name].isdecimal():
            raise RuntimeError(f"{name} must be a whole number, as torchrun sets it, got {os.environ[name]!r}")
        found[name] = int(os.environ[name])
    return found


def _device(wanted, local_rank: int) -> torch.device:
    device = torch.device(wanted or ("cuda" if runtime.HAS_GPU else "cpu"))
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not runtime.HAS_GPU:
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {str(wanted)!r}")
    if device.index is not None:
        raise ValueError(f"device must be cuda alone, for each rank has the GPU of its own number, got {str(wanted)!r}")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"rank {local_rank} of this machine has no GPU of its own: there are "
                         f"{torch.cuda.device_count()}. Start as many ranks, or give --device cpu")
    return torch.device("cuda", local_rank)


def _settings() -> None:
    """Ranks of one machine talk over the loopback; no sum is left to an NVLink switch."""
    interface = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if interface and os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def _why(text: str, ranks: Ranks) -> str:
    port = os.environ["MASTER_PORT"]
    if "EADDRINUSE" in text or "already in use" in text:
        return (f"MASTER_PORT {port} is taken by another program: let torchrun choose one (--standalone), or name "
                "another (--master-port)")
    last = text.strip().splitlines()[-1].strip() if text.strip() else "no reason given"
    return f"{ranks} could not join the others at {os.environ['MASTER_ADDR']}:{port}: {last}"
