"""What the notebooks' cells call: begin, check, observe, show, show_texts and show_source."""
from __future__ import annotations

import ast
import base64
import html
import inspect
import io
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch

from ... import bits, runtime
from .. import records, style


def begin() -> None:
    """Say in one line where this runs, set the figures' and the page's theme and seed torch."""
    style.theme()
    torch.manual_seed(0)
    print(_where())
    _theme_page()


# Long lines of shown code scroll, where JupyterLab would break them inside words; folded solutions have room below.
_PAGE = """<style>
.jp-RenderedMarkdown.jp-RenderedMarkdown pre, .jp-RenderedMarkdown.jp-RenderedMarkdown pre code {
  white-space: pre; word-break: normal; overflow-wrap: normal; overflow-x: auto }
.jp-RenderedMarkdown details { margin-bottom: 1.5em }
</style>"""


def _theme_page() -> None:
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is not None:
        display({"text/html": _PAGE, "text/plain": ""}, raw=True)


def _where() -> str:
    recorded = _recorded_machine()
    if runtime.where() == "LIVE":
        return f"LIVE {records.device_name()}"
    if runtime.where() == "INTERPRETER":
        return "INTERPRETER on CPU" + (f" + recorded {recorded}" if recorded else "")
    return f"RECORDED {recorded}".strip() + f" ({runtime.WHY_NOT})"


def _recorded_machine() -> str:
    """The machine whose records charts open on, such as H200; '' where data/ has none."""
    for name in records.machines()[:1]:
        return records.read_machine(records.DATA / name).get("device", name).removeprefix("NVIDIA ")
    return ""


def show(figure, alt: str) -> None:
    """Display a matplotlib figure once, as PNG with `alt` as its text alternative, and close it.

    JupyterLab drops an image's alternative text, so the words are also below the figure, folded.
    Raises ValueError where `alt` is empty.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt must say in words what the figure shows, got {alt!r}")
    alt = " ".join(alt.split())
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    plt.close(figure)
    width = round(figure.get_figwidth() * figure.get_dpi())  # savefig.dpi is finer, for sharp screens
    display({"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt}, raw=True,
            metadata={"image/png": {"alt": alt, "width": width}})
    words = f"<details><summary>This figure in words</summary>{html.escape(alt)}</details>"
    display({"text/html": words}, raw=True)


def show_texts(texts: Mapping[str, str]) -> None:
    """Display named texts below each other; the first letter in which one differs from the first text is marked.

    A sentence says where each differs, so that the mark is not the only sign. Raises ValueError without a text.
    """
    from IPython.display import display

    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    (first, text), *_ = texts.items()
    width, lines, plain, said = max(map(len, texts)), [], [], []
    for name, other in texts.items():
        at = _first_difference(text, other)
        head, letter, rest = (other, "", "") if at is None else (other[:at], other[at : at + 1], other[at + 1 :])
        lines.append(html.escape(f"{name:{width}}  {head}") + _marked(letter) + html.escape(rest))
        plain += [f"{name:{width}}  {other}"] + ([" " * (width + 2 + at) + "^"] if at is not None else [])
        if at is not None:
            said.append(f"{name} differs from {first} first at letter {at + 1}.")
    words = " ".join(said) or "All texts are the same."
    display({"text/html": '<pre style="line-height:1.6">' + "\n".join(lines) + f"</pre><p>{html.escape(words)}</p>",
             "text/plain": "\n".join([*plain, words])}, raw=True)


def _first_difference(one: str, other: str) -> int | None:
    if one == other:
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _marked(letter: str) -> str:
    """A letter on the colour of moved bits, which is readable on light and on dark pages, bold and underlined."""
    _, fill, ink = style.MOVED
    look = f"background:{fill};color:{ink};font-weight:bold;text-decoration:underline;padding:0 2px"
    return f'<mark style="{look}">{html.escape(letter)}</mark>' if letter else ""


def check(claim: str, condition, absent: str = "") -> None:
    """Print a tick and the claim, or raise AssertionError that says what differs.

    `condition` is a bool, a tensor or NumPy value of one element, or a Report of bits.check_invariance. `absent` says
    why this machine cannot try it; then a circle and the start of that are printed in place of a tick.
    """
    if absent:
        print(f"○ {claim}: not here ({re.split('[:(]', absent)[0].strip()})")
        return
    evidence = f": {condition}" if isinstance(condition, bits.Report) else ""
    if not _truth(condition):
        raise AssertionError(f"✗ {claim}{evidence or ': that is not so here'}")
    print(f"✓ {claim}{evidence}")


def _truth(condition) -> bool:
    if isinstance(condition, (bool, bits.Report)):
        return bool(condition)
    if getattr(condition, "dtype", None) in (torch.bool, bool) and getattr(condition, "ndim", 0) == 0:
        return bool(condition)
    raise TypeError(f"a check needs one yes or no, got {type(condition).__name__} {condition!r}")


def observe(what: str, value, recorded=None, cpu: bool = False) -> None:
    """Print what this machine happens to do, beside what the recorded machines did.

    `recorded` is the recorded machine's value, or a mapping from machine names to values. `cpu`: this machine's CPU did
    it, though there may be a GPU.
    """
    if recorded is not None and not isinstance(recorded, Mapping):
        recorded = {_recorded_machine() or "the recorded machine": recorded}
    here = records.device_name() if runtime.HAS_GPU and not cpu else "this CPU"
    both = [(here, value), *(recorded or {}).items()]
    print(f"• {what}: " + "; ".join(f"{printed(v)} on {machine}" for machine, v in both))


def printed(value) -> str:
    """A value as `observe` prints it: yes or no, three digits of a float, else its own text."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_source(thing, without_docstring: bool = False) -> None:
    """Display the source of a function, an op's implementation or a Triton kernel, highlighted.

    Works for compiled and interpreted kernels alike, and for a stand-in where there is no Triton.
    """
    from IPython.display import display

    function = _function(getattr(thing, "shows", thing))
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    source = _drop_docstring(source) if without_docstring else source
    file = Path(inspect.getsourcefile(function))
    title = f"*{file.relative_to(records.ROOT).as_posix()}*\n\n" if file.is_relative_to(records.ROOT) else ""
    display({"text/markdown": f"{title}```python\n{source}\n```", "text/plain": source}, raw=True)


def _function(thing):
    """The plain Python function inside a Triton kernel, a partial or a decorated function."""
    while not inspect.isfunction(thing):
        inner = getattr(thing, "fn", None) or getattr(thing, "func", None) or getattr(thing, "_init_fn", None)
        if inner is None:
            raise TypeError(f"show_source needs a function or a kernel, got {type(thing).__name__} {thing!r}")
        thing = inner
    return inspect.unwrap(thing)


def _drop_docstring(source: str) -> str:
    body = ast.parse(source).body[0].body
    if len(body) < 2 or ast.get_docstring(ast.parse(source).body[0]) is None:
        return source
    lines = source.splitlines()
    return "\n".join(lines[: body[0].lineno - 1] + lines[body[0].end_lineno :])
