"""What the mode costs: one forward of a model of transformers that nobody rewrote, default against mode.

    python -m kernels mode --model llama-3.1-8b --tokens 1 16 64 512 2048 --how eager compiled find --out data
    python -m kernels mode --model llama-3.1-8b --tokens 64 --how batches compiled_batches --batches 200

eager     host wall clock a forward, as a reader calls it: launches and the dispatcher's Python counted
compiled  the same with each decoder layer compiled in place, which is how users of transformers compile a long model:
          one compilation serves all layers, and one is made for each shape outside the mode and one inside. What is
          around the layers stays eager, for both contenders
whole     the same with the whole model compiled for CUDA graphs (mode="reduce-overhead"), once for each shape
find      one `find_moving_ops` over two such prompts, seconds as microseconds
batches   a forward of a batch of four prompts that were drawn at random, padded to so many tokens
compiled_batches, whole_batches  the same of a model so compiled

The model is transformers' LlamaForCausalLM of a preset's sizes, with random weights. A forward takes one prompt of so
many tokens and gives the logits of the last. Contenders are interleaved, batches apart. `same_bits` says whether the
prompt's logits are those it has among others in a batch of four; of batches, whether in all of them all logits of all
tokens are those of the prompts alone. A point is written when both contenders are measured; the command goes on there.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pandas as pd
import torch

from ... import runtime
from ...bits import hashed, same_bits
from ...mode import batch_invariant
from ...model.config import PRESETS, preset
from ...op import DTYPES
from .. import bench, provenance, records
from .batches import pool, random_batches
from .measure import find_moving_ops

TIMED = ("eager", "compiled", "find")
HOW, OPS = (*TIMED, "whole", "batches", "compiled_batches", "whole_batches"), ("default", "invariant")
TOKENS = {"cuda": (1, 2, 4, 8, 16, 32, 64, 512, 1024, 2048, 4096), "cpu": (1, 2, 4, 8)}
REQUESTS = 4  # of a batch
BATCHES = 200
MODE_COST = records.Table(
    "mode_cost.csv",
    ("model", "how", "ops", "dtype", "tokens", "us_p05", "us_p20", "us_p50", "us_p80", "us_p95", "repeats", "same_bits",
     "recorded_at", "source"),
    ("model", "how", "ops", "dtype", "tokens"))


def source() -> str:
    """The code that decides a row: this file, the mode and its ops."""
    return provenance.source(__file__)


def layer_cost(layer: Callable, inputs: Callable[[int], torch.Tensor], tokens: Sequence[int], name: str,
               repeats: int = 7) -> pd.DataFrame:
    """A layer's time for each count of tokens, alone and under the mode, as rows that `sweep_chart` draws.

    inputs(n) makes n rows of which the first ones do not depend on n. `cuda` is the default; `triton` on a GPU and
    `python` on a CPU is the mode. `same_bits` says whether the rows equal those at the largest count.
    """
    x = inputs(max(tokens))
    calls = {"cuda": layer, "triton" if x.is_cuda else "python": batch_invariant(strict=True)(layer)}
    with torch.no_grad():
        whole = {key: call(x) for key, call in calls.items()}
        rows = []
        for count in tokens:
            some = x[:count]
            times = bench.measure(calls, lambda _, some=some: (some,), "call", device=x.device, set_bytes=some.nbytes,
                                  repeats=repeats)
            for key, timing in times.items():
                if isinstance(timing, Exception):
                    raise timing
                rows.append({"op": name, "implementation": key, "dtype": str(x.dtype).removeprefix("torch."),
                             "shape": f"D={x.shape[-1]}", "tokens": count, "clock": "call", **timing.percentiles(),
                             "repeats": repeats, "same_bits": same_bits(calls[key](some), whole[key][:count])})
    return pd.DataFrame(rows)


def transformers_model(name: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """transformers' Llama of a preset's sizes, random weights, for inference. ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = preset(name)
    config = LlamaConfig(vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size,
                         intermediate_size=sizes.intermediate_size, num_hidden_layers=sizes.layers,
                         num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
                         head_dim=sizes.head_dim, max_position_embeddings=sizes.context, use_cache=False)
    with device:
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def prompts(model, requests: int, tokens: int) -> torch.Tensor:
    """(requests, tokens): the first one does not depend on how many there are."""
    place = torch.arange(requests * tokens, dtype=torch.int64, device=model.device)
    return (hashed(place, 7) % model.config.vocab_size).view(requests, tokens)


def mode_cost(name: str, tokens: Sequence[int], how: Sequence[str] = TIMED, dtype: str = "bfloat16",
              repeats: int = 11, on_row: Callable[[dict], None] = lambda row: None,
              skip: frozenset[tuple] = frozenset(), batches: int = BATCHES) -> list[dict]:
    """Rows of MODE_COST, each handed to `on_row` as it is measured. Raises ValueError for counts, ways or a dtype."""
    checked(tokens, how, dtype, repeats, batches)
    model, rows = None, []
    for way, count in ((way, count) for way in how for count in sorted(set(tokens))):
        if all((name, way, ops, dtype, count) in skip for ops in OPS):
            continue  # of one alone the other is measured again: contenders are interleaved
        model = model or transformers_model(name, DTYPES[dtype], runtime.device())
        compiled = {"compiled": compiled_layers, "whole": compiled_whole}.get(way.split("_")[0], nullcontext)
        with compiled(model):
            measured = (_find(model, count) if way == "find" else _batches(model, count, batches)
                        if way.endswith("batches") else _forwards(model, count, repeats))
        for ops, (times, same) in measured.items():
            rows.append({"model": name, "how": way, "ops": ops, "dtype": dtype, "tokens": count, **times,
                         "same_bits": same, "recorded_at": records.now(), "source": source()})
            on_row(rows[-1])
    return rows


def compiled_layers(model: torch.nn.Module) -> AbstractContextManager[None]:
    """A transformers model's decoder layers compiled in place, all by one function; as they were afterwards."""
    return _compiled(model.model.layers)


def compiled_whole(model: torch.nn.Module) -> AbstractContextManager[None]:
    """A model compiled in place for CUDA graphs, as it was afterwards."""
    return _compiled([model], mode="reduce-overhead")


@contextmanager
def _compiled(modules: Iterable[torch.nn.Module], **options) -> Iterator[None]:
    """Raises torch._dynamo.exc.FailOnRecompileLimitHit where PyTorch would have gone on without compiling."""
    torch._dynamo.reset()
    try:
        for module in modules:
            module.compile(dynamic=False, **options)
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
        torch._dynamo.reset()


def checked(tokens: Sequence[int], how: Sequence[str], dtype: str, repeats: int, batches: int = BATCHES) -> None:
    """Raise ValueError that names the argument, what it was and what it may be."""
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be whole numbers of at least 1, got {list(tokens)}")
    for way in how:
        if way not in HOW:
            raise ValueError(f"how must be among {', '.join(HOW)}, got {way!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for what, number in (("repeats", repeats), ("batches", batches)):
        if number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")


def _under(ops: str, function: Callable) -> Callable:
    return batch_invariant(strict=True)(function) if ops == "invariant" else function


def _forwards(model, count: int, repeats: int) -> Mapping[str, tuple[dict, bool]]:
    one, many = prompts(model, 1, count), prompts(model, REQUESTS, count)

    def forward(ids):
        return model(input_ids=ids, logits_to_keep=1).logits
    calls = {ops: _under(ops, forward) for ops in OPS}
    with torch.no_grad():
        times = bench.measure(calls, lambda _: (one,), "call", device=one.device, set_bytes=one.nbytes, repeats=repeats)
        found = {}
        for ops, timing in times.items():
            if isinstance(timing, Exception):
                raise timing
            alone = calls[ops](one).clone()  # the next replay of a graph writes there
            found[ops] = {**timing.percentiles(), "repeats": repeats}, same_bits(alone, calls[ops](many)[:1])
    return found


def _batches(model, count: int, batches: int) -> Mapping[str, tuple[dict, bool]]:
    prompts = pool(model.config.vocab_size, count, model.device)
    found = {}
    for ops in OPS:
        us, differ = random_batches(_under(ops, lambda **given: model(**given).logits), prompts, batches, REQUESTS)
        found[ops] = {**bench.Timing(us).percentiles(), "repeats": batches}, not differ
    return found


def _find(model, count: int) -> Mapping[str, tuple[dict, bool]]:
    ids = prompts(model, 2, count)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {}
    for ops in OPS:
        start = time.perf_counter()
        report = _under(ops, find_moving_ops)(model, given)
        times = bench.Timing([1e6 * (time.perf_counter() - start)]).percentiles()
        found[ops] = {**times, "repeats": 1}, not report
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels mode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    device = runtime.device()
    parser.add_argument("--model", choices=list(PRESETS), default="llama-3.1-8b" if runtime.HAS_GPU else "tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS[device.type]))
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(TIMED))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batches", type=int, default=BATCHES, help="random ones, of the ways named so")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure points that are recorded already")
    a = parser.parse_args(argv)
    checked(a.tokens, a.how, a.dtype, a.repeats, a.batches)
    folder = records.open_machine(a.out, a.machine)
    skip = frozenset() if a.again else _recorded(folder)
    records.note_machine(folder, MODE_COST.file)

    def keep(row):
        MODE_COST.merge(folder, [row])
        print(f"{row['model']} {row['how']} {row['ops']} {row['tokens']} tokens: {row['us_p50'] / 1e3:.3f} ms, "
              f"{'same bits' if row['same_bits'] else 'bits moved'}")
    mode_cost(a.model, a.tokens, a.how, a.dtype, a.repeats, keep, skip, a.batches)
    return 0


def _recorded(folder) -> frozenset[tuple]:
    """The keys of rows that this very code has recorded."""
    done = MODE_COST.read(folder)
    same = done[done.source.isin(provenance.known_as(source()))] if len(done) else done
    return frozenset(same[list(MODE_COST.key)].itertuples(index=False, name=None))


if __name__ == "__main__":
    sys.exit(main())
