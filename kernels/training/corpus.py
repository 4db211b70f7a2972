"""The text that the byte model learns: the Python standard library's own source, as the Python that runs has it.

Files are taken in the order of their paths; before each stands one zero byte, which begins a text. What is left out:
tests, packages that were installed, files that name the machine, and encodings and pydoc_data, which are tables. Every
tenth file is held out: no window of the training text touches it.
"""
from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data",
                      "lib2to3", "__pycache__"})
BEGIN = b"\0"
HELD_OUT_EACH, HELD_OUT_FIRST = 10, 5  # files
PIECES, PIECE = 16, 4096  # of held-out text: pieces of one file each, and bytes a piece


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text that is held out, and what they were made of.

    sha256    of the training text, and held_out_sha256 of all held-out text
    excerpt   64 KiB of held-out text for scores, PIECES pieces that begin with whole lines
    licence   what its LICENSE.txt says, None where there is none
    """

    python: str
    files: int
    text: bytes
    sha256: str
    held_out_files: int
    held_out_sha256: str
    excerpt: bytes
    licence: bytes | None = None


def gather(folder: str | Path | None = None, version: str | None = None) -> Corpus:
    """The standard library in `folder` and its CPython's version, by default the running Python's.

    Raises FileNotFoundError where there is none, ValueError for a folder without a version, or a library that is too
    small to hold text out.
    """
    if (folder is None) != (version is None):
        raise ValueError(f"a folder of another Python's library needs its version, such as 3.11.7, and a version its "
                         f"folder; got {folder} and {version}")
    folder, version = Path(folder or sysconfig.get_paths()["stdlib"]), version or platform.python_version()
    files = _files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no Python source: is this Python installed without its library?")
    kept = [file for i, file in enumerate(files) if i % HELD_OUT_EACH != HELD_OUT_FIRST]
    held = [file for i, file in enumerate(files) if i % HELD_OUT_EACH == HELD_OUT_FIRST]
    text, other, licence = _joined(kept), _joined(held), folder / "LICENSE.txt"
    return Corpus(version, len(kept), text, hashlib.sha256(text).hexdigest(), len(held),
                  hashlib.sha256(other).hexdigest(), _excerpt(folder, held),
                  licence.read_bytes() if licence.is_file() else None)


def _files(folder: Path) -> list[Path]:
    """The source files, in the order of their paths as bytes."""
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    return [named[name] for name in sorted(named, key=str.encode) if _is_ours(Path(name))]


def _is_ours(path: Path) -> bool:
    machine = path.name.startswith("_sysconfigdata") or path.parts[0].startswith("config-")
    return not machine and not LEFT_OUT & set(path.parts)


def _joined(files: list[Path]) -> bytes:
    return b"".join(BEGIN + file.read_bytes() for file in files)


def _excerpt(folder: Path, held: list[Path]) -> bytes:
    """PIECES pieces from the middles of as many held-out files, evenly spread over those that are long enough."""
    long = [text for file in held if len(text := file.read_bytes()) >= 2 * PIECE]
    if len(long) < PIECES:
        raise ValueError(f"{folder} must hold {PIECES} held-out files of {2 * PIECE} bytes or more, has {len(long)}")
    return b"".join(_middle(long[i * len(long) // PIECES]) for i in range(PIECES))


def _middle(text: bytes) -> bytes:
    """PIECE bytes around the middle, from the begin of a line if one begins in the quarter before."""
    start = (len(text) - PIECE) // 2
    line = text.rfind(b"\n", start - PIECE // 4, start) + 1 or start
    return text[line : line + PIECE]


def windows(text: bytes, length: int, count: int) -> list[bytes]:
    """The first `count` pieces of `length` bytes, one after another. ValueError if there are not as many."""
    if count * length > len(text):
        raise ValueError(f"scored windows must fit in {len(text)} bytes of held-out text, got {count} of {length}")
    return [text[i * length : (i + 1) * length] for i in range(count)]
