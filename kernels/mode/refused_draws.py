"""Random draws: a row's numbers depend on its place in the stream, so they are refused, or warned of, by name.

What draws for no row of a batch passes in silence: into a Parameter, where a module is built, in torch.nn.init, in a
DataLoader, and where torch.compile times its kernels; of draws of a shape alone (`torch.rand(3)`), those that PyTorch
itself makes. A generator that the caller gives is one stream too.
"""
from __future__ import annotations

import torch

from .callers import called_by_pytorch, is_fake, makes_inputs, makes_weights, measures
from .names import overloads_of
from .switch import Unsupported, rule

OF_A_TENSOR = ("bernoulli", "binomial", "poisson", "normal", "rand_like", "randn_like", "randint_like",
               "_standard_gamma", "_sample_dirichlet", "_fused_dropout", "normal_functional")
IN_PLACE = ("bernoulli_", "uniform_", "normal_", "random_", "geometric_", "cauchy_", "log_normal_", "exponential_")
FUNCTIONAL = tuple(name.removesuffix("_") for name in IN_PLACE[1:])  # as torch.compile writes the in-place ones
FROM_A_SHAPE = ("rand", "randn", "randint", "randperm")
WITH_NOISE = ("rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional")  # in training


def _for_no_row(arguments, named) -> bool:
    if arguments and isinstance(arguments[0], torch.nn.Parameter):
        return True
    device = named.get("device")
    if device is not None and torch.device(device).type == "meta":
        return True
    return makes_weights() or makes_inputs() or measures()


def _draws(*arguments, **named):
    if _for_no_row(arguments, named):
        return NotImplemented
    raise Unsupported("draws from one stream of random numbers, as dropout does, so that a row's depend on its place "
                      "in the batch")


def _draws_of_a_shape(*arguments, **named):
    return NotImplemented if called_by_pytorch() or is_fake() else _draws(*arguments, **named)


def _noise(self, noise, lower=0.125, upper=1 / 3, training=False, *rest, **named):
    return _draws(self, noise) if training else NotImplemented


for _packet in (*OF_A_TENSOR, *IN_PLACE, *FUNCTIONAL):
    rule(*overloads_of(_packet))(_draws)
for _packet in FROM_A_SHAPE:
    rule(*overloads_of(_packet))(_draws_of_a_shape)
rule("multinomial.out")(_draws)  # multinomial has a row in the atlas
for _packet in WITH_NOISE:
    rule(*overloads_of(_packet))(_noise)
