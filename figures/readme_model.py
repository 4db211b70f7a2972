"""README's numbers of a whole model: its digests, its answers, its speed, and what a window costs it."""
from __future__ import annotations

from pathlib import Path

from figures import answers
from kernels.lab import records
from kernels.lab.moving.cost import MODE_COST
from kernels.lab.parallel import chart as parallel_chart
from kernels.lab.parallel.measure import TENSOR_PARALLEL
from kernels.lab.proofs import model as proofs
from kernels.lab.serving.arrivals import LATENCY
from kernels.lab.serving.recorded import ANSWERS, EVERY
from kernels.lab.serving.speed import SERVING, SHAREABLE
from kernels.lab.window.measure import VERIFY_COST
from kernels.lab.window.replay import CURVE

BATCHES, BEHIND = (1, 8, 32, 128, 256), 1024
OPS = {"default": "default ops", "frozen": "`frozen`: one schedule for all", "invariant": "**`invariant` ops**"}


def table(head: list, align: str, lines: list[list]) -> str:
    """Cells as a table; numbers to one decimal."""
    cells = [head, [align] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(f"{c:.1f}" if isinstance(c, float) else str(c) for c in line) + " |"
                     for line in cells)


def model(data, machine) -> str:
    """All of it, a paragraph each."""
    parts = (part(data, machine) for part in (_digests, _answers, _speed, _arrivals, _parallel, _mode, _window))
    return "\n\n".join(part for part in parts if part)


def _digests(data, machine) -> str:
    rows = proofs.recorded(machine, data)
    runs = rows[["model", "shared", "form", "tokens"]].drop_duplicates()
    return (f"A whole model's bits (`model_digests.csv`): the GPU's schedules recorded {len(rows)} digests, layer by "
            f"layer, of {len(runs)} runs of the trained byte model and of one layer of Llama-3.1-8B's size. The "
            "specification gives the same on a CPU: `python -m kernels verify --form window` redoes windows in "
            "seconds, `python -m kernels verify` all of it in minutes.")


def _answers(data, machine) -> str:
    every = records.load(ANSWERS, machine, data)
    every = every[every.load == EVERY]
    said = []
    for name, mine in every.groupby("model", sort=True):
        counts = [f"{row.answers:,.0f} answer{'s' * (row.answers != 1)} to {row.requests:,.0f} requests with "
                  f"{answers.named(row.ops)}" + f" at temperature {row.temperature:g}" * (row.temperature > 0)
                  for row in mine.sort_values(["temperature", "ops"]).itertuples()]
        said.append(f"{'the byte model' if name == 'byte' else name} gave {', '.join(counts)}")
    return ("One prompt asked for many times, with one seed, among strangers under random loads (`answers.csv`): "
            f"{'; '.join(said)}.\n\n![](figures/answers.png)")


def _speed(data, machine) -> str:
    rows = _of_real_size(records.load(SERVING, machine, data))
    us = rows.pivot(index=["phase", "batch", "context"], columns="ops", values="tokens_per_s_p50")
    lines = [[label, *(f"{us.loc[('decode', batch, BEHIND), ops]:,.0f}" for batch in BATCHES)]
             for ops, label in OPS.items()]
    ratio = us.invariant / us.default
    phase, batch, context = ratio.idxmin()
    return (f"{rows.model.iloc[0]}'s shape with random weights, served: tokens a second of decode behind {BEHIND:,} "
            f"tokens (`serving.csv`):\n\n{table(['requests in the batch', *BATCHES], '---', lines)}\n\n"
            f"Over {len(us)} points of decode and prefill `invariant` ops have {_mean(ratio):.2f} times the default's "
            f"speed in the geometric mean, and `frozen` {_mean(us.frozen / us.default):.2f}. The lowest is "
            f"{ratio.min():.2f}: {phase} of {batch:,} behind {context:,}. Slower than the default: "
            f"{(ratio < 1).sum()} of {len(us)}.{_apart(rows)}{_shareable(rows)}")


def _apart(rows) -> str:
    others = answers.of_another_run(rows)
    return others and f" Timed in other runs than `invariant`: {others}."


def _shareable(rows) -> str:
    """What the order that several GPUs can share costs on one, where both orders were timed in one run."""
    ms = rows.pivot(index=["phase", "batch", "context"], columns="ops", values="ms_p50")
    if SHAREABLE not in ms:
        return ""
    if SHAREABLE in answers.of_another_run(rows):
        return ""
    ratio = (ms[SHAREABLE] / ms.invariant).dropna()
    spans = [f"{phase} {mine.min():.2f} to {mine.max():.2f}" for phase, mine in ratio.groupby("phase")]
    return f" On one GPU the order that eight can share takes {' and '.join(spans)} times as long."


def _arrivals(data, machine) -> str:
    rows = LATENCY.read(Path(data) / machine)
    said = []
    for (name, rate, requests), mine in rows.groupby(["model", "rate", "requests"]):
        ms = mine.set_index("ops")
        first, between = (", ".join(f"{row[column]:.1f} with `{ops}` ops" for ops, row in ms.iterrows())
                          for column in ("first_ms_p50", "between_ms_p50"))
        said.append(f"{requests:,.0f} requests for {name}'s shape that arrive at random, {rate:g} a second, wait for "
                    f"their first token {first} (median, milliseconds), and for each one behind it {between}")
    return (f"A server by the wall clock (`latency.csv`): {'; '.join(said)}. Its keys lie in pages of 16 tokens, which "
            "`default` gathers for PyTorch's attention.") if said else ""


def _parallel(data, machine) -> str:
    rows = parallel_chart.recorded(machine, data)
    both, lone = parallel_chart.compared(rows), parallel_chart.alone(rows)
    said = (f"{parallel_chart.claim(rows)} of its logits ({', '.join(both.model.unique())}, "
            f"{both.groupby(parallel_chart.POINT).ngroups} points, `tensor_parallel.csv`).")
    more = _shared_time(rows)
    if len(lone):
        counts = " or ".join(map(str, sorted(lone.gpus.unique())))
        more += (f" {lone.groupby(parallel_chart.POINT).ngroups} points of {', '.join(lone.model.unique())} are "
                 f"recorded on {counts} GPUs alone, so their digests are compared with no other.")
    names = records.machines(TENSOR_PARALLEL.file, data)
    cpus = [name for name in names if records.is_cpu(name, records.read_machine(Path(data) / name))]
    prompts = {name: records.load(TENSOR_PARALLEL, name, data).query(
        "model == 'byte' and ops == 'invariant' and phase == 'prefill' and context == 64") for name in (machine, *cpus)}
    counts = sorted({gpus for name in cpus for gpus in prompts[name].gpus})
    if not counts or not len(prompts[machine]):
        return said + more
    digests = {digest for mine in prompts.values() for digest in mine.logit_digest}
    have = "the same digest" if len(digests) == 1 else f"{len(digests)} digests"
    return (f"{said} A prompt of 64 tokens has {have} there and on {', '.join(map(str, counts))} processes of a "
            f"CPU.{more}")


def _shared_time(rows) -> str:
    """What a forward of the largest model takes with invariant ops on the most GPUs, beside the default's."""
    large, most = _of_real_size(rows), rows.gpus.max()
    ratio = parallel_chart.shares(large[large.gpus == most])
    spans = [f"{phase} {mine.min():.2f} to {mine.max():.2f}" for phase, mine in ratio.groupby("phase")]
    return (f" On {most} GPUs {large.model.iloc[0]}'s shape takes, with invariant ops, {' and '.join(spans)} times the "
            "default's time.") if spans else ""


def _mode(data, machine) -> str:
    every = records.load(MODE_COST, machine, data)
    rows = every[every.how == "eager"]
    us = rows.pivot(index="tokens", columns="ops", values="us_p50")
    moved = (~rows.same_bits.astype(bool)).groupby(rows.ops).sum()
    ratio = us.invariant / us.default
    return (f"A model of transformers that nobody rewrote ({rows.model.iloc[0]}'s shape) takes, inside `with "
            f"batch_invariant():`, {ratio.min():.2f} to {ratio.max():.2f} times the default's time for prompts of "
            f"{us.index.min():,} to {us.index.max():,} tokens, eager, dispatching counted (`mode_cost.csv`). Beside "
            f"three other prompts the default moved the last logits of {moved.default} of {len(us)} prompts, the mode "
            f"of {moved.invariant or 'none'}.{_compiled(every)}{_batches(every)}\n\n"
            "![](figures/mode_cost.png)")


def _compiled(every) -> str:
    """A sentence for each way to compile that both contenders have."""
    said = []
    for how, name in (("compiled", "With each layer under `torch.compile`"),
                      ("whole", "Compiled whole for CUDA graphs")):
        us = every[every.how == how].pivot(index="tokens", columns="ops", values="us_p50")
        us = us.reindex(columns=["default", "invariant"]).dropna()
        if len(us):
            ratio, counts = us.invariant / us.default, sorted({us.index.min(), us.index.max()})
            said.append(f" {name} it takes {ratio.min():.2f} to {ratio.max():.2f} times the default's time, for "
                        f"{' to '.join(f'{count:,}' for count in counts)} tokens.")
    return "".join(said)


def _batches(every) -> str:
    """Of random batches: what moved, and what they took."""
    said = []
    for how, name in (("batches", "eager"), ("compiled_batches", "compiled"),
                      ("whole_batches", "compiled whole")):
        mine = every[every.how == how].set_index("ops")
        if {"invariant", "default"} <= set(mine.index):
            ratio = mine.us_p50["invariant"] / mine.us_p50["default"]
            moved = [f"{ops} {'moved none' if mine.same_bits[row] else 'moved some'}"
                     for ops, row in (("the mode", "invariant"), ("the default", "default"))]
            said.append(f"{mine.repeats['invariant']:,} {name}, {' and '.join(moved)}, {ratio:.2f} times the time")
    return f" Logits in random batches of four padded prompts: {'; '.join(said)}." if said else ""


def _window(data, machine) -> str:
    every = records.load(VERIFY_COST, machine, data)
    rows, tokens = every[every.curve == "graph"].set_index(["ops", "tokens"]), (16, 128, 512)
    lines = [[f"{label} ops", *(float(rows.ms_p50[ops, t]) for t in tokens)]
             for label, ops in (("default", "default"), ("`invariant`", "invariant"))]
    lines.append(["floor, computed from measured ceilings", *(float(rows.floor_ms["invariant", t]) for t in tokens)])
    work = every[every.curve == CURVE].dropna(subset="ms_p50")
    spans = [f"{ms.min():.1f} to {ms.max():.1f} ms with {ops} ops" for ops, ms in work.groupby("ops").ms_p50]
    return ("One forward of a Llama-3.1-8B shape over a window of tokens, milliseconds a pass, curve `graph` (a CUDA "
            f"graph), medians (`verify_cost.csv`):\n\n{table(['tokens in the window', *tokens], '---', lines)}"
            + (f"\n\nA verifier's pass at work has {int((work.tokens * work.group).max())} tokens, in windows of "
               f"{work.tokens.min()} to {work.tokens.max()} behind {work.prefix.min():,} or {work.prefix.max():,} "
               f"tokens each. It takes {', '.join(spans)}." if len(work) else ""))


def _of_real_size(rows):
    model = max(rows.model.unique(), key=lambda model: (model != "byte", (rows.model == model).sum()))
    return rows[rows.model == model]


def _mean(ratio) -> float:
    return float(ratio.prod() ** (1 / len(ratio)))
