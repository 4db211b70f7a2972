"""Draw every figure, or those that are named, as SVG and PNG, write README's numbers and draw the handout.

    python -m figures                    ours, from data/, into figures/
    python -m figures --check            say which of them would come out otherwise
    python -m figures --machine NAME     another machine of data/, such as your own, into figures/NAME/
    python -m figures --size single      for a paper's single column (3.5 in), into figures/single/; double is two
                                         columns (7.2 in), slide a slide of 16:9 (13.3 by 7.5 in)

The letters fit the size: 4 to 8 points on paper, 8 to 19 on a slide. On paper and on a slide the atlas counts the ops
that never moved in one line, and on a slide those of every group; the screen's has a line for each.

A record that is not complete is drawn as far as it goes; what is left out is said.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import FOLDER, names, render


def main(argv=None) -> int:
    from kernels.lab.command import in_one_line

    return in_one_line(lambda: _run(argv))


def _run(argv) -> int:
    from .page import PAGES

    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(names())} (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file's bytes would change")
    parser.add_argument("--machine", help="whose record to draw: a folder's name under data/ (default: ours)")
    parser.add_argument("--data", type=Path, help="the data folder (default: data)")
    parser.add_argument("--size", choices=PAGES, default="screen", help="what to draw for (default: screen)")
    parser.add_argument("--out", type=Path,
                        help="the folder to draw into (default: figures, with a machine's name and the size)")
    a = parser.parse_args(argv)
    if unknown := [name for name in a.name if name not in names()]:
        print(f"error: figure must be one of {', '.join(names())}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    of = {key: value for key, value in (("data", a.data), ("machine", a.machine)) if value is not None}
    if a.data and not a.data.is_dir():
        print(f"error: --data must be a folder with recorded machines in it, got {a.data}", file=sys.stderr)
        return 2
    sized = a.size != "screen"
    out = a.out or (FOLDER / (a.machine or a.data.resolve().name) if of else FOLDER) / (a.size if sized else "")
    left = {name: _draw(name, of | {"size": a.size}, out, a.check) for name in a.name or names()}
    if not (of or a.name or a.out or sized):
        left["README.md"] = _write_readme(a.check)
        left["handout"] = _write_handout(a.check)
    excused = of and not a.name and set(left.values()) - {None}  # a record need not have everything
    return int(None in left.values() and not excused or a.check and "changed" in left.values())


def _draw(name, of, out, check) -> str | None:
    """'changed' or 'as it was'; None, with a line that says why, for a figure that cannot be drawn."""
    try:
        files = render(name, **of)
    except (ValueError, FileNotFoundError) as error:
        own = set(of) == {"size"}  # ours has everything
        print(f"{'error' if own else 'not drawn'}: {name}: {error}", file=sys.stderr)
        return None
    changed = [kind for kind, content in files.items() if not _same(out / f"{name}.{kind}", content)]
    for kind in () if check else changed:
        from kernels.lab import records

        records.write_atomic(records.made(out) / f"{name}.{kind}", files[kind])
    word = "changed" if changed else "as it was"
    print(f"{name}: {word}")
    return word


def _write_readme(check) -> str:
    """'changed' or 'as it was'; README's numbers and the words of its figures are drawn like the figures."""
    from kernels.lab import records

    from . import readme

    text = readme.README.read_text(encoding="utf-8")
    made = readme.written(text)
    if made != text and not check:
        records.write_atomic(readme.README, made)
    word = "changed" if made != text else "as it was"
    print(f"README.md: {word}")
    return word


def _write_handout(check) -> str:
    from . import handout

    return handout.write(check=check)


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a figure opens no window, whatever the reader draws with elsewhere
    try:
        sys.exit(main())
    except ImportError as error:  # another `kernels` stands before ours
        sys.exit(f"error: {error}")
