"""Pages: what is shared, what is taken again, and that the count finds what is lost."""
import pytest
import torch
from served import TILED, engine, prompt

from kernels.inference.pages import ROOT, PagedCache


def cache(pages=6, size=4, **options) -> PagedCache:
    return PagedCache(TILED, pages, size, **options)


def filled(made: PagedCache, tokens: list[int]) -> list[int]:
    """Pages of a request whose full ones are known, and which has given them back."""
    pages = made.take(made.needed(len(tokens)))
    number = ROOT
    for i in range(len(tokens) // made.page_size):
        number = made.keep(number, tokens[i * made.page_size : (i + 1) * made.page_size], pages[i])
    made.release(pages)
    return pages


def test_a_beginning_is_found_page_by_page_and_one_token_is_left_over():
    made, tokens = cache(), prompt(0, 12)
    pages = filled(made, tokens)
    assert made.find(tokens) == pages[:2] and made.find([*tokens, 1]) == pages
    assert made.find(tokens[:7]) == pages[:1] and made.find(tokens[1:]) == []
    assert made.find([*tokens[:4], *tokens[:4], 1]) == pages[:1]  # a page is known behind its own beginning alone
    made.check()


class Same(int):
    """Tokens that all have one hash."""

    def __hash__(self):
        return 1


def test_equal_hashes_share_no_page():
    made = cache()
    first, other = [Same(i) for i in (1, 2, 3, 4)], [Same(i) for i in (1, 2, 3, 5)]
    assert hash(tuple(first)) == hash(tuple(other))
    pages = filled(made, first)
    assert made.find([*first, 0]) == pages and made.find([*other, 0]) == []


def test_the_page_used_longest_ago_is_taken_first_and_a_beginning_last():
    made = cache(pages=5)
    old, new = filled(made, prompt(1, 8)), filled(made, prompt(2, 8))
    made.hold(found := made.find([*prompt(1, 8), 0]))
    made.release(found)  # used again
    assert made.take(3) == [4, *new[::-1]] and made.evictions == 2
    assert made.find([*prompt(2, 8), 0]) == [] and made.find([*prompt(1, 8), 0]) == old
    assert made.take(1) == old[1:] and made.find([*prompt(1, 8), 0]) == old[:1]


def test_two_that_compute_the_same_page_keep_one_known():
    made, tokens = cache(), prompt(3, 4)
    one, other = made.take(1), made.take(1)
    assert made.keep(ROOT, tokens, one[0]) == made.keep(ROOT, tokens, other[0]) == made.number(one[0])
    made.release(one)
    made.release(other)
    assert made.find([*tokens, 0]) == one and made.free[-1] == other[0]
    made.check()


def test_nothing_is_shared_without_sharing():
    made = cache(sharing=False)
    filled(made, prompt(0, 8))
    assert made.find(prompt(0, 9)) == [] and not made.idle and len(made.free) == 6


def test_a_cache_that_forgets_finds_what_is_held_alone():
    made = cache()
    filled(made, prompt(1, 8))
    held = made.take(1)
    made.keep(ROOT, prompt(2, 4), held[0])
    made.forget()
    assert made.find([*prompt(1, 8), 0]) == [] and made.find([*prompt(2, 4), 0]) == held
    assert not made.idle and made.spare == len(made.free) == 5 and made.evictions == 0
    made.check([held])


def test_more_pages_than_there_are_cannot_be_taken():
    made = cache()
    made.take(4)
    with pytest.raises(RuntimeError, match="3 pages were asked for and 2 are spare"):
        made.take(3)
    assert made.spare == 2


def test_pages_of_numbers_that_are_none_are_forgotten_and_zero():
    made, tokens = cache(), prompt(0, 4)
    pages = made.take(1)
    made.keep(ROOT, tokens, pages[0])
    made.kv[:, pages[0]] = float("nan")
    made.release(pages, spoiled=True)
    assert made.find([*tokens, 0]) == [] and not made.kv.isnan().any() and made.spare == 6
    made.check()


def lose_a_page(made):
    made.take(1)


def count_one_too_many(made):
    made.hold(made.take(1))


def free_a_held_one(made):
    made.free.append(made.take(1)[0])


def forget_half(made):
    made.known.clear()


@pytest.mark.parametrize("fault, message", [
    (lose_a_page, "page . is held by 0 requests and counts 1"), (count_one_too_many, "counts 2"),
    (free_a_held_one, "page . is held by 0 requests and counts 1; it is 1 times free"),
    (forget_half, "do not belong together")])
def test_the_count_finds_what_is_lost(fault, message):
    made = cache()
    filled(made, prompt(0, 8))
    made.check()
    fault(made)
    with pytest.raises(RuntimeError, match=message):
        made.check()


def test_slots_and_positions_follow_the_pages():
    batch = cache().batch([3, 1], [3, 0], [[5, 2], [4]], [2, 0])
    assert batch.slots.tolist() == [23, 8, 9, 16] and batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.last.tolist() == [1, 2] and batch.room == (7, 4)
    assert batch.sequences.keys.tolist() == [6, 1]


@pytest.mark.parametrize("wanted, rows", [([1, 1], [1, 3]), ([0, 2], [2, 3]), ([2, 0], [0, 1]), ([0, 0], []),
                                          ([2, 1], [0, 1, 3]), ([1, 2], [1, 2, 3])])
def test_logits_are_those_of_the_last_tokens_that_are_wanted(wanted, rows):
    made = cache()
    batch = made.batch([2, 2], [0, 0], [[0], [1]], wanted)
    tokens = torch.tensor([1, 2, 3, 4])
    every = TILED.forward(tokens, batch, made, logits="all")
    assert torch.equal(TILED.forward(tokens, batch, made), every[rows])


@pytest.mark.parametrize("change, message", [
    ({"pages": 0}, "pages must be a whole number of at least 1, got 0"), ({"page_size": 1.5}, "page_size .* got 1.5")])
def test_pages_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        engine(**change)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made():
    with pytest.raises(MemoryError, match="a KV cache of 1000000000000 pages of 4 tokens for tiny takes .* GB free"):
        engine(pages=10**12)
