"""A training: one digest on every run, the model's own forward, and gradients near float64's."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backward_cases import HERE, float64
from trained import QUICK, TINY, corpus, trained

from kernels import runtime
from kernels.bits import same_bits
from kernels.model import steps
from kernels.model.config import Config, preset
from kernels.model.llama import Llama
from kernels.training import functions
from kernels.training.backward import implementation_on
from kernels.training.batches import drawn
from kernels.training.forward import check_trainable, logits, loss
from kernels.training.parameters import Parameters
from kernels.training.places import Places
from kernels.training.trainer import Trainer

CPU = torch.device("cpu")
text = pytest.fixture(scope="module")(corpus)


def weights_of(config, device=CPU):
    return Parameters(config, QUICK, device).weights


def tokens_of(text, batch, length, device=CPU):
    held = torch.frombuffer(bytearray(text.text), dtype=torch.uint8).to(device)
    return drawn(held, torch.zeros(1, dtype=torch.int64, device=device), batch, length, 1)


def plain(weights, config, window, places):
    """The same loss by PyTorch's own operations, in the dtype of the weights."""
    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turned(x):
        (a, b), (cos, sin) = x.chunk(2, -1), places.table[: places.length].to(x.dtype).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embedding"][window[:, :-1]]
    for i in range(config.layers):
        own = {name: weights[f"{i}.{name}"] for name in config.layer_shapes}
        qkv = (norm(x, own["attention_norm"]) @ own["qkv"].t()).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([config.heads, config.kv_heads, config.kv_heads], 1)
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + y.transpose(1, 2).flatten(2) @ own["output"].t()
        gate, up = (norm(x, own["mlp_norm"]) @ own["gate_up"].t()).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ own["down"].t()
    return F.cross_entropy((norm(x, weights["norm"]) @ weights["head"].t()).flatten(0, 1), window[:, 1:].flatten())


# the forward


@pytest.mark.parametrize("config", [TINY, replace(TINY, shared=8, heads=8, head_dim=8, kv_heads=8)],
                         ids=["tiny", "shared by eight"])
def test_logits_are_those_of_the_models_prefill(config, text):
    weights, window = weights_of(config), tokens_of(text, 2, 20)
    model = Llama(config, ops="invariant", dtype=torch.bfloat16, device="cpu",
                  weights=lambda name, shape: weights[name].detach())
    with torch.no_grad():
        found = logits(weights, config, window[:, :-1], Places(config, 2, 20, CPU), "python").view(2, 20, -1)
    for row, own in zip(window[:, :-1].tolist(), found, strict=True):
        assert same_bits(own, steps.logits(model, row))


def test_the_loss_and_its_gradients_are_near_float64s(text):
    weights, window, places = weights_of(TINY), tokens_of(text, 2, 16), Places(TINY, 2, 16, CPU)
    exact = dict(zip(weights, float64(*weights.values()), strict=True))
    value, wanted = loss(weights, TINY, window, places, "python"), plain(exact, TINY, window, places)
    assert abs(value.item() - wanted.item()) < 2.0**-9 * wanted.item()
    found = torch.autograd.grad(value, tuple(weights.values()))
    for name, a, b in zip(weights, found, torch.autograd.grad(wanted, tuple(exact.values())), strict=True):
        assert a.dtype == torch.bfloat16 and float((a.double() - b).norm() / b.norm()) < 0.04, name


def test_an_unread_byte_of_the_embedding_gets_no_gradient(text):
    weights, window, places = weights_of(TINY), tokens_of(text, 1, 16), Places(TINY, 1, 16, CPU)
    found, = torch.autograd.grad(loss(weights, TINY, window, places, "python"), weights["embedding"])
    read = torch.zeros(256, dtype=torch.bool)
    read[window[0, :-1]] = True
    assert found[read].any(1).all() and not found[~read].any()


@pytest.mark.parametrize("change, field", [(dict(tied_embeddings=True), "tied_embeddings"),
                                           (dict(qk_norm=True), "qk_norm")])
def test_a_model_without_these_passes_is_refused(change, field, text):
    config = replace(TINY, **change)
    with pytest.raises(ValueError, match=f"{field} must be False .*tiny has it"):
        check_trainable(config)
    with pytest.raises(ValueError, match=field):
        Trainer(config, QUICK, text, CPU)


def test_places_must_fit_the_context():
    with pytest.raises(ValueError, match="tiny's context of 1024, got 2 and 1025"):
        Places(TINY, 2, 1025, CPU)


# a run


def test_two_runs_have_one_digest_and_one_curve(text):
    (one, rows), (other, again) = trained(text), trained(text)
    assert one.parameters.digest() == other.parameters.digest()
    assert [(r.step, r.loss, r.held_out_loss) for r in rows] == [(r.step, r.loss, r.held_out_loss) for r in again]
    assert [r.step for r in rows] == [1, 2, 3] and rows[-1].held_out_loss < rows[0].held_out_loss
    assert same_bits(one.parameters.half, one.parameters.master.bfloat16())


def test_another_seed_gives_other_weights(text):
    quick = replace(QUICK, steps=1)
    assert trained(text, quick)[0].parameters.digest() != trained(text, replace(quick, seed=1))[0].parameters.digest()


def test_rows_are_means_since_the_row_before(text):
    seen, trainer = [], Trainer(TINY, QUICK, text, CPU)
    rows = trainer.run(2, seen.append)
    assert seen == rows and [r.step for r in rows] == [2, 3]
    losses = trainer.losses.double()
    assert rows[0].loss == float(losses[:2].mean()) and rows[1].loss == float(losses[2])
    with pytest.raises(ValueError, match="every .*got 0"):
        trainer.run(0)


def test_the_held_out_loss_is_that_of_the_held_out_windows(text):
    trainer = Trainer(TINY, replace(QUICK, scored=2), text, CPU)
    rows = torch.tensor([list(text.excerpt[:16]), list(text.excerpt[16:32])])
    with torch.no_grad():
        wanted = loss(trainer.parameters.weights, TINY, rows, Places(TINY, 2, 15, CPU), "python")
    assert trainer.held_out_loss() == float(wanted)
    with pytest.raises(ValueError, match="65536 bytes of held-out text, got 4097 of 16"):
        Trainer(TINY, replace(QUICK, scored=4097), text, CPU)


def test_windows_are_drawn_by_the_step_and_the_seed_alone(text):
    held = torch.frombuffer(bytearray(text.text), dtype=torch.uint8)
    windows = [drawn(held, torch.tensor([step]), 4, 10, seed) for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert same_bits(windows[0], windows[1]) and windows[0].shape == (4, 11) and windows[0].dtype == torch.int64
    assert all(not same_bits(windows[0], w) for w in windows[2:])
    assert all(bytes(row.tolist()) in text.text for row in windows[0])
    rows = drawn(held, torch.tensor([0]), 5, 10, 0)
    assert same_bits(rows[:4], windows[0])  # a larger batch draws the same first windows in its first step
    assert same_bits(drawn(held, torch.tensor([0]), 8, 10, 0)[4:], windows[2])  # and then those of the next
    assert same_bits(drawn(held[:11], torch.tensor([7]), 3, 10, 0), held[:11].long().expand(3, 11))
    with pytest.raises(ValueError, match="longer than 11 bytes, got 11"):
        drawn(held[:11], torch.tensor([0]), 1, 11, 0)


def test_a_cpu_carries_out_the_specification():
    assert implementation_on(CPU) == "python" and implementation_on(torch.device("cuda")) == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("config, recipe", [(TINY, replace(QUICK, steps=5, batch=5, length=30)),
                                            (preset("byte"), QUICK)], ids=["tiny", "byte"])
def test_a_gpus_weights_are_a_cpus(config: Config, recipe, text, monkeypatch):
    """Captured steps too, of which the first two are not; and more tokens than one segment of them."""
    monkeypatch.setattr(functions, "SEGMENT", 64)
    (gpu, rows), (cpu, wanted) = (trained(text, recipe, config, device, every=recipe.steps) for device in (HERE, "cpu"))
    assert gpu.parameters.digest() == cpu.parameters.digest()
    assert [r.held_out_loss for r in rows] == [r.held_out_loss for r in wanted]


@pytest.mark.gpu
def test_two_runs_of_the_byte_model_have_one_digest(text):
    recipe = replace(QUICK, steps=20, batch=16, length=256)
    digests = {trained(text, recipe, preset("byte"), HERE)[0].parameters.digest() for _ in range(2)}
    assert len(digests) == 1 and runtime.where() == "LIVE"
