"""How fast attention runs in one order, beside SDPA and FlashAttention-3: prefill, decode, queries on a context."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import CLOCKS, medians, not_recorded, of_older_code, pick, sweep_rows
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.attention import aside
from kernels.op import Shape

OPS = {"attention_prefill": "prefill", "attention_decode": "decode", "attention_chunk": "queries on a context"}
WHERE = {op: f"{'for' if op == 'attention_chunk' else 'in'} {said}" for op, said in OPS.items()}
BESIDE = {"cuda": "SDPA", "flash_attention_3": "FlashAttention-3"}
HEADS = "H=32,KV=8,D=128"
MARKS = ("s", "P", "X", "*", "h", "<", "p", "d", ">", "8")  # of decode's contexts
WIDTHS = (2.4, 1.1)  # of lines on the longer and the shorter context
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, machine = recorded(data, machine)
    ours, ratio, clock = machine["ours"], relative(rows, machine["ours"]), rows.clock.iloc[0]
    ops = [op for op in OPS if op in set(ratio.index.unique("op"))]
    rows = rows[rows.op.isin(ops)]
    figure = page.figure(13, 4.1 if page.screen else 2.4 * len(ops) if page.narrow else 3.3)
    panels = (len(ops), 1) if page.narrow else (1, len(ops))
    for axes, op in zip(figure.subplots(*panels, squeeze=False).flat, ops, strict=True):
        mine = rows[rows.op == op]
        _decode(axes, mine, ours) if op == "attention_decode" else _lines(axes, mine, op, machine["is_cpu"])
        style.thin_labels(axes, sorted(mine.tokens.unique()), figure.get_figwidth() / panels[1] - 1)
        title = f"{OPS[op].capitalize()}: {_range(ratio.loc[op])}"
        axes.set_title(style.wrapped(title, 13 / panels[1] - 0.75, 10.5, "bold") if page.screen else title,
                       fontsize=10.5)
    around(figure, page, _claim(ratio), f"{_heads(rows)} · {rows.dtype.iloc[0]}, causal · {machine['device']}, torch "
           f"{machine['torch']} · clock `{clock}`: {CLOCKS[clock]}, {medians(rows)} · all axes but TFLOP/s log\n"
           "PyTorch's default: scaled_dot_product_attention (SDPA) · "
           f"{_behind(ratio)}{_cliff(rows)}{_frozen(rows, ours)}{machine['aside']}\n{_bits(rows)}"
           + not_recorded([*BESIDE, "frozen", ours], rows.implementation) + not_recorded(OPS, ops)
           + of_older_code(rows), _legend(rows, machine["is_cpu"]), 2 if page.narrow else 3)
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, machine = recorded(data, machine)
    ratio = relative(rows, machine["ours"])
    shown = {"attention_prefill": "TFLOP/s of prefill over the tokens of the prompt",
             "attention_decode": "SDPA's and FlashAttention-3's time over ours in decode against the batch, a line for "
                                 "each context, with a grey line at 1",
             "attention_chunk": "microseconds for one or more queries on a context, on log axes"}
    said = [f"{text} ({_range(ratio.loc[op])})" for op, text in shown.items() if op in ratio.index.unique("op")]
    rows = rows[rows.op.isin(ratio.index.unique("op"))]
    return (f"{_claim(ratio)}. A panel each: {'; '.join(said)}. O{_behind(ratio)[1:]}{_cliff(rows)}{machine['aside']}. "
            f"B{_bits(rows)[1:]}.")


def recorded(data, machine: str | None = None) -> tuple[pd.DataFrame, dict]:
    """Attention's rows in one dtype (bfloat16) on the clock `cold`, or a CPU's `call`, and what their machine is.

    Prefill and queries on a context are of one size of heads, the latter on two contexts at most. Keys in pages and
    mixed batches are told in words, under `aside` of the machine. Raises ValueError
    where no time of ours can be compared with SDPA's or FlashAttention-3's.
    """
    rows, machine = sweep_rows(data, machine, OPS)
    clock = "call" if machine["is_cpu"] else "cold"
    machine["aside"] = aside.told(rows[rows.clock == clock], machine["ours"], BESIDE)
    rows = rows[~aside.is_aside(rows)]
    rows = pick(rows[rows.clock == clock], "dtype", "bfloat16")
    rows = rows[rows.implementation.isin([*BESIDE, "frozen", machine["ours"]])]
    rows = rows.assign(heads=[shape.partition(",context")[0] for shape in rows["shape"]],
                       context=[Shape.parse(shape).get("context", 0) for shape in rows["shape"]])
    of = {op: rows[rows.op == op] for op in OPS}
    for op in set(OPS) - {"attention_decode"}:
        of[op] = pick(of[op], "heads", HEADS)
    chunks = of["attention_chunk"]
    of["attention_chunk"] = chunks[chunks.context.isin(sorted(chunks.context.unique())[-2:])]
    rows = pd.concat(of.values())
    if not len(relative(rows, machine["ours"])):
        raise ValueError(f"no attention is recorded for both {machine['ours']} and {' or '.join(BESIDE)} on the clock "
                         f"{clock} for {machine['device']}: python -m kernels sweep attention_prefill")
    return rows, machine


def relative(rows, ours: str = "triton") -> pd.DataFrame:
    """Times their speed: a row for each op, shape and token count that can be compared, a column for each of BESIDE."""
    us = rows.pivot(index=["op", "shape", "tokens"], columns="implementation", values="us_p50").astype(float)
    us = us.reindex(columns=[*dict.fromkeys([*BESIDE, ours])])
    return us[[*BESIDE]].div(us[ours], axis=0).dropna(how="all")


def _lines(axes, rows, op, cpu):
    """TFLOP/s or time over tokens, a line for each contender; on the shorter context a thin one."""
    prefill = op == "attention_prefill"
    column, contexts = "tflops" if prefill else "us_p50", sorted(rows.context.unique())[::-1]
    for name in style.in_order(rows):
        for context, width in zip(contexts, WIDTHS, strict=False):
            mine = rows[(rows.implementation == name) & (rows.context == context)].sort_values("tokens")
            line, = axes.plot(mine.tokens, mine[column], **style.contender(name, cpu) | {
                "linewidth": width, "markersize": 3.5 + width, "label": f"_{name}, {context}"})
            style.hollow(axes, mine.tokens, mine[column], mine, line)
    style.token_axis(axes, sorted(rows.tokens.unique()), log=True)
    if prefill:
        axes.set(xlabel="Tokens of the prompt", ylabel="TFLOP/s", ylim=(0, None))
    else:
        axes.set(xlabel="Queries on the context", ylabel="Microseconds", yscale="log")
        style.time_ticks(axes, log=True)
        axes.minorticks_off()


def _decode(axes, rows, ours):
    """Their time over ours: colour and line tell whose, the mark tells which context."""
    axes.axhline(1, color=style.GREY, linewidth=1.3, zorder=1)
    table = rows.pivot(index=["shape", "tokens"], columns="implementation", values=["us_p50", "older"])
    for shape, mark in _contexts(rows):
        for name, look in zip(BESIDE, ((1.2, 6.5), (0.7, 4)), strict=True):
            mine = table.loc[shape].reindex(columns=[(c, n) for c in ("us_p50", "older") for n in (name, ours)])
            mine = mine[mine.us_p50.notna().all(axis=1)]
            ratio, older = (mine["us_p50", name] / mine["us_p50", ours]).astype(float), mine.older.any(axis=1)
            line, = axes.plot(mine.index, ratio, **style.contender(name) | {
                "marker": mark, "linewidth": look[0], "markersize": look[1], "label": f"_{name}, {shape}"})
            style.hollow(axes, mine.index, ratio, older.to_frame("older"), line)
    style.token_axis(axes, sorted(rows.tokens.unique()), log=True)
    axes.set(xlabel="Sequences in the batch", ylabel="Their time / ours", yscale="log")
    low, high = axes.get_ylim()
    tenths = [i / 10 for i in range(1, 100) if i <= 10 or high / low < 1.6 or i % 2 == 0]  # lines lie closer above 1
    ticks = tenths if high / low < 3 else TICKS
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _contexts(rows) -> list[tuple[str, str]]:
    """Decode's shapes, the usual heads first and by their context, and their marks."""
    decode = rows[rows.op == "attention_decode"].drop_duplicates("shape")
    shapes = decode.assign(other=decode.heads != HEADS).sort_values(["other", "heads", "context"])["shape"]
    return [(shape, MARKS[i % len(MARKS)]) for i, shape in enumerate(shapes)]


def _legend(rows, cpu) -> tuple[list, list]:
    """Contenders with their verdicts; then the marks of decode's contexts and the widths of the others'."""
    handles = []
    for name in style.in_order(rows):
        mine = rows[rows.implementation == name]
        look = style.contender(name, cpu)
        handles.append(Line2D([], [], **look | {"label": f"{look['label']}: {_verdict(mine)}"}))
    for shape, mark in _contexts(rows):
        one = Shape.parse(shape)
        heads = "" if shape.startswith(HEADS) else f", {one['H']}/{one['KV']} heads"
        handles.append(Line2D([], [], color=style.GREY, marker=mark, linestyle="none", markersize=6.5,
                              label=f"decode, context {one.get('context', 0):,}{heads}"))
    contexts = sorted(rows[rows.op == "attention_chunk"].context.unique())[::-1]
    handles += [Line2D([], [], color=style.GREY, linewidth=width, label=f"queries on a context of {context:,}")
                for context, width in zip(contexts, WIDTHS, strict=False)]
    return handles, [handle.get_label() for handle in handles]


def _verdict(rows) -> str:
    """At how many of these points a row's bits were not those at the most tokens."""
    known = rows[rows.same_bits.notna()]
    moved = int((~known.same_bits.astype(bool)).sum())
    if not len(known):
        return "bits not recorded"
    return f"bits moved at {moved} of {len(known)} points" if moved else f"same bits at all {len(known)} points"


def _bits(rows) -> str:
    """The same by op."""
    said = []
    for op in OPS:
        mine = rows[(rows.op == op) & rows.same_bits.notna()]
        moved = mine[~mine.same_bits.astype(bool)].implementation.value_counts()
        lines = [f"{name} at {moved[name]} of {(mine.implementation == name).sum()}" for name in moved.index]
        said += [f"{OPS[op]} {', '.join(lines) or 'none'}"] if len(mine) else []
    return f"bits that are not those at the most tokens of their line: {'; '.join(said) or 'not recorded'}"


def _heads(rows) -> str:
    usual = pick(rows, "heads", HEADS).heads.iloc[0]
    return "{H} heads of {D}, {KV} of keys".format(**Shape.parse(usual))


def _range(ratio) -> str:
    """The slowest and the fastest point beside each."""
    said = []
    for name, whose in BESIDE.items():
        low, high = f"{ratio[name].min():.2f}", f"{ratio[name].max():.2f}"
        if ratio[name].notna().any():
            said.append(f"{low}{f' to {high}' * (low != high)} times {whose}'s{' speed' * (not said)}")
    return ", ".join(said)


def _behind(ratio) -> str:
    said = []
    for name, whose in BESIDE.items():
        counts = [f"{OPS[op]} {(column < 1).sum()} of {len(column)}" for op in OPS if op in ratio.index.unique("op")
                  and len(column := ratio.loc[op][name].dropna())]
        said += [f"than {whose} at: {', '.join(counts)} points"] if counts else []
    return f"ours is slower {'; '.join(said)}"


def _cliff(rows) -> str:
    """How much longer two queries on a context take than one; '' where that is not recorded."""
    us = rows[rows.op == "attention_chunk"].pivot(index=["implementation", "context"], columns="tokens",
                                                 values="us_p50").reindex(columns=[1, 2])
    times = (us[2] / us[1]).dropna()
    said = [f"{name} {low}{f' to {high}' * (low != high)}" for name in style.in_order(rows)
            if name in times.index.unique(0)
            for low, high in [(f"{times[name].min():.1f}", f"{times[name].max():.1f}")]]
    return f" · two queries on a context take, times one query's time: {', '.join(said)}" if said else ""


def _frozen(rows, ours) -> str:
    us = rows[rows.op == "attention_decode"].pivot(index=["shape", "tokens"], columns="implementation",
                                                   values="us_p50").reindex(columns=["frozen", ours])
    times = (us.frozen / us[ours]).dropna()
    if not len(times):
        return ""
    return f" · frozen in decode, not drawn: {times.min():.1f} to {times.max():.1f} times our time"


def _claim(ratio) -> str:
    """Geometric means beside each; the ops are named again only where they are others."""
    said, named = [], None
    for name, whose in BESIDE.items():
        means = {op: np.exp(np.log(ratio.loc[op][name]).mean()) for op in OPS if op in ratio.index.unique("op")
                 and ratio.loc[op][name].notna().any()}
        lines = [f"{mean:.2f}" + (f" {WHERE[op]}" if [*means] != named else "")
                 for op, mean in means.items()]
        said += [f"times {whose}'s{' speed' * (not said)}: {', '.join(lines)}"] if means else []
        named = named or [*means]
    return f"Attention in one order, {'; '.join(said)} (geometric means)"
