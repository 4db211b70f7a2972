"""Decode, verify, roll back: one answer under any load, nothing unverified leaves, and each count by hand."""
from __future__ import annotations

import random

import pytest
import torch

from kernels.inference import Engine, Sampler, digest_of
from kernels.inference.verify import VerifyingEngine
from kernels.model import Llama, steps

MODEL = Llama("tiny", dtype=torch.float32, device="cpu")
PROMPTS = (b"import", b"def f(x):", b"class A:\n    pass", b"#")


def engine(model=MODEL, **settings):
    return VerifyingEngine(model, **{"window": 4, "group": 2, "pages": 96, "page_size": 4, "max_batch": 6, "budget": 24,
                                     "chunk": 8, "reach": 36, **settings})


def answers_alone(count=9, **settings):
    """The answer and the digest of each prompt, in an engine that serves nothing else."""
    found = {}
    for prompt in PROMPTS:
        alone = engine(digests=True, **settings)
        request = alone.submit(prompt, count, verify=True)
        alone.run()
        found[prompt] = request.answer, request.logit_digest
    return found


def under_load(seed, count=9, requests=12, **settings):
    """Deterministic requests among strangers that come and go; what each prompt was answered, and the engine."""
    draw = random.Random(seed)
    busy = engine(digests=True, max_batch=draw.choice((2, 3, 6)), chunk=draw.choice((1, 3, 8)), **settings)
    served = []
    for _ in range(requests):
        prompt = draw.choice(PROMPTS)
        served.append((prompt, busy.submit(prompt, count, verify=True)))
        stranger = busy.submit(draw.randbytes(draw.randint(1, 20)), draw.randint(1, 12))
        for _ in range(draw.randint(0, 4)):
            busy.step()
        if draw.random() < 0.3:
            stranger.cancel()
    busy.run()
    busy.check()
    return served, busy


@pytest.fixture(scope="module")
def alone():
    return answers_alone()


# one answer

@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_has_one_answer_and_one_digest_under_any_load(alone, seed):
    served, busy = under_load(seed)
    assert [(request.state, (request.answer, request.logit_digest)) for _, request in served] \
        == [("done", alone[prompt]) for prompt, _ in served]
    assert busy.passes and busy.dummies and busy.windows > busy.passes


@pytest.mark.parametrize("flip_every", [1, 2, 5])
def test_forced_flips_move_no_answer(alone, flip_every):
    served, busy = under_load(7, flip_every=flip_every)
    assert [(request.answer, request.logit_digest) for _, request in served] == [alone[prompt] for prompt, _ in served]
    assert busy.flips and busy.flips == sum(request.flips for _, request in served)


@pytest.mark.parametrize(("seed", "settings"), [
    (0, {"pages": 9}), (1, {"pages": 9, "sharing": False}), (2, {"speculate": 3}),
    (4, {"pages": 9, "speculate": 2, "flip_every": 3})])
def test_pages_that_run_out_and_drafts_by_lookup_move_no_answer(alone, seed, settings):
    served, busy = under_load(seed, requests=8, **settings)
    assert [(r.state, (r.answer, r.logit_digest)) for _, r in served] == [("done", alone[p]) for p, _ in served]
    assert busy.scheduler.preemptions or "pages" not in settings


def test_pages_that_run_out_take_what_is_sure_with_them(alone):
    busy = engine(digests=True)
    request = busy.submit(PROMPTS[2], 9, verify=True)
    while request.sure <= len(PROMPTS[2]):
        busy.step()
    busy.scheduler.preempt(request)
    assert (request.state, request.pages, request.held, request.sure) == ("waiting", [], 0, 0)
    busy.run()
    assert (request.answer, request.logit_digest) == alone[PROMPTS[2]] and request.preemptions == 1


def test_the_order_fixed_in_every_op_needs_no_shape():
    """Windows as long as they are: the bits are those of the whole text as one window."""
    model, whole = MODEL, MODEL.using("tiled")
    served, busy = under_load(3, requests=6, verifier="tiled", flip_every=4)
    for prompt, request in served:
        assert request.answer == steps.greedy(whole, prompt, 9)
        logits = steps.logits(whole, prompt + bytes(request.answer[:-1]))[len(prompt) - 1 :]
        assert request.logit_digest == digest_of(logits)
    assert busy.dummies == 0 and busy.flips and model.ops_name == "default"


def test_drawn_answers_are_verified_as_well():
    sampler = Sampler(temperature=1.5, top_p=0.9, seed=5)
    found = set()
    for seed in range(3):
        busy = engine(flip_every=seed or None)
        request = busy.submit(b"import", 10, sampler, verify=True)
        others = [busy.submit(bytes([65 + seed + i]) * 3, 10, verify=bool(i)) for i in range(seed)]
        busy.run()
        found.add(tuple(request.answer))
        assert all(other.state == "done" for other in others)
    assert len(found) == 1 and found != {tuple(steps.greedy(MODEL, b"import", 10))}


# one shape

def test_every_pass_has_one_shape_up_to_the_end_of_the_context(monkeypatch):
    busy, shapes = engine(pages=300, reach=MODEL.config.context), []
    forward = busy.verifier.forward
    monkeypatch.setattr(busy.verifier, "forward", lambda tokens, batch, cache: shapes.append(
        (len(tokens), batch.sequences.queries.tolist(), int(batch.positions.max()))) or forward(tokens, batch, cache))
    attention, keys = torch.nn.functional.scaled_dot_product_attention, set()
    context = MODEL.config.context
    long = busy.submit(bytes(context - 6), 6, verify=True)
    busy.submit(b"short", 3, verify=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **more: keys.add(
            (q.shape[0], q.shape[2], k.shape[2])) or attention(q, k, v, **more))
        busy.run()
    assert {(tokens, *queries) for tokens, queries, _ in shapes} == {(8, 4, 4)}
    assert {shape for shape in keys if shape[1] == busy.window} == {(2, 4, context)}
    assert max(last for *_, last in shapes) == context - 1 and len(long.answer) == 6
    busy.check()


def test_what_pads_a_pass_is_written_to_nobodys_page():
    busy = engine(sharing=False)
    request = busy.submit(b"def f(x):", 2, verify=True)
    kv = busy.cache.kv
    kv.fill_(7.0)
    busy.step()
    held = busy.cache.needed(len(request.tokens))
    others = [page for page in range(busy.cache.pages) if page not in request.pages]
    assert len(request.pages) == held and (kv[:, others] == 7).all()
    assert not (kv[:, busy.cache.pages] == 7).all()


# what a reader sees

def test_tokens_leave_once_they_are_verified_and_never_before():
    busy, seen = engine(flip_every=3), []
    request = busy.submit(b"import", 9, verify=True, on_token=lambda _, token: seen.append(token))
    loose = busy.submit(b"import", 9)
    bursts, drafted = [], 0
    while busy.step():
        bursts.append(len(seen))
        drafted = max(drafted, len(request.drafts))
        assert request.answer == seen and list(request.unread) == seen
        assert len(loose.answer) == min(len(bursts), 9)
    assert bursts[:6] == [0, 1, 1, 1, 1, 4]  # two windows of the prompt; two kept and one replaced
    assert drafted == 4 and seen == steps.greedy(MODEL, b"import", 9)


def test_iterating_gives_verified_tokens():
    busy = engine(flip_every=2)
    request = busy.submit(b"class A:", 7, verify=True)
    assert list(request) == steps.greedy(MODEL, b"class A:", 7) and request.state == "done"


def test_a_stop_ends_the_answer_once_it_is_verified():
    greedy = steps.greedy(MODEL, b"import", 12)
    stop = greedy[4]
    busy = engine(flip_every=4)
    request = busy.submit(b"import", 12, verify=True, stop=[stop])
    busy.run()
    assert request.answer == greedy[: greedy.index(stop) + 1] and request.state == "done"
    wrong = engine(flip_every=2)  # a draft that looks like the stop ends nothing
    second = wrong.submit(b"import", 6, verify=True, stop=[(greedy[2] + 1) % 256])
    wrong.run()
    assert second.answer[:3] == greedy[:3]


def test_a_full_buffer_pauses_decode_and_loses_nothing():
    busy = engine()
    request = busy.submit(b"import", 12, verify=True, buffer=4)
    got = []
    while not request.finished:
        busy.run()
        assert len(request.unread) <= 4
        got += request.read(2)
    assert got + request.read() == steps.greedy(MODEL, b"import", 12)
    left = engine()
    given_up = left.submit(b"import", 12, verify=True, buffer=4, patience=3)
    left.run()
    assert given_up.state == "failed" and isinstance(given_up.error, TimeoutError)
    left.check()


# what it counts

def test_counts_by_hand():
    """A prompt of 3, then twice 4 drafts, each kept: of four the oldest waits three steps, the newest none."""
    busy = engine()
    busy.submit(b"abc", 9, verify=True)
    busy.run()
    found = busy.counts()
    assert [found[name] for name in ("verify passes", "windows", "dummy windows", "tokens replayed", "drafts decoded",
                                     "tokens verified", "flips", "tokens recomputed", "steps held back")] \
        == [3, 3, 3, 3 + 4 + 4, 8, 9, 0, 0, 2 * (3 + 2 + 1 + 0)]
    assert found["seconds held back"] > 0


def test_flips_are_counted_by_hand():
    """Each third draft is wrong: 1 2 x 4 | 5 x 7 8 | x 10 11 | x 13 | 14, and behind an x all is dropped."""
    busy = engine(flip_every=3)
    request = busy.submit(b"abc", 9, verify=True)
    busy.run()
    found = busy.counts()
    assert [found[name] for name in ("verify passes", "tokens replayed", "drafts decoded", "flips",
                                     "tokens recomputed", "steps held back")] \
        == [6, 3 + 4 + 4 + 3 + 2 + 1, 14, 4, 1 + 2 + 2 + 1, (3 + 2) + 3 + 0]
    assert (request.flipped_at, request.recomputed, len(request.held_back)) == ([3, 5, 6, 7], 6, 4)


def test_who_asks_for_nothing_pays_nothing():
    plain = Engine(MODEL, pages=96, page_size=4, max_batch=6, budget=24, chunk=8, digests=True)
    busy = engine(digests=True)
    for server in (plain, busy):
        server.served = [server.submit(prompt, 8) for prompt in PROMPTS]
        server.run()
    assert [r.logit_digest for r in plain.served] == [r.logit_digest for r in busy.served]
    assert busy.counts() | plain.counts() == busy.counts() and busy.passes == busy.replayed == 0


def test_a_group_waits_for_others_and_not_for_ever():
    """Two requests that ripen two steps apart share their passes where waiting is allowed."""
    passes = {}
    for wait in (0, 8):
        busy = engine(wait=wait)
        busy.submit(b"abc", 9, verify=True)
        busy.step()
        busy.step()
        busy.submit(b"abd", 9, verify=True)
        busy.run()
        passes[wait] = busy.passes
    assert passes[8] < passes[0]


# pages

def test_verified_pages_are_shared_among_verified_requests_alone():
    busy = engine(page_size=2)
    busy.submit(b"shared prompt", 3)
    busy.run()
    first = busy.submit(b"shared prompt", 3, verify=True)
    busy.run()
    assert busy.scheduler.hits == 0, "what nobody verified was taken for verified"
    second = busy.submit(b"shared prompt", 3, verify=True)
    busy.run()
    assert busy.scheduler.hits == 12 and second.answer == first.answer


def test_a_request_without_pages_waits_and_its_place_is_padded():
    """Pages for one request at a time: who gets none waits for its own window, and no pass has another shape."""
    few = {"pages": 7, "sharing": False}
    alone, busy = answers_alone(**few), engine(digests=True, **few)
    two = [busy.submit(prompt, 9, verify=True) for prompt in (b"class A:\n    pass", b"def f(x):")]
    busy.step()
    assert [request.state for request in two] == ["running", "waiting"] and busy.dummies == busy.passes > 0
    busy.run()
    busy.check()
    assert [(request.answer, request.logit_digest) for request in two] == [alone[bytes(r.prompt)] for r in two]


# what goes wrong

@pytest.mark.parametrize(("settings", "error", "said"), [
    ({"window": 0}, ValueError, "window must be a whole number of at least 1, got 0"),
    ({"group": 0}, ValueError, "group must be a whole number of at least 1, got 0"),
    ({"group": 2.0}, ValueError, "group must be a whole number of at least 1, got 2.0"),
    ({"wait": -1}, ValueError, "wait must be a whole number of at least 0, got -1"),
    ({"reach": 0}, ValueError, "reach must be a whole number of at least 1, got 0"),
    ({"flip_every": 0}, ValueError, "flip_every must be a whole number of at least 1, got 0"),
    ({"verifier": "fast"}, ValueError, "verifier must be one of default, invariant, tiled, got 'fast'"),
    ({"window": 37}, ValueError, "at most the 36 tokens .* or no group could be padded to it, got 37"),
    ({"group": 1 << 40}, MemoryError, "a verify pass of 1099511627776 windows of 4 tokens, each on 36 keys, takes"),
    ({"verifier": "invariant"}, TypeError, "ops='invariant' need bfloat16 or float16"),
])
def test_settings_that_cannot_be_are_refused(settings, error, said):
    with pytest.raises(error, match=said):
        engine(**settings)


def test_requests_that_no_pass_reaches_are_refused_and_leave_nothing():
    busy = engine()
    with pytest.raises(ValueError, match="prompt of 30 tokens and the 9 to follow are 39, and a verify pass reaches"):
        busy.submit(bytes(30), 9, verify=True)
    with pytest.raises(ValueError, match="buffer must hold the 4 tokens of a window, which leave at once, got 3"):
        busy.submit(b"a", 9, verify=True, buffer=3)
    assert not busy.scheduler.requests and busy.submit(bytes(30), 9).state == "waiting"


def test_a_pass_that_fails_changes_no_request_and_is_tried_again(alone, monkeypatch):
    busy, forward, left = engine(digests=True, flip_every=3), VerifyingEngine._padded_rows, [1, 4]

    def fails(self, windows):
        left[0] -= 1
        if left[0] == 0:
            left[:] = left[1:] or [0]
            raise MemoryError("no memory in the middle of a pass")
        return forward(self, windows)

    monkeypatch.setattr(VerifyingEngine, "_padded_rows", fails)
    request, refused = busy.submit(b"import", 9, verify=True), 0
    while not request.finished:
        try:
            busy.step()
        except MemoryError:
            refused += 1
            busy.check()
    assert refused == 2 and (request.answer, request.logit_digest) == alone[b"import"]


def test_logits_that_are_no_numbers_fail_that_request_alone(alone, monkeypatch):
    busy, forward = engine(digests=True), VerifyingEngine._padded_rows

    def spoiled(self, windows):
        rows, begin = forward(self, windows), 0
        for window in windows:
            if window.request.number == 2 and window.wanted > 1:
                rows[begin] = float("nan")
            begin += window.wanted
        return rows

    monkeypatch.setattr(VerifyingEngine, "_padded_rows", spoiled)
    good, bad = (busy.submit(prompt, 9, verify=True) for prompt in (b"import", b"bad"))
    busy.run()
    busy.check()
    assert (good.answer, good.logit_digest) == alone[b"import"]
    assert bad.state == "failed" and "its verified logits are not numbers" in str(bad.error)
    assert len(bad.answer) == 1


def test_a_client_that_raises_or_cancels_ends_its_request_alone(alone):
    busy = engine(digests=True)

    def raises(request, token):
        if len(request.answer) == 3:
            raise KeyError("a client's")

    failed = busy.submit(b"import", 9, verify=True, on_token=raises)
    gone = busy.submit(b"import", 9, verify=True, on_token=lambda request, _: request.cancel())
    steps_on = busy.submit(b"#", 9, verify=True, on_token=lambda *_: busy.step())
    good = busy.submit(b"import", 9, verify=True)
    busy.run()
    busy.check()
    assert failed.state == "failed" and isinstance(failed.error, KeyError) and len(failed.answer) == 3
    assert gone.state == "cancelled" and len(gone.answer) == 1
    assert isinstance(steps_on.error, RuntimeError) and "a step is under way" in str(steps_on.error)
    assert (good.answer, good.logit_digest) == alone[b"import"]


def test_an_engine_stopped_in_the_middle_says_so_and_keeps_no_page():
    busy = engine()
    request = busy.submit(b"import", 9, verify=True)
    for _ in range(3):
        busy.step()
    busy.stop()
    busy.check()
    assert busy.cache.spare == busy.cache.pages and request.state == "failed" and len(request.answer) == 1
