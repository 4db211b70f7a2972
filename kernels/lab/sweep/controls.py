"""The controls that say what a sweep measures."""
from __future__ import annotations

from collections.abc import Iterable

import ipywidgets as w
import torch

from ... import OPS, runtime
from ...op import DTYPES, Op
from .. import bench
from ..widgets import parts
from . import context as contexts
from .shapes import first_dtype, first_shape, shape_for


class Contenders(w.HBox):
    """A box for each contender of an op; `boxes` holds them by name."""

    def __init__(self):
        super().__init__(layout=w.Layout(flex_flow="row wrap", grid_gap="0 18px"))
        self.boxes: dict[str, w.Checkbox] = {}

    def offer(self, op: Op):
        split_shows_bits_moving = not runtime.HAS_GPU
        chosen = {"cuda", "python", "triton"} | ({"split"} if split_shows_bits_moving else set())
        self.boxes = {
            name: w.Checkbox(description=name, value=name in chosen, indent=False, layout=w.Layout(width="auto"))
            for name in op.implementations}
        self.children = tuple(self.boxes.values())

    def chosen(self) -> list[str]:
        """The names that are ticked. ValueError if none is."""
        names = [name for name, box in self.boxes.items() if box.value]
        if not names:
            raise ValueError("choose at least one contender")
        return names


class ContextSlider(w.SelectionSlider):
    """The context of a shape; hidden where the shape has none. `offering` while its places change, not its reader."""

    def __init__(self):
        super().__init__(description="Context", options=[0], continuous_update=False, **parts.LABELLED)
        self.offering = False

    def offer(self, shape: str, others: Iterable[str]):
        """The slider's places: the contexts of this shape, where it stands, and of the others."""
        found = contexts.offered(shape, others)
        self.offering = True
        self.options = found or [0]
        self.value = contexts.of(shape) or self.options[0]
        self.layout.display = None if found else "none"
        self.offering = False


class Controls:
    """An op, its dtype, shape and context, the clock, the token counts and the contenders."""

    def __init__(self, op: Op, device: torch.device):
        labelled, shape, clocks = parts.LABELLED, first_shape(op), bench.clocks(device)
        counts = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096) if runtime.HAS_GPU else (1, 2, 4, 8, 16, 32)
        self.op = w.Dropdown(description="Op", options=list(OPS), value=op.name, **labelled)
        self.dtype = w.Dropdown(description="Dtype", options=list(DTYPES), value=first_dtype(op), **labelled)
        self.shape = w.Combobox(description="Shape", value=shape, options=sorted({shape, *op.shapes}),
                                continuous_update=False, placeholder=op.shapes[0], **labelled)
        self.context = ContextSlider()
        self.clock = w.Dropdown(description="Clock", options=clocks, **labelled)
        self.tokens = w.Text(description="Token counts", value=" ".join(map(str, counts)),
                             continuous_update=False, **labelled)
        self.contenders = Contenders()
        self.contenders.offer(op)

    def panel(self, notes: dict[str, w.Widget], run_line: w.Widget) -> w.VBox:
        """The controls, laid out with a note beside those that can be wrong."""
        parts.widths({self.op: "170px", self.dtype: "170px", self.shape: "260px", self.clock: "150px",
                      self.context: "420px", self.tokens: "auto"})
        self.tokens.layout.flex = "1 1 auto"
        return parts.panel(parts.line(self.op, self.dtype, self.shape, notes["shape"], self.clock),
                           parts.line(self.context), parts.line(self.tokens, notes["tokens"]),
                           parts.line(w.Label("Contenders"), self.contenders, notes["contenders"]), run_line)

    def offer(self, op: Op):
        """Another op's shapes, dtype and contenders."""
        shape = first_shape(op)
        self.shape.options, self.shape.value = sorted({shape, *op.shapes}), shape
        if not runtime.HAS_GPU:
            self.dtype.value = first_dtype(op)
        self.contenders.offer(op)

    def experiment(self) -> tuple[str, str, str]:
        """The dtype, shape and clock, as recorded rows have them."""
        return self.dtype.value, self.shape.value, self.clock.value

    def options(self, op: Op) -> dict:
        """What is asked for beside the op, in the words of sweep.Sweep. ValueError says which control is wrong."""
        return {"tokens": parts.whole_numbers(self.tokens.value), "implementations": self.contenders.chosen(),
                "dtypes": [self.dtype.value], "shapes": [shape_for(op, self.shape.value)],
                "clocks": [self.clock.value]}
