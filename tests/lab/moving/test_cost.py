"""What the mode costs, at toy size: the rows, the command, and that it goes on where it stopped."""
from __future__ import annotations

import pytest
import torch

from kernels import runtime
from kernels.__main__ import main
from kernels.bits import portable, same_bits
from kernels.lab.moving import examples, find_moving_ops
from kernels.lab.moving.cost import MODE_COST, layer_cost, mode_cost
from kernels.lab.moving.examples import Plain, example_model, example_prompts, logits, padded
from kernels.lab.sweep.chart import sweep_chart
from kernels.mode import batch_invariant

DEVICE = runtime.device()


def test_a_layers_cost_is_rows_that_a_sweeps_chart_draws():
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 16).to(DEVICE)
    rows = layer_cost(layer, lambda n: portable(n, 32, device=DEVICE), (1, 4), "Linear", repeats=2)
    ours = "triton" if DEVICE.type == "cuda" else "python"
    assert rows[["implementation", "tokens"]].values.tolist() == [["cuda", 1], [ours, 1], ["cuda", 4], [ours, 4]]
    assert rows[rows.implementation == ours].same_bits.all() and (rows.us_p50 > 0).all()
    assert sweep_chart(rows, clock="call", labels={"cuda": "default"}).axes[0].get_lines()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    words = ["mode", "--model", "tiny", "--tokens", "2", "--repeats", "1", "--how", "eager", "find", "--out",
             str(out), "--machine", "toy"]
    assert main(words) == 0
    return out / "toy", words


def test_the_command_records_each_point(recorded):
    folder, _ = recorded
    rows = MODE_COST.read(folder)
    keys = {(r.how, r.ops, r.tokens) for r in rows.itertuples()}
    assert keys == {(how, ops, n) for how in ("eager", "find") for ops in ("default", "invariant") for n in (2,)}
    assert rows[rows.ops == "invariant"].same_bits.all() and (rows.us_p50 > 0).all()
    if DEVICE.type == "cuda":
        assert not rows[(rows.ops == "default") & (rows.how == "find")].same_bits.all()
    assert set(rows.model) == {"tiny"} and set(rows.dtype) == {"bfloat16"}


def test_a_second_run_measures_nothing_again(recorded, capsys):
    folder, words = recorded
    before = (folder / MODE_COST.file).read_bytes()
    assert main(words) == 0 and capsys.readouterr().out == ""
    assert (folder / MODE_COST.file).read_bytes() == before


@pytest.mark.parametrize("named, says", [
    ({"tokens": [0]}, "tokens must be whole numbers of at least 1"), ({"how": ["slowly"]}, "how must be among eager"),
    ({"dtype": "float64"}, "dtype must be one of"), ({"repeats": 0}, "repeats must be at least 1"),
    ({"name": "enormous"}, "model must be one of")])
def test_bad_input_is_named(named, says):
    with pytest.raises(ValueError, match=says):
        mode_cost(**{"name": "tiny", "tokens": [1], **named})


# The example model of notebook 06b where transformers is missing.

@torch.no_grad()
def test_without_transformers_there_is_a_model_in_plain_pytorch(monkeypatch):
    monkeypatch.setattr(examples, "has_transformers", lambda: False)
    model, prompts = example_model(), example_prompts((3, 1))
    assert isinstance(model, Plain)
    with batch_invariant(strict=True):
        alone = [logits(model, [prompt])[0] for prompt in prompts]
        assert same_bits(alone, logits(model, prompts, left=True)) and same_bits(alone, logits(model, prompts))
        assert find_moving_ops(model, padded(example_prompts((2, 2))), ("batch", "padding")).table().empty
    if DEVICE.type == "cpu":
        assert not same_bits([logits(model, [prompt])[0] for prompt in prompts], logits(model, prompts, left=True))
    with pytest.raises(RuntimeError, match="some/folder needs transformers"):
        example_model("some/folder")
