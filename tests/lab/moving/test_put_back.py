"""Each run of `find_moving_ops` has its own inputs and leaves the model as it was; what is not compared is no tick."""
from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.lab.moving import examples, find_moving_ops, moving_words
from kernels.lab.moving.state import changed, put_back, tensors_in
from kernels.mode import batch_invariant

DEVICE = runtime.device()


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments, **named):
        return self.function(*arguments, **named)


@dataclass
class Cache:
    """As transformers' are: layers in a list, which a forward writes into and appends to."""

    layers: list = field(default_factory=list)

    def add(self, x):
        self.layers[0].mul_(2)
        self.layers.append(x)
        return sum(self.layers)


def rows(count=4, width=16):
    return portable(count, width, device=DEVICE) + 1.5


def write(x):
    return x.add_(1)


@pytest.mark.parametrize("given", [
    lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: ([x],), lambda x: ({"x": x},),
    lambda x: (SimpleNamespace(x=x),)])
def test_a_model_that_writes_into_its_inputs_is_not_blamed_and_changes_nothing(given):
    x = rows()
    before = x.clone()
    report = find_moving_ops(Model(lambda *found, **named: write(*tensors_in((found, named)))), given(x))
    assert not report and same_bits(x, before)


def test_a_cache_holds_a_row_for_each_and_is_each_runs_own():
    cache, x = Cache([rows() * 2]), rows()
    report = find_moving_ops(Model(lambda x, cache: cache.add(x) * 2), (x, cache))
    assert not report and len(cache.layers) == 1 and same_bits(cache.layers[0], rows() * 2)


def test_a_cache_of_transformers_may_be_an_argument():
    transformers = pytest.importorskip("transformers")
    model, prompts = examples.example_model(), examples.example_prompts((4, 4))
    given = examples.padded(prompts)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**given, past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys.clone()
    more = {"input_ids": given["input_ids"], "past_key_values": cache,
            "attention_mask": torch.ones(2, 8, dtype=torch.int64, device=DEVICE)}
    with batch_invariant(strict=True):
        report = find_moving_ops(model, more)
        assert not find_moving_ops(model, {**given, "past_key_values": transformers.DynamicCache()}, "batch")
    assert not report and report.tried == ("run", "batch", "place")
    assert report.left_out["query"] == "needs an attention_mask as large as input_ids"
    assert cache.get_seq_length() == 4 and same_bits(cache.layers[0].keys, keys)


class Remembers(nn.Module):
    """Everything that a forward may leave in a module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(16))
        self.register_buffer("last", torch.zeros(16))
        self.seen, self.plain, self.calls = [], torch.zeros(16, device=DEVICE), 0

    def forward(self, x):
        self.calls += 1
        y = x + self.total + self.last + self.plain + self.calls + len(self.seen)
        self.total += x[0]
        self.plain += x[0]
        self.last = x[0] * 2
        self.seen.append(x)
        self.new = x
        return y


def test_what_a_forward_leaves_in_a_model_is_put_back():
    model = Remembers().to(DEVICE)
    held = model.total, model.last, model.plain
    assert not find_moving_ops(model, rows(), ("run", "batch"))  # its row 0 is the one watched
    assert model.calls == 0 and model.seen == [] and not hasattr(model, "new")
    assert all(a is b for a, b in zip(held, (model.total, model.last, model.plain), strict=True))
    assert not any(t.any() for t in held)


def test_running_statistics_are_as_they_were():
    model = nn.BatchNorm1d(16).to(DEVICE).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = find_moving_ops(model, portable(8, 48, device=DEVICE).view(8, 16, 3))
    assert report.first.way == "batch"
    assert same_bits(dict(model.state_dict()), before)


def test_a_model_is_put_back_where_it_fails():
    model = Remembers().to(DEVICE)
    with pytest.raises(KeyError), put_back(model):
        model(rows())
        raise KeyError
    assert model.calls == 0 and not model.total.any()


def test_four_bits_and_lazy_modules_pass():
    model = nn.Sequential(nn.ReLU(), nn.LazyLinear(4)).to(DEVICE)
    model.register_buffer("small", torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    assert find_moving_ops(model, rows(), "run").first is None
    assert model[1].in_features == 16 and model(rows()).shape == (4, 4)


def test_what_cannot_be_copied_is_shared():
    class Locked:
        def __init__(self):
            self.lock, self.x, self.list = Lock(), torch.zeros(2), []

        def __reduce_ex__(self, _):
            raise TypeError("cannot pickle a lock")
    locked, free = Locked(), SimpleNamespace(x=torch.zeros(2))
    inner = locked.list
    found = changed((locked, free, free, int), lambda t: t + 1)
    assert found[0] is locked and locked.x.sum() == 0 and locked.list is inner
    assert found[1] is found[2] is not free and found[1].x.sum() == 2 and free.x.sum() == 0 and found[3] is int


def test_an_output_of_whole_numbers_beside_others_is_not_asked():
    """A cache's length, say, is another one behind more padding."""
    report = find_moving_ops(Model(lambda x: (x * 2, torch.tensor(len(x)))), rows())
    assert not report and {call.op for call in report.calls} == {"mul"}


def test_the_output_is_compared_where_its_call_is_not():
    """Of more than 25 rows cdist takes another op than of one."""
    weight = portable(8, 16, device=DEVICE)
    report = find_moving_ops(Model(lambda x: torch.cdist(x, weight)), rows(40))
    found = {call.way: call.verdict for call in report.calls if call.op == "output"}
    assert set(found) == {"run", "batch", "place"} and set(found.values()) <= {"same", "starts"}
    assert found["run"] == "same" and not report.unchecked


def test_it_says_which_call_made_an_output_that_moved():
    def other(x):
        return x * 2 if len(x) == 1 else x.sin()
    report = find_moving_ops(Model(other), rows(), "batch")
    made = "output in Model (made by sin in Model, which was not compared) is the first to move"
    assert report.first.op == "output" and made in str(report)
    assert not find_moving_ops(Model(other), rows(), "run")


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: SimpleNamespace(logits=y), lambda y: Cache([y])])
def test_an_output_that_differs_is_found_by_itself(wrap):
    report = find_moving_ops(Model(lambda x: wrap(x.argmax(-1) + len(x))), rows())
    assert [(c.way, c.op) for c in report.calls if c.moved] == [("batch", "output")]
    assert not find_moving_ops(Model(lambda x: wrap(x.argmax(-1))), rows())


def test_a_model_that_hands_its_input_on_is_checked():
    report = find_moving_ops(nn.Identity(), rows())
    assert not report and {call.op for call in report.calls} == {"output"} and len(report.calls) == 3


def test_a_report_that_compared_nothing_does_not_pass():
    report = find_moving_ops(Model(lambda x: x.new_zeros(len(x) * 3 + 1)), rows(), ("batch",))
    assert report and report.first is None and report.unchecked == ["batch"]
    assert str(report) == "batch: nothing was compared, for no result has a part that is the row's"
    assert "Nothing was compared: batch." in moving_words(report)
    silent = find_moving_ops(Model(lambda x: None), rows())
    assert silent and silent.unchecked == ["run", "batch", "place"] and "no bit moved" not in str(silent)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("given, name", [(lambda t: t, "inputs"), (lambda t: {"x": t}, r"inputs\['x'\]"),
                                         (lambda t: (rows(), [t]), r"inputs\[1\]")])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name(layout, given, name):
    nested = torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(2, 2)], layout=layout)
    with pytest.raises(TypeError, match=f"^{name} must be a tensor of one shape for all rows, got a nested tensor"):
        find_moving_ops(Model(lambda x: x), given(nested))
