"""`find_moving_ops` names the op that moves a row's bits, and nothing else; and leaves a model as it was."""
from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kernels import runtime
from kernels.bits import portable
from kernels.lab.moving import WAYS, examples, find_moving_ops, measure, moving_chart, moving_words
from kernels.mode import active, batch_invariant

DEVICE = runtime.device()


class Planted(nn.Module):
    """A module that depends on the batch, among others that do not."""

    def __init__(self, what):
        super().__init__()
        self.before, self.planted, self.after = nn.ReLU(), What(what), nn.Tanh()

    def forward(self, x):
        return self.after(self.planted(self.before(x)))


class What(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


def rows(count=4, width=16):
    return portable(count, width, device=DEVICE) + 1.5


PLANTED = {
    "the batch's mean": (lambda x: x - x.mean(0, keepdim=True), "mean", {"batch", "place"}),
    "the batch's size": (lambda x: x * (1.0 + len(x)), "mul", {"batch"}),
    "noise": (lambda x: x + torch.rand_like(x), "rand_like", {"run", "batch", "place"}),
    "a row's place": (lambda x: x + torch.arange(len(x), dtype=torch.float32, device=x.device)[:, None], "arange",
                      {"place"}),
    "a running sum": (lambda x: x.cumsum(0), "cumsum", {"place"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_it_names_what_was_planted(name):
    what, op, ways = PLANTED[name]
    report = find_moving_ops(Planted(what), rows())
    assert report and {c.way for c in report.calls if c.verdict == "starts"} == ways
    assert {(c.op, c.module) for c in report.calls if c.verdict == "starts"} == {(op, "planted")}
    first = report.first
    assert first.differ > 0 and first.elements in (1, 16) and first.ulps > 0
    assert {c.module for c in report.calls if c.verdict == "carries"} >= {"after"}
    assert f"{op} in planted is the first to move" in str(report)


def test_a_copy_is_no_call_and_hands_on_what_made_it():
    """PyTorch copies some tensors alone and not in a batch, and the other way round."""
    def copied(x):
        double = x * 2
        y = (double.clone() if len(x) == 1 else double).exp()
        copy = (y.clone() if len(x) > 1 else y).clone()
        return copy - x.mean(0, keepdim=True) if y is not copy else y
    report = find_moving_ops(Planted(copied), rows(), "batch")
    assert [(c.op, c.verdict) for c in report.calls if c.module == "planted"] == [
        ("mul", "same"), ("exp", "same"), ("mean", "starts"), ("sub", "carries")]
    assert report.calls[-2].fed_by == (("planted", "exp", 1), ("planted", "mean", 1))


def test_what_carries_says_what_fed_it():
    report = find_moving_ops(Planted(PLANTED["the batch's mean"][0]), rows(), "batch")
    table = report.table()
    assert table.layer.tolist() == ["planted", "after"] and table.verdict.tolist() == ["starts", "carries"]
    assert table["fed by"].tolist() == ["relu in before", "sub in planted"]
    assert table.kind.tolist() == ["What", "Tanh"]
    subtract = next(c for c in report.calls if c.op == "sub")
    assert subtract.verdict == "carries" and ("planted", "mean", 1) in subtract.fed_by
    assert len(report.starts()) == 1


def test_nothing_moves_where_nothing_does():
    report = find_moving_ops(Planted(lambda x: x * 2), rows())
    assert not report and report.first is None and report.table().empty and report.starts().empty
    assert str(report).startswith("no bit moved: run, batch, place, ")
    assert {c.verdict for c in report.calls} == {"same"}
    assert set(report.left_out) == {"padding", "query"}


def test_the_state_of_draws_that_are_not_made_is_no_result():
    """PyTorch's kernels for a GPU return it, as memory that nobody fills."""
    filled = itertools.count()
    with torch.library._scoped_library("same_bits_test", "FRAGMENT") as library:
        for name, state in (("attention", "philox_seed"), ("guess", "best")):
            library.define(f"{name}(Tensor x) -> (Tensor y, Tensor {state})")
            library.impl(name, lambda x: (x.clone(), torch.tensor(next(filled), device=x.device)),
                         "CompositeExplicitAutograd")
        assert not find_moving_ops(Planted(lambda x: torch.ops.same_bits_test.attention(x)[0]), rows())
        found = find_moving_ops(Planted(lambda x: torch.ops.same_bits_test.guess(x)[0]), rows())
        assert found.first.op.endswith("guess")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of this kind of CPU's products")
def test_without_the_mode_it_names_the_product_and_with_it_the_table_is_empty():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).to(DEVICE)
    x = portable(8, 32, device=DEVICE)
    report = find_moving_ops(model, x, "batch")
    assert (report.first.op, report.first.module) == ("addmm", "0")
    assert report.table().layer.tolist()[:2] == ["0", "1"]
    with batch_invariant(strict=True):
        assert find_moving_ops(model, x).table().empty


class Decoder(nn.Module):
    """Takes its arguments by name; `leak` lets a token see one behind it, `mixed` the padding."""

    def __init__(self, leak=False, mixed=False):
        super().__init__()
        self.embed, self.leak, self.mixed = nn.Embedding(7, 8), leak, mixed
        with torch.no_grad():
            self.embed.weight.copy_(portable(7, 8))

    def forward(self, input_ids, attention_mask, position_ids=None, scale=1.0):
        x = self.embed(input_ids) * scale
        if position_ids is not None:
            x = x + position_ids[..., None]
        if self.leak:
            x = x + x.roll(-1, 1)
        return {"logits": x / (input_ids.shape[1] if self.mixed else 4), "mask": attention_mask}


def named(**more):
    ids = torch.arange(12, device=DEVICE).view(3, 4) % 7
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def test_inputs_may_be_a_dict_and_a_tuple():
    positions = torch.arange(4, device=DEVICE).expand(3, 4).contiguous()
    report = find_moving_ops(Decoder().to(DEVICE), named(position_ids=positions, scale=2.0))
    assert not report and {c.way for c in report.calls} == set(WAYS) and not report.left_out
    given = named()
    assert not find_moving_ops(Decoder().to(DEVICE), (given["input_ids"], given["attention_mask"]))


@pytest.mark.parametrize("fault, op", [({"leak": True}, "roll"), ({"mixed": True}, "div")])
def test_padding_and_other_queries_are_found(fault, op):
    report = find_moving_ops(Decoder(**fault).to(DEVICE), named())
    found = {(c.way, c.op) for c in report.calls if c.verdict == "starts"}
    assert found == {("padding", op), ("query", op)}


def test_what_is_padded_is_hidden_from_the_model():
    class Masked(Decoder):
        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids) * attention_mask[..., None]
            return x + x.sum(1, keepdim=True) * 0.5
    model = Masked().to(DEVICE)
    with batch_invariant(strict=True):
        report = find_moving_ops(model, named(), "padding")
    assert not report and report.calls


def test_attention_that_adds_its_mask_is_not_blamed_for_it(monkeypatch):
    """On a GPU PyTorch pads a mask to a multiple of eight keys, so its numbers follow the padding at one shape."""
    def efficient(q, k, v, attn_mask):
        hidden = F.pad(torch.where(attn_mask, 0.0, -torch.inf), (0, 16 - k.shape[2]))[..., : k.shape[2]]
        hidden = hidden.expand(len(q), q.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, hidden, False)[0]
    monkeypatch.setattr(examples.F, "scaled_dot_product_attention", efficient)
    model, given = examples.Plain().to(DEVICE).eval(), examples.padded(examples.example_prompts((2, 2)))
    with batch_invariant(strict=True):
        report = find_moving_ops(model, given, "padding")
    assert not report and "constant_pad_nd" not in {call.op for call in report.calls}
    low = torch.finfo(torch.float32).min
    assert all(measure._shows_or_hides(torch.tensor(t)) for t in ([0, -torch.inf], [low, -0.0]))
    assert not any(measure._shows_or_hides(torch.tensor(t)) for t in ([0.0, 1, -torch.inf], [0.0, -0.0], [0], []))
    assert not measure._shows_or_hides(torch.zeros(2, dtype=torch.float32).to(torch.float8_e4m3fn))  # has no order


def test_rows_lie_where_the_shapes_say():
    """Heads folded into the batch, and a batch that is no first dimension."""
    class Folded(nn.Module):
        def forward(self, x):
            heads = x.unflatten(1, (4, 4)).flatten(0, 1) * 2
            swapped = (x.t().contiguous() + 1).t()
            return heads.view(x.shape) + swapped
    report = find_moving_ops(Folded(), rows(), row=2)
    assert not report and {c.verdict for c in report.calls} == {"same"}


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = What(lambda x: x / 0 if len(x) < 3 else self.fail())

    def fail(self):
        raise KeyError("of the model's own")

    def forward(self, x):
        return self.inner(x)


def test_a_model_that_fails_gives_its_own_error_and_is_left_as_it_was():
    model = Failing()
    with pytest.raises(KeyError, match="of the model's own"):
        find_moving_ops(model, rows())
    with batch_invariant(), pytest.raises(KeyError):
        find_moving_ops(model, rows())
    assert not active() and not _get_current_dispatch_mode_stack() and torch.is_grad_enabled()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_random_stream_and_the_mode_of_the_model_are_kept():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).to(DEVICE).train()
    before = torch.get_rng_state()
    report = find_moving_ops(model, rows(), "run")
    assert report.first.module == "1" and model.training
    if DEVICE.type == "cpu":
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("named_, error, says", [
    ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
    ({"inputs": 3}, TypeError, "inputs must be a tensor, a tuple or list with one"),
    ({"inputs": rows(1)}, ValueError, "inputs must hold a batch of at least two rows"),
    ({"ways": "sideways"}, ValueError, "ways must be among run, batch, place, padding, query, got 'sideways'"),
    ({"ways": "query"}, ValueError, "way 'query' needs a dict with input_ids"),
    ({"row": 4}, ValueError, "row must be a whole number from 0 to 3, got 4"),
    ({"row": True}, ValueError, "row must be a whole number from 0 to 3, got True")])
def test_bad_input_is_named(named_, error, says):
    with pytest.raises(error, match=says):
        find_moving_ops(**{"model": nn.ReLU(), "inputs": rows(), **named_})


def test_the_picture_shows_each_layer_in_each_way():
    report = find_moving_ops(Planted(PLANTED["a row's place"][0]), rows())
    figure = moving_chart(report)
    axes, = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["before", "planted", "after"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["run", "batch", "place"]
    assert [t.get_text() for t in axes.texts if "✗" in t.get_text()] == ["✗ arange"]
    assert figure.get_suptitle() == "arange in planted is the first to move its bits (place)"
    assert "planted, place: arange starts, 1 of 1 elements" in moving_words(report)
    assert "No bit moved." in moving_words(find_moving_ops(nn.ReLU(), rows()))


def test_a_long_model_is_cut_and_says_so():
    model = nn.Sequential(*[nn.ReLU() for _ in range(60)])
    figure = moving_chart(find_moving_ops(model, rows(), "batch"))
    assert len(figure.axes[0].get_yticks()) == 40
    assert "20 layers behind these are not shown" in " ".join(figure.get_supxlabel().split())
