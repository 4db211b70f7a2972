"""Which token comes next: greedy, or drawn by temperature, top-k and top-p; the same bits on a CPU and a GPU.

A choice depends on its row of logits, on a seed and on a position, and on nothing else: not on the batch, its row, or
what was drawn before. For one row of V logits:

    scores   the logits in float32; greedy takes the largest, of equal ones (+0 equals -0) that of lowest index
    log p    log_softmax of scores * float32(1 / temperature), one multiplication each, as ops/softmax/order.py adds
    weight   floor(exp(log p) * 2**31), an integer; exp as in arithmetic/elementary.py
    top-k    keeps the weights of the k largest scores, of equal ones those of lowest index; the others become 0
    top-p    takes what is left in that order, and keeps a token while the weights before it sum to less than
             p * their total, with p rounded to a multiple of 2**-31; so the first is always kept
    draw     u is 31 bits hashed from seed and position; t = floor(u * total / 2**31), where total is the sum of the
             kept weights; the token is the first, by index, whose weights up to its own sum to more than t

Sums of weights are sums of integers, exact, and so have no order. A token of a probability below 2**-31 is never drawn.

A row that holds a NaN or +inf, or nothing but -inf, has no choice: -1, whatever the row beside it holds.

`log_probs` are those of the same log p, before top-k and top-p: one definition for whoever samples and whoever scores.

Method: inverse transform sampling, Devroye, Non-Uniform Random Variate Generation, 1986; Holtzman et al., The Curious
Case of Neural Text Degeneration, arXiv 1904.09751 (top-p).
"""
from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass

import torch

from .. import runtime
from ..arithmetic.elementary import exp
from ..bits import hashed
from ..op import DTYPES
from ..ops.softmax import log_softmax

BITS = 31  # of a weight and of the noise: the product of two still fits in int64
COLDEST, HOTTEST = 1e-3, 1e3
NONE = -1


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen.

    temperature  0 is greedy, and looks at nothing below; else 0.001 to 1000
    top_k        only the k likeliest, None for all
    top_p        only the likeliest that make up this share, 1 for all
    seed         0 to 2**63 - 1

    Raises TypeError or ValueError that names the field.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0:
            _check_temperature(self.temperature)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be None or a whole number of at least 1, got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, positions: torch.Tensor | None = None,
                 seeds: torch.Tensor | None = None) -> torch.Tensor:
        """logits (R, V) -> (R,) int64: the token chosen in each row, or -1 where there is no choice.

        positions  (R,) int64: of the chosen token in its request; greedy needs none
        seeds      (R,) int64: of each row's request, in place of `seed`

        Raises TypeError or ValueError that names the argument. Nothing is read back from the device.
        """
        _check_logits(logits)
        scores = logits.float()
        top = scores.amax(-1)
        token = _first_largest(scores, top) if self.temperature == 0 else self._drawn(scores, positions, seeds)
        return torch.where(top.isfinite(), token, NONE)

    def _drawn(self, scores, positions, seeds):
        _check_rows("positions", positions, scores)
        if seeds is None:
            seeds = torch.full_like(positions, self.seed)
        _check_rows("seeds", seeds, scores)
        weight = self._kept(scores, _weights(scores, self.temperature))
        target = ((noise(seeds, positions) >> 1) * weight.sum(-1)) >> BITS
        return (weight.cumsum(-1) <= target[:, None]).sum(-1)

    def _kept(self, scores, weight):
        """The weights, 0 where top-k or top-p leaves a token out."""
        if self.top_k is None and self.top_p == 1:
            return weight
        scores = scores + 0.0  # -0 becomes +0: equal ones stay in the order of their indices
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        ranked = weight.gather(-1, order)
        if self.top_k is not None:
            ranked[:, self.top_k :] = 0
        if self.top_p < 1:
            before, share = ranked.cumsum(-1) - ranked, max(1, round(self.top_p * (1 << BITS)))
            ranked = torch.where(before << BITS < share * ranked.sum(-1, keepdim=True), ranked, 0)
        return torch.zeros_like(weight).scatter_(-1, order, ranked)


def log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The log-probability of a token in each row: logits (R, V), tokens (R,) int64 -> (R,) float32.

    Before top-k and top-p, as this file says. NaN where a token is outside the vocabulary or a row has no choice.
    Raises TypeError or ValueError that names the argument.
    """
    _check_logits(logits)
    _check_rows("tokens", tokens, logits)
    _check_temperature(temperature)
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    found = _log_p(logits.float(), temperature).gather(-1, torch.where(inside, tokens, 0)[:, None])[:, 0]
    return torch.where(inside, found, float("nan"))


def noise(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """32 well mixed bits, as int64, of each seed and position (int64); one seed has none twice in 2**32 positions."""
    low, high = seeds & 0xFFFFFFFF, seeds >> 32 & 0xFFFFFFFF
    first = hashed(low, 1)
    second = hashed(high ^ first, 2)
    return hashed(hashed((positions & 0xFFFFFFFF) ^ first, 3) ^ second, 4)


def _log_p(scores, temperature):
    """log_softmax of the scaled scores: schedule or specification, the same bits."""
    scaled = scores if temperature == 1 else scores * c_float(1 / temperature).value
    call = log_softmax.triton if scores.is_cuda and not runtime.WHY_NOT and not scores.requires_grad \
        else log_softmax.python
    return call(scaled)


def _weights(scores, temperature):
    p = exp(_log_p(scores, temperature))
    return (torch.where(p.isnan(), 0.0, p) * 2.0**BITS).to(torch.int64)


def _first_largest(scores, top):
    index = torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device)
    return torch.where(scores == top[:, None], index, scores.shape[1]).amin(-1)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_temperature(value) -> None:
    if not _is_number(value) or not COLDEST <= value <= HOTTEST:
        raise ValueError(f"temperature must lie in {COLDEST}..{HOTTEST}, or in a Sampler be 0, greedy, got {value!r}")


def _check_logits(logits) -> None:
    if not isinstance(logits, torch.Tensor) or logits.dtype not in DTYPES.values():
        raise TypeError(f"logits must be a tensor of {', '.join(DTYPES)}, got "
                        f"{getattr(logits, 'dtype', type(logits).__name__)}")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must have shape (R, V) with V of at least 1, got {tuple(logits.shape)}")


def _check_rows(name: str, values, logits) -> None:
    if not isinstance(values, torch.Tensor) or values.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.shape != logits.shape[:1] or values.device != logits.device:
        raise ValueError(f"{name} must have shape ({len(logits)},) on {logits.device}, got {tuple(values.shape)} on "
                         f"{values.device}")
