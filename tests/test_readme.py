"""The README's numbers are those of data/: every table under "Measured" is computed again from data/h200's CSV."""
import re

import pandas as pd
import pytest

from kernels import tables
from kernels.lab import records
from kernels.lab.proofs.certificates import CERTIFICATES, stand_in
from kernels.lab.window.measure import VERIFY_COST
from kernels.op import Shape
from kernels.ops.matmul.schedule import Schedule

README = (records.ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Measured on an H200")[2].partition("\n## ")[0]
TABLES = [[[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines()]
          for block in re.findall(r"(?:^\|.*\n)+", SECTION, re.M)]
SWEEP = records.load(machine="h200").query("clock == 'cold' and dtype == 'bfloat16'").set_index(
    ["op", "shape", "implementation", "tokens"]).us_p50
WINDOWS = records.load(VERIFY_COST, "h200").query("curve == 'graph'").set_index(["ops", "tokens"])


def one(found) -> float:
    """The only value found: a key that fits two rows would compare with either."""
    assert found.size == 1
    return float(found.item() if hasattr(found, "item") else found)


def rms_norm(label, tokens, state):
    named = {"PyTorch's default (add, then `F.rms_norm`)": "cuda", "`torch.compile` of the default": "compile",
             "FlashInfer's `fused_add_rmsnorm`": "flashinfer", "`rms_norm.triton` (fixed order)": "triton"}
    return one(SWEEP["rms_norm", "D=8192,residual", named[label], tokens])


def reductions(label, tokens, state):
    default = re.fullmatch(r"`(?:F|torch)\.(\w+)`, (\d+) wide", label)
    op, width = state["default"] = default.groups() if default else state["default"]
    assert default or label == f"`{op}.triton`"
    return one(SWEEP[op, f"D={width}", "cuda" if default else "triton", tokens])


def matmul(label, tokens, state):
    named = {"`F.linear` (cuBLAS)": "cuda", "frozen": "frozen", "`matmul.triton`": "triton"}
    weight, name = label
    state["weight"] = weight or state["weight"]
    return one(SWEEP["matmul", "N={},K={}".format(*state["weight"].split(" x ")), named[name], tokens])


def window(label, tokens, state):
    if label.startswith("floor"):
        return one(WINDOWS.loc[("invariant", tokens), "floor_ms"])
    return one(WINDOWS.loc[({"default ops": "default", "`invariant` ops": "invariant"}[label], tokens), "ms_p50"])


@pytest.mark.parametrize("number, lookup, labels, rows", [
    (0, rms_norm, 1, 4), (1, reductions, 1, 6), (2, matmul, 2, 9), (3, window, 1, 3)],
    ids=lambda value: getattr(value, "__name__", ""))
def test_a_table_is_what_was_recorded(number, lookup, labels, rows):
    header, rule, *lines = TABLES[number]
    assert len(lines) == rows and set("".join(rule)) <= set("-: ")
    tokens = [int(re.match(r"\d+", text)[0]) for text in header[labels:]]
    state, wrong = {}, []
    for line in lines:
        label = line[0].replace("**", "") if labels == 1 else tuple(cell.replace("**", "") for cell in line[:labels])
        for count, printed in zip(tokens, line[labels:], strict=True):
            value = lookup(label, count, state)
            if f"{value:.1f}" != printed:
                wrong.append(f"{label}, {count}: printed {printed}, recorded {value}")
    assert not wrong


def test_the_limits_of_wide_softmax_are_those_recorded():
    rows = records.load(machine="h200").query("clock == 'cold' and tokens == 4096 and implementation == 'triton'")
    rows = rows[rows.op.isin(["softmax", "log_softmax"])].set_index(["dtype", "shape"]).gbytes_per_s
    share = 100 * rows / records.read_machine(records.DATA / "h200")["copy_gbytes_per_s"]
    wide = [*share.loc["bfloat16"], *share["float32", "D=128256"]]
    assert len(wide) == 6 and f"reach {min(wide):.0f}-{max(wide):.0f} % of a copy's bandwidth at 4096" in README
    narrow = share["float32", "D=32000"]
    assert {f"rows 32000 wide reach {value:.0f} %" in README for value in narrow} == {True}


def test_the_certificates_are_those_recorded():
    rows = pd.concat([records.load(CERTIFICATES, machine) for machine in records.machines(CERTIFICATES.file)])
    assert set(rows.machine) == {"h200", "h100"}
    assert (rows.groupby(["dtype", "shape", "input", "tokens"]).digest.nunique() == 1).all()
    assert f"{rows.schedule.nunique()} schedules and {len(rows)} comparisons on an H200 and an H100" in README
    proved = set(rows[["machine", "dtype", "shape", "schedule"]].itertuples(index=False, name=None))
    stored = [(machine, dtype, *stand_in(n, k), str(schedule)) for machine in ("h200", "h100")
              for dtype, columns in tables.load(machine, Schedule.parse)["matmul"].items()
              for (n, k), column in columns.items() for schedule in column.values()]
    assert len(stored) > 200 and {(m, d, f"N={n},K={k}", s) for m, d, n, k, s in stored} <= proved


def test_where_products_are_not_ahead_is_as_recorded():
    us = SWEEP.loc["matmul"].unstack("implementation")
    speed = us.cuda / us.triton
    (lowest, tokens), slow = speed.idxmin(), (speed < 0.97).sum()
    assert (f"at {slow} points it is below 0.97, lowest {speed.min():.2f} ({_weight(lowest)} at {tokens} "
            "tokens)") in README
    call = records.load(machine="h200").query("op == 'matmul' and clock == 'call'").pivot_table(
        index=["shape", "tokens"], columns="implementation", values="us_p50")
    later = (call.triton - call.cuda).dropna().reset_index(name="us")
    few = later[later.tokens <= 64].us
    assert (f"at most {few.max():.1f} us slower than the default up to 64 tokens, and faster at {(few < 0).sum()} of "
            f"those {len(few)} points") in README
    more = later[later.tokens > 64]
    worst = more.loc[more.us.idxmax()]
    ours, default = call.loc[(worst["shape"], worst.tokens), ["triton", "cuda"]]
    assert len(more) == 6 and (f"the worst is {worst.us:.1f} us slower ({_weight(worst['shape'])} at {worst.tokens} "
                               f"tokens: {ours:.1f} us against {default:.1f})") in README


def behind(op, clock, other, **only):
    """(points at which the schedule takes longer than `other`, points, the largest ratio) on an H200."""
    rows = records.load(machine="h200").query("op == @op and clock == @clock")
    if only:
        rows = rows[rows["shape"].str.contains("residual") == only["residual"]]
    us = rows.pivot_table(index=["dtype", "shape", "tokens"], columns="implementation", values="us_p50")
    ratio = (us.triton / us[other]).dropna()
    return (ratio > 1).sum(), len(ratio), f"{ratio.max():.2f}"


def test_where_rows_are_not_ahead_is_as_recorded():
    points, of, most = behind("rms_norm", "call", "cuda", residual=False)
    assert f"behind the default at {points} of {of} points on `call`, taking up to {most} times as long" in README
    (cold, of, a), (graph, _, b), (call, _, c) = (behind("rms_norm", clock, "compile")
                                                  for clock in ("cold", "graph", "call"))
    assert (f"at {cold} of {of} points on `cold` (up to {a}), at {graph} on `graph` ({b}) and at {call} on `call` "
            f"({c})") in README
    (mean, of, a), (log, _, b), (soft, _, c) = (behind(op, "call", "cuda") for op in ("mean", "log_softmax", "softmax"))
    assert (f"`mean` at {mean} of {of} points (up to {a} times as long), `log_softmax` at {log} ({b}) and `softmax` at "
            f"{soft} ({c})") in README
    log, _, most = behind("log_softmax", "graph", "cuda")
    assert f"on `graph`, `log_softmax` at {log} ({most})" in README
    (cold, of, a), (graph, _, b) = (behind("mean", clock, "compile") for clock in ("cold", "graph"))
    assert f"`mean` is at {cold} of {of} points on `cold` ({a}) and at {graph} on `graph` ({b})" in README


def test_where_rows_are_ahead_everywhere_nothing_is_said():
    """The list above is complete."""
    for op in ("rms_norm", "softmax", "log_softmax", "mean"):
        assert behind(op, "cold", "cuda")[0] == 0, op
    for op in ("rms_norm", "softmax", "mean"):
        assert behind(op, "graph", "cuda")[0] == 0, op
    assert behind("mean", "call", "compile")[0] == 0 and behind("rms_norm", "call", "cuda", residual=True)[0] == 0


def _weight(shape):
    return "{N} x {K}".format(**Shape.parse(shape))


def test_no_table_is_left_out():
    assert len(TABLES) == 4
    assert "\n|" not in re.sub(r"(?:^\|.*\n)+", "", SECTION, flags=re.M)
