"""The properties of the atlas: the ways in which a call's rows are computed again, and how they are compared.

run         the same call, repeated
batch       the rows in batches of other sizes
position    the rows elsewhere in the batch
neighbours  the rows among other rows
query       the same positions, computed with other numbers of queries
threads     by other numbers of CPU threads
graph       replayed from a CUDA graph
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from ... import bits, runtime
from .cases import Case

PROPERTIES = ("run", "batch", "position", "neighbours", "query", "threads", "graph")
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 256, 384)
FEW_BATCHES = (1, 3, 16)
THREADS = (2, 3, 4)
RUNS = {"cpu": 2, "cuda": 10}  # how many times the trials asked for, in `run`
SEEDS, SECOND_LOOKS = 2, 5


class Tally:
    """What the comparisons of one cell found."""

    def __init__(self):
        self.trials = self.elements = self.differ = self.largest = 0
        self.patterns = defaultdict(set)  # row -> digests of the results it had, once they differed

    def compare(self, expected, got, rows: Sequence = ("all",), seed: int = 0) -> bool:
        """Count one comparison; whether bits moved. `rows` names the rows of the results; by default they are one."""
        whole = len(rows) == 1 and rows[0] == "all"
        expected, got = (tuple(x[None] if whole else x for x in bits.as_tuple(value)) for value in (expected, got))
        self.trials += 1
        if all(map(_same_memory, expected, got)):  # quicker than counting, and the usual case
            self.elements += sum(x.numel() for x in got)
            return False
        moved_rows = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        for a, b in zip(expected, got, strict=True):
            moved = bits.moved(a, b)
            self.elements += moved.numel()
            self.differ += int(moved.sum())
            moved_rows |= moved.reshape(len(rows), -1).any(1).cpu()
            finite = moved & a.isfinite() & b.isfinite()
            if a.is_floating_point() and finite.any():
                self.largest = max(self.largest, int(bits.ulp_distance(a, b)[finite].max()))
        where = moved_rows.nonzero().flatten()
        for value in (expected, got):
            moved = [x[where.to(x.device)].cpu() for x in value]
            for i, row in enumerate(where.tolist()):
                self.patterns[seed, rows[row]].add(bits.digest(tuple(x[i] for x in moved)))
        return len(where) > 0

    def columns(self) -> dict:
        """share_differ, largest_ulp, distinct and trials, as in atlas.csv; the first three empty without a trial."""
        if not self.trials:
            return {"share_differ": math.nan, "largest_ulp": math.nan, "distinct": math.nan, "trials": 0}
        return {"share_differ": self.differ / max(self.elements, 1), "largest_ulp": self.largest,
                "distinct": max(map(len, self.patterns.values()), default=1), "trials": self.trials}


def _same_memory(a, b) -> bool:
    """Whether two tensors hold the same bytes. If not, their bits may still be the same: every NaN equals every NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def outcome(case: Case, dtype: torch.dtype, property: str, device: torch.device, trials: int) -> tuple[str, Tally]:
    """The verdict on one cell and the tally behind it; the atlas' `test` says what a verdict rests on."""
    if not _applies(case, property, device):
        return "not applicable", Tally()
    if property in case.lacks:
        return f"not here: {case.lacks[property]}", Tally()
    try:
        tally = _measured(case, dtype, property, device, trials)
        if not tally.differ:
            return "same", tally
        if any(_measured(case, dtype, property, device, trials).differ for _ in range(SECOND_LOOKS)):
            return "varies", tally
        return f"error: bits moved once and not in {SECOND_LOOKS} further measurements", tally
    except Exception as error:  # noqa: BLE001 - an op that fails is a row that says so
        return _failure(error), Tally()


def _applies(case: Case, property, device) -> bool:
    return {"run": True, "batch": case.per_row, "position": case.per_row, "neighbours": case.per_row,
            "query": case.query, "threads": device.type == "cpu", "graph": device.type == "cuda"}[property]


def _failure(error: Exception) -> str:
    text = " ".join(next(iter(str(error).strip().splitlines()), "").split())[:120]
    if isinstance(error, runtime.Unavailable):
        return f"not here: {text}"
    if isinstance(error, NotImplementedError) or "not implemented for" in text:
        return f"not here: {text}"
    return f"error: {type(error).__name__}: {text}"


@torch.no_grad()
def _measured(case: Case, dtype, property, device, trials) -> Tally:
    tally = Tally()
    _MEASURES[property](case, dtype, device, tally, trials)
    if tally.trials < trials:
        raise RuntimeError(f"{case.name}, {property}: {tally.trials} comparisons are too few")
    return tally


def _seeds(tally: Tally, trials: int) -> Iterator[int]:
    """Seeds until there were enough comparisons, and at least SEEDS of them."""
    for seed in range(max(SEEDS, trials)):
        if seed >= SEEDS and tally.trials >= trials:
            return
        yield seed


def _some(case: Case, arguments, rows) -> tuple:
    """The same arguments with these rows (an index tensor) of each argument that has rows, in memory of their own."""
    return tuple(a[rows] if i in case.per_row else a for i, a in enumerate(arguments))


def _batch_size(case: Case, arguments) -> int:
    return arguments[case.per_row[0]].shape[0]


def _run(case, dtype, device, tally, trials):
    """Twice the trials asked for, on a GPU ten times: there some ops move in one run of hundreds.

    An op that has moved `trials` times for one input needs no more of it.
    """
    for seed in range(SEEDS):
        arguments = case.inputs(dtype, device, seed)
        first, moved = case.call(*arguments), 0
        for _ in range(-(-trials * RUNS[device.type] // SEEDS)):
            moved += tally.compare(first, case.call(*arguments), seed=seed)
            if moved >= trials:
                break


def _batch(case, dtype, device, tally, trials):
    """The first n rows without the others; and further rows alone, each against a batch that begins with it."""
    for seed in _seeds(tally, trials):
        arguments = case.inputs(dtype, device, seed)
        every = torch.arange(_batch_size(case, arguments), dtype=torch.int64, device="cpu")
        for start in (0,) if case.few else sorted({0, len(every) // 3, len(every) - 1}):
            order = every.roll(-start)
            first = _some(case, arguments, order.to(device))
            whole = bits.as_tuple(case.call(*first))
            for n in _sizes(case) if start == 0 else (1,):
                if n < len(every):
                    got = case.call(*_some(case, first, every[:n].to(device)))
                    tally.compare(tuple(x[:n] for x in whole), got, order[:n].tolist(), seed)


def _sizes(case) -> tuple[int, ...]:
    return FEW_BATCHES if case.few else BATCHES


def _position(case, dtype, device, tally, trials):
    """Each row elsewhere in a batch of the same size: reversed, moved along, and one row in every place."""
    for seed in _seeds(tally, trials):
        arguments = case.inputs(dtype, device, seed)
        whole = bits.as_tuple(case.call(*arguments))
        every = torch.arange(_batch_size(case, arguments), dtype=torch.int64, device="cpu")
        moved = [every.roll(n) for n in (1, 2, 3, 5, 7, 8, 13, len(every) // 2) if n < len(every)]
        for rows in (every.flip(0), *moved, every[:1].expand(len(every)), every[-1:].expand(len(every))):
            got = case.call(*_some(case, arguments, rows.to(device)))
            tally.compare(tuple(x[rows.to(x.device)] for x in whole), got, rows.tolist(), seed)


def _neighbours(case, dtype, device, tally, trials):
    """Some rows kept where they are, the others replaced: by other values, zeros (padding), huge ones, NaN."""
    for seed in _seeds(tally, trials):
        arguments = case.inputs(dtype, device, seed)
        whole = bits.as_tuple(case.call(*arguments))
        batch = _batch_size(case, arguments)
        every = torch.arange(batch, dtype=torch.int64, device="cpu")
        for content in case.contents:
            others = case.inputs(dtype, device, seed + 100, content)
            for kept in (every == 0, every == batch - 1, every % 2 == 0, every < batch // 2):
                mixed = [_mixed(a, b, kept.to(device)) if i in case.per_row else a
                         for i, (a, b) in enumerate(zip(arguments, others, strict=True))]
                got = bits.as_tuple(case.call(*mixed))
                rows = kept.nonzero().flatten()
                tally.compare(tuple(x[rows.to(x.device)] for x in whole), tuple(x[rows.to(x.device)] for x in got),
                              rows.tolist(), seed)


def _mixed(a, b, kept) -> torch.Tensor:
    return torch.where(kept.view(-1, *[1] * (a.dim() - 1)), a, b)


def _query(case, dtype, device, tally, trials):
    for seed in _seeds(tally, trials):
        for positions, expected, got in case.query(case.call, case.inputs(dtype, device, seed)):
            tally.compare(expected, got, list(positions), seed)


def _threads(case, dtype, device, tally, trials):
    before = torch.get_num_threads()
    counts = (max(before, 2),) if case.few else sorted({*THREADS, before} - {1})
    try:
        for seed in range(max(SEEDS, -(-trials // len(counts)))):
            arguments = case.inputs(dtype, device, seed)
            torch.set_num_threads(1)
            alone = case.call(*arguments)
            for count in counts:
                torch.set_num_threads(count)
                tally.compare(alone, case.call(*arguments), seed=seed)
    finally:
        torch.set_num_threads(before)


def _graph(case, dtype, device, tally, trials, replays=3):
    static = case.inputs(dtype, device)
    result, graph = _captured(case.call, static)
    for seed in range(max(SEEDS, -(-trials // replays))):
        arguments = case.inputs(dtype, device, seed)
        for place, argument in zip(static, arguments, strict=True):
            place.copy_(argument)
        eager = case.call(*arguments)
        for _ in range(replays):
            graph.replay()
            tally.compare(eager, result, seed=seed)


def _captured(call, arguments):
    """The call in a CUDA graph: its result, which each replay overwrites, and the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call(*arguments)
    except RuntimeError as error:
        raise runtime.Unavailable(f"cannot be captured: {str(error).splitlines()[0]}") from None
    finally:
        torch.cuda.set_stream(stream)  # a capture that ends with an error leaves its own stream the current one
    return result, graph


_MEASURES = {"run": _run, "batch": _batch, "position": _position, "neighbours": _neighbours, "query": _query,
             "threads": _threads, "graph": _graph}
