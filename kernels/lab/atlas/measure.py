"""The atlas: PyTorch's own ops, and what moves their bits on this machine.

    python -m kernels atlas                                 test every op, into data/<machine>/atlas.csv
    python -m kernels atlas --ops mm softmax --properties batch

A cell is one op, dtype and property. Each compares one call's rows with the same rows computed otherwise: repeated
(run), in batches of other sizes (batch), elsewhere in the batch (position), among other rows (neighbours), with other
numbers of queries (query), by other numbers of threads (threads), replayed from a CUDA graph (graph).
"""
from __future__ import annotations

import argparse
import inspect
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from ... import bits, runtime
from ...op import DTYPES
from .. import provenance, records
from .cases import CASES, Case

PROPERTIES = ("run", "batch", "position", "neighbours", "query", "threads", "graph")
RECORDED_DTYPES = ("float32", "bfloat16")
ATLAS = records.Table(
    "atlas.csv",
    ("op", "dtype", "shape", "property", "verdict", "share_differ", "largest_ulp", "distinct", "trials",
     "recorded_at", "source"),
    ("op", "dtype", "shape", "property"),
)
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 256, 384)
FEW_BATCHES = (1, 3, 16)
THREADS = (2, 3, 4)
RUNS = {"cpu": 2, "cuda": 10}
SEEDS, SECOND_LOOKS = 2, 5


def names() -> list[str]:
    """Every op of the atlas, in its order."""
    return [case.name for case in CASES]


def machines(out=records.DATA) -> list[str]:
    """The machines that recorded an atlas, data-centre GPUs first."""
    return records.machines(ATLAS.file, out)


def recorded(machine: str, out=records.DATA) -> pd.DataFrame:
    """A machine's atlas: the latest row of each op, dtype and property. FileNotFoundError if it recorded none."""
    rows = records.load(ATLAS, machine, out).sort_values("recorded_at", kind="stable")
    return rows.drop_duplicates(["op", "dtype", "property"], keep="last").sort_index()


def verdict(machine: str, op: str, dtype: str, property: str, out=records.DATA) -> str:
    """What a machine recorded: `same`, `varies`, `not applicable`, `not here: why`, `error: what`, or `not recorded`.

    ValueError for an op, dtype or property that the atlas does not have.
    """
    _checked(op, dtype, property)
    rows = recorded(machine, out)
    found = rows[(rows.op == op) & (rows.dtype == dtype) & (rows.property == property)]
    return found.verdict.iloc[0] if len(found) else "not recorded"


def test(op: str | Case, dtype: str, property: str, device=None, trials: int = 20) -> dict:
    """Measure one cell here and now: a dict of atlas.csv's columns.

    `same` rests on at least `trials` comparisons; `varies` was seen again when measured again: the same seeds, inputs
    made anew.
    ValueError for an op, dtype or property there is not. What the op itself raises becomes its verdict.
    """
    case = _checked(op, dtype, property)
    device = torch.device(device or runtime.device())
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    found, tally = _outcome(case, DTYPES[dtype], property, device, trials)
    return {"op": case.name, "dtype": dtype, "shape": case.size(device), "property": property, "verdict": found,
            **tally.columns(), "recorded_at": records.now(), "source": source()}


def _checked(op, dtype, property) -> Case:
    case = op if isinstance(op, Case) else next((c for c in CASES if c.name == op), None)
    if case is None:
        raise ValueError(f"op must be one of {', '.join(names())}, got {op!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if property not in PROPERTIES:
        raise ValueError(f"property must be one of {', '.join(PROPERTIES)}, got {property!r}")
    return case


def source() -> str:
    """The code that decides a row: this file, the cases and what they import."""
    return provenance.source(__file__, inspect.getfile(Case))


# --- one cell


class _Tally:
    """What the comparisons of one cell found."""

    def __init__(self):
        self.trials = self.elements = self.differ = self.largest = 0
        self.patterns = defaultdict(set)  # row -> digests of the results it had, once they differed

    def compare(self, expected, got, rows: Sequence = ("all",), seed: int = 0) -> bool:
        """One trial: whether it moved. `rows` names the rows of the results' first dimension, by default one piece."""
        whole = len(rows) == 1 and rows[0] == "all"
        expected, got = (tuple(x[None] if whole else x for x in bits._each(value)) for value in (expected, got))
        self.trials += 1
        if all(map(_same_memory, expected, got)):  # quicker than counting, and the usual case
            self.elements += sum(x.numel() for x in got)
            return False
        moved_rows = torch.zeros(len(rows), dtype=torch.bool)
        for a, b in zip(expected, got, strict=True):
            moved = bits._moved(a, b)
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
    """Whether two tensors hold the same bytes; two different NaN may still be the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().view(bits._VIEWS[x.element_size()]) for x in (a, b)))


def _outcome(case: Case, dtype, property, device, trials) -> tuple[str, _Tally]:
    """The verdict and the tally behind it."""
    if not _applies(case, property, device):
        return "not applicable", _Tally()
    if property in case.lacks:
        return f"not here: {case.lacks[property]}", _Tally()
    try:
        tally = _measured(case, dtype, property, device, trials)
        if not tally.differ:
            return "same", tally
        if any(_measured(case, dtype, property, device, trials).differ for _ in range(SECOND_LOOKS)):
            return "varies", tally
        return f"error: bits moved once and not in {SECOND_LOOKS} further measurements", tally
    except Exception as error:  # noqa: BLE001 - an op that fails is a row that says so
        return _failure(error), _Tally()


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
def _measured(case: Case, dtype, property, device, trials) -> _Tally:
    tally = _Tally()
    _MEASURES[property](case, dtype, device, tally, trials)
    if tally.trials < trials:
        raise RuntimeError(f"{case.name}, {property}: {tally.trials} comparisons are too few")
    return tally


def _seeds(tally: _Tally, trials: int) -> Iterator[int]:
    """Seeds until there were enough comparisons, over more than one input."""
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
    """Twice the trials asked for, ten times on a GPU: there some ops move in one run of hundreds.

    An op that moves in most of its runs is believed sooner.
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
        every = torch.arange(_batch_size(case, arguments))
        for start in (0,) if case.few else sorted({0, len(every) // 3, len(every) - 1}):
            order = every.roll(-start)
            first = _some(case, arguments, order.to(device))
            whole = bits._each(case.call(*first))
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
        whole = bits._each(case.call(*arguments))
        every = torch.arange(_batch_size(case, arguments))
        moved = [every.roll(n) for n in (1, 2, 3, 5, 7, 8, 13, len(every) // 2) if n < len(every)]
        for rows in (every.flip(0), *moved, every[:1].expand(len(every)), every[-1:].expand(len(every))):
            got = case.call(*_some(case, arguments, rows.to(device)))
            tally.compare(tuple(x[rows.to(x.device)] for x in whole), got, rows.tolist(), seed)


def _neighbours(case, dtype, device, tally, trials):
    """Some rows kept where they are, the others replaced: by other values, zeros (padding), huge ones, NaN."""
    for seed in _seeds(tally, trials):
        arguments = case.inputs(dtype, device, seed)
        whole = bits._each(case.call(*arguments))
        batch = _batch_size(case, arguments)
        every = torch.arange(batch)
        for content in case.contents:
            others = case.inputs(dtype, device, seed + 100, content)
            for kept in (every == 0, every == batch - 1, every % 2 == 0, every < batch // 2):
                mixed = [_mixed(a, b, kept.to(device)) if i in case.per_row else a
                         for i, (a, b) in enumerate(zip(arguments, others, strict=True))]
                got = bits._each(case.call(*mixed))
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
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call(*arguments)
    except RuntimeError as error:
        raise runtime.Unavailable(f"cannot be captured: {str(error).splitlines()[0]}") from None
    return result, graph


_MEASURES = {"run": _run, "batch": _batch, "position": _position, "neighbours": _neighbours, "query": _query,
             "threads": _threads, "graph": _graph}


# --- all cells


def cells(ops: Sequence[str] = (), dtypes: Sequence[str] = RECORDED_DTYPES,
          properties: Sequence[str] = PROPERTIES) -> list[tuple[str, str, str]]:
    """(op, dtype, property) of every cell asked for. ValueError for a name there is not.

    Graphs come last: a capture that fails may leave PyTorch's allocator unfit for the next one.
    """
    wanted = [(o, d, p) for o in ops or names() for d in dtypes for p in properties]
    for cell in wanted:
        _checked(*cell)
    return sorted(wanted, key=lambda cell: cell[2] == "graph")


def atlas(wanted: Sequence[tuple[str, str, str]], done: pd.DataFrame | None = None, device=None, trials: int = 20,
          progress: bool = True) -> Iterator[dict]:
    """Yield a row for each wanted cell that `done` does not hold for this source and size, with as many trials."""
    device = torch.device(device or runtime.device())
    todo = [cell for cell in wanted if cell not in _have(done, device, trials)]
    bar = tqdm(todo, desc="atlas", disable=not progress, file=sys.stderr)
    for cell in bar:
        bar.set_postfix_str(" ".join(cell))
        yield test(*cell, device=device, trials=trials)


def _have(done, device, trials) -> set:
    """Cells recorded by these very files at this size; a row that rests on too few trials, or on an error, is none."""
    if done is None or not len(done):
        return set()
    sizes = {case.name: case.size(device) for case in CASES}
    good = done[(done.source.isin(provenance.known_as(source()))) & (done["shape"] == done.op.map(sizes))
                & ~done.verdict.str.startswith("error") & ((done.trials >= trials) | (done.trials == 0))]
    return set(good[["op", "dtype", "property"]].itertuples(index=False, name=None))


def record(folder, wanted, done=None, trials: int = 20, progress: bool = True) -> int:
    """Measure and write the rows of each op and dtype as they are finished; how many there were."""
    count = 0
    rows = atlas(wanted, done, trials=trials, progress=progress)
    for _, group in itertools.groupby(rows, key=lambda row: (row["op"], row["dtype"])):
        kept: list[dict] = []
        try:
            kept.extend(group)
        finally:  # an interrupted group keeps what it has
            if kept:
                ATLAS.merge(folder, kept)
                count += len(kept)
    return count


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels atlas", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=[], help="such as mm softmax (default: all)")
    parser.add_argument("--dtypes", nargs="+", default=list(RECORDED_DTYPES), choices=list(DTYPES))
    parser.add_argument("--properties", nargs="+", default=list(PROPERTIES), choices=PROPERTIES)
    parser.add_argument("--trials", type=int, default=20, help="comparisons that a cell needs at least")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure cells that are recorded already")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a = _arguments(argv)
    try:
        wanted = cells(a.ops, a.dtypes, a.properties)
        folder = records.open_machine(a.out, a.machine)
        done = None if a.again else ATLAS.read(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records.note_machine(folder, ATLAS.file)
    try:
        count = record(folder, wanted, done, a.trials)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} cells measured, {len(wanted) - count} were recorded already, in {folder / ATLAS.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
