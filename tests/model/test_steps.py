"""A prompt in every form, greedy text, digests layer by layer, and prompts that are none."""
import dataclasses

import pytest
import torch
from decoders import TINY, prompt

from kernels.bits import digest, same_bits
from kernels.model import steps
from kernels.model.llama import Llama

MODEL = Llama("tiny", ops="invariant", device="cpu", seed=4)


def test_greedy_tokens_are_the_likeliest_of_one_window():
    tokens = prompt(1, 6)[0].tolist()
    chosen = steps.greedy(MODEL, tokens, 4)
    assert len(chosen) == 4
    assert chosen == steps.logits(MODEL, tokens + chosen)[5:-1].argmax(-1).tolist()


def test_digests_are_those_of_streams_and_logits():
    tokens = prompt(1, 3)[0]
    found, cache, streams = steps.layer_digests(MODEL, tokens), MODEL.cache(1, 3), []
    logits = MODEL.forward(tokens, cache.batch([3], [0]), cache, logits="all", streams=streams)
    assert list(found) == ["embedding", "layer 0", "layer 1", "logits"]
    assert list(found.values()) == [*map(digest, streams), digest(logits)]


def test_the_first_layer_that_differs_is_named():
    """One number of the second layer's last product moves: what was before keeps its digest."""
    other = Llama("tiny", ops="invariant", device="cpu", seed=4)
    other.layers[1].down[0, 0] *= 2
    a, b = (steps.layer_digests(model, prompt(1, 3)[0]) for model in (MODEL, other))
    assert [name for name in a if a[name] != b[name]] == ["layer 1", "logits"]


def test_text_is_its_bytes():
    assert steps.encode(TINY, "né") == steps.encode(TINY, "né".encode()) == [110, 195, 169]
    assert same_bits(steps.logits(MODEL, "ab"), steps.logits(MODEL, [97, 98]))
    assert steps.encode(TINY, torch.tensor([1, 2])) == [1, 2]


@pytest.mark.parametrize("given, more, error, message", [
    ([], 0, ValueError, "at least one token, got an empty one"), ("", 0, ValueError, "empty"),
    ([1, 256], 0, ValueError, "tokens from 0 to 255, the vocabulary of tiny, got 256 at 1"),
    ([-1], 0, ValueError, "got -1 at 0"), ([1.0], 0, TypeError, "integers, got 1.0 at 0"),
    ([True], 0, TypeError, "integers, got True at 0"),
    ([1] * 1025, 0, ValueError, "tiny's context of 1024 tokens, got 1025"),
    ([1] * 1000, 25, ValueError, "got 1000 and 25 to follow"),
])
def test_a_prompt_that_is_none_says_why(given, more, error, message):
    with pytest.raises(error, match=message):
        steps.encode(TINY, given, more)


def test_text_is_refused_where_tokens_are_no_bytes():
    with pytest.raises(TypeError, match="the 4096 tokens of tiny are no bytes, got str"):
        steps.encode(dataclasses.replace(TINY, vocab_size=4096), "text")


def test_a_prompt_may_fill_the_context():
    assert len(steps.encode(TINY, [1] * 1000, 24)) == 1000


@pytest.mark.parametrize("chunks", [[2, 2], [3, 0], [], [4, -1]])
def test_chunks_must_make_up_the_prompt(chunks):
    with pytest.raises(ValueError, match="chunks must be sizes of at least 1 that make up the prompt's 3"):
        steps.logits(MODEL, [1, 2, 3], chunks)


@pytest.mark.parametrize("count", [0, -1, 1.0, True])
def test_a_count_of_tokens_that_cannot_be(count):
    with pytest.raises(ValueError, match="count must be a whole number of at least 1"):
        steps.greedy(MODEL, [1], count)


def test_logits_that_are_no_numbers_are_said():
    broken = Llama("tiny", device="cpu")
    broken.norm[0] = float("nan")
    with pytest.raises(RuntimeError, match="no next token behind 2: its logits are not numbers"):
        steps.greedy(broken, [1, 2], 1)
