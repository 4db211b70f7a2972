"""What the mode costs, at toy size: the rows, the command, and that it goes on where it stopped."""
from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from kernels import runtime
from kernels.__main__ import main
from kernels.bits import portable, same_bits
from kernels.lab.moving import examples, find_moving_ops
from kernels.lab.moving.batches import PROMPTS, pool, random_batches
from kernels.lab.moving.cost import MODE_COST, compiled_layers, layer_cost, mode_cost, prompts, transformers_model
from kernels.lab.moving.examples import Plain, example_model, example_prompts, logits, padded
from kernels.lab.sweep.chart import sweep_chart
from kernels.mode import active, batch_invariant

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
    assert set(rows.model) == {"tiny"} and set(rows.dtype) == {"bfloat16"}


def test_a_search_that_finds_something_is_no_row_of_the_same_bits(monkeypatch):
    monkeypatch.setattr("kernels.lab.moving.cost.find_moving_ops", lambda model, given: active())
    found = mode_cost("tiny", [2], ["find"])
    assert {row["ops"]: row["same_bits"] for row in found} == {"default": True, "invariant": False}


def test_a_second_run_measures_nothing_again(recorded, capsys):
    folder, words = recorded
    before = (folder / MODE_COST.file).read_bytes()
    assert main(words) == 0 and capsys.readouterr().out == ""
    assert (folder / MODE_COST.file).read_bytes() == before


def test_a_point_that_lacks_a_contender_is_measured_whole():
    half, other = (("tiny", "eager", ops, "bfloat16", 2) for ops in ("default", "invariant"))
    rows = mode_cost("tiny", [2], ["eager"], repeats=1, skip=frozenset({half}))
    assert [row["ops"] for row in rows] == ["default", "invariant"]
    assert mode_cost("tiny", [2], ["eager"], repeats=1, skip=frozenset({half, other})) == []


# Compiled layer by layer.

def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_one_compilation_serves_all_layers(monkeypatch):
    compile_layer, compiled = torch.nn.Module.compile, []

    def by_eager(self, **named):
        compiled.append(named)
        return compile_layer(self, backend="eager", **named)
    monkeypatch.setattr(torch.nn.Module, "compile", by_eager)
    before = graphs()
    rows = mode_cost("tiny", [3], ["compiled"], repeats=1)
    assert len(compiled) > 1 and all(named == {"dynamic": False} for named in compiled)
    assert graphs() - before == 2 * len({"alone", "in a batch"})  # outside the mode and inside
    assert [(row["how"], row["ops"]) for row in rows] == [("compiled", "default"), ("compiled", "invariant")]
    assert rows[1]["same_bits"]


@pytest.mark.serial  # it compiles
def test_a_whole_model_is_compiled_for_cuda_graphs_and_no_padding_moves_a_bit(monkeypatch):
    compile_module, compiled = torch.nn.Module.compile, []

    def noted(module, **named):
        compiled.append((type(module).__name__, named))
        compile_module(module, **named)
    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    rows = mode_cost("tiny", [2], ["whole_batches"], repeats=1, batches=3)
    assert compiled == [("LlamaForCausalLM", {"dynamic": False, "mode": "reduce-overhead"})]
    assert [(row["how"], row["ops"]) for row in rows] == [("whole_batches", "default"), ("whole_batches", "invariant")]
    assert rows[1]["same_bits"]


def test_layers_are_as_they_were_behind_the_block():
    model = transformers_model("tiny", torch.float32, DEVICE)
    with pytest.raises(KeyError), compiled_layers(model):
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
        raise KeyError
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_too_many_compilations_are_an_error_and_no_silence():
    model = transformers_model("tiny", torch.float32, DEVICE)
    for layer in model.model.layers:
        layer.forward = lambda x, **named: x + 1
    with compiled_layers(model), torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1), \
            pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for count in (2, 3, 4):
            model(input_ids=prompts(model, 1, count))


@pytest.mark.serial  # it compiles
@torch.no_grad()
def test_no_batch_moves_a_bit_of_compiled_layers():
    model, before = transformers_model("tiny", torch.bfloat16, DEVICE), graphs()
    with compiled_layers(model), batch_invariant(strict=True):
        alone, among = (model(input_ids=prompts(model, n, 3)).logits for n in (1, 3))
    assert graphs() - before == 2 and same_bits(alone, among[:1])


# Random batches.

def test_random_batches_are_compared_with_each_prompt_alone():
    given, seen = pool(50, 8, DEVICE), []

    def forward(input_ids, attention_mask, position_ids):
        seen.append((input_ids, attention_mask))
        return input_ids[..., None] * 3.0 + position_ids[..., None]
    us, differ = random_batches(forward, given, 30, 4)
    assert sorted(map(len, given)) == [2, 2, 4, 4, 6, 6, 8, 8] and len(us) == 30 and differ == 0 and min(us) > 0
    batches = seen[PROMPTS + 2 :]
    assert len(batches) == 30 and all(ids.shape == (4, 8) for ids, _ in batches)
    assert {bool((mask[:, 0] == 0).any()) for _, mask in batches} == {True, False}
    assert any((mask[:, -1] == 0).any() for _, mask in batches)

    def moved(input_ids, attention_mask, position_ids):  # one token, where others are in the batch
        y = forward(input_ids, attention_mask, position_ids)
        y[2:, -1] += 1.0
        return y
    assert 0 < random_batches(moved, given, 30, 4)[1] <= 60


def test_the_command_records_random_batches(tmp_path, capsys):
    words = ["mode", "--model", "tiny", "--tokens", "4", "--how", "batches", "--batches", "3", "--out", str(tmp_path),
             "--machine", "toy"]
    assert main(words) == 0 and "tiny batches invariant 4 tokens" in capsys.readouterr().out
    rows = MODE_COST.read(tmp_path / "toy")
    assert rows.ops.tolist() == ["default", "invariant"] and set(rows.repeats) == {3} and rows.same_bits.tolist()[1]


@pytest.mark.parametrize("named, says", [
    ({"batches": 0}, "batches must be at least 1"),
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
