"""Memory that every GPU of a group can read and write: torch.distributed's symmetric memory, without multicast.

NVLink multicast (multimem, NVLS) stays off: its order is the switch's, and its bits have been reported to depend on
what was allocated before.
"""
from __future__ import annotations

import os
import warnings

import torch

from . import ranks

TIMEOUT_MS = 100_000  # of a barrier; then the kernel traps, and the next call on this GPU raises
_SMALLEST = 4 << 20
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


class Workspace:
    """A part and a result on every GPU of a group, each as large as `nbytes`; the same call on every rank makes it.

    parts, results  where they lie on each GPU, as this GPU sees them: tensors of bytes, in the order of ranks
    """

    def __init__(self, nbytes: int, device: torch.device, group):
        import torch.distributed as dist
        from torch.distributed import _symmetric_memory

        group = group or dist.group.WORLD
        self.nbytes, self.group = nbytes, group
        with torch.inference_mode(False):
            self.memory = _symmetric_memory.empty(2 * nbytes, dtype=torch.uint8, device=device)
        self.handle = _symmetric_memory.rendezvous(self.memory, group)
        self.parts, self.results = ([self.handle.get_buffer(rank, (nbytes,), torch.uint8, offset)
                                     for rank in range(ranks.size(group))] for offset in (0, nbytes))
        self.rank = ranks.number(group)

    def barrier(self) -> None:
        """All that was queued before it on every GPU is done before what is queued after it on any."""
        self.handle.barrier(0, TIMEOUT_MS)


class Workspaces:
    """One for each group and GPU; a larger one takes its place, and the old one stays for graphs that use it."""

    def __init__(self):
        self._kept: dict[tuple, list[Workspace]] = {}
        self._can: dict[tuple, bool] = {}

    def of(self, nbytes: int, device: torch.device, group) -> Workspace:
        """A workspace for parts of `nbytes` bytes. RuntimeError while a graph is captured if there is none so large."""
        kept = self._kept.setdefault((_key(group), device), [])
        if kept and kept[-1].nbytes >= nbytes:
            return kept[-1]
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("all_reduce.triton needs more memory that GPUs share, which no graph can make while it "
                               "is captured: make one such call before")
        kept.append(Workspace(max(_SMALLEST, 1 << (nbytes - 1).bit_length()), device, group))
        return kept[-1]

    def can(self, device: torch.device, group) -> bool:
        """Whether these GPUs read each other's memory; said once where they do not. Asked on every rank alike."""
        key = (_key(group), device)
        if key not in self._can:
            self._can[key] = self._try(device, group)
        return self._can[key]

    def _try(self, device, group) -> bool:
        if device.type != "cuda" or ranks.size(group) == 1:
            return False
        why = ""
        try:
            self.of(_SMALLEST, device, group)
        except Exception as error:  # noqa: BLE001 - drivers raise what they like
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        reasons = [reason for reason in ranks.told_objects(why, group) if reason]
        if reasons:
            warnings.warn(f"these GPUs have no symmetric memory ({reasons[0]}): all_reduce.triton goes through NCCL's "
                          "all-gather and all-to-all, slower and with the same bits", RuntimeWarning, stacklevel=4)
        return not reasons


def _key(group) -> int:
    """Groups have no order and no names that last: the object, which the workspace keeps alive, is the key."""
    return 0 if group is None else id(group)


WORKSPACES = Workspaces()
