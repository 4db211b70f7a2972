"""README's numbers: its result, its section "Measured" and the words of its figures, made from data/."""
from __future__ import annotations

import importlib
import re
from pathlib import Path

import pandas as pd

from figures import attention_speed, matmul_unseen, other_runs, readme_model
from figures.atlas import machines_shown
from figures.readme_model import table as _table
from kernels import tables
from kernels.lab import older, records
from kernels.lab.atlas import chart as atlas_chart
from kernels.lab.atlas import measure as atlas
from kernels.lab.proofs.certificates import CERTIFICATES
from kernels.lab.proofs.products import PRODUCTS
from kernels.lab.proofs.tensor_core import TENSOR_CORE
from kernels.lab.tuning.unseen import speeds
from kernels.op import Shape

README = Path(__file__).resolve().parents[1] / "README.md"
PART = re.compile(r"(<!-- make figures: (\w+) -->\n).*?(<!-- end -->\n)", re.S)
IMAGE = re.compile(r"!\[[^\]]*\]\(figures/(\w+)\.png\)")
HIDDEN = "D=8192,residual"


def written(text: str, data=records.DATA, machine: str = "h200") -> str:
    """README with its marked parts and the words of its figures made anew. ValueError if a part's marks are gone."""
    parts = {"result": result, "measured": measured}
    if [name for _, name, _ in PART.findall(text)] != list(parts):
        raise ValueError("README.md must hold '<!-- make figures: NAME -->' and '<!-- end -->' around each of "
                         f"{', '.join(parts)}")
    return IMAGE.sub(_image, PART.sub(lambda found: found[1] + parts[found[2]](data, machine) + found[3], text))


def _image(match: re.Match) -> str:
    words = importlib.import_module(f"figures.{match[1]}").words()
    return f"![{words.replace('[', '(').replace(']', ')')}](figures/{match[1]}.png)"


def result(data=records.DATA, machine: str = "h200") -> str:
    """What it costs and what it keeps, in two sentences."""
    rows = records.load(machine=machine, out=data)
    cold = _cold(rows, "matmul")
    us = cold.pivot(index=["shape", "tokens"], columns="implementation", values="us_p50")
    moved = {name: count for name, count, _ in _moved(cold)[0]}
    return ("\n**The result.** Matrix products in a fixed order run at "
            f"**{_mean(us.cuda / us.triton):.2f}** of cuBLAS's speed on an {machine.upper()}, in the geometric mean of "
            f"{len(us)} points, where one frozen schedule has {_mean(us.cuda / us.frozen):.2f}. The default moved its "
            f"bits at {moved.get('`cuda`', 0)} of these points, ours at {moved.get('`triton`', 0) or 'none'}.\n\n")


def measured(data=records.DATA, machine: str = "h200") -> str:
    """The section's text, from one GPU's record."""
    rows = older.mark(records.load(machine=machine, out=data))
    parts = (_intro(rows, data, machine), _rows(rows), _softmax(rows), _behind(rows), _products(rows),
             _unseen(data, machine), _attention(data, machine), _certificates(data), _random_products(data, machine),
             _tensor_core(data, machine), _atlas(data), readme_model.model(data, machine))
    return "\n" + "\n\n".join(part for part in parts if part) + "\n\n"


def _intro(rows, data, machine) -> str:
    made = records.read_machine(Path(data) / machine)
    old = rows[rows.older].op.value_counts()
    said = f" Of older code are {old.sum()} of {len(rows)} rows of `token_sweep.csv`: " + ", ".join(
        f"{count} of `{op}`" for op, count in old.items()) + " (`python -m kernels digests --check` lists them)."
    return (f"The numbers below are read from [data/{machine}/](data/README.md), recorded on an {made['device']} with "
            f"torch {made['torch']} and triton {made['triton']}, and describe that machine unless another is named."
            + (said if len(old) else ""))


def _us(rows, **where) -> float:
    """The only median of these rows."""
    for column, value in where.items():
        rows = rows[rows[column] == value]
    (us,) = rows.us_p50
    return us


def _cold(rows, op):
    return rows[(rows.op == op) & (rows.clock == "cold") & (rows.dtype == "bfloat16")]


def _rows(rows) -> str:
    cold, tokens = _cold(rows, "rms_norm"), (1, 128, 1024, 4096)
    names = {"PyTorch's default (add, then `F.rms_norm`)": "cuda", "`torch.compile` of the default": "compile",
             "FlashInfer's `fused_add_rmsnorm`": "flashinfer", "**`rms_norm.triton`** (fixed order)": "triton"}
    table = _table(["tokens", *tokens], "---", [
        [label, *(_us(cold, shape=HIDDEN, implementation=name, tokens=count) for count in tokens)]
        for label, name in names.items()])
    call = rows[(rows.op == "rms_norm") & (rows.clock == "call") & (rows["shape"] == HIDDEN)]
    ours, theirs = (_us(call, dtype="bfloat16", implementation=name, tokens=1) for name in ("triton", "flashinfer"))
    moved, kept = _moved(rows[rows.op == "rms_norm"])
    return ("Residual + RMSNorm, D=8192, bfloat16, microseconds a call, clock `cold` (device time, inputs out of "
            f"cache), medians (`token_sweep.csv`):\n\n{table}\n\nOn the clock `call`, which counts the launch, "
            f"FlashInfer's C++ takes {theirs:.1f} us at one token and the schedule's Python {ours:.1f}.\n\nBits of "
            f"RMSNorm, over both dtypes and all shapes: {_listed(kept)} gave each row the same bits at every token "
            "count"
            + (f"; {'; '.join(f'{n} did not at {c} of {of} points' for n, c, of in moved)}." if moved else "."))


def _moved(rows) -> tuple[list, list]:
    """(name, points whose bits were not those of the largest batch, points) of each that moved; those that did not."""
    points = rows.drop_duplicates(["implementation", "dtype", "shape", "tokens"])
    counted = points.groupby("implementation").same_bits.agg(lambda s: int((~s.astype(bool)).sum()))
    of = points.groupby("implementation").size()
    return ([(f"`{n}`", int(c), int(of[n])) for n, c in counted.items() if c], [f"`{n}`" for n, c in counted.items()
                                                                               if not c])


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _softmax(rows) -> str:
    lines, tokens = [], (1, 128, 1024, 4096)
    for op, default, width in (("log_softmax", "F.log_softmax", 128256), ("softmax", "F.softmax", 32000),
                               ("mean", "torch.mean", 8192)):
        cold = _cold(rows, op)
        for label, name in ((f"`{default}`, {width} wide", "cuda"), (f"**`{op}.triton`**", "triton")):
            lines.append([label, *(_us(cold, shape=f"D={width}", implementation=name, tokens=t) for t in tokens)])
    moved = [f"{n}'s {op} did at {c} of {of} points" for op in ("softmax", "log_softmax", "mean")
             for n, c, of in _moved(rows[rows.op == op])[0]]
    return (f"Softmax and mean, bfloat16, the same clock and table:\n\n{_table(['tokens', *tokens], '---', lines)}\n\n"
            "![](figures/reductions_speed.png)\n\nOf these ops' contenders, "
            + (f"bits moved: {'; '.join(moved)}." if moved else "none moved a bit.")
            + f" At 4096 tokens softmax and log_softmax reach {_reach(rows)} of a copy's bandwidth.")


def _reach(rows) -> str:
    """How near softmax and log_softmax come to a copy, over dtypes and widths."""
    wide = rows[rows.op.isin(["softmax", "log_softmax"]) & (rows.clock == "cold") & (rows.tokens == 4096)
                & (rows.implementation == "triton")]
    copy = records.read_machine(records.DATA / wide.machine.iloc[0])["copy_gbytes_per_s"]
    share = 100 * wide.gbytes_per_s / copy
    return f"{share.min():.0f} to {share.max():.0f} %"


def _behind(rows) -> str:
    """Every op, clock and contender beside which a schedule takes longer at some point."""
    lines = []
    for op in ("rms_norm", "softmax", "log_softmax", "mean", "matmul", "all_reduce", *attention_speed.OPS):
        for clock in ("cold", "graph", "call"):
            us = rows[(rows.op == op) & (rows.clock == clock)].pivot_table(
                index=["dtype", "shape", "tokens"], columns="implementation", values="us_p50")
            for other in ("cuda", "compile", "flashinfer", "cublas_no_split_k", "flash_attention_3"):
                if not {"triton", other} <= set(us):
                    continue
                ratio = (us.triton / us[other]).dropna()
                if (ratio > 1).any():
                    dtype, shape, tokens = ratio.idxmax()
                    lines.append([f"`{op}`", f"`{other}`", f"`{clock}`", f"{(ratio > 1).sum()} of {len(ratio)}",
                                  f"{ratio.max():.2f}", f"{shape}, {dtype}, {tokens} tokens"])
    head = ["op", "beside", "clock", "points behind", "longest, times", "there"]
    cells = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
    return f"All points at which a schedule is slower than a contender (`cuda` is PyTorch's default):\n\n{cells}"


def _products(rows) -> str:
    cold, tokens, lines = _cold(rows, "matmul"), (1, 64, 512, 4096), []
    for shape in ("N=4096,K=4096", "N=28672,K=4096", "N=1280,K=8192"):
        for i, (label, name) in enumerate((("`F.linear` (cuBLAS)", "cuda"), ("frozen", "frozen"),
                                           ("**`matmul.triton`**", "triton"))):
            weight = "" if i else "{N} x {K}".format(**Shape.parse(shape))
            lines.append([weight, label, *(_us(cold, shape=shape, implementation=name, tokens=t) for t in tokens)])
    us = cold.pivot(index=["shape", "tokens"], columns="implementation", values="us_p50")
    mean = {name: _mean(us.cuda / us[name]) for name in ("triton", "frozen")}
    moved = {n: c for n, c, _ in _moved(cold)[0]}
    slow = us.cublas_no_split_k / us.cuda
    digest = cold.pivot(index=["shape", "tokens"], columns="implementation", values="digest")
    chain, alike = _one_chain(digest.index), digest.cublas_no_split_k == digest.triton
    table = _table(["weight N x K", "", "1 token", *tokens[1:]], "---", lines)
    table = table.replace("| --- | ---: |", "| --- | --- |", 1)
    return ("Matrix products `F.linear(x, weight)`, bfloat16, microseconds a call, the same clock and table. `frozen` "
            f"is the usual remedy, one schedule for every token count; it and `matmul.triton` keep their "
            f"bits:\n\n{table}\n\n![](figures/matmul_speed.png)\n\n"
            f"Over {us.index.unique('shape').size} weights and {us.index.unique('tokens').size} token counts, "
            f"`matmul.triton` has {mean['triton']:.2f} times the default's speed in the geometric mean (frozen: "
            f"{mean['frozen']:.2f}). The default moved bits at {moved.get('`cuda`', 0)} of the {len(us)} points, "
            f"`matmul.triton` at {moved.get('`triton`', 0) or 'none'}. If cuBLAS is told not to split k, it has our "
            f"bits at {alike[chain].sum()} of {chain.sum()} points where our order is one chain, and at "
            f"{alike[~chain].sum()} of the other {(~chain).sum()}. It moved its own bits at "
            f"{moved.get('`cublas_no_split_k`', 0)} points, and took up to "
            f"{slow.max():.1f} times as long as the default."
            + (f" Timed in another run than the default: {apart}; those ratios hold what differs between two runs."
               if (apart := other_runs(cold)) else ""))


def _unseen(data, machine) -> str:
    speed = speeds(matmul_unseen.recorded(data, machine)[0]).droplevel("dtype")
    said = {name: f"{_mean(of):.2f} times the default's speed in the geometric mean, {of.median():.2f} in the median "
                  f"and {of.min():.2f} at worst, below 0.90 at {(of < 0.9).sum()} of the {len(of)} points"
            for name, of in ((name, speed[name].dropna()) for name in speed)}
    tuned = f" With the schedules that `kernels.tuning` keeps: {said['online']}." if "online" in said else ""
    whole = [Shape.parse(shape)["K"] % 8 == 0 for shape in speed.index.get_level_values("shape")]
    eights = speed.triton[whole].dropna()
    plain = (f" Where K is a multiple of 8, it has {_mean(eights):.2f}, and is below 0.85 at {(eights < 0.85).sum()} "
             f"of {len(eights)} points.") if 0 < len(eights) < speed.triton.notna().sum() else ""
    return (f"Of {speed.index.unique('shape').size} weights of other models no table holds a schedule. Where it is "
            f"chosen by a model of time, without having been timed, `matmul.triton` has {said['triton']}.{plain}{tuned}"
            "\n\n"
            "![](figures/matmul_unseen.png)")


def _attention(data, machine) -> str:
    rows, _ = attention_speed.recorded(data, machine)
    ratio, moved = attention_speed.relative(rows), rows[~rows.same_bits.astype(bool)].implementation.value_counts()
    worst = []
    for name, whose in attention_speed.BESIDE.items():
        op, shape, tokens = ratio[name].idxmin()
        worst.append(f"{ratio[name].min():.2f} of {whose}'s speed (`{op}`, {tokens} on {shape})")
    return ("Attention, bfloat16, the same clock and table. A prompt, its chunks and its single new tokens are added "
            "in one order. Its leaves of 1024 keys run in sequence or side by side:\n\n"
            "![](figures/attention_speed.png)\n\n"
            f"Where it is slowest, it has {' and '.join(worst)}. SDPA moved bits at {moved.get('cuda', 0)} points, "
            f"FlashAttention-3 at {moved.get('flash_attention_3', 0)}, `triton` at {moved.get('triton', 0) or 'none'}.")


def _one_chain(points) -> pd.Series:
    from kernels.ops.matmul.order import order

    def whole(shape):
        sizes = Shape.parse(shape)
        return order(sizes["N"], sizes["K"])[0] == 1

    return pd.Series([whole(shape) for shape in points.get_level_values("shape")], index=points)


def _mean(ratio) -> float:
    return float(ratio.prod() ** (1 / len(ratio)))


def _certificates(data) -> str:
    gpus = records.machines(CERTIFICATES.file, data)
    rows = pd.concat([older.mark(records.load(CERTIFICATES, gpu, data)) for gpu in gpus])
    one = (rows.groupby(["dtype", "shape", "input", "tokens"]).digest.nunique() == 1).all()
    stored = sum(len(column) for gpu in gpus
                 for shapes in tables.load(gpu, str, Path(data) / "schedules").get("matmul", {}).values()
                 for column in shapes.values())
    return (f"Every schedule that is stored was compared with one trusted schedule on inputs made to hurt: {stored} "
            f"stored choices, {rows.schedule.nunique()} schedules and {len(rows)} comparisons on an "
            f"{' and an '.join(map(str.upper, gpus))}, "
            f"{'one digest for each input' if one else 'with more than one digest for an input'} (`certificates.csv`). "
            f"{(~rows.older).sum()} of these rows are of today's kernels; the others prove schedules that are no "
            "longer stored. Each row keeps a hash of the kernels that it proved. A kernel that changes by one "
            "operation turns the tests red on a laptop, until a GPU has proved it again.")


def _random_products(data, machine) -> str:
    if machine not in records.machines(PRODUCTS.file, data):
        return ""
    rows = records.load(PRODUCTS, machine, data)
    differ = rows.differ.sum()
    return (f"{rows.cases.sum():,} products of random sizes, by {len(rows)} forms of weights and schedules, were "
            f"compared with the trusted schedule: {f'{differ:,} differ' if differ else 'none differs'} "
            "(`products.csv`).")


def _tensor_core(data, machine) -> str:
    rows = records.load(TENSOR_CORE, machine, data)
    differ = rows.mismatches.sum()
    return ("A tensor core's addition, as `kernels/arithmetic/tensor_core.py` writes it in whole numbers: "
            f"{rows.outputs.sum():,} sums of this GPU's `mma.sync` and `wgmma`, with zeros, subnormals, infinities and "
            f"NaN; {f'{differ:,} differ' if differ else 'none differs'} (`tensor_core.csv`).")


def _atlas(data) -> str:
    said = []
    for name in machines_shown(data):
        rows = atlas.recorded(name, data)
        rows = rows[rows.op.isin(atlas.names()) & rows.dtype.isin(atlas.RECORDED_DTYPES)]
        some, of = atlas_chart.counts(atlas_chart.steady(rows), "batch")
        said.append(f"{some} of {of} ops on {'a CPU' if name.startswith('cpu') else f'an {name.upper()}'}")
    return (f"[The atlas](figures/atlas.png) tests {len(atlas.names())} of PyTorch's own ops for what moves their bits "
            f"(`atlas.csv`). Another batch gave a row other bits in {' and '.join(said)}, leaving out those that race "
            "from run to run or draw random numbers.")
