"""How a schedule is carried out: on GPUs by the kernel, on a CPU by Triton's interpreter, with gloo between."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch

from ...launch import Launch
from ...runtime import require_triton
from . import order, ranks
from .kernel import PARTS, RESULTS, filled, join
from .schedule import SYMMETRIC, Schedule, choose
from .symmetric import WORKSPACES


def scheduled(part, bias=None, dtype: torch.dtype | None = None, group=None) -> torch.Tensor:
    """A schedule of choice: the arguments, results and bits of the specification."""
    order.check("triton", part, bias, dtype, group)
    schedule = choose(part.numel(), ranks.size(group), WORKSPACES.can(part.device, group))
    return run_schedule(schedule, part, bias, dtype, group)


def run_schedule(schedule: Schedule, part, bias=None, dtype: torch.dtype | None = None, group=None) -> torch.Tensor:
    """One given schedule. Raises TypeError for another op's, ValueError for one that this device cannot carry out."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule of all_reduce, got {type(schedule).__name__} {schedule!r}")
    order.check("triton", part, bias, dtype, group)
    require_triton("all_reduce")
    if schedule.kind in SYMMETRIC and not WORKSPACES.can(part.device, group):
        raise ValueError(f"schedule must be of kind gather or scatter where memory is not symmetric, got {schedule}")
    part, bias, dtype = part.detach(), None if bias is None else bias.detach().contiguous(), dtype or torch.float32
    if not part.numel():
        return torch.empty(part.shape, dtype=dtype, device=part.device)
    return _WAYS[schedule.kind](schedule, part, bias, dtype, group)


def room(shape: tuple[int, ...], device: torch.device, group=None) -> torch.Tensor:
    """Memory (float32) where a part may be made that the next call sums: where it can lie, nothing is copied then.

    A part that will be pushed lies elsewhere: others push theirs before this one has left.
    """
    device, size = torch.device(device), math.prod(shape)
    if size and ranks.size(group) > 1 and WORKSPACES.can(device, group) \
            and choose(size, ranks.size(group), True).kind != "push":
        workspace = WORKSPACES.of(4 * size, device, group)
        return workspace.parts[workspace.rank][: 4 * size].view(torch.float32).view(shape)
    return torch.empty(shape, dtype=torch.float32, device=device)


def _gather(schedule, part, bias, dtype, group):
    y = torch.empty(part.shape, dtype=dtype, device=part.device)
    _add(schedule, ranks.gathered(part, group), [y], 0, part.numel(), bias)
    return y


def _scatter(schedule, part, bias, dtype, group):
    """By whole rows; the last rank's may be short, and are padded with zeros, which nobody keeps."""
    count, width = ranks.size(group), part.shape[-1]
    rows = part.reshape(-1, width)
    each = -(-len(rows) // count)
    pieces = torch.zeros(count * each, width, dtype=torch.float32, device=part.device)
    pieces[: len(rows)].copy_(rows)
    mine = ranks.exchanged(pieces.view(count, each, width), group)
    y = torch.empty(each, width, dtype=dtype, device=part.device)
    _add(schedule, list(mine), [y], 0, y.numel(), bias)
    return torch.cat(ranks.gathered(y, group))[: len(rows)].view(part.shape)


def _one_shot(schedule, part, bias, dtype, group):
    workspace = _brought(part, group)
    y = torch.empty(part.shape, dtype=dtype, device=part.device)
    workspace.barrier()
    _add(schedule, _floats(workspace.parts), [y], 0, part.numel(), bias)
    workspace.barrier()  # nobody writes its next part while another reads this one
    return y


def _two_shot(schedule, part, bias, dtype, group):
    workspace, width = _brought(part, group), part.shape[-1]
    count = len(workspace.parts)
    rows = part.numel() // width
    each = -(-rows // count)
    start, end = (min(rows, each * rank) * width for rank in (workspace.rank, workspace.rank + 1))
    results = [whole.view(dtype) for whole in workspace.results]
    workspace.barrier()
    if end > start:
        _add(schedule, _floats(workspace.parts), results, start, end, bias, width)
    workspace.barrier()
    return results[workspace.rank][: part.numel()].clone().view(part.shape)


def _push(schedule, part, bias, dtype, group):
    """Slot i of a GPU's memory for parts holds rank i's numbers of the rows that this GPU adds.

    Raises ValueError for a part in that memory, which others' numbers would overwrite.
    """
    count, rank, width = ranks.size(group), ranks.number(group), part.shape[-1]
    rows = part.numel() // width
    each = -(-rows // count) * width
    workspace = WORKSPACES.of(4 * count * each, part.device, group)
    if _lies_in(part, workspace.parts[rank]):
        raise ValueError("schedule must be another than push for a part that lies in the memory that GPUs share")
    flat, slots = part.reshape(-1), [memory[: 4 * count * each].view(torch.float32).view(count, each)
                                     for memory in workspace.parts]
    for peer in range(count):
        sent = flat[each * peer : each * (peer + 1)]
        slots[peer][rank, : len(sent)].copy_(sent)
    workspace.barrier()
    start, end = (min(part.numel(), each * of) for of in (rank, rank + 1))
    results = [memory.view(dtype) for memory in workspace.results]
    if end > start:
        moved = [result[start:] for result in results]
        _add(schedule, list(slots[rank]), moved, 0, end - start, bias, width)
    workspace.barrier()
    return results[rank][: part.numel()].clone().view(part.shape)


_WAYS = {"gather": _gather, "scatter": _scatter, "one_shot": _one_shot, "two_shot": _two_shot, "push": _push}


def _brought(part, group):
    """The workspace, this rank's part in it."""
    workspace = WORKSPACES.of(4 * part.numel(), part.device, group)
    place = workspace.parts[workspace.rank]
    if part.data_ptr() != place.data_ptr() or not part.is_contiguous():
        part = part.clone() if _lies_in(part, place) else part
        place[: 4 * part.numel()].view(torch.float32).view(part.shape).copy_(part)
    return workspace


def _lies_in(part, memory) -> bool:
    return 0 <= part.data_ptr() - memory.data_ptr() < memory.numel()


def _floats(buffers) -> list[torch.Tensor]:
    return [buffer.view(torch.float32) for buffer in buffers]


def _add(schedule, parts, results, start, end, bias, width: int = 0) -> None:
    """Elements start to end of the result, from all parts, into all results."""
    y, width = results[0], width or results[0].shape[-1]
    index = y.get_device()
    if index < 0:
        _interpret(schedule, parts, y, end, bias, width)
        return
    launch = _launch(len(parts), len(results), start, end, width, y.dtype, None if bias is None else bias.dtype,
                     schedule.block, schedule.warps, index)
    pointers = [*filled([p.data_ptr() for p in parts]), y.data_ptr() if bias is None else bias.data_ptr(),
                *filled([r.data_ptr() for r in results])]
    low = 0
    for pointer in pointers:
        low |= pointer
    launch(low & 15, *pointers)


@cache
def _launch(parts, results, start, end, n, dtype, bias, block, warps, index) -> Callable:
    return Launch(join(parts, results, start, end, n, dtype, bias, block, warps), index)


def _interpret(schedule, parts, y, end, bias, width) -> None:
    """Triton's interpreter is wrong for bfloat16: it gets float32, and torch rounds. It runs few, big programs."""
    total = torch.empty(y.shape, dtype=torch.float32, device="cpu")
    block = max(schedule.block, 1 << max(end - 1, 0).bit_length() - 3)
    bias = None if bias is None else bias.float()
    step = join(len(parts), 1, 0, end, width, torch.float32, None if bias is None else torch.float32, block, 4)
    step.interpret({**dict(zip(PARTS, filled(list(parts)), strict=True)), "bias_ptr": total if bias is None else bias,
                    **dict(zip(RESULTS, filled([total]), strict=True))})
    y.copy_(total.to(y.dtype))
