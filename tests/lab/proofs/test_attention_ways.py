"""Random sequences in seven ways: what a GPU recorded, redone here, and an attention whose bits move, counted."""
import dataclasses

import pytest
import torch

from kernels.bits import digest
from kernels.lab import records
from kernels.lab.proofs import attention as proofs
from kernels.op import DTYPES
from kernels.ops.attention.op import attention_prefill


def test_a_gpu_recorded_hundreds_of_thousands_of_cases_and_no_bit_moved():
    rows = records.load(proofs.WAYS, "h200")
    assert set(rows.implementation) == {"triton"} and rows.cases.sum() > 300_000 and not rows.differ.any()
    assert (rows.cases == 6 * rows["keys"]).all() and set(rows["shape"]) == set(proofs.FORMS)


@pytest.mark.parametrize("place", [0, 1])
def test_this_cpu_has_the_digest_of_the_shortest_of_them(place):
    row = records.load(proofs.WAYS, "h200").sort_values("keys").iloc[place]
    case = proofs.drawn(int(row.seed), 2500)
    assert (case["keys"], case["shape"], case["dtype"]) == (row["keys"], row["shape"], row["dtype"])
    given = attention_prefill.inputs(int(row["keys"]), row["shape"], DTYPES[row["dtype"]], "cpu", int(row.seed))
    assert digest(attention_prefill.python(*given)) == row.digest


def test_the_specification_keeps_its_bits_here(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--machine", "cpu-here"]
    assert proofs.main(["--count", "1", "--most", "50", *out]) == 0
    assert "0 of " in capsys.readouterr().out
    row = proofs.WAYS.read(tmp_path / "cpu-here").iloc[0]
    assert row.differ == 0 and row.cases == 6 * row["keys"]


def test_bits_that_follow_the_number_of_queries_are_counted(monkeypatch):
    def moving(q, k, v, sequences, window=0, lse=False):
        y = attention_prefill.python(q, k, v, sequences)
        return y * 2 if len(q) == 1 else y

    op = dataclasses.replace(attention_prefill, python=moving)
    monkeypatch.setattr(proofs, "attention_prefill", op)
    case = {**proofs.drawn(0, 50), "keys": 45, "prompt": 40, "chunks": [10, 10], "page": 16}
    row = proofs.measured(case, "python", torch.device("cpu"))
    assert row["differ"] == 5 and row["cases"] == 6 * 45


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--most", "40"]])
def test_a_count_that_says_nothing_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        proofs.main(wrong)
    assert "at least" in capsys.readouterr().err
