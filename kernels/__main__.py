"""The table of ops, or one of the suite's commands.

    python -m kernels                    the ops, their orders and files
    python -m kernels VERB --help        what a command does and takes

What a reader can mend is told in one line; `python -X dev -m kernels VERB ...` shows the traceback.
"""
from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path

from .lab.command import in_one_line

VERBS = {
    "record": ("recorder", "measure this machine: every op, at sizes that it can do"),
    "sweep": ("sweep.measure", "time and bits of an op over token counts"),
    "tune": ("tuning.tune", "find this GPU's fastest schedules of the matrix product"),
    "unseen": ("tuning.unseen", "time products of weights that no table holds, as their schedules are chosen"),
    "digests": ("proofs.digests", "record what bits ops have, or redo what is recorded (--check)"),
    "verify": ("proofs.model", "redo a GPU's digests of a whole model, layer by layer, or record them (--record)"),
    "certificates": ("proofs.certificates", "prove this GPU's stored schedules of the matrix product again"),
    "products": ("proofs.products", "compute random products in random schedules, and count bits that move"),
    "attention": ("proofs.attention", "compute random sequences in seven ways, and count bits that move"),
    "tensor-core": ("proofs.tensor_core", "compare this GPU's tensor cores with their model"),
    "code": ("proofs.generated_code", "compile an op's schedules ahead of time and count instructions"),
    "atlas": ("atlas.measure", "test PyTorch's own ops for what moves their bits"),
    "window": ("window.measure", "time one forward of a model over a window of tokens"),
    "rollbacks": ("verifying.measure", "serve verified requests: how many tokens are decoded again?"),
    "mix": ("verifying.explore", "time loose, verified and invariant requests together"),
    "load": ("load", "serve random requests with faults: is a page lost, does an answer change?"),
    "parallel": ("parallel.measure", "by torchrun: one model on several GPUs or processes, its digest and its time"),
    "mode": ("moving.cost", "time a model of transformers under batch_invariant(), and without it"),
    "answers": ("serving.recorded", "ask a server for one prompt a thousand times, and count answers"),
    "serving": ("serving.speed", "time decoding and prefill of a model, and a server under random arrivals"),
    "train": ("train", "train the byte model on the standard library's own source"),
    "sources": ("sources.claims", "run notebook 02 and record what it saw"),
    "host": ("sources.host", "digests of PyTorch's CPU defaults"),
    "notebooks": ("notebook.run", "run, clean or check the notebooks"),
    "teaching": ("site.teaching", "time the cells of a path through the notebooks, section by section"),
    "student": ("site.student", "copy the notebooks without solutions, for a class"),
    "slides": ("site.slides", "make decks of slides of the notebooks"),
    "site": ("site.build", "build the static site"),
}


def table() -> str:
    """Each op with its order and the file where it is written."""
    from . import OPS

    root = Path(__file__).resolve().parents[1]
    files = [Path(inspect.getfile(inspect.unwrap(op.python))).relative_to(root).as_posix() for op in OPS.values()]
    rows = [(op.name, op.order, file) for op, file in zip(OPS.values(), files, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ops = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    verbs = "\n".join(f"  {verb:12} {what}" for verb, (_, what) in VERBS.items())
    return f"{ops}\n\npython -m kernels VERB ...\n{verbs}"


def main(argv=None) -> int:
    return in_one_line(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(table())
        return 0
    if argv[0] not in VERBS:
        print(f"error: the command must be one of {', '.join(VERBS)}, got {argv[0]!r}", file=sys.stderr)
        return 2
    return import_module(f".lab.{VERBS[argv[0]][0]}", __package__).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
