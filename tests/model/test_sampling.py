"""Sampling: one row's choice beside any neighbours, its frequencies, ties, what has no choice, and bad arguments."""
import math
from collections import Counter

import pytest
import torch
from decoders import DEVICES

from kernels import log_softmax, runtime
from kernels.arithmetic.elementary import exp
from kernels.bits import digest, portable, same_bits
from kernels.model import sampling
from kernels.model.sampling import NONE, Sampler, log_probs, noise

INF, NAN = math.inf, math.nan
SAMPLERS = {"greedy": Sampler(), "plain": Sampler(1.0, seed=3), "cold": Sampler(0.25), "hot": Sampler(7.0, seed=2**62),
            "top_k": Sampler(1.0, top_k=5), "top_p": Sampler(0.8, top_p=0.7), "both": Sampler(1.5, 40, 0.9, 11)}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def inputs(rows, width=300, dtype=torch.float32, device="cpu"):
    positions = torch.arange(rows, device=device) * 7 + 1
    return portable(rows, width, dtype, device, 5, 3), positions


def drawn(sampler, logits, count):
    """How often each token of one row is chosen at so many positions."""
    rows = torch.tensor([logits]).expand(count, -1)
    return Counter(sampler(rows, torch.arange(count)).tolist())


def test_greedy_takes_the_largest_of_equal_ones_the_first():
    logits = torch.tensor([[1.0, 3, 2, 3], [-0.0, 0.0, -1, -1], [-5, -INF, -INF, -5], [7, 7, 7, 7]])
    assert Sampler()(logits).tolist() == [1, 0, 0, 0]
    assert Sampler()(logits.bfloat16()).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_sampler
def test_a_choice_does_not_depend_on_the_batch(name, dtype, device):
    sampler, (logits, positions) = SAMPLERS[name], inputs(24, dtype=dtype, device=device)
    whole = sampler(logits, positions)
    assert len(set(whole.tolist())) > 4
    for rows in ([5], [23, 0, 5], list(range(23, -1, -1)), [9] * 30):
        assert sampler(logits[rows], positions[rows]).tolist() == whole[rows].tolist()


# What these choose on every machine.
CHOSEN = {"greedy": "f5ea1cf5bbe3", "plain": "c0ce3b018390", "cold": "ce876e443833", "hot": "6427ff494d37",
          "top_k": "ad6066e78b07", "top_p": "9889ed3fbb7c", "both": "d07e4d4abac3"}


@pytest.mark.parametrize("device", DEVICES)
@every_sampler
def test_choices_are_the_same_on_every_machine(name, device):
    logits, positions = inputs(64, 5000, device=device)
    assert digest(SAMPLERS[name](logits, positions))[:12] == CHOSEN[name]


def by_pencil(scores, position, s) -> int:
    """sampling.py's rule for one row, in Python's whole numbers."""
    log_p = log_softmax.python(torch.tensor([scores]) * torch.tensor(1 / s.temperature))
    weight = [int(p * 2**31) for p in exp(log_p)[0].tolist()]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: s.top_k]
    total, before, kept = sum(weight[i] for i in order), 0, [0] * len(scores)
    for i in order:
        if s.top_p == 1 or before * 2**31 < round(s.top_p * 2**31) * total:
            kept[i] = weight[i]
        before += weight[i]
    u = int(noise(torch.tensor([s.seed]), torch.tensor([position]))) >> 1
    target = u * sum(kept) >> 31
    return next(i for i in range(len(scores)) if sum(kept[: i + 1]) > target)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "greedy"])
def test_choices_follow_the_written_rule(name):
    logits, positions = inputs(20, 60, torch.bfloat16)
    expected = [by_pencil(row, at, SAMPLERS[name]) for row, at in zip(logits.tolist(), positions.tolist(), strict=True)]
    assert SAMPLERS[name](logits, positions).tolist() == expected and len(set(expected)) > 5


@pytest.mark.parametrize("u, token", [(0, 1), (2**32 - 1, 3)])
def test_the_least_and_the_greatest_noise_choose_the_first_and_the_last_that_may_come(u, token, monkeypatch):
    monkeypatch.setattr(sampling, "noise", lambda seeds, positions: torch.full_like(positions, u))
    logits = torch.tensor([[-INF, 0.0, 1.0, 0.0, -INF]])
    for sampler in (Sampler(1.0), Sampler(1.0, top_k=4), Sampler(1.0, top_p=0.9)):
        assert sampler(logits, torch.tensor([5])).tolist() == [token]


def chi_square(found, probabilities, count) -> float:
    assert sum(found.values()) == count and set(found) <= set(probabilities)
    return sum((found[token] - count * p) ** 2 / (count * p) for token, p in probabilities.items())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    """20 tokens, 40 000 draws: chi-square with 19 degrees of freedom is below 43.8 in 999 of 1000 such tests."""
    logits = portable(1, 20, seed=4, scale=1)[0].tolist()
    shares = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    found = drawn(Sampler(temperature, seed=8), logits, 40_000)
    assert chi_square(found, dict(enumerate(shares)), 40_000) < 43.8


def test_the_frequencies_check_sees_another_temperature():
    logits = portable(1, 20, seed=4, scale=1)[0].tolist()
    shares = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    assert chi_square(drawn(Sampler(1.1, seed=8), logits, 40_000), dict(enumerate(shares)), 40_000) > 100


def test_seeds_are_independent_of_each_other():
    """Pairs of choices under neighbouring seeds: 16 kinds, as often each; 15 degrees, 37.7 for 999 of 1000."""
    rows, at = torch.zeros(20_000, 4), torch.arange(20_000)
    a, b = (Sampler(1.0, seed=seed)(rows, at) for seed in (0, 1))
    assert chi_square(Counter((4 * a + b).tolist()), dict.fromkeys(range(16), 1 / 16), 20_000) < 37.7
    after = Counter((4 * a[1:] + a[:-1]).tolist())
    assert chi_square(after, dict.fromkeys(range(16), 1 / 16), 19_999) < 37.7


def test_noise_has_no_bits_twice_and_a_seed_a_row():
    at = torch.arange(200_000)
    found = noise(torch.full_like(at, 2**63 - 1), at)
    assert len(found.unique()) == len(at) and int(found.min()) >= 0 and int(found.max()) < 2**32
    assert all(abs(float((found >> bit & 1).double().mean()) - 0.5) < 0.006 for bit in range(32))
    for seed in (1, 2**32, 46368):  # a Fibonacci number, where multiples of the golden ratio come close
        assert not set(noise(torch.full_like(at, seed), at)[:1000].tolist()) & set(
            noise(torch.zeros_like(at), at)[:1000].tolist())


def test_seeds_a_row_are_those_of_the_samplers():
    logits, positions = inputs(6)
    seeds = torch.tensor([4, 2**40, 0, 9, 4, 1])
    together = Sampler(1.0)(logits, positions, seeds)
    for i, seed in enumerate(seeds.tolist()):
        assert int(Sampler(1.0, seed=seed)(logits[i : i + 1], positions[i : i + 1])) == int(together[i])


def test_top_k_keeps_the_largest_of_equal_ones_the_first():
    assert set(drawn(Sampler(1.0, top_k=3), [1.0, 2.0, 1.0, 1.0, -3.0], 400)) == {0, 1, 2}
    assert set(drawn(Sampler(1.0, top_k=2), [0.0, -0.0, 0.0, -0.0], 200)) == {0, 1}
    assert set(drawn(Sampler(1.0, top_k=9), [0.0, 0.0], 100)) == {0, 1}


def test_top_k_of_one_is_greedy_even_where_a_sum_makes_scores_equal():
    logits = torch.tensor([[5.0, 5.0000005, 5.0], [9.0, 1.0, 9.000001]])
    assert Sampler(1.0, top_k=1)(logits, torch.tensor([0, 1])).tolist() == [1, 2] == Sampler()(logits).tolist()


def test_top_p_keeps_what_makes_up_the_share():
    """Probabilities 0.5, 0.3, 0.15, 0.05: a token stays while those before it sum to less than p."""
    logits = [math.log(p) for p in (0.15, 0.5, 0.05, 0.3)]
    for share, kept in ((0.4, {1}), (0.6, {1, 3}), (0.85, {0, 1, 3}), (0.97, {0, 1, 2, 3}), (1e-12, {1})):
        assert set(drawn(Sampler(1.0, top_p=share), logits, 600)) == kept
    found = drawn(Sampler(1.0, top_p=0.6), logits, 8000)
    assert chi_square(found, {1: 0.625, 3: 0.375}, 8000) < 10.8


def test_top_p_counts_what_top_k_left():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(drawn(Sampler(1.0, top_k=2, top_p=0.57), logits, 400)) == {0}, "0.4 / 0.7 is 0.571"
    assert set(drawn(Sampler(1.0, top_k=2, top_p=0.58), logits, 400)) == {0, 1}


def test_switches_that_leave_nothing_out_choose_as_none():
    logits, positions = inputs(40)
    assert same_bits(Sampler(1.0)(logits, positions), Sampler(1.0, top_k=300)(logits, positions))


@every_sampler
def test_a_row_without_a_choice_is_said_and_its_neighbours_do_not_notice(name):
    sampler, (logits, positions) = SAMPLERS[name], inputs(6, 8)
    before = sampler(logits, positions)
    logits[1, 3], logits[3, 0], logits[4] = NAN, INF, -INF
    after = sampler(logits, positions)
    assert [int(after[i]) for i in (1, 3, 4)] == [NONE] * 3
    assert [int(after[i]) for i in (0, 2, 5)] == [int(before[i]) for i in (0, 2, 5)]


def test_a_token_of_minus_infinity_is_never_chosen():
    assert set(drawn(Sampler(1000.0), [-INF, 0.0, -INF, 1.0], 300)) == {1, 3}


# Log-probabilities.

@pytest.mark.parametrize("device", DEVICES)
def test_log_probs_are_one_definition_whatever_computes_them(device):
    logits, _ = inputs(5, device=device)
    tokens = torch.tensor([0, 299, 7, 7, 100], device=device)
    expected = log_softmax.python(logits).gather(-1, tokens[:, None])[:, 0]
    assert same_bits(log_probs(logits, tokens), expected)
    assert same_bits(log_probs(logits[2:4], tokens[2:4]), expected[2:4])
    exact = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (log_probs(logits, tokens, 0.7) - exact).abs().max() < 1e-5
    assert same_bits(log_probs(logits.bfloat16(), tokens), log_probs(logits.bfloat16().float(), tokens))


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
def test_a_schedule_gives_the_log_probs_of_the_specification():
    logits, _ = inputs(3, device=runtime.device())
    assert same_bits(log_softmax.triton(logits * 0.5), log_softmax.python(logits * 0.5))


def test_log_probs_of_no_token_are_nan():
    logits, _ = inputs(4, 8)
    logits[3, 0] = NAN
    found = log_probs(logits, torch.tensor([-1, 8, 7, 1]))
    assert found.isnan().tolist() == [True, True, False, True]


# Errors.

@pytest.mark.parametrize("options, message", [
    ({"temperature": -1.0}, "temperature must lie in 0.001..1000"), ({"temperature": 1e-4}, "got 0.0001"),
    ({"temperature": 2000}, "temperature"), ({"temperature": NAN}, "temperature"),
    ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_k": 0}, "top_k must be None or a whole number of at least 1, got 0"),
    ({"top_k": 1.0}, "top_k"), ({"top_k": True}, "top_k"), ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p"), ({"top_p": NAN}, "top_p"), ({"top_p": None}, "top_p"), ({"seed": -1}, "seed must be a"),
    ({"seed": 2**63}, "seed"), ({"seed": 1.0}, "seed"), ({"seed": True}, "seed"),
])
def test_a_sampler_that_cannot_be_names_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


ROWS, AT = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("given, error, message", [
    ((ROWS,), TypeError, "positions must be an int64 tensor, got NoneType"),
    ((ROWS, [0, 0]), TypeError, "positions must be an int64 tensor, got list"),
    ((ROWS, AT.int()), TypeError, "positions must be an int64 tensor, got torch.int32"),
    ((ROWS, AT[:1]), ValueError, r"positions must have shape \(2,\) on cpu, got \(1,\) on cpu"),
    ((ROWS, AT.to("meta")), ValueError, "got .* on meta"), ((ROWS, AT, AT.float()), TypeError, "seeds must be"),
    ((ROWS, AT, AT[:1]), ValueError, "seeds must have shape"), (([[0.0]], AT), TypeError, "logits must be a tensor of"),
    ((ROWS.long(), AT), TypeError, "logits must be a tensor of bfloat16, float16, float32, got torch.int64"),
    ((ROWS.double(), AT), TypeError, "got torch.float64"), ((ROWS[0], AT), ValueError, r"shape \(R, V\)"),
    ((ROWS[:, :0], AT), ValueError, "V of at least 1"),
])
def test_arguments_that_cannot_be_are_named(given, error, message):
    with pytest.raises(error, match=message):
        Sampler(1.0)(*given)


@pytest.mark.parametrize("given, error, message", [
    ((ROWS, AT.int()), TypeError, "tokens must be an int64 tensor"), ((ROWS, AT[:1]), ValueError, "tokens must have"),
    ((ROWS, AT, 0), ValueError, "temperature must lie in"), ((ROWS[0], AT), ValueError, "logits must have shape"),
])
def test_log_probs_refuses_what_it_cannot_score(given, error, message):
    with pytest.raises(error, match=message):
        log_probs(*given)


def test_no_rows_have_no_tokens():
    assert Sampler()(ROWS[:0]).shape == Sampler(1.0, 2, 0.5)(ROWS[:0], AT[:0]).shape == (0,)
    assert log_probs(ROWS[:0], AT[:0]).shape == (0,)
