"""What differs from op to op, for the tests of what every op promises (test_every_op.py).

A point such as "7 D=96,residual bfloat16" is 7 rows of an op's inputs; * is every dtype, and a fourth word a dim.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from common import (
    HERE,
    INF,
    NAN,
    ROW_OPS,
    dtypes,
    made,
    needs_triton,
    numbers,
    seeds,
    tensors_and_dims,
    whole_inputs,
)
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.bits import ADVERSARIAL
from kernels.op import DTYPES
from kernels.ops import mean, rms_norm, softmax, swiglu
from kernels.ops.matmul.schedule import Schedule as Tiles


@st.composite
def rows(draw, op, count, widest, device=HERE):
    """`count` rows of an op's inputs, at most `widest` wide."""
    shape = draw(ABOUT[op.name].shapes(widest))
    return op.inputs(draw(count), shape, draw(dtypes), device, draw(seeds)) + draw(ABOUT[op.name].more)


@st.composite
def any_dims(draw, op, count, widest, device=HERE):
    shape, dim = draw(tensors_and_dims(widest))
    return numbers(shape, draw(dtypes), draw(seeds), device), dim, draw(st.booleans())


@dataclass(frozen=True)
class About:
    """What tests must know of an op."""

    schedule: Any  # one that suits every input here
    several: tuple  # those with several rows a program
    pencil: Callable
    errors: Callable
    rounded_twice: tuple[str, Callable]  # a point, and the op with one rounding too many
    shapes: Callable  # widest -> strategy
    good: tuple[dict, ...]  # arguments by name, and others that a careless key would take for bad ones
    bad: dict  # case -> (changes to the first of the good, error, message)
    custom: Callable  # -> arguments for the custom op
    choices: tuple  # (shapes, token counts) whose schedules of choice must be tested ones
    points: dict  # test -> points, or a dict of them by implementations
    examples: tuple[int, int, int]  # how many are drawn: pencil, triton, choices of rows
    widest: tuple[int, int, int]  # and how wide
    more: st.SearchStrategy = st.just(())  # further arguments
    arguments: Callable = rows
    kinds: tuple[str, ...] = ADVERSARIAL
    kernels: tuple = ()  # schedules with one row a program
    hostile_schedule: Any = None
    slow: bool = False  # the schedule of choice takes the interpreter long: `several` choose rows instead
    spoiled: Callable = lambda y: ~y.isfinite()
    backward: bool = False
    far: tuple = ()  # (point, schedules)


asked = set()


def cases(name, *implementations):
    """One test for each op, implementation and point of this name."""
    asked.add(name)
    found = []
    for op, how in ((op, how) for op in ROW_OPS.values() for how in implementations or [None]):
        points = ABOUT[op.name].points.get(name, ())
        if isinstance(points, dict):
            points = next((p for names, p in points.items() if how in names.split()), ())
        for point in (p.replace("*", dtype) for p in points for dtype in (DTYPES if "*" in p else [""])):
            words = [op.name, *([how] if how else []), *point.split()]
            found.append(pytest.param(op, *([how] if how else []), point, id="-".join(words),
                                      marks=needs_triton if how in ("triton", "schedule") else ()))
    return pytest.mark.parametrize(("op", "name", "point") if implementations else ("op", "point"), found)


def each(form, *values):
    """The form with each value in the place of {}."""
    return tuple(form.format(value) for value in values)


def like(*size, **kind):
    return torch.ones(size, **{"device": HERE, **kind})


def by_name(names, arguments, **others):
    return {**dict(zip(names.split(), arguments, strict=True)), **others}


RESIDUAL = ("", ",residual")
NORM = About(
    schedule=rms_norm.Schedule(1, 4), several=(rms_norm.Schedule(2, 4), rms_norm.Schedule(4, 4)),
    pencil=reference.norm, errors=reference.norm_errors,
    rounded_twice=("20 D=1024 bfloat16", reference.norm_rounded_twice),
    shapes=lambda widest: st.builds("D={}{}".format, st.integers(1, widest), st.sampled_from(RESIDUAL)),
    more=st.tuples(st.sampled_from([1e-6, 1e-5, 1e-12, 0.1, 0.5, 3.0])),
    examples=(100, 40, 25), widest=(5000, 3000, 1500),
    good=(by_name("x weight residual", made(OPS["rms_norm"], "3 D=16,residual float32"), eps=1e-6),),
    bad={"weight of another width": ({"weight": like(8)}, ValueError, r"weight.*\(16,\).*\(8,\)"),
         "weight with two dimensions": ({"weight": like(1, 16)}, ValueError, r"weight.*\(1, 16\)"),
         "x of another width": ({"x": like(3, 8)}, ValueError, r"weight.*\(8,\).*\(16,\)"),
         "x without a width": ({"x": like(3, 0), "weight": like(0), "residual": None}, ValueError, r"x .*\(3, 0\)"),
         "x a single number": ({"x": like(), "residual": None}, ValueError, r"x .*\(\)"),
         "x on another device": ({"x": like(3, 16, device="meta"), "residual": None}, ValueError, r"weight.*meta"),
         "residual with fewer rows": ({"residual": like(2, 16)}, ValueError, r"residual.*\(3, 16\).*\(2, 16\)"),
         "residual of another width": ({"residual": like(3, 15)}, ValueError, r"residual.*\(3, 15\)"),
         "residual of one row": ({"residual": like(16)}, ValueError, r"residual.*\(16,\)"),
         "eps zero": ({"eps": 0.0}, ValueError, r"eps.*0"),
         "eps negative": ({"eps": -1e-6}, ValueError, r"eps.*-1e-06"),
         "eps nan": ({"eps": NAN}, ValueError, r"eps.*nan"),
         "eps infinite": ({"eps": INF}, ValueError, r"eps.*inf"),
         "eps a string": ({"eps": "1"}, TypeError, r"eps.*str")},
    custom=lambda: [(*(t if t is None or t.dim() == 1 else t.view(*leading, 48) for t in made(
        OPS["rms_norm"], f"{count} D=48{residual} {dtype}")), eps)
        for residual, eps in (("", 1e-6), (",residual", 1e-5)) for count, leading, dtype in (
            (4, (4,), "float32"), (6, (2, 3), "float32"), (0, (0,), "float32"), (5, (5,), "bfloat16"))],
    choices=(each("D={}", 1, 3, 17, 100, 128, 129, 500, 1000, 1024, 2000, 4096, 8192, 16384, 16385, 70000),
             (*range(1, 3000, 13), 10**5, 10**6)),
    far=(("2 D=1000 bfloat16", (rms_norm.Schedule(1, 4), rms_norm.Schedule(2, 4), rms_norm.Schedule(1, 16, 4))),),
    points={
        "accuracy": {"cuda python triton split": tuple(
            f"20 D={w}{residual} *" for w in (1, 77, 1024, 3000) for residual in RESIDUAL)},
        "threads": ("300 D=3000,residual bfloat16",),
        "pencil": ("6 D=1300 *", "6 D=700,residual *"),
        "hostile": ("9 D=1300 *", "9 D=600,residual *"),
        "widths": tuple(f"2 D={w}{residual} bfloat16" for w in (
            1, 2, 3, 5, 31, 64, 100, 255, 256, 257, 512, 1000, 1023, 1024, 1025, 2047, 3000, 4096, 5120, 8191, 16384,
            16385, 20000, 65535, 65536) for residual in RESIDUAL),
        "schedules": ("7 D=3 *", "7 D=96,residual *", "7 D=1000 *", "7 D=2500,residual *", "7 D=17000 *"),
        "batches": ("13 D=96,residual *", "13 D=1000 *", "13 D=2100,residual *"),
        "hostile batches": ("7 D=600,residual *",),
        "neighbours": ("8 D=300,residual *",),
        "strides": {"python triton": each("6 D={} *", "70", "70,residual", "1040", "1040,residual"),
                    "schedule": ("6 D=70,residual *", "6 D=1040,residual *")},
        "plain": ("4 D=200 bfloat16", "4 D=200,residual bfloat16"),
        "gpu schedules": ("37 D=3 float32", "37 D=100,residual bfloat16", "37 D=1000 float16",
                          "37 D=1025,residual float16", "37 D=4096 bfloat16", "37 D=5120,residual float32",
                          "37 D=8192,residual bfloat16", "37 D=20000,residual bfloat16", "37 D=20001 float32"),
        "gpu batches": ("4096 D=96,residual bfloat16", "4096 D=1000 float32", "4096 D=4096,residual bfloat16",
                        "4096 D=5120 float16", "4096 D=8192,residual bfloat16", "4096 D=8192 float32",
                        "4096 D=20000,residual float16"),
        "gpu specified": tuple(f"{min(2000, 10**6 // w)} D={w}{residual} *" for residual in RESIDUAL
                               for w in (1, 100, 1000, 4096, 5120, 8192, 20000, 65536)),
        "graphs": each("{} D=4096,residual bfloat16", 64, 1, 3000),
        "streams": ("700 D=4096,residual bfloat16", "64 D=8192,residual bfloat16", "3000 D=1000,residual bfloat16",
                    "9 D=20000,residual bfloat16"),
        "elsewhere": ("33 D=4096,residual bfloat16", "3 D=64 bfloat16", "3 D=64,residual bfloat16")})

PAIR = numbers((2, 3))
SOFTMAX = About(
    schedule=softmax.Schedule("resident", 4, rows=2),
    several=tuple(softmax.Schedule("resident", 4, rows=n) for n in (4, 8, 16)),
    kernels=(softmax.Schedule("stream", 4), softmax.Schedule("columns", 4, columns=64)),
    hostile_schedule=softmax.Schedule("resident", 4, rows=16), slow=True, spoiled=torch.isnan,
    pencil=reference.softmax, errors=reference.softmax_errors,
    rounded_twice=("20 D=1000 bfloat16", reference.softmax_rounded_twice),
    shapes=lambda widest: st.builds("D={}".format, st.integers(1, widest)),
    examples=(60, 10, 10), widest=(5000, 2100, 300),
    good=({"x": PAIR, "dim": 1},),
    bad={"dim beyond": ({"dim": 2}, ValueError, r"dim .* 2, got 2"),
         "dim before": ({"dim": -3}, ValueError, r"dim .* 2, got -3"),
         "dim of no dimensions": ({"x": PAIR[0, 0]}, ValueError, r"dim .* 0, got 1"),
         "no dim": ({"dim": None}, TypeError, r"dim .*None"),
         "dim a bool": ({"dim": True}, TypeError, r"dim .*True"),
         "dim a float": ({"dim": 1.0}, TypeError, r"dim .*1\.0"),
         "dim a tuple": ({"dim": (0, 1)}, TypeError, r"dim .*\(0, 1\)"),
         "dim a list": ({"dim": [1]}, TypeError, r"dim .*\[1\]")},
    custom=lambda: [(numbers((2, 3, 4)), 1, None), (numbers((0, 4)), 1, None), (numbers((2, 3)), -1, None),
                    (numbers((2, 3)).half(), -1, torch.float32)],
    choices=(each("D={}", 1, 3, 17, 100, 128, 129, 500, 1000, 1024, 2000, 8192, 8193, 32000, 32768, 32769, 128256),
             (*range(1, 3000, 13), 10**5, 10**6)),
    far=(("2 D=33000 bfloat16", (softmax.Schedule("stream", 8),
                                 softmax.Schedule("columns", 1, flight=4, columns=32, chunks=2))),
         ("2 D=1000 bfloat16", (softmax.Schedule("resident", 4, rows=2),))),
    points={
        "accuracy": {"python": (*each("20 D={} *", 1, 77, 1024, 3000), "4 D=33000 *")},
        "threads": ("30 D=3000 float32",),
        "pencil": ("3 D=700 *", "3 D=2300 *"),
        "hostile": ("3 D=200 float32", "3 D=200 float16"),
        "widths": each("1 D={} bfloat16", 1, 2, 3, 127, 128, 1000, 1023, 1024, 1025),
        "schedules": ("3 D=3 float16", "2 D=40 bfloat16"),
        "batches": {"python": ("7 D=40 *", "7 D=1000 *", "7 D=2100 *"), "triton": ("4 D=1025 bfloat16",)},
        "hostile batches": {"python": ("5 D=600 *",)},
        "neighbours": ("6 D=60 float32",),
        "strides": {"python triton": each("2 D={}", "1 bfloat16", "1 float32", "70 bfloat16", "70 float32"),
                    "schedule": ("2 D=20 float32",)},
        "plain": ("3 D=50 float32",),
        "gpu schedules": ("37 D=1 float32", "37 D=1024 float32", "37 D=32000 bfloat16", "37 D=128256 bfloat16",
                          "37 D=262144 bfloat16"),  # few: a kernel of 32 chunks takes LLVM 9 s, and lengths share them
        "gpu batches": ("9000 D=100 bfloat16", "4400 D=1000 bfloat16", "300 D=40000 bfloat16"),
        "gpu specified": tuple(f"{max(2, 60_000 // w)} D={w} *" for w in (1, 100, 3000, 32000, 40000)),
        "graphs": ("4 D=40000 bfloat16", "1 D=1000 bfloat16", "300 D=1000 bfloat16", "100 D=40000 bfloat16"),
        "streams": ("4 D=40000 bfloat16", "7 D=40000 bfloat16", "600 D=1000 bfloat16", "100 D=40000 bfloat16"),
        "elsewhere": ("9 D=1000 bfloat16", "9 D=40000 bfloat16", "3 D=64 float32")})
LOG_SOFTMAX = replace(SOFTMAX, points={
    **SOFTMAX.points, "gpu schedules": ("37 D=1000 bfloat16", "37 D=32768 bfloat16", "37 D=32769 float32")})

GATED = About(
    schedule=swiglu.Schedule(256, 4), several=(), kernels=(swiglu.Schedule(64, 1), swiglu.Schedule(1024, 4)),
    pencil=reference.gated, errors=reference.gated_errors,
    rounded_twice=("20 F=1000 bfloat16", reference.gated_rounded_twice),
    shapes=lambda widest: st.builds("F={}".format, st.integers(1, widest)),
    examples=(60, 15, 6), widest=(3000, 1500, 300),
    good=({"gate_up": numbers((2, 6))},),
    bad={"of odd width": ({"gate_up": like(3, 15)}, ValueError, r"gate_up .*\(T, 2F\), got \(3, 15\)"),
         "of one dimension": ({"gate_up": like(16)}, ValueError, r"gate_up .*\(16,\)"),
         "of three dimensions": ({"gate_up": like(2, 3, 4)}, ValueError, r"gate_up .*\(2, 3, 4\)")},
    custom=lambda: [(numbers((4, 96)),), (numbers((0, 8)),), (numbers((3, 0)),), (numbers((3, 10)).half(),)],
    choices=(each("F={}", 1, 3, 17, 255, 256, 257, 511, 512, 513, 1000, 1024, 1500, 8192, 14336),
             (*range(1, 3000, 13), 10**5, 10**6)),
    far=(("2 F=1000 bfloat16", (swiglu.Schedule(256, 1), swiglu.Schedule(1024, 4))),),
    points={
        "accuracy": {"python": each("20 F={} *", 1, 77, 1024, 3000), "triton": each("3 F={} *", 1, 77, 700)},
        "threads": ("300 F=3000 float32",),
        "pencil": ("6 F=1300 *",),
        "hostile": ("9 F=300 *",),
        "widths": each("2 F={} bfloat16", 1, 2, 3, 31, 100, 255, 256, 257, 512, 1000, 1023, 1024, 1025, 3000, 14336),
        "schedules": ("7 F=3 float32", "5 F=96 *", "2 F=1000 *", "1 F=4100 bfloat16"),
        "batches": {"python": ("13 F=96 *", "13 F=1000 *"), "triton": ("9 F=96 *", "5 F=300 bfloat16")},
        "hostile batches": {"python": ("7 F=300 *",), "triton": ("3 F=60 float16",)},
        "neighbours": ("6 F=60 *",),
        "strides": {"python": ("6 F=70 *", "6 F=1040 *"), "triton": ("3 F=70 *",), "schedule": ("3 F=70 bfloat16",)},
        "plain": ("4 F=200 bfloat16",),
        "gpu schedules": each("37 F={}", "1 float32", "100 bfloat16", "1000 float16", "8192 bfloat16", "14336 float32"),
        "gpu batches": each("4096 F={}", "96 bfloat16", "1000 float32", "512 float16", "14336 bfloat16"),
        "gpu specified": tuple(f"{min(2000, 10**6 // w)} F={w} *" for w in (1, 100, 1000, 14336)),
        "graphs": each("{} F=8192 bfloat16", 64, 1, 3000),
        "streams": ("700 F=4096 bfloat16", "64 F=8192 bfloat16", "3000 F=1000 bfloat16", "9 F=14336 bfloat16"),
        "elsewhere": ("33 F=8192 bfloat16", "3 F=64 float32")})

X, ARRAY = numbers((1, 4)), np.ones((1, 4), np.float32)
SPLIT = mean.Schedule("split", 1, flight=4, columns=64)
REDUCTION = About(
    schedule=SPLIT, several=(mean.Schedule("rows", 4, rows=2), mean.Schedule("rows", 4, rows=4)),
    pencil=reference.reduction, errors=reference.reduction_errors,
    rounded_twice=("64 D=2048 bfloat16", reference.reduction_rounded_twice),
    arguments=any_dims, shapes=lambda widest: st.builds("D={}".format, st.integers(1, widest)),
    examples=(100, 30, 20), widest=(3000, 2500, 1500),
    good=tuple({"x": X, "dim": dim, "keepdim": keepdim} for dim, keepdim in (
        (1, False), (1, True), (0, False), ((0, 1), False), ((0,), False), (None, False))),
    bad={"x a list, no dim": ({"x": [[1.0]], "dim": None}, TypeError, r"x .*list"),
         "x an array, dims a tuple": ({"x": ARRAY, "dim": (1,)}, TypeError, r"x .*ndarray"),
         "dim too large": ({"dim": 2}, ValueError, r"dim .*x, which has 2, got 2"),
         "dim too small": ({"dim": -3}, ValueError, r"dim .*got -3"),
         "one of the dims too large": ({"dim": (0, 2)}, ValueError, r"dim .*got \(0, 2\)"),
         "dim of a number": ({"x": X[0, 0]}, ValueError, r"dim .*which has 0, got 1"),
         "a dim twice": ({"dim": (0, 0)}, ValueError, r"dim .*once, got \(0, 0\)"),
         "a dim twice, once from the end": ({"dim": (1, -1)}, ValueError, r"dim .*once, got \(1, -1\)"),
         "the dim of a number twice": ({"x": X[0, 0], "dim": (0, -1)}, ValueError, r"dim .*once, got \(0, -1\)"),
         "dim a float": ({"dim": 1.0}, TypeError, r"dim .*int.*got 1.0"),
         "dim a bool": ({"dim": True}, TypeError, r"dim .*int.*got True"),
         "dims with a float": ({"dim": (0, 1.0)}, TypeError, r"dim .*int.*got \(0, 1.0\)"),
         "dims with a bool": ({"dim": (False,)}, TypeError, r"dim .*int.*got \(False,\)"),
         "a list with a bool": ({"dim": [False]}, TypeError, r"dim .*int.*got \[False\]"),
         "dim a string": ({"dim": "1"}, TypeError, r"dim .*got '1'"),
         "dim a set": ({"dim": {1}}, TypeError, r"dim .*got {1}"),
         "dim a tensor": ({"dim": torch.tensor(1)}, TypeError, r"dim .*tensor\(1\)"),
         "keepdim a number": ({"keepdim": 1}, TypeError, r"keepdim .*int"),
         "keepdim None": ({"keepdim": None}, TypeError, r"keepdim .*NoneType")},
    custom=lambda: [(numbers(shape), dims, keepdim) for keepdim in (False, True) for shape, dims in (
        ((4, 48), [1]), ((2, 3, 8), [0, 2]), ((5,), []), ((), []), ((0, 4), [1]))],
    choices=([f"D={w}{inner}" for w in (1, 3, 17, 100, 129, 512, 513, 1000, 2000, 8192, 16384, 16385, 65535, 65536,
                                        10**6, 2**24)
              for inner in ("", ",inner=2", ",inner=9", ",inner=64", ",inner=1000", ",inner=8192")],
             (*range(1, 600, 7), 1000, 4096, 5000, 10**5, 10**6)),
    far=(("2 D=1000 bfloat16 1", (mean.Schedule("rows", 4), mean.Schedule("rows", 4, rows=2),
                                  mean.Schedule("stream", 4), mean.Schedule("split", 1, columns=32))),
         ("2 D=1000 bfloat16 0", (mean.Schedule("inner", 4, columns=64, parts=2), SPLIT))),
    points={
        "accuracy": {"cuda python triton": each("9 D={} *", 1, 77, 1024, 3000)},
        "threads": ("300 D=3000 float32",),
        "pencil": ("6 D=1300 *", "6 D=64 *", "6 D=130,inner=3 *"),
        "hostile": ("5 D=1300 *", "5 D=512 *", "5 D=1030,inner=3 *"),
        "widths": tuple(f"{2 if w < 65536 else 1} D={w} bfloat16" for w in (
            1, 2, 3, 31, 64, 255, 256, 257, 1000, 1023, 1024, 1025, 2047, 3000, 8191, 16384, 16385, 65535, 65536)),
        "schedules": ("2 D=3 float32", "2 D=96 bfloat16", "2 D=1000 float16", "2 D=2500 bfloat16", "2 D=17000 float32",
                      "2 D=3,inner=5 bfloat16", "2 D=20,inner=11 float16", "2 D=1100,inner=2 float32"),
        "batches": ("7 D=96 *", "7 D=2100 *", "7 D=90,inner=6 *"),
        "hostile batches": ("5 D=600 float32",),
        "neighbours": ("6 D=300 *", "6 D=70,inner=9 float32"),
        "strides": {"python triton": tuple(f"3 D={w} {dim}" for w in ("130 bfloat16", "70 float16", "130 float32")
                                           for dim in (1, 0, None)),
                    "schedule": ("3 D=130 bfloat16 1", "3 D=20 float32 0")},
        "plain": ("3 D=30 float32 0", "3 D=30 float32 1", "1 D=1 float32 None"),
        "gpu schedules": ("37 D=3 float32", "37 D=100 bfloat16", "37 D=1000 float16", "37 D=1025 float32",
                          "37 D=4096 bfloat16", "37 D=5120 float32", "37 D=8192 bfloat16", "37 D=20000 bfloat16",
                          "37 D=20001 float32", "37 D=70000 float16", "37 D=3,inner=5 float32",
                          "37 D=100,inner=64 float16", "37 D=1000,inner=33 bfloat16", "37 D=1024,inner=128 float32",
                          "37 D=5000,inner=48 bfloat16", "37 D=20000,inner=3 float32"),
        "gpu batches": ("4096 D=96 bfloat16", "4096 D=1000 float32", "4096 D=4096 bfloat16", "4096 D=5120 float16",
                        "4096 D=8192 bfloat16", "4096 D=8192 float32", "4096 D=20000 float16",
                        "4096 D=100,inner=40 bfloat16", "4096 D=1500,inner=16 float32"),
        "gpu specified": tuple(f"{min(2000, 10**6 // w)} D={w}{inner} *" for w, inner in (
            (1, ""), (100, ""), (1000, ""), (8192, ""), (20000, ""), (65536, ""), (1100, ",inner=8"))),
        "graphs": tuple(f"{tokens} {shape} bfloat16" for tokens in (1, 64)
                        for shape in ("D=4096", "D=100000", "D=3000,inner=64", "D=100000,inner=2")),
        "streams": ("700 D=4096 bfloat16", "2 D=100000 bfloat16", "3000 D=1000 bfloat16", "3 D=20000,inner=8 bfloat16"),
        "elsewhere": ("3 D=4096 bfloat16", "3 D=100000 bfloat16", "3 D=64 bfloat16")})

SMALL = (Tiles("pointer", 16, 16, 16, 1, 2, 1), Tiles("pointer", 16, 32, 64, 4, 3, 2, swap=True),
         Tiles("pointer", 32, 16, 32, 2, 2, 8))
PRODUCT = About(
    schedule=Tiles("pointer", 16, 32, 32), several=SMALL, hostile_schedule=SMALL[0], backward=True,
    kinds=("cancellation", "wide", "subnormal", "signed_zero", "huge"),
    pencil=reference.product, errors=reference.product_errors,
    rounded_twice=("40 N=40,K=64,bias bfloat16", reference.product_rounded_twice),
    shapes=lambda widest: st.builds(
        "N={},K={}{}".format, st.integers(1, 20), st.integers(1, widest), st.sampled_from(["", ",bias"])),
    examples=(20, 8, 8), widest=(40, 20, 20),
    good=(by_name("x weight bias", whole_inputs(3, 8, 128, torch.float32), order=None),
          *({"x": X, "weight": X, "bias": None, "order": order} for order in (None, (1, 4)))),
    bad={"x of another width": ({"x": like(3, 15)}, ValueError, r"x .*128.*\(3, 15\)"),
         "x a single number": ({"x": like()}, ValueError, r"x .*\(\)"),
         "weight with one dimension": ({"weight": like(128)}, ValueError, r"weight.*\(128,\)"),
         "weight with three dimensions": ({"weight": like(1, 8, 128)}, ValueError, r"weight.*\(1, 8, 128\)"),
         "weight transposed": ({"weight": like(128, 8)}, ValueError, r"x .*8.*\(3, 128\)"),
         "bias of another length": ({"bias": like(7)}, ValueError, r"bias.*\(8,\).*\(7,\)"),
         "bias with two dimensions": ({"bias": like(1, 8)}, ValueError, r"bias.*\(1, 8\)"),
         "order a number": ({"order": 2}, TypeError, r"order .*two integers.*got 2"),
         "order of one number": ({"order": (1,)}, TypeError, r"order .*two integers.*got \(1,\)"),
         "order with a bool": ({"order": (True, 128)}, TypeError, r"order .*two integers.*got \(True, 128\)"),
         "order with a float": ({"order": [1.0, 128]}, TypeError, r"order .*two integers.*got \[1.0, 128\]"),
         "order that leaves k over": ({"order": (1, 64)}, ValueError, r"order .*k = 128, got \(1, 64\)"),
         "order of too many segments": ({"order": (3, 64)}, ValueError, r"order .*k = 128, got \(3, 64\)"),
         "order of short segments": ({"order": (4, 32)}, ValueError, r"order .*at least 64.*got \(4, 32\)"),
         "order of odd segments": ({"order": (2, 80)}, ValueError, r"order .*multiple of 32.*got \(2, 80\)")},
    custom=lambda: [(*(t if t is None else t.clone().requires_grad_(wanted) for t in made(
        OPS["matmul"], f"3 N=4,K=6{bias} float32")), order)
        for bias, wanted, order in (("", False, None), ("", True, None), (",bias", True, None),
                                    (",bias", False, [1, 6]))],
    choices=([f"N={n},K={k}" for n, k in ((40, 70), (512, 4096), (4096, 4096), (28672, 4096), (8192, 1024),
                                          (1280, 8192), (4096, 1000))],
             (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096, 16384)),
    points={
        "accuracy": {"cuda python tiled": each("5 N=12,K={},bias *", 1, 40, 700),
                     "triton": (*each("5 N=12,K={},bias *", 1, 40), *each("5 N=12,K=700,bias {}", *(
                         dtype for dtype in DTYPES if runtime.HAS_GPU or dtype != "float32")))},
        "threads": ("30 N=33,K=600 *",),
        "pencil": ("4 N=9,K=1200 bfloat16", "4 N=9,K=1200,bias bfloat16", "4 N=9,K=1200 float16",
                   "4 N=9,K=1200,bias float16"),
        "hostile": ("6 N=7,K=33 float32",),
        "widths": tuple(f"2 N={n},K={k} *" for n, k in ((1, 1), (3, 15), (16, 16), (17, 17), (32, 33))),
        "schedules": ("3 N=5,K=18,bias float32",),
        "batches": {"python": ("11 N=6,K=20 float32", "11 N=33,K=600 bfloat16", "11 N=33,K=600 float16"),
                    "triton": ("11 N=6,K=20 float32", "11 N=9,K=600 bfloat16", "11 N=9,K=24 float16")},
        "hostile batches": {"python": ("6 N=5,K=530 *",)},
        "neighbours": ("6 N=10,K=24,bias *",),
        "strides": {"python schedule": ("5 N=20,K=24,bias *",), "triton": ("5 N=4,K=6,bias float32",)},
        "plain": ("4 N=8,K=16,bias bfloat16",)})

ABOUT = {"rms_norm": NORM, "softmax": SOFTMAX, "log_softmax": LOG_SOFTMAX, "sum": REDUCTION, "mean": REDUCTION,
         "matmul": PRODUCT, "swiglu": GATED}
