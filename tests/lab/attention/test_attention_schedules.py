"""Schedules timed beside each other: a line each, with a verdict, whatever one of them cannot do."""
import csv
import io

import pytest

from kernels import runtime
from kernels.lab.attention import schedules
from kernels.ops.attention.op import attention_decode

pytestmark = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")


def lines(capsys, *argv):
    assert schedules.main([*argv, "--repeats", "1", "--clock", "call", "--width", "16", "--heads", "2/1"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_each_schedule_has_a_line_and_one_that_cannot_says_why(capsys):
    found = lines(capsys, "--requests", "1", "--contexts", "60", "--page", "16", "--schedules",
                  "spread 16 warps=4 stages=3", "hopper_spread 64 warps=4 stages=3", "--contenders", "triton",
                  "cuda")
    assert [row["contender"] for row in found] == [
        "spread 16 warps=4 stages=3", "hopper_spread 64 warps=4 stages=3", "triton", "cuda"]
    assert {(row["heads"], row["requests"], row["context"], row["page"]) for row in found} == {("2/1", "1", "60", "16")}
    assert found[0]["same_bits"] == found[2]["same_bits"] == "True" and float(found[0]["us_p50"]) > 0
    assert runtime.HAS_GPU or "sm_90" in found[1]["same_bits"] and not found[1]["us_p50"]


def test_other_bits_are_told():
    """Inverse test: a contender that moves a bit."""
    def moving(q, k, v, s):
        return attention_decode.python(q, k, v, s) * 1.01
    row, = schedules.measured(attention_decode, 1, "H=2,KV=1,D=16,context=20", {"moving": moving}, "call", 1)
    assert row["same_bits"] is False and row["us_p50"] > 0


def test_queries_of_one_sequence_are_a_chunk(capsys):
    row, = lines(capsys, "--queries", "2", "--contexts", "20", "--schedules", "walk 16 warps=4 stages=3",
                 "--contenders", "triton")[:1]
    assert (row["queries"], row["requests"], row["same_bits"]) == ("2", "1", "True")


def test_heads_that_are_no_heads_are_named():
    with pytest.raises(ValueError, match="heads must read like 32/8, got '32'"):
        schedules.shape_of("32", 1024)
