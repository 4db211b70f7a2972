"""Notebook 02 and the recorded atlas tell the same story: what its sources expect is compared with data/."""
from __future__ import annotations

import pytest

from kernels.lab.atlas import measure as atlas
from kernels.lab.sources import claims as sources

CELLS = [(source.name, cell) for source in sources.SOURCES for cell in source.expected]
VERDICTS = [(name, cell, machine, verdict) for name, cell in CELLS for machine, verdict in cell.verdicts.items()
            if machine in atlas.machines()]


def test_a_machine_has_recorded_an_atlas():
    assert atlas.machines(), "record one: python -m kernels atlas"


@pytest.mark.parametrize("name, cell", CELLS, ids=lambda value: str(value)[:40])
def test_every_cell_is_one_of_the_atlas(name, cell):
    assert cell.op in atlas.names() and cell.property in atlas.PROPERTIES and cell.dtype in atlas.RECORDED_DTYPES
    for machine in atlas.machines():
        assert atlas.verdict(machine, cell.op, cell.dtype, cell.property) != "not recorded"


@pytest.mark.parametrize("name, cell, machine, verdict", VERDICTS,
                         ids=lambda value: getattr(value, "op", str(value)))
def test_the_recorded_verdict_is_the_expected_one(name, cell, machine, verdict):
    assert atlas.verdict(machine, cell.op, cell.dtype, cell.property) == verdict, name


def test_sources_that_break_a_property_have_an_op_that_moves():
    """Of the sources with cells, each moves at least one of its ops on at least one recorded machine."""
    moved = {name for name, cell in CELLS for machine in atlas.machines()
             if atlas.verdict(machine, cell.op, cell.dtype, cell.property) == "varies"}
    assert moved == {name for name, _ in CELLS}


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


def test_a_source_prints_all_its_cells_and_sees_a_record_that_disagrees(monkeypatch, capsys):
    assert sources.recorded("batch size")
    assert capsys.readouterr().out.count("batch: ") == 5
    monkeypatch.setattr(atlas, "verdict", lambda *cell: "same")
    assert not sources.recorded("batch size")
    assert sources.recorded("reduced precision")  # it expects nothing
    with pytest.raises(ValueError, match="name must be one of atomic additions, .*, got 'luck'"):
        sources.recorded("luck")


def test_beside_rejects_what_the_atlas_does_not_have():
    with pytest.raises(ValueError, match="op must be one of"):
        sources.beside("no such op", "run")
