"""How near RMSNorm comes to the memory's own speed: bytes a second against a plain copy's."""
from __future__ import annotations

from matplotlib.figure import Figure

from kernels.lab import records, style

ALT = ("Memory bandwidth of residual plus RMSNorm over 1 to 16384 tokens, inputs out of cache, in GB/s on a linear "
       "axis. The Triton kernel climbs fastest and ends within a few per cent of the dashed line of a plain copy; "
       "FlashInfer and torch.compile follow just below, PyTorch's default at about two thirds, plain Python at "
       "less than a tenth.")


def draw(data=records.DATA) -> Figure:
    rows = records.load(out=data)
    rows = rows[(rows.op == "rms_norm") & (rows.dtype == "bfloat16") & (rows["shape"] == "D=8192,residual")
                & (rows.clock == "cold")]
    machine = records.read_machine(records.Path(data) / rows.machine.iloc[0])
    tokens = sorted(rows.tokens.unique())
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    copy = machine["copy_gbytes_per_s"]
    axes.axhline(copy, color="#404040", linestyle=(0, (4, 2)), linewidth=1.2)
    axes.annotate(f"a plain copy: {copy:,.0f} GB/s", (tokens[-1], copy), xytext=(0, 4), textcoords="offset points",
                  ha="right", fontsize=9, color="#404040")
    for name in style.CONTENDERS:
        mine = rows[rows.implementation == name].sort_values("tokens")
        if len(mine) and name != "split":
            axes.plot(mine.tokens, mine.gbytes_per_s, **style.contender(name))
    style.token_axis(axes, tokens, log=True)
    axes.set(ylabel="Bytes moved a second (GB/s)", ylim=(0, 1.12 * copy))
    share = rows[(rows.implementation == "triton")].set_index("tokens").gbytes_per_s[tokens[-1]] / copy
    axes.set_title(f"At {tokens[-1]} tokens the batch-invariant kernel runs at {share:.0%} of a plain copy")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    style.caption(figure, f"residual + RMSNorm, hidden 8192, bfloat16 · {machine['device']} · clock `cold`: device "
                          "time with inputs out of cache,\nmedians of three interleaved sweeps · bytes counted once "
                          "for each input and output")
    return figure
