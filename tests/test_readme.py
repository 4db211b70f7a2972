"""README's numbers are those of data/: it is what figures/readme.py writes, which follows the data, and its tables are
computed a second way here.
"""
import importlib
import re
import shutil
from functools import cache

import pandas as pd
import pytest

import figures
from figures import readme, readme_model
from kernels.lab import records
from kernels.lab.moving.cost import MODE_COST
from kernels.lab.parallel.measure import TENSOR_PARALLEL
from kernels.lab.proofs.certificates import CERTIFICATES
from kernels.lab.proofs.tensor_core import TENSOR_CORE
from kernels.lab.serving.recorded import ANSWERS
from kernels.lab.serving.speed import SERVING
from kernels.lab.window.measure import VERIFY_COST
from kernels.op import Shape

README = (records.ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Measured on an H200")[2].partition("\n## ")[0]
TABLES = [[[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines()]
          for block in re.findall(r"(?:^\|.*\n)+", SECTION, re.M)]
SWEEP = records.load(machine="h200").query("clock == 'cold' and dtype == 'bfloat16'").set_index(
    ["op", "shape", "implementation", "tokens"]).us_p50
SERVED = records.load(SERVING, "h200").query("model != 'byte'").set_index(["phase", "ops", "batch", "context"])
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


def test_a_servers_speed_is_what_was_recorded():
    (_, *batches), _, *lines = TABLES[4]
    named = {"default ops": "default", "`frozen`: one schedule for all": "frozen", "`invariant` ops": "invariant"}
    assert [line[0] for line in lines] == list(named) and len(batches) == 5
    for label, *printed in lines:
        found = [one(SERVED.loc[("decode", named[label], int(batch), 1024), "tokens_per_s_p50"]) for batch in batches]
        assert printed == [f"{value:,.0f}" for value in found]


@pytest.mark.parametrize("number, lookup, labels, rows", [
    (0, rms_norm, 1, 4), (1, reductions, 1, 6), (3, matmul, 2, 9), (5, window, 1, 3)],
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


def test_the_readme_is_what_make_figures_writes():
    """Red? Run make figures."""
    assert readme.written(README) == README


def test_the_two_orders_give_what_is_printed():
    code, printed = re.search(r">>> (.+)\n(.+)\n```", README).groups()
    assert repr(eval(code)) == printed  # noqa: S307 - a line of our README
    assert len({*eval(code)}) == 2  # noqa: S307


@pytest.mark.parametrize("text", ["", "<!-- make figures: result -->\n<!-- end -->\n"])
def test_a_readme_without_its_marks_is_refused(text):
    with pytest.raises(ValueError, match="must hold '<!-- make figures: NAME -->'"):
        readme.written(text)


def test_the_words_of_an_image_are_those_of_its_figure():
    for name in ("rms_norm_time", "verify_cost", "matmul_speed", "reductions_speed", "attention_speed"):
        words = importlib.import_module(f"figures.{name}").words()
        assert f"![{words}](figures/{name}.png)" in README


# recomputed from altered data


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of what README's numbers come from."""
    data = tmp_path_factory.mktemp("altered") / "data"
    for name in ("h200", "h100", "cpu-avx512", "schedules"):
        shutil.copytree(records.DATA / name, data / name, ignore=shutil.ignore_patterns("host*", "*.lock"))
    (data / "cpu-intel-xeon-avx512-2").mkdir()
    for file in ("machine.json", TENSOR_PARALLEL.file):
        shutil.copy(records.DATA / "cpu-intel-xeon-avx512-2" / file, data / "cpu-intel-xeon-avx512-2" / file)
    return data


@pytest.fixture
def altered(copied):
    """altered(table, change, machine): README's text with other rows, which are put back afterwards."""
    kept = {}

    def alter(table, change, machine="h200"):
        path = copied / machine / table.file
        kept.setdefault(path, path.read_bytes())
        table.merge(copied / machine, change(table.read(copied / machine)))
        return readme.result(copied) + readme.measured(copied)
    yield alter
    for path, content in kept.items():
        path.write_bytes(content)


def test_a_copy_gives_the_same_text(copied):
    bare = re.sub(r"!\[[^\]]*\]", "![]", README)
    assert readme.result(copied) in bare and readme.measured(copied) in bare


def numbers(text) -> list[str]:
    return re.findall(r"\d[\d,.]*", text)


@cache
def usual() -> list[str]:
    return numbers(readme.result() + readme.measured())


def differs(text) -> int:
    """How many of its numbers are not README's."""
    before, after = usual(), numbers(text)
    return sum(a != b for a, b in zip(before, after, strict=False)) + abs(len(before) - len(after))


@pytest.mark.parametrize("where, least", [
    ("op == 'rms_norm' and implementation == 'triton' and clock == 'cold'", 4),
    ("op == 'rms_norm' and implementation == 'cuda' and clock == 'call'", 1),
    ("op == 'rms_norm' and implementation == 'flashinfer' and clock == 'call'", 2),
    ("op == 'softmax' and implementation == 'triton' and clock == 'cold'", 4),
    ("op == 'mean' and implementation == 'compile' and clock == 'graph'", 1),
    ("op == 'matmul' and implementation == 'triton' and clock == 'cold'", 12),
    ("op == 'matmul' and implementation == 'frozen' and clock == 'cold'", 12),
    ("op == 'matmul' and implementation == 'cublas_no_split_k' and clock == 'cold'", 2),
    ("op == 'attention_decode' and implementation == 'triton' and clock == 'cold'", 3)])
def test_other_times_give_other_numbers(altered, where, least):
    text = altered(records.TOKEN_SWEEP, lambda rows: rows.query(where).assign(us_p50=lambda r: r.us_p50 * 0.7))
    assert differs(text) >= least


@pytest.mark.parametrize("where", ["op == 'rms_norm' and implementation == 'triton'", "op == 'mean'",
                                   "op == 'matmul' and implementation == 'triton'",
                                   "op == 'matmul' and implementation == 'cuda'",
                                   "op == 'attention_decode' and implementation == 'triton'"])
def test_other_bits_give_another_text(altered, where):
    text = altered(records.TOKEN_SWEEP, lambda rows: rows.query(where).assign(same_bits=lambda r: ~r.same_bits))
    assert differs(text)


def test_other_bandwidth_gives_another_share(altered):
    text = altered(records.TOKEN_SWEEP, lambda rows: rows.query(
        "op == 'softmax' and clock == 'cold' and implementation == 'triton'").assign(gbytes_per_s=1000.0))
    assert differs(text)


def test_other_digests_of_cublas_are_counted(altered):
    text = altered(records.TOKEN_SWEEP, lambda rows: rows.query(
        "op == 'matmul' and implementation == 'cublas_no_split_k'").assign(digest="f" * 16))
    assert "at 0 of 77 points" in text and "at 0 of the other 44" in text


def test_other_certificates_windows_and_sums_give_another_text(altered):
    text = altered(CERTIFICATES, lambda rows: rows.head(1).assign(digest="f" * 64))
    assert "more than one digest" in text
    text = altered(TENSOR_CORE, lambda rows: rows.head(2).assign(mismatches=3))
    assert "6 differ" in text
    text = altered(VERIFY_COST, lambda rows: rows.query("curve == 'graph'").assign(
        ms_p50=lambda r: r.ms_p50 * 2, floor_ms=lambda r: r.floor_ms * 2))
    assert differs(text) >= 9


def test_other_digests_answers_speeds_and_modes_give_another_text(altered):
    text = altered(ANSWERS, lambda rows: rows.query("load == 'all' and ops == 'invariant'").assign(answers=7.0))
    assert "7 answers to 1,000 requests with invariant ops" in text
    text = altered(SERVING, lambda rows: rows.query("ops == 'invariant'").assign(
        tokens_per_s_p50=lambda r: r.tokens_per_s_p50 / 2))
    assert "Slower than the default: 15 of 15" in text
    text = altered(SERVING, lambda rows: rows.query("ops == 'invariant'").assign(
        ops="shareable", ms_p50=lambda r: r.ms_p50 * r.phase.map({"decode": 1.02, "prefill": 1.04})))
    assert "the order that eight can share takes decode 1.02 to 1.02 and prefill 1.04 to 1.04 times as long." in text
    text = altered(SERVING, lambda rows: rows.query("ops == 'shareable' and batch == 8").assign(
        recorded_at="2020-01-01T00:00:00Z"))
    assert "that eight can share" not in text and re.search("other runs than `invariant`: .*shareable", text)
    text = altered(MODE_COST, lambda rows: rows.query("ops == 'invariant' and tokens == 16").assign(same_bits=False))
    assert re.search(r"the mode of 1\b", text)
    text = altered(TENSOR_PARALLEL, lambda rows: rows.query("ops == 'invariant' and gpus == 2").assign(
        logit_digest="f" * 64))
    assert "invariant ops 2 digests of its logits" in text
    assert "A prompt of 64 tokens has 2 digests there and on 1, 2, 4, 8 processes of a CPU" in text
    assert "has the same digest there and on 1, 2, 4, 8 processes of a CPU" in README


def test_a_model_compiled_whole_is_told_where_both_contenders_are_recorded(altered):
    def of(how, **columns):
        return lambda rows: rows[(rows.how == "eager") & (rows.tokens == 64)].assign(how=how, **columns)
    every = MODE_COST.read(records.DATA / "h200")
    apart = every[~every.how.str.startswith("whole")]
    assert "ompiled whole" not in readme_model._compiled(apart) + readme_model._batches(apart)
    pair = of("whole")(every).assign(us_p50=lambda rows: rows.ops.map({"default": 100.0, "invariant": 90.0}))
    more = pair.assign(tokens=1024, us_p50=lambda rows: 2 * rows.us_p50 - 10)
    told = readme_model._compiled(pd.concat([apart, pair, more, pair[:1].assign(tokens=4096)]))
    assert told.startswith(" With each layer under `torch.compile` it takes ") and told.endswith(
        " Compiled whole for CUDA graphs it takes 0.89 to 0.90 times the default's time, for 64 to 1,024 tokens.")
    assert "Compiled whole" not in readme_model._compiled(pd.concat([apart, pair[:1]]))
    text = altered(MODE_COST, of("whole_batches", us_p50=7.0, repeats=30, same_bits=True))
    assert "30 compiled whole, the mode moved none and the default moved none, 1.00 times the time." in text


def test_rows_of_older_code_are_counted(altered):
    text = altered(records.TOKEN_SWEEP, lambda rows: rows.query("op == 'mean'").assign(source="0" * 12))
    assert f"{len(records.load(machine='h200').query('op == @op', local_dict={'op': 'mean'}))} of `mean`" in text


@pytest.mark.parametrize("name, where", [
    ("rms_norm_time", "op == 'rms_norm'"), ("rms_norm_bandwidth", "op == 'rms_norm'"),
    ("reductions_speed", "op == 'softmax' and implementation == 'triton'"),
    ("matmul_speed", "op == 'matmul' and implementation == 'triton'"), ("matmul_roofline", "op == 'matmul'"),
    ("attention_speed", "op == 'attention_decode' and implementation == 'triton'")])
def test_the_words_and_the_title_of_a_figure_follow_the_data(altered, copied, name, where):
    figure = importlib.import_module(f"figures.{name}")

    def title(data):
        drawn = figure.draw(data, "h200")
        return drawn.get_suptitle() or drawn.axes[0].get_title(loc="left") or drawn.axes[0].get_title()

    before = figure.words(copied, "h200"), title(copied)
    assert before[0] == figure.words() and before[1] == title(records.DATA)
    altered(records.TOKEN_SWEEP, lambda rows: rows.query(where).assign(
        us_p50=lambda r: r.us_p50 * 0.5 ** (r.implementation == "triton"), tflops=lambda r: r.tflops * 0.5,
        gbytes_per_s=lambda r: r.gbytes_per_s * 0.5))
    after = figure.words(copied, "h200"), title(copied)
    assert after[0] != before[0] and after[1] != before[1]


def test_every_figure_of_ours_has_its_title_in_its_words():
    for name in ("rms_norm_time", "reductions_speed", "matmul_speed", "matmul_roofline", "verify_cost",
                 "attention_speed"):
        figure = importlib.import_module(f"figures.{name}")
        assert figure.words().startswith(" ".join(figure.draw().get_suptitle().split())), name
    assert set(figures.names()) >= {"adder", "atlas"}


def test_no_table_is_left_out():
    assert len(TABLES) == 6
    assert "\n|" not in re.sub(r"(?:^\|.*\n)+", "", SECTION, flags=re.M)


def test_where_a_schedule_is_behind_is_all_of_it():
    """Counted another way: point by point."""
    rows = records.load(machine="h200")
    rows = rows[rows.clock.isin(["cold", "graph", "call"])]
    key, wrong = ["op", "dtype", "shape", "tokens", "clock"], []
    times = {name: rows[rows.implementation == name].set_index(key).us_p50.to_dict()
             for name in ("triton", "cuda", "compile", "flashinfer", "cublas_no_split_k", "flash_attention_3")}
    ours, counted = times.pop("triton"), {}
    for name, theirs in times.items():
        for point in ours.keys() & theirs.keys():
            behind = counted.setdefault((point[0], name, point[-1]), [0, 0])
            behind[0] += ours[point] > theirs[point]
            behind[1] += 1
    said = {tuple(cell.strip("`") for cell in line[:3]): line[3] for line in TABLES[2][2:]}
    wrong = {k: v for k, v in counted.items() if v[0] and said.get(k) != f"{v[0]} of {v[1]}"}
    assert not wrong and len(said) == sum(1 for v in counted.values() if v[0])


def test_shapes_in_the_products_table_are_those_of_the_op():
    from kernels import matmul
    shapes = {"N={},K={}".format(*line[0].split(" x ")) for line in TABLES[3][2:] if line[0]}
    assert len(shapes) == 3 and {str(Shape.parse(s)) for s in shapes} <= set(matmul.shapes)
