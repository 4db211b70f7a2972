"""The page that redoes a GPU's digests of RMSNorm in the reader's browser: proof.html and proof.js, and the records."""
from __future__ import annotations

import json
from pathlib import Path

from ...op import Shape
from ...ops.rms_norm import rms_norm
from .. import records
from ..proofs.digests import DIGESTS

HERE = Path(__file__).parent
FIRST = ("D=8192,residual", "float32")  # shown first: the published chart's shape; in float32 each swap shows
MOST_ELEMENTS = 1 << 21  # a telephone does as many in under two seconds
LEAST_WIDTH = 2049  # three chunks: two of them can be swapped without being the first two
DTYPES = ("bfloat16", "float32")  # those that proof.js rounds to

INTRODUCTION = """# A GPU's bits in your browser

An NVIDIA GPU computed RMSNorm of some hundred rows and recorded one number: the SHA-256 of all bits of the result.
Below, your browser makes the same inputs from whole numbers, adds in the same order, and takes the same SHA-256.
It uses plain JavaScript and fetches nothing.

"""
EXPLANATION = """
## What it does

1. **Inputs.** An integer hash of each place gives a whole number, and that times a power of two is the input
   (`kernels/bits.py`). No step rounds, so every machine has the same inputs.
2. **Sum.** Each element is squared in float32. The row is cut into chunks of 1024, which are added in sequence; then
   neighbours are added in pairs (`kernels/arithmetic/sums.py`). `Math.fround` rounds after each addition.
3. **The rest** is one product, one square root, one quotient and two products for each element, each rounded once
   (`kernels/ops/rms_norm.py`). For bfloat16 the result is then rounded to 8 significant bits.
4. **Digest.** SHA-256 of dtype, shape and bits, as `kernels.bits.digest` takes it.

The order of a sum is all that the two machines must agree about. Swap two chunks and the digest is another one, on
either machine. Swap the first two and it stays: `a + b` and `b + a` are one sum.

The digests come from `data/` when this page is built. `python -m kernels digests --check` redoes all of them in
PyTorch on a CPU.
"""


def recorded(data=records.DATA) -> list[dict]:
    """The digests that GPUs recorded and a browser can redo quickly, the one to show first first.

    ValueError where none is recorded under `data`.
    """
    found = []
    for machine in records.machines(DIGESTS.file, data):
        rows = DIGESTS.read(Path(data) / machine)
        rows = rows[(rows.op == rms_norm.name) & (rows.implementation == "triton") & (rows.input == "portable")
                    & rows.dtype.isin(DTYPES)]
        device = records.read_machine(Path(data) / machine).get("device", machine)
        found += [_record(row, machine, device) for row in rows.itertuples() if _fits(row)]
    if not found:
        raise ValueError(f"no GPU's digest of rms_norm that a browser can redo is recorded in {data}: "
                         "python -m kernels digests rms_norm")
    return sorted(found, key=lambda r: (r["shape"], r["dtype"]) != FIRST)


def _fits(row) -> bool:
    width = Shape.parse(row.shape)["D"]
    return width >= LEAST_WIDTH and int(row.rows) * width <= MOST_ELEMENTS


def _record(row, machine: str, device: str) -> dict:
    shape = Shape.parse(row.shape)
    residual = bool(shape.get("residual"))
    label = f"{row.rows} rows of {shape['D']}, {row.dtype}{', a residual added first' * residual} ({machine})"
    return {"label": label, "machine": machine, "device": device, "shape": row.shape, "rows": int(row.rows),
            "width": shape["D"], "residual": residual, "dtype": row.dtype, "seed": int(row.seed),
            "digest": row.digest, "recorded_at": row.recorded_at}


def page(data=records.DATA) -> str:
    """The page as MyST Markdown, with its script and the recorded digests inside."""
    known = json.dumps(recorded(data), indent=1).replace("</", "<\\/")
    parts = [(HERE / "proof.html").read_text(encoding="utf-8").rstrip(),
             f'<script type="application/json" id="proof-records">\n{known}\n</script>',
             f"<script>\n{(HERE / 'proof.js').read_text(encoding='utf-8').rstrip()}\n</script>"]
    raw = "\n".join(parts)
    return f"{INTRODUCTION}````{{raw}} html\n{raw}\n````\n{EXPLANATION}"
