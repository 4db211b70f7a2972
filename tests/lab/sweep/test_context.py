"""The context of a sweep's shape, and the slider that sets it."""
from __future__ import annotations

import pytest

from kernels.lab.sweep import TokenSweep, context

SHAPE = "H=32,KV=8,D=128,context=4096"


@pytest.mark.parametrize(("shape", "found"), [
    (SHAPE, 4096), ("D=8192,residual", None), ("context", None), ("?!", None)])
def test_a_shape_names_its_context_or_none(shape, found):
    assert context.of(shape) == found


def test_contexts_are_offered_in_order_with_the_one_set_now():
    assert context.offered("H=1,context=77", [SHAPE, SHAPE, "D=4", "H=2,context=512"]) == [77, 512, 4096]
    assert context.offered("D=4", [SHAPE]) == []


def test_a_context_is_replaced_and_nothing_else():
    assert context.replaced(SHAPE, 8) == "H=32,KV=8,D=128,context=8"
    with pytest.raises(ValueError, match="shape must name a context, .* got 'D=4'"):
        context.replaced("D=4", 8)


def test_the_recorded_experiment_that_differs_in_nothing_else_comes_first():
    experiments = {"a": ("bfloat16", "H=8,context=1", "cold"), "b": ("bfloat16", "H=8,context=2", "call"),
                   "c": ("bfloat16", "H=8,context=2", "cold"), "d": ("bfloat16", "D=2", "cold")}
    assert context.recorded(experiments, "a", 2) == "c"
    assert context.recorded(experiments, "none", 2) == context.recorded(experiments, "d", 2) == "b"
    assert context.recorded(experiments, "a", 3) is None


@pytest.fixture(scope="module")
def widget():
    return TokenSweep("attention_decode", "h200")


def test_the_slider_moves_the_shape_and_the_recorded_chart(widget):
    before = widget.chart.value
    assert {1024, 4096, 8192, 65536} <= set(widget.context.options)
    for length in (8192, 1024):
        widget.context.value = length
        assert context.of(widget.shape.value) == length and widget.shape.value.startswith("H=")
        assert f"context={length} · " in widget.recording.value
        assert set(widget.recorded["shape"].map(context.of)) == {length}
    assert widget.chart.value != before


def test_the_slider_follows_the_shape_and_is_gone_where_there_is_no_context(widget):
    recorded = widget.recording.value
    widget.shape.value = "H=2,KV=1,D=16,context=77"
    assert widget.context.value == 77 and 77 in widget.context.options and widget.recording.value == recorded
    widget.shape.value = "no shape"
    assert widget.context.layout.display == "none"
    widget.op.value = "softmax"
    assert widget.context.layout.display == "none" and widget.context.options == (0,)
    widget.op.value = "attention_chunk"
    assert widget.context.layout.display is None and 8192 in widget.context.options
