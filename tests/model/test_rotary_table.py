"""The rotary table: its rule against 60 decimal digits, and its bits against those recorded."""
import dataclasses
import decimal
import math
import time
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from kernels.bits import digest, hashed, same_bits
from kernels.model.config import PRESETS, Config, RopeScaling
from kernels.model.rotary_table import PI, rotary_table, turns

DIGESTS = {"llama-3.1-8b": "991e1cfb9d5360c6", "llama-3.2-1b": "fef05840a8cac912", "small": "130fc4e3d24493d4",
           "tiny": "a35804b16b13af37"}
PLAIN = Config("plain", vocab_size=8, hidden_size=8, intermediate_size=8, layers=1, heads=1, kv_heads=1, head_dim=64,
               context=40000, rope_theta=10000.0, rope_scaling=None)
CONFIGS = {"scaled": PRESETS["llama-3.1-8b"], "plain": PLAIN,
           "scaled by 32": dataclasses.replace(PLAIN, rope_scaling=RopeScaling(factor=32.0), rope_theta=500000.0),
           "of a theta that is no whole number": dataclasses.replace(PLAIN, rope_theta=1e6 + 0.3, head_dim=8)}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# The rule again, written apart: branches over wavelengths, Taylor's series of the whole angle in exact fractions.

def frequency(config: Config, pair: int) -> Fraction:
    """Radians a position, to 60 digits."""
    with decimal.localcontext(prec=70):
        plain = 1 / (Decimal(config.rope_theta) ** (Decimal(2 * pair) / config.head_dim))
        if (s := config.rope_scaling) is None:
            return Fraction(plain)
        wavelength = 2 * PI / plain
        low, high = Decimal(s.low_frequency_factor), Decimal(s.high_frequency_factor)
        if wavelength < s.original_context / high:
            return Fraction(plain)
        if wavelength > s.original_context / low:
            return Fraction(plain / Decimal(s.factor))
        smooth = (s.original_context / wavelength - low) / (high - low)
        return Fraction((1 - smooth) * plain / Decimal(s.factor) + smooth * plain)


def cosine(angle: Fraction) -> Fraction:
    angle = angle - round(angle / (2 * Fraction(PI))) * 2 * Fraction(PI)
    angle = Fraction(round(angle * 2**200), 2**200)
    total, term = Fraction(0), Fraction(1)
    for k in range(0, 60, 2):
        total += term
        term = Fraction(round(-term * angle * angle / ((k + 1) * (k + 2)) * 2**200), 2**200)
    return total


def exact(config: Config, position: int, column: int) -> Fraction:
    half = config.head_dim // 2
    angle = position * frequency(config, column % half)
    return cosine(angle) if column < half else cosine(angle - Fraction(PI) / 2)


def ulps(found: float, wanted: Fraction) -> float:
    """The error in float32 numbers, where the exact result lies."""
    spacing = Fraction(2) ** (math.frexp(float(wanted))[1] - 24)
    return float(abs(Fraction(found) - wanted) / spacing)


def places(table: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """Some places, and those whose numbers are nearest to zero, where an angle's error shows most."""
    chosen = hashed(torch.arange(count, dtype=torch.int64), 1) % table.numel()
    smallest = table.abs().flatten().masked_fill(table.flatten() == 0, 1.0).topk(count, largest=False).indices
    return [divmod(int(i), table.shape[1]) for i in torch.cat([chosen, smallest])]


@every_config
def test_numbers_are_within_half_a_float32_of_the_exact_ones(config):
    table = rotary_table(config)
    worst = max(ulps(table[at].item(), exact(config, *at)) for at in places(table, 60))
    assert worst <= 0.501


@every_config
def test_every_number_is_near_that_of_float64(config):
    """Whose angle of up to 131071 is off by 2**-36."""
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * torch.tensor(
        [float(f * 2 * PI) for f in turns(config)], dtype=torch.float64)
    wanted = torch.cat([angle.cos(), angle.sin()], -1)
    assert (rotary_table(config).double() - wanted).abs().max() < 2.0**-25 + 2.0**-35


def test_position_zero_turns_nothing():
    row = rotary_table(PRESETS["tiny"])[0]
    assert same_bits(row, torch.cat([torch.ones(8), torch.zeros(8)]))


@pytest.mark.parametrize("name", DIGESTS)
def test_the_bits_are_those_recorded(name):
    assert digest(rotary_table(PRESETS[name]))[:16] == DIGESTS[name]


def test_a_position_does_not_depend_on_the_context():
    long, short = (rotary_table(dataclasses.replace(PLAIN, context=n)) for n in (2500, 1025))
    assert same_bits(long[:1025], short)


def test_the_bits_ignore_threads_and_settings():
    wanted, threads = rotary_table(PRESETS["small"]), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), decimal.localcontext(prec=5, rounding=decimal.ROUND_UP), torch.inference_mode():
            under = rotary_table(PRESETS["small"])
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert same_bits(under, wanted)


@pytest.mark.serial
def test_the_longest_table_takes_a_moment():
    start = time.perf_counter()
    rotary_table(dataclasses.replace(PRESETS["llama-3.2-1b"], context=131072))
    assert time.perf_counter() - start < 4.0


@pytest.mark.gpu
def test_a_gpu_gets_the_same_table():
    assert same_bits(rotary_table(PRESETS["small"], "cuda").cpu(), rotary_table(PRESETS["small"]))
