"""A server that verifies the requests of one prompt: one answer under twenty servers, though drafts are changed."""
from __future__ import annotations

import pytest
import torch

from kernels.lab import records
from kernels.lab.serving import loads, measure, recorded, served
from kernels.model import Llama

TINY = Llama("tiny", dtype=torch.bfloat16, device="cpu")


@pytest.fixture(scope="module")
def found():
    """What three servers, each with settings of its own, gave."""
    return [served.serve(TINY, loads.random_load(TINY.config, seed, 5, 3, 10), verify=True) for seed in range(3)]


def test_one_answer_and_one_digest_over_servers_of_many_kinds(found):
    total = found[0] + found[1] + found[2]
    assert total.requests == 15 and len(total.answers) == 1 and len(total.digests) == 1
    (answer,) = total.answers
    assert len(answer) == 10


def test_drafts_were_changed_and_no_reader_saw_one(found):
    assert all(one.counts["flips"] > 0 and one.counts["tokens recomputed"] > 0 for one in found)
    loose = served.serve(TINY, loads.random_load(TINY.config, 0, 5, 3, 10))
    assert set(loose.answers) == set(found[0].answers), "the model is too small to flip by itself"


def test_strangers_are_not_verified(found):
    assert all(one.counts["tokens verified"] == 5 * 10 for one in found)


def test_every_server_verifies_at_one_shape():
    """Pages of several sizes, and still as many keys."""
    every = [loads.random_load(TINY.config, seed) for seed in range(20)]
    assert len({load.server.page_size for load in every}) == 4
    assert len({served._engine(TINY, load, True).shape.keys for load in every}) == 1


def test_it_is_recorded_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_loaded", lambda dtype, device: TINY)
    said = []
    plan = recorded.Plan("byte", ("tiled", recorded.VERIFIED), 1, 2, 16, (0.0,))
    rows = recorded.record(plan, tmp_path, said=said.append).set_index(["ops", "load"])
    assert rows.loc["verified", "all"].answers == rows.loc["tiled", "all"].answers == 1
    assert any(line.startswith("verified, random 0") and "flips" in line and "seconds" not in line for line in said)
    assert recorded._arguments(["--ops", "verified"]).ops == ["verified"]


@pytest.mark.parametrize("machine", sorted({*records.OURS} & {*records.machines(recorded.ANSWERS.file)}))
def test_what_is_recorded_with_a_fixed_order_or_a_verifier_is_one_answer(machine):
    rows = recorded.ANSWERS.read(records.DATA / machine)
    assert recorded.EVERY in set(rows.load)
    fixed = rows[rows.ops.isin(["invariant", "tiled"])]
    assert (fixed.answers == 1).all() and (fixed.logit_digests == 1).all()
    assert (rows[rows.ops == recorded.VERIFIED].answers == 1).all()
