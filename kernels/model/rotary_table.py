"""The rotary table: cosines and sines of every position's angles, by a rule that leaves no machine a choice.

PyTorch's float64 pow, cos and sin differ from one vector unit to another. Here a few numbers are worked out in decimal
arithmetic, and all others by whole numbers and by single additions and products of float64.

The rule, for position p and pair i of D/2:

    1. A frequency is rope_theta**(-2i / D) radians a position, stretched as `rope_scaling` says, and so over 2 pi turns
       a position: worked out with 60 digits, rounded once to a multiple of 2**-93 of a turn.
    2. p times it, without its whole turns and without what is below 2**-62, is exact in whole numbers.
    3. That is n quarters and a rest r between -1/8 and 1/8 of a turn; x = r * 2 pi in float64, rounded twice.
    4. cos(x) and sin(x) are Taylor's series up to x**14 and x**13, by Horner's rule in x * x, one float64 operation
       after the other.
    5. n says which of the two, with which sign, is the cosine and which the sine; these are rounded to float32.

Largest error, against 60 digits: 0.501 of the distance between two float32 numbers, wherever an angle lies.

Source: Su et al., RoFormer, arXiv 2104.09864; the stretch: Grattafiori et al., The Llama 3 Herd of Models,
arXiv 2407.21783.
"""
from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

import torch

from .config import Config, RopeScaling

ARITHMETIC = Context(prec=60, rounding=ROUND_HALF_EVEN)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")
LIMB, LIMBS = 31, 3  # a frequency is a whole number of LIMBS * LIMB bits, its turn's fraction
TURN = 2 * LIMB  # bits that are kept of an angle's fraction of a turn
RADIANS = 2 * math.pi / 2.0**TURN
COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(8))
SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7))
POSITIONS = 256  # worked out at a time: PyTorch keeps so few numbers on one core, whose cache holds them


def rotary_table(config: Config, device="cpu") -> torch.Tensor:
    """(context, head_dim) float32: each position's head_dim/2 cosines, then its sines, as this file says."""
    limbs = torch.tensor([_limbs(f) for f in turns(config)], dtype=torch.int64, device="cpu").unbind(-1)
    table = torch.empty(config.context, config.head_dim, dtype=torch.float32, device="cpu")
    for first in range(0, config.context, POSITIONS):
        rows = table[first : first + POSITIONS]
        position = torch.arange(first, first + len(rows), dtype=torch.int64, device="cpu")[:, None]
        rows.copy_(torch.cat(_cosine_and_sine(_fraction(position, limbs)), -1))
    return table.to(device)


def turns(config: Config) -> list[Decimal]:
    """Each pair's frequency in turns a position, to 60 digits."""
    half, found = config.head_dim // 2, []
    with localcontext(ARITHMETIC):
        step = -Decimal(config.rope_theta).ln() / half
        for i in range(half):
            found.append(_stretched((step * i).exp() / (2 * PI), config.rope_scaling))
    return found


def _stretched(frequency: Decimal, scaling: RopeScaling | None) -> Decimal:
    """Llama 3.1's rule: frequencies that turn often over the original context are kept, slow ones are divided."""
    if scaling is None:
        return frequency
    low, high = Decimal(scaling.low_frequency_factor), Decimal(scaling.high_frequency_factor)
    kept = (scaling.original_context * frequency - low) / (high - low)
    kept = min(max(kept, Decimal(0)), Decimal(1))  # 1: keep the frequency, 0: divide it by the factor
    return frequency * (kept + (1 - kept) / Decimal(scaling.factor))


def _limbs(frequency: Decimal) -> list[int]:
    """The frequency as LIMBS whole numbers of LIMB bits, the highest first."""
    with localcontext(ARITHMETIC):
        whole = int((frequency * 2 ** (LIMB * LIMBS)).to_integral_value())
    return [whole >> LIMB * (LIMBS - 1 - i) & (1 << LIMB) - 1 for i in range(LIMBS)]


def _fraction(position, limbs) -> torch.Tensor:
    """The angles' fractions of a turn, in units of 2**-TURN; positions below 2**31, so that nothing overflows."""
    mask = (1 << LIMB) - 1
    high, middle, low = limbs
    second = position * middle + (position * low >> LIMB)
    first = position * high + (second >> LIMB)
    return (first & mask) << LIMB | second & mask


def _cosine_and_sine(fraction) -> tuple[torch.Tensor, torch.Tensor]:
    quarter = fraction + (1 << TURN - 3) >> TURN - 2  # rounded: 0 to 4
    rest = fraction - (quarter << TURN - 2)
    x = ((rest >> LIMB).double() * 2.0**LIMB + (rest & (1 << LIMB) - 1).double()) * RADIANS
    square = x * x
    cosine, sine = _horner(square, COSINE), x * _horner(square, SINE)
    odd = (quarter & 1).bool()
    cosine, sine = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return torch.where(((quarter + 1) & 2).bool(), -cosine, cosine), torch.where((quarter & 2).bool(), -sine, sine)


def _horner(square, coefficients) -> torch.Tensor:
    """c0 + s (c1 + s (c2 + ...)), each product and each sum rounded to float64."""
    total = torch.full_like(square, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * square
        total = total + c
    return total
