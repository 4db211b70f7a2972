"""Notebook 04's plain Python `share` is what the Hopper kernel's programs do, and its shares are complete."""
import ast
import inspect
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lab.notebook import run as notebook

HELD = notebook.held()
HOPPER = Path(inspect.getfile(notebook)).parents[2] / "ops" / "matmul" / "hopper_walk.py"


@cache
def from_notebook(name):
    """The function `name` as notebook 04 defines it, with whatever stands in that cell before it."""
    (path,) = [path for path in HELD if path.name.startswith("04")]
    (cell,) = [c for c in notebook.parse(HELD[path], path.name).cells if f"def {name}(" in c.source]
    space: dict = {}
    exec(ast.unparse(next(n for n in ast.parse(cell.source).body if getattr(n, "name", "") == name)), space)
    return space[name]


@cache
def kernels_functions():
    """The compiled source of `jobs` and `job`, undecorated."""
    body = ast.parse(HOPPER.read_text(encoding="utf-8")).body
    found = [node for node in body if getattr(node, "name", "") in ("job", "jobs")]
    for function in found:
        function.decorator_list = []
    return compile(ast.Module(found, []), HOPPER, "exec")


def from_kernel(program, programs, units, steps, abreast=1, stream=1):
    """The jobs that `jobs` and `job` give one program, without its empty ones; their source, run as Python."""
    space = {"gl": SimpleNamespace(
        constexpr=None, maximum=max, cdiv=lambda a, b: -(-a // b), where=lambda test, a, b: a if test else b,
        program_id=lambda axis: program, num_programs=lambda axis: programs)}
    exec(kernels_functions(), space)
    every = [space["job"](number, units, steps, abreast, stream)
             for number in range(space["jobs"](units, abreast, stream))]
    return [job for job in every if job[1] < job[2]]


@pytest.mark.parametrize(("programs", "units", "steps"), [
    (6, 8, 12), (4, 4, 8), (4, 5, 8), (4, 15, 1), (4, 7, 16), (2, 3, 1), (132, 133, 64), (132, 160, 16),
    (132, 200, 64), (132, 263, 64), (132, 262, 64), (132, 395, 128), (132, 512, 64)])
def test_the_notebook_shares_out_as_the_kernel_does(programs, units, steps):
    share = from_notebook("share")
    lists = [share(program, programs, units, steps) for program in range(programs)]
    assert [from_kernel(program, programs, units, steps) for program in range(programs)] == lists
    done = sorted((unit, step) for jobs in lists for unit, *part in jobs for step in range(*part))
    assert done == [(unit, step) for unit in range(units) for step in range(steps)]


@settings(deadline=None, max_examples=150)
@given(programs=st.integers(1, 9), times=st.floats(1, 4), steps=st.integers(1, 24))
def test_the_kernels_shares_are_complete_and_nobody_waits(programs, times, steps):
    """Every step once; a chain carried over is begun first, taken over last, and by the next program."""
    units = int(programs * times)
    lists = [from_kernel(program, programs, units, steps) for program in range(programs)]
    done = sorted((unit, step) for jobs in lists for unit, *part in jobs for step in range(*part))
    assert done == [(unit, step) for unit in range(units) for step in range(steps)]
    for program, jobs in enumerate(lists):
        assert all(last == steps for _, _, last in jobs[1:]) and all(first == 0 for _, first, _ in jobs[:-1])
        unit, first, _ = jobs[-1]
        assert not first or lists[program - 1][0] == (unit, 0, first)


@settings(deadline=None, max_examples=150)
@given(abreast=st.integers(1, 5), lanes=st.integers(1, 6), times=st.floats(1, 4), steps=st.integers(1, 24))
def test_in_lockstep_programs_share_weight_rows_and_k(abreast, lanes, times, steps):
    """Every step once; programs that are neighbours do the same jobs for one tile of tokens each, a chain is carried
    over to the program that has the next share of the same tokens."""
    programs, weights = abreast * lanes, int(lanes * times)
    lists = [from_kernel(program, programs, weights * abreast, steps, abreast, 2) for program in range(programs)]
    done = sorted((unit, step) for jobs in lists for unit, *part in jobs for step in range(*part))
    assert done == [(unit, step) for unit in range(weights * abreast) for step in range(steps)]
    alone = [from_kernel(lane, lanes, weights, steps) for lane in range(lanes)]
    for program, jobs in enumerate(lists):
        tokens = program % abreast
        assert all(unit % abreast == tokens for unit, _, _ in jobs)
        assert [(unit // abreast, *part) for unit, *part in jobs] == alone[program // abreast]
        unit, first, _ = jobs[-1]
        assert not first or lists[program - abreast][0] == (unit, 0, first)
