"""What no request can be, and what clients do: told to that request alone; others' bits and the pages stay."""
import pytest
import torch
from served import CONTEXT, TILED, engine, forward_of, prompt

from kernels.inference import Sampler
from kernels.lab.load import POISON


def beside(happens, **changes):
    """Two requests of which nothing may be noticed, while `happens(engine)` between their steps."""
    serving = engine(**changes)
    others = [serving.submit(prompt(i, 7 + i), 6) for i in range(2)]
    serving.step()
    found = happens(serving)
    serving.check()
    serving.run()
    serving.check()
    for request in others:
        assert request.state == "done" and request.logit_digest == forward_of(TILED, request.prompt, request.answer)
    assert serving.cache.spare == serving.cache.pages
    return found


@pytest.mark.parametrize("given, error, message", [
    (([], 1), ValueError, "prompt must have at least one token, got an empty one"),
    (([1] * CONTEXT, 1), ValueError, "context of 64 tokens, got 64 and 1 to follow"),
    (([256], 1), ValueError, "tokens from 0 to 255, .* got 256 at 0"),
    (([1.0], 1), TypeError, "prompt must be integers, got 1.0 at 0"),
    (([1], 0), ValueError, "count must be a whole number of at least 1, got 0"),
    (([1], None), ValueError, "count must be a whole number of at least 1, got None"),
    (([1] * 30, 12), ValueError, r"prompt of 30 tokens and the 12 to follow need 11 pages of 4 tokens, .* has 10"),
    (([1], 1, 0.5), TypeError, "sampler must be a Sampler, got float"),
])
def test_a_request_that_cannot_be_is_refused(given, error, message):
    def happens(serving):
        with pytest.raises(error, match=message):
            serving.submit(*given)
        return serving.number
    assert beside(happens, pages=10) == 2


@pytest.mark.parametrize("name", ["buffer", "patience"])
def test_a_buffer_or_a_patience_that_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        engine().submit([1], 1, **{name: 0})


@pytest.mark.parametrize("changes, message", [
    ({"max_batch": 0}, "max_batch must be a whole number of at least 1, got 0"),
    ({"chunk": 0}, "chunk must be .* at least 1, got 0"), ({"speculate": -1}, "speculate must be .* at least 0"),
    ({"budget": 3}, "budget must be a whole number of at least 4 = max_batch, got 3"),
    ({"graphs": True}, "graphs must be False or None without a GPU, got True for a model on cpu")])
def test_an_engine_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        engine(**changes)


def test_a_request_that_needs_all_pages_is_served_alone():
    serving = engine(pages=10)
    whole, short = serving.submit(prompt(0, 30), 11), serving.submit(prompt(1, 3), 2)
    serving.run()
    assert whole.state == short.state == "done" and serving.cache.spare == 10


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_a_request_cancelled_in_its_prompt_or_in_its_answer(steps):
    def happens(serving):
        request = serving.submit(prompt(5, 20), 9)
        for _ in range(steps):
            serving.step()
        serving.check()
        held = request.held
        request.cancel()
        request.cancel()  # no more than once
        assert request.state == "cancelled" and list(request) == request.answer and request.pages == []
        return held, request.answer
    held, answer = beside(happens)
    assert (held > 0) == (steps > 0) and bool(answer) == (steps == 7)


def test_a_request_cancelled_while_it_waits_for_a_place():
    def happens(serving):
        serving.submit(prompt(5, 3), 3)
        request = serving.submit(prompt(6, 3), 3)
        serving.step()
        assert request.state == "waiting"
        request.cancel()
        return list(request)
    assert beside(happens, max_batch=3) == []


def test_a_client_that_stops_reading_pauses_its_request_and_no_other():
    serving = engine(pages=10)
    slow = serving.submit(prompt(0, 8), 7, buffer=2)
    serving.run()
    assert slow.state == "running" and len(slow.answer) == 2 and serving.step() == 0
    others = [serving.submit(prompt(i, 20), 9) for i in (1, 2)]  # they need its pages
    serving.run()
    assert [request.state for request in others] == ["done"] * 2 and slow.state == "waiting" and slow.preemptions == 1
    assert list(slow) == slow.answer and slow.state == "done"
    assert slow.logit_digest == forward_of(TILED, slow.prompt, slow.answer)


def test_paused_requests_leave_their_places_to_others():
    serving = engine(max_batch=1)
    slow, other = serving.submit(prompt(0, 8), 7, buffer=1), serving.submit(prompt(1, 8), 3)
    serving.run()
    assert (slow.state, other.state) == ("waiting", "done")


def test_a_client_that_does_not_come_back_is_given_up():
    def happens(serving):
        request = serving.submit(prompt(3, 4), 9, buffer=2, patience=3)
        serving.run()
        assert request.state == "failed" and len(request.answer) == 2
        with pytest.raises(TimeoutError, match="request 3 was given up: its client left 2 tokens unread for 3 steps"):
            list(request)
        return True
    assert beside(happens)


def test_a_buffer_is_never_more_than_full_with_drafts():
    serving = engine(speculate=4)
    slow = serving.submit(prompt(2, 7) * 3, 20, buffer=2)
    while not slow.finished:
        serving.step()
        assert len(slow.unread) <= 2
        slow.read()
    assert serving.accepted > 0
    slow = serving.submit(prompt(2, 3), 20, buffer=2)
    slow.lookup.draft = lambda most: [0] * most
    assert [serving.step(), slow.read(1) and serving.step()] == [3, 2]  # room for two: a token and one draft
    assert slow.logit_digest == forward_of(TILED, slow.prompt, slow.answer)


def test_an_on_token_that_raises_ends_its_request_alone():
    def hang_up(request, token):
        raise ConnectionResetError("gone")

    def happens(serving):
        request = serving.submit(prompt(3, 4), 9, on_token=hang_up)
        serving.run()
        with pytest.raises(ConnectionResetError, match="gone"):
            list(request)
        return request.state, len(request.answer)
    assert beside(happens) == ("failed", 1)


def test_an_on_token_may_cancel_and_submit_but_not_step():
    serving = engine()
    other, more = serving.submit(prompt(1, 4), 9), []

    def meddle(request, token):
        other.cancel()
        more.append(serving.submit(prompt(2, 3), 1))
        serving.step()
    first = serving.submit(prompt(0, 2), 2, on_token=meddle)
    serving.run()
    assert other.state == "cancelled" and more[0].state == "done"
    with pytest.raises(RuntimeError, match="a step is under way: on_token may read, cancel and submit"):
        list(first)
    serving.check()


@pytest.mark.parametrize("at", [0, 6])
def test_logits_that_are_no_numbers_end_their_request_alone(at):
    tokens = prompt(3, 7)
    tokens[at] = POISON

    def happens(serving):
        request = serving.submit(tokens, 3)
        serving.run()
        with pytest.raises(RuntimeError, match="request 3 has no next token behind 7: its logits are not numbers"):
            list(request)
        assert not serving.cache.kv[:, : serving.cache.pages].isnan().any()
        return request.answer
    assert beside(happens) == []


def test_a_prompt_with_a_nan_is_shared_with_nobody():
    """It reaches the tokens before it too, in whose blocks it lies."""
    head = prompt(3, 10)
    serving = engine(chunk=12)
    broken = serving.submit([*head, POISON, *prompt(4, 3)], 3)
    serving.step()
    broken.cancel()
    whole = serving.submit([*head, *prompt(5, 4)], 3)
    serving.run()
    assert whole.state == "done" and whole.logit_digest == forward_of(TILED, whole.prompt, whole.answer)


def test_an_engine_stopped_in_the_middle():
    with engine(max_batch=2) as serving:
        done = serving.submit(prompt(0, 3), 1)
        running, waiting = serving.submit(prompt(1, 9), 5), serving.submit(prompt(2, 9), 5)
        serving.step()
        serving.step()
    assert (done.state, running.state, waiting.state) == ("done", "failed", "failed") and list(done) == done.answer
    for request in (running, waiting):
        with pytest.raises(RuntimeError, match=f"the engine was stopped before request {request.number} was done"):
            list(request)
    with pytest.raises(RuntimeError, match="the engine was stopped and takes no more requests"):
        serving.submit([1], 1)
    serving.check()
    assert serving.cache.spare == serving.cache.pages and serving.step() == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()])
def test_a_forward_that_raises_has_changed_nothing(error, monkeypatch):
    def happens(serving):
        request = serving.submit(prompt(4, 12), 4, Sampler(temperature=1.0, seed=3))
        with monkeypatch.context() as patched:
            patched.setattr(serving.model, "forward", lambda *_: (_ for _ in ()).throw(error))
            for _ in range(2):
                with pytest.raises(type(error)):
                    serving.step()
                serving.check()
        serving.run()
        return request
    request = beside(happens)
    assert request.state == "done" and request.logit_digest == forward_of(TILED, request.prompt, request.answer)
