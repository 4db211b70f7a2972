"""A step's numbers, and AdamW against one of torch's in float64."""
import math

import pytest
import torch
from backward_cases import HERE, numbers
from trained import QUICK, TINY

from kernels.bits import same_bits
from kernels.model.config import preset
from kernels.training.backward import implementation_on
from kernels.training.parameters import Parameters
from kernels.training.recipe import Recipe

HOW = implementation_on(HERE)


# a step's numbers


def test_the_rate_rises_in_a_line_and_falls_to_its_last_share():
    recipe = Recipe(steps=1000, warmup=10, rate=0.5, last=0.25)
    assert [recipe.rate_at(s) for s in (0, 4, 9, 10)] == [0.05, 0.25, 0.5, 0.5]
    rates = [recipe.rate_at(s) for s in range(10, 1001)]
    assert rates == sorted(rates, reverse=True) and recipe.rate_at(1000) == 0.125
    assert recipe.rate_at(505) == 0.5 * (0.25 + 0.75 / 2)
    half_cosine = [0.5 * (0.25 + 0.75 * (1 + math.cos(math.pi * i / 990)) / 2) for i in range(991)]
    assert max(abs(a - b) for a, b in zip(rates, half_cosine, strict=True)) < 0.011 * 0.5


def test_without_a_warm_up_it_begins_at_the_top():
    assert Recipe(steps=1, warmup=0, rate=0.5).rate_at(0) == 0.5


def test_numbers_are_adams_corrections():
    recipe = Recipe(steps=50, warmup=5, beta1=0.9, beta2=0.95, decay=0.1)
    found = recipe.numbers(torch.device("cpu"))
    assert found.shape == (50, 3) and found.dtype == torch.float32
    for step in (0, 7, 49):
        rate, t = recipe.rate_at(step), step + 1
        wanted = [rate / (1 - 0.9**t), 1 / math.sqrt(1 - 0.95**t), 1 - rate * 0.1]
        assert torch.allclose(found[step].double(), torch.tensor(wanted, dtype=torch.float64), rtol=2.0**-24)


@pytest.mark.parametrize("change", [dict(steps=0), dict(batch=0), dict(length=1), dict(seed=-1), dict(warmup=-1),
                                    dict(scored=0), dict(steps=2.0), dict(steps=True), dict(rate=0.0),
                                    dict(rate=math.inf), dict(clip=-1.0), dict(eps=0.0), dict(last=1.0),
                                    dict(decay=-0.1), dict(beta1=1.0), dict(beta2=math.nan)], ids=str)
def test_a_recipe_that_cannot_be_names_the_field(change):
    (field, value), = change.items()
    with pytest.raises(ValueError, match=f"{field} must be .*{value!r}"):
        Recipe(**change)


# weights and updates


def test_first_weights_are_drawn_by_the_seed_and_vectors_are_ones():
    one, same, other = (Parameters(TINY, Recipe(seed=seed), HERE) for seed in (1, 1, 2))
    assert one.digest() == same.digest() != other.digest()
    assert set(one.weights) == set(TINY.shapes) and one.half.numel() == TINY.parameters
    for name, weight in one.weights.items():
        assert tuple(weight.shape) == TINY.shapes[name] and weight.dtype == torch.bfloat16 and weight.requires_grad
        assert weight.dim() == 2 or bool((weight == 1).all())
    inside = {name: float(w.detach().double().std() * w.shape[1] ** 0.5) for name, w in one.weights.items()
              if w.dim() == 2}
    assert all(0.1 < deviation < 1.5 for deviation in inside.values())
    assert inside["head"] < inside["0.output"] < inside["0.qkv"]


def test_a_models_first_logits_are_small():
    """So that the first loss is near that of a guess, and no branch drowns the others."""
    byte = Parameters(preset("byte"), Recipe(), HERE).weights
    assert float(byte["head"].detach().double().std()) * 256**0.5 < 0.4


def gradients_of(parameters, step, size):
    return [numbers(tuple(w.shape), torch.bfloat16, 10 * step + i, size)
            for i, w in enumerate(parameters.weights.values())]


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_an_update_is_adamws(clip):
    """torch's own in float64, with and without gradients that are cut to a norm."""
    recipe = Recipe(steps=6, warmup=2, rate=0.01, decay=0.1, clip=clip)
    parameters = Parameters(TINY, recipe, HERE)
    exact = [piece.double() for piece in parameters.master.split([w.numel() for w in parameters.weights.values()])]
    groups = [{"params": [e for e, w in zip(exact, parameters.weights.values(), strict=True) if (w.dim() > 1) == big],
               "weight_decay": 0.1 * big} for big in (True, False)]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)
    table = recipe.numbers(HERE)
    for step in range(recipe.steps):
        gradients = gradients_of(parameters, step, -4)
        parameters.update(gradients, table[step], HOW)
        for group in adamw.param_groups:
            group["lr"] = recipe.rate_at(step)
        norm = torch.cat([g.double().flatten() for g in gradients]).norm()
        for e, g in zip(exact, gradients, strict=True):
            e.grad = g.double().flatten() * min(clip / float(norm), 1.0)
        adamw.step()
    apart = (parameters.master.double() - torch.cat(exact)).abs()
    assert float(apart.max()) < 1e-6 * recipe.steps and float((parameters.master - torch.cat(exact)).norm()) > 0
    assert same_bits(parameters.half, parameters.master.bfloat16())
    assert same_bits(parameters.weights["norm"].detach(), parameters.half[-TINY.hidden_size:])


def test_no_gradient_moves_no_vector():
    parameters = Parameters(TINY, QUICK, HERE)
    zeros = [torch.zeros_like(w) for w in parameters.weights.values()]
    parameters.update(zeros, QUICK.numbers(HERE)[0], HOW)
    vectors = parameters.master[parameters.matrices:]
    assert same_bits(vectors, torch.ones_like(vectors)) and bool(parameters.master.isfinite().all())


@pytest.mark.gpu
def test_an_update_on_a_gpu_is_a_cpus():
    """More weights than one chunk of a sum, and roots that a CPU's float32 would miss."""
    found = []
    for device in (HERE, torch.device("cpu")):
        parameters, table = Parameters(TINY, QUICK, device), QUICK.numbers(device)
        for step in range(3):
            gradients = [g.to(device) for g in gradients_of(parameters, step, 0)]
            parameters.update(gradients, table[step], implementation_on(device))
        found.append([t.cpu() for t in (parameters.master, parameters.m, parameters.v)])
    assert same_bits(*found)
