"""An answer is the same alone and under any load; what a batch may move is found."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import CONTEXT, EXACT, TILED, engine, follows_the_batch, forward_of, prompt

from kernels.inference import Sampler
from kernels.lab.load import alone, jobs
from kernels.lab.load import small_model as made
from kernels.model import steps

DRAWN = Sampler(temperature=1.5, top_k=50, top_p=0.9, seed=11)


@pytest.mark.parametrize("model", [TILED, EXACT], ids=["tiled", "invariant"])
def test_greedy_text_is_that_of_steps_and_its_logits_those_of_one_window(model):
    given = [prompt(i, 2 + 5 * i) for i in range(4)]
    serving = engine(model)
    served = [serving.submit(tokens, 5) for tokens in given]
    serving.run()
    serving.check()
    for tokens, request in zip(given, served, strict=True):
        assert request.state == "done" and request.answer == steps.greedy(model, tokens, 5)
        assert request.logit_digest == forward_of(model, tokens, request.answer)


def test_a_drawn_text_is_the_samplers_of_one_window():
    serving, tokens = engine(speculate=3), prompt(1, 9)
    request, beside = serving.submit(tokens, 8, DRAWN), serving.submit(tokens, 8)
    serving.run()
    rows = steps.logits(TILED, tokens + request.answer)[8:-1]
    assert request.answer == DRAWN(rows, torch.arange(9, 17)).tolist() != beside.answer
    again = serving.submit(tokens, 8, DRAWN)
    again.lookup.draft = lambda most: request.answer[len(again.answer) :][:most]  # each of them right
    serving.run()
    assert again.logit_digest == request.logit_digest and serving.accepted >= 5


SETTINGS = st.fixed_dictionaries({
    "page_size": st.sampled_from([1, 3, 8]), "max_batch": st.integers(1, 6), "chunk": st.sampled_from([1, 4, 64]),
    "budget": st.integers(6, 40), "sharing": st.booleans(), "speculate": st.sampled_from([0, 1, 3]),
    "pages": st.sampled_from([32, 70])})
WANTED = {}


@settings(max_examples=8, deadline=None)
@given(SETTINGS, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from(["", "cancel", "slow"])),
                          min_size=2, max_size=7))
def test_no_load_changes_an_answer(changes, coming):
    """Prompts that begin alike, of 3 to 28 tokens; clients that cancel in between, or read one token at a time."""
    serving, served = engine(**changes), []
    for number, more, client in coming:
        tokens, sampler = prompt(0, 2 + 4 * number) + prompt(number + 1, 1 + more), DRAWN if more == 1 else Sampler()
        served.append((serving.submit(tokens, 4, sampler, buffer=1 if client == "slow" else None), client))
        serving.step()
        if client == "cancel":
            served[-2 if len(served) > 1 else -1][0].cancel()
    while not all(request.finished for request, _ in served):
        serving.step()
        serving.check()
        [request.read() for request, client in served if client == "slow"]
    for request, _ in served:
        key = tuple(request.prompt), request.sampler
        if key not in WANTED:
            WANTED[key] = engine(max_batch=1, pages=80, page_size=1).submit(request.prompt, 4, request.sampler)
            WANTED[key].engine.run()
        if request.state == "done":
            assert request.answer == WANTED[key].answer and request.logit_digest == WANTED[key].logit_digest
        else:
            assert request.state == "cancelled" and request.answer == WANTED[key].answer[: len(request.answer)]


def crowded(model):
    """The logit digests of one prompt's answers among strangers."""
    serving = engine(model, max_batch=6, budget=30, chunk=30)
    same = []
    for i in range(6):
        same.append(serving.submit(prompt(0, 6), 3))
        serving.submit(prompt(i, 5 + i), 1 + i % 3)
        serving.step()
    serving.run()
    return {request.logit_digest for request in same}


def test_the_check_can_fail():
    assert len(crowded(TILED)) == 1 and len(crowded(follows_the_batch(TILED))) > 1


def test_pages_that_run_out_are_taken_from_the_last_and_computed_again():
    serving = engine(pages=8, budget=32, chunk=32, sharing=False)
    given = [prompt(i, 12) for i in range(4)]
    served = [serving.submit(tokens, 8) for tokens in given]
    serving.run()
    assert serving.counts()["preemptions"] > 0 and served[0].preemptions == 0 < served[1].preemptions
    assert [request.logit_digest for request in served] == [forward_of(TILED, t, r.answer)
                                                            for t, r in zip(given, served, strict=True)]
    assert serving.cache.spare == 8


def test_a_planned_token_is_left_out_if_its_request_gives_up_its_pages():
    """To an older one, whose chunk is planned behind it."""
    serving = engine(pages=8, chunk=4, sharing=False)
    old, young = serving.submit(prompt(0, 24), 2), serving.submit(prompt(1, 5), 8)
    serving.run()
    assert (old.preemptions, young.preemptions) == (0, 1)
    for request in (old, young):
        assert request.logit_digest == forward_of(TILED, request.prompt, request.answer)


def test_a_beginning_that_is_known_is_not_computed_again():
    serving, tokens = engine(), prompt(0, 21)
    first = serving.submit(tokens, 3)
    serving.run()
    before = serving.tokens
    again = serving.submit(tokens, 3)
    serving.run()
    assert (again.answer, again.logit_digest) == (first.answer, first.logit_digest)
    assert serving.counts()["tokens found in the cache"] == 20 and serving.tokens - before == 1 + 2
    longer = serving.submit(tokens + first.answer, 1)  # what was answered is known as well
    serving.step()
    assert longer.state == "done" and serving.counts()["tokens found in the cache"] == 20 + 20


def test_prompts_come_in_chunks_beside_tokens_within_the_budget():
    serving = engine(budget=6, chunk=4, max_batch=3)
    first = serving.submit(prompt(0, 4), 9)
    serving.step()
    second = serving.submit(prompt(1, 11), 2)
    sizes = []
    while not second.answer:
        sizes.append(serving.step())
    assert sizes == [1 + 4, 1 + 4, 1 + 3] and len(first.answer) == 4


def test_drafts_are_verified_in_one_forward_and_change_nothing():
    tokens = prompt(2, 7) * 3
    plain, fast = engine(), engine(speculate=4)
    wanted, request = (serving.submit(tokens, 20) for serving in (plain, fast))
    plain.run()
    fast.run()
    assert (request.answer, request.logit_digest) == (wanted.answer, wanted.logit_digest)
    counts = fast.counts()
    assert counts["drafts"] >= counts["drafts accepted"] > 0 == plain.counts()["drafts"]
    assert fast.steps == plain.steps - counts["drafts accepted"]


def test_an_answer_streams_while_others_go_on():
    serving, told = engine(), []
    first = serving.submit(prompt(0, 5), 6)
    other = serving.submit(prompt(1, 5), 6, on_token=lambda request, token: told.append((request.number, token)))
    got = []
    for token in first:
        got.append(token)
        assert len(other.answer) >= len(got) - 1
    assert got == first.answer and told == [(2, token) for token in other.answer]
    assert first.read() == [] and other.read(2) == other.answer[:2] and other.read() == other.answer[2:]
    assert len(first.times) == 6 and first.arrived <= first.times[0] <= first.times[-1]


def test_a_stop_token_ends_an_answer():
    serving = engine()
    whole = serving.submit(prompt(0, 5), 6)
    serving.run()
    at = whole.answer.index(whole.answer[2])
    short = serving.submit(prompt(0, 5), 6, stop=[whole.answer[2]])
    serving.run()
    assert short.state == "done" and short.answer == whole.answer[: at + 1]


def test_a_request_may_fill_the_context():
    serving = engine(page_size=CONTEXT, pages=1)
    request = serving.submit(prompt(0, CONTEXT - 3), 3)
    serving.run()
    assert request.state == "done" and request.logit_digest == forward_of(TILED, request.prompt, request.answer)


def test_default_ops_are_served():
    model = made("default")
    serving, given = engine(model, speculate=2), [prompt(i, 3 + 6 * i) for i in range(4)]
    served = [serving.submit(tokens, 4) for tokens in given]
    serving.run()
    for tokens, request in zip(given, served, strict=True):
        logits = steps.logits(model, tokens + request.answer)[len(tokens) - 1 : -1]
        best = logits.max(-1).values
        assert (best - logits.gather(1, torch.tensor(request.answer)[:, None])[:, 0]).max() < 1e-4 * best.abs().max()


def test_the_jobs_of_the_load_test_are_of_many_kinds():
    from random import Random

    drawn = jobs(Random(0))
    assert len({job.prompt for job in drawn}) > 60 and {job.sampler.temperature for job in drawn} == {0.0, 1.5}
    assert alone(TILED, drawn[0]).state == "done"
