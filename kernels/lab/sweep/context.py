"""The second control of a sweep: how many tokens stand before those that a call computes, `context=` in a shape."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...op import Shape


def of(shape: str) -> int | None:
    """The context that a shape names. None if it names none, or is no shape."""
    try:
        found = Shape.parse(shape).get("context")
    except ValueError:
        return None
    return None if found is True else found


def offered(now: str, shapes: Iterable[str]) -> list[int]:
    """The contexts of these shapes in rising order, the one set now among them; none where `now` names none."""
    if of(now) is None:
        return []
    return sorted({found for shape in (now, *shapes) if (found := of(shape)) is not None})


def replaced(shape: str, context: int) -> str:
    """The shape with another context. ValueError if it names none."""
    if of(shape) is None:
        raise ValueError(f"shape must name a context, such as 'H=32,KV=8,D=128,context=4096', got {shape!r}")
    return str(Shape(**{**Shape.parse(shape), "context": context}))


def recorded(experiments: Mapping[str, tuple[str, str, str]], chosen: str, context: int) -> str | None:
    """The label of a recorded experiment (dtype, shape, clock) with this context; None if there is none.

    Of several, the one that differs from `chosen` in nothing else comes first.
    """
    fits = [label for label, (_, shape, _) in experiments.items() if of(shape) == context]
    if chosen in experiments and of(experiments[chosen][1]) is not None:
        dtype, shape, clock = experiments[chosen]
        wanted = dtype, replaced(shape, context), clock
        fits.sort(key=lambda label: experiments[label] != wanted)
    return fits[0] if fits else None
