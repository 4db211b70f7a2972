"""The load test: some hundred random requests with faults, and that it finds what it looks for."""
import pytest

from kernels.inference import Sampler
from kernels.inference.pages import PagedCache
from kernels.lab import load
from kernels.lab.load import main


def test_no_page_is_lost_and_no_answer_changes():
    tally = load.load(200, seed=4)
    assert tally, str(tally)
    assert sum(tally.ended.values()) == 200 and tally.ended["done"] > 100
    assert {"cancelled", "gone", "raised", "refused", "poisoned", "stopped"} <= set(tally.ended)
    happened = ("preemptions", "tokens found in the cache", "pages taken again", "drafts")
    assert min(tally.engine[what] for what in happened) > 0


def test_a_model_that_chooses_the_poisoned_token_is_served_as_it_is_alone():
    clients = load.Clients(load.small_model(), seed=1)
    clients.jobs = [load.Job((1, 2, 3), 3, Sampler(temperature=1.5, seed=59))]
    alone = clients.alone(clients.jobs[0])
    assert alone.answer[-1] == load.POISON and isinstance(alone.error, RuntimeError) and len(alone.answer) == 2
    clients.serve(30)
    assert clients.tally and not clients.tally.ended["done"], str(clients.tally)
    assert clients.tally.ended["poisoned"] > 10


def test_an_error_that_nobody_caused_is_counted():
    clients = load.Clients(load.small_model(), seed=1)
    spoiled = clients.model.using("tiled")
    spoiled.head = spoiled.head * float("nan")
    clients.model, clients._compare = spoiled, lambda *_: None
    clients.serve(20)
    assert not clients.tally and "has no next token" in clients.tally.lost[0]


def test_an_answer_that_changes_is_counted():
    from dataclasses import replace

    model = load.small_model()
    real = model.ops.linear
    model.ops = replace(model.ops, linear=lambda x, weight, order: real(x, weight, order) * (1 + len(x) * 2.0**-12))
    tally = load.load(40, seed=2, model=model)
    assert not tally and tally.changed > 10 and not tally.lost


def test_a_lost_page_is_counted(monkeypatch):
    real = PagedCache.release
    monkeypatch.setattr(PagedCache, "release", lambda self, pages, spoiled=False: real(self, pages[1:], spoiled))
    tally = load.load(30, seed=2)
    assert not tally and "counts" in tally.lost[0]


def test_the_command_prints_its_counts(capsys):
    assert main(["--requests", "20", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "20 requests:" in said and "0 answers changed, 0 pages or errors lost" in said and "tiled ops" in said


def test_a_count_that_cannot_be():
    with pytest.raises(ValueError, match="requests must be a whole number of at least 1, got 0"):
        load.load(0)
