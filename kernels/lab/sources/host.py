"""What moves bits between two CPUs, or two settings of one: threads, vector units, versions of PyTorch.

    python -m kernels host             print the digests of DEFAULTS on this CPU as JSON, with one thread
    python -m kernels host --record    write them to data/<machine>/host_digests.csv
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from ... import bits, rms_norm
from .. import provenance, records

# PyTorch's CPU defaults whose bits are worth following from machine to machine, and one specification
DEFAULTS: dict[str, Callable] = {
    "mm": lambda x: x @ x.t(),
    "mm, one row": lambda x: x[:1] @ x.t(),
    "mm, bfloat16": lambda x: x.bfloat16() @ x.bfloat16().t(),
    "sum": lambda x: x.sum(-1),
    "exp": torch.exp,
    "silu": F.silu,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "conv1d": lambda x: F.conv1d(x[None, :32], x[32:, :160].reshape(16, 32, 5)),
    "attention": lambda x: F.scaled_dot_product_attention(*x.view(3, 1, 1, -1, 64)[..., :300, :]),
    "randn": lambda x: torch.randn(x.shape, dtype=torch.float32, device="cpu",
                                    generator=torch.Generator("cpu").manual_seed(0)),
    "rms_norm.python (ours)": lambda x: rms_norm.python(x, torch.ones(x.shape[-1], dtype=torch.float32, device="cpu")),
}
HOST_DIGESTS = records.Table("host_digests.csv", ("op", "torch", "capability", "digest", "recorded_at", "source"),
                             ("op", "torch", "capability"))
SPECIFICATION = "rms_norm.python (ours)"
# setting -> environment variables that say which instructions PyTorch and the libraries below it may use
VECTOR_UNITS = {
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
             "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "as it comes": {},
}


@contextmanager
def threads(count: int):
    """torch.set_num_threads inside a with-block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_threads(function: Callable, counts: Iterable[int] = (1, 2, 3, 4)) -> dict[int, torch.Tensor]:
    """What a function without arguments returns, by the number of CPU threads."""
    found = {}
    for count in counts:
        with threads(count):
            found[count] = function()
    return found


def digests() -> dict[str, str]:
    """The digest of each of DEFAULTS on this CPU as it is set up now, with one thread."""
    x = bits.portable(48, 4096)
    with threads(1):
        return {name: bits.digest(function(x)) for name, function in DEFAULTS.items()}


def elsewhere(settings: Mapping[str, str]) -> dict[str, str]:
    """`digests` in a fresh process with these environment variables. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "kernels", "host"]
    done = subprocess.run(command, cwd=records.ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
                          timeout=120)
    if done.returncode:
        raise RuntimeError(f"{settings}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def by_vector_unit() -> pd.DataFrame:
    """One row an op of DEFAULTS, one column a setting of VECTOR_UNITS: the first 8 digits of the digest.

    A CPU without these instructions uses the nearest that it has, and then columns are alike.
    """
    return pd.DataFrame({name: elsewhere(settings) for name, settings in VECTOR_UNITS.items()}).map(lambda d: d[:8])


def by_version(machine: str = "cpu-avx512", out=records.DATA) -> pd.DataFrame:
    """One row an op of DEFAULTS, one column a recorded version of PyTorch: the first 8 digits of the digest.

    Reads `machine` and its folders for other versions (cpu-avx512-2, ...) that name the same device.
    Raises FileNotFoundError if there is no such record.
    """
    def device(name):
        return records.read_machine(Path(out) / name).get("device")

    family = re.compile(rf"{re.escape(machine)}(-\d+)?")
    recorded = [name for name in records.machines(HOST_DIGESTS.file, out) if family.fullmatch(name)]
    alike = [name for name in recorded if device(name) == device(machine)]
    if not alike:
        raise FileNotFoundError(f"no {HOST_DIGESTS.file} is recorded for {machine} in {out}")
    rows = pd.concat([records.load(HOST_DIGESTS, name, out) for name in alike], ignore_index=True)
    version = rows.torch.str.partition("+")[0]
    oldest_first = sorted(set(version), key=lambda text: [int(n) for n in text.split(".")[:2]])
    table = rows.assign(digest=rows.digest.str[:8], torch=version).pivot(index="op", columns="torch", values="digest")
    return table.loc[list(DEFAULTS), oldest_first]


def record(out=records.DATA) -> str:
    """Write this CPU's digests into its folder under `out`; returns the folder's name."""
    folder = records.open_machine(out)
    capability = torch.backends.cpu.get_cpu_capability()
    HOST_DIGESTS.merge(folder, [
        {"op": op, "torch": torch.__version__, "capability": capability, "digest": digest,
         "recorded_at": records.now(), "source": provenance.source(__file__)} for op, digest in digests().items()])
    records.note_machine(folder, HOST_DIGESTS.file)
    return folder.name


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels host", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write them instead of printing them")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    a = parser.parse_args(argv)
    print(record(a.out) if a.record else json.dumps(digests()))


if __name__ == "__main__":
    main()
