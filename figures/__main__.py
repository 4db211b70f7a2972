"""python -m figures [NAME ...] [--check]: draw figures/<name>.svg and .png, or say which would come out otherwise."""
from __future__ import annotations

import argparse
import sys

from . import FOLDER, names, render


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(names())} (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file's bytes would change")
    arguments = parser.parse_args(argv)
    changed = []
    for name in arguments.name or names():
        try:
            files = render(name)
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
        for kind, content in files.items():
            path = FOLDER / f"{name}.{kind}"
            if not path.exists() or path.read_bytes() != content:
                changed.append(path.name)
                if not arguments.check:
                    path.write_bytes(content)
        print(f"{name}: {'as it was' if not any(c.startswith(name + '.') for c in changed) else 'changed'}")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
