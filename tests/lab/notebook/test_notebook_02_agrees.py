"""Notebook 02 and the recorded atlas tell the same story: the table in lab/sources.py is held against data/."""
from __future__ import annotations

import pytest

from kernels.lab.atlas import measure as atlas
from kernels.lab.sources import claims as sources

CLAIMS = [(source.name, claim) for source in sources.SOURCES for claim in source.claims]
EXPECTED = [(name, claim, machine, verdict) for name, claim in CLAIMS for machine, verdict in claim.expected.items()
            if machine in atlas.machines()]


def test_a_machine_has_recorded_an_atlas():
    assert atlas.machines(), "record one: python -m kernels atlas"


@pytest.mark.parametrize("name, claim", CLAIMS, ids=lambda value: str(value)[:40])
def test_every_claim_is_a_cell_of_the_atlas(name, claim):
    assert claim.op in atlas.names() and claim.property in atlas.PROPERTIES and claim.dtype in atlas.RECORDED_DTYPES
    for machine in atlas.machines():
        assert atlas.verdict(machine, claim.op, claim.dtype, claim.property) != "not recorded"


@pytest.mark.parametrize("name, claim, machine, verdict", EXPECTED,
                         ids=lambda value: getattr(value, "op", str(value)))
def test_the_recorded_verdict_is_the_one_the_notebook_counts_on(name, claim, machine, verdict):
    assert atlas.verdict(machine, claim.op, claim.dtype, claim.property) == verdict, name


def test_sources_that_break_a_property_have_an_op_that_moves():
    """Of the sources with claims, each moves at least one of its ops on at least one recorded machine."""
    moved = {name for name, claim in CLAIMS for machine in atlas.machines()
             if atlas.verdict(machine, claim.op, claim.dtype, claim.property) == "varies"}
    assert moved == {name for name, _ in CLAIMS}


def test_beside_prints_what_is_recorded(capsys):
    shown = sources.beside("mm", "batch", live=False)
    assert shown == {f"{m}, recorded": atlas.verdict(m, "mm", "float32", "batch") for m in atlas.machines()}
    assert all(f"{verdict} ({where})" in capsys.readouterr().out for where, verdict in list(shown.items())[:1])


def test_beside_says_so_where_nothing_is_recorded(monkeypatch, capsys):
    monkeypatch.setattr(atlas, "machines", list)
    assert sources.beside("mm", "batch", live=False) == {}
    assert "mm, float32, batch: not recorded" in capsys.readouterr().out


def test_beside_measures_when_asked(monkeypatch, capsys):
    monkeypatch.setattr(atlas, "machines", list)
    assert sources.beside("matmul[1d@1d]", "run")["here, live"] in ("same", "varies")
    assert "(here, live)" in capsys.readouterr().out


def test_a_source_prints_all_its_claims_and_sees_a_record_that_disagrees(monkeypatch, capsys):
    assert sources.recorded("batch size")
    assert capsys.readouterr().out.count("batch: ") == 5
    monkeypatch.setattr(atlas, "verdict", lambda *cell: "same")
    assert not sources.recorded("batch size")
    assert sources.recorded("reduced precision")  # it claims nothing
    with pytest.raises(ValueError, match="name must be one of atomic additions, .*, got 'luck'"):
        sources.recorded("luck")


def test_beside_rejects_what_the_atlas_does_not_have():
    with pytest.raises(ValueError, match="op must be one of"):
        sources.beside("no such op", "run")
