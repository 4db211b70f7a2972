"""What ranks do for test_parallel.py: it is imported by the processes, under its full name."""
import copy
import dataclasses
import os
import time
from pathlib import Path

import torch

from kernels.bits import digest
from kernels.lab.parallel import measure, room, work
from kernels.lab.parallel.record import Record
from kernels.lab.proofs.model_forms import prompt_in
from kernels.model import parallel, steps
from kernels.model.config import preset
from kernels.model.weights import random_weights
from kernels.ops.all_reduce import ranks as words

TINY = dataclasses.replace(preset("tiny"), heads=8, kv_heads=4, head_dim=64, intermediate_size=512, shared=8)
# qkv's 3072 rows are one chain of 1024; the 1536 that a rank of two has would be cut in two, were they a whole weight
TALL = dataclasses.replace(TINY, hidden_size=1024, heads=16, head_dim=128, layers=1, vocab_size=64)


def tall(ranks):
    """Logits of a model in which a piece of a weight has another order than the whole, taken by itself."""
    return digest(steps.logits(parallel.Sharded(TALL, ranks), [1, 2]))


def digests(ranks, ops, tokens):
    """The byte model's parts, layer by layer."""
    return steps.layer_digests(work.byte_model(ranks).using(ops), prompt_in()[:tokens])


def in_forms(ranks):
    """One prompt as a window, in chunks and token by token; greedy tokens; what the model says of itself."""
    model = work.pocket_model(ranks)
    forms = {digest(steps.logits(model, range(9), chunks)) for chunks in ([9], [4, 5], [1] * 9)}
    return forms, steps.greedy(model, range(9), 4), (model.config.heads, model.config.kv_heads, repr(model))


def pieces(ranks):
    """This rank's weights, and those of the whole."""
    model = parallel.Sharded(TINY, ranks, seed=3)
    return {name: weight.clone() for name, weight in model.weights().items()}


def refused(ranks, kind):
    """What a model that ranks cannot share, or do not agree on, is told."""
    config, odd = TINY, ranks.rank == ranks.size - 1
    options, change = {}, {}
    if kind == "seed":
        options = {"seed": 1 if odd else 0}
    elif kind == "dtype":
        options = {"dtype": torch.float16 if odd else torch.bfloat16}
    elif kind == "ops":
        options = {"ops": "default" if odd else "invariant"}
    elif kind == "one weight":
        whole = random_weights(0, torch.bfloat16, "cpu")
        options = {"weights": lambda name, shape: whole(name, shape) + (odd and name == "1.down")}
    elif kind == "eps":
        change = {"norm_eps": 1e-5 if odd else 1e-6}
    else:
        change = {"heads": {"heads": 12, "kv_heads": 4, "shared": 1}, "kv_heads": {"heads": 24, "kv_heads": 6},
                  "vocab": {"vocab_size": 250}, "shared": {"shared": 1}, "leaves": {"head_dim": 16}}[kind]
    try:
        parallel.Sharded(dataclasses.replace(config, **change), ranks, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def other_ops(ranks):
    try:
        work.pocket_model(ranks).using("tiled")
    except ValueError as error:
        return str(error)
    return "nothing"


def served(ranks):
    """The engine over a model that ranks share: every rank is given the same requests."""
    from kernels.inference import Engine, Sampler

    engine = Engine(work.pocket_model(ranks), pages=16, max_batch=3, budget=12, chunk=5, digests=True)
    requests = [engine.submit(range(1 + i, 9 + 2 * i), 3, Sampler(temperature=0.8, seed=i)) for i in range(4)]
    engine.run()
    return [(r.state, r.answer, r.logit_digest) for r in requests]


def without_room(ranks, where):
    """What `measure` tells where the last rank alone has no room; then all ranks meet."""
    def lacking(*_, **__):
        raise {"cache": MemoryError}.get(where, torch.OutOfMemoryError)("CUDA out of memory. Tried\nmore words")

    model = copy.copy(work.pocket_model(ranks))  # the pocket model is kept
    if ranks.rank == ranks.size - 1 and where == "cache":
        model.cache = lacking
    elif ranks.rank == ranks.size - 1:
        model.ops = dataclasses.replace(model.ops, swiglu=lacking)
    try:
        measure.measure(model, measure.Point("decode", 2, 4), 1)
    except MemoryError as error:
        return str(error), words.told_objects(ranks.rank, ranks.group)
    return "nothing", []


def alone(ranks):
    """Of a rehearsal on the last rank, while the others do something else: the logits' shape, and the model's own."""
    model = work.pocket_model(ranks)
    found, point = (), measure.Point("prefill", 1, 9)
    if ranks.rank == ranks.size - 1:
        _, whole = measure.forward_of(room.alone(model), point)
        found = tuple(whole().shape)
    words.told_objects(0, ranks.group)
    return found, tuple(measure.forward_of(model, point)[1]().shape)


def one_row(ranks):
    return measure.measure(work.pocket_model(ranks), measure.Point("decode", 2, 4), 1)


def decoded(ranks, at_once):
    """The digest of a decode behind prompts that are read so many tokens at a time, and of its rehearsal's calls."""
    model, calls = copy.copy(work.pocket_model(ranks)), []
    forward = model.forward
    model.forward = lambda tokens, *given: calls.append(len(tokens)) or forward(tokens, *given)
    before, measure.AT_ONCE = measure.AT_ONCE, at_once
    try:
        digests = [digest(measure.forward_of(model, measure.Point("decode", 5, 6), rehearsal)[1]())
                   for rehearsal in (False, True)]
    finally:
        measure.AT_ONCE = before
    return digests[0], calls


def slowest(ranks):
    """A row where the last rank takes 7 ms and the others 1."""
    measured, measure._wall = measure._wall, lambda run, model: 7.0 if ranks.rank == ranks.size - 1 else 1.0
    try:
        return one_row(ranks)["ms_p50"]
    finally:
        measure._wall = measured


def other_logits(ranks):
    """What `measure` tells where the last rank has other logits than the others."""
    model = copy.copy(work.pocket_model(ranks))
    forward = model.forward
    model.forward = lambda *given, **named: forward(*given, **named) + (ranks.rank == ranks.size - 1)
    try:
        return measure.measure(model, measure.Point("decode", 2, 4), 1)
    except RuntimeError as error:
        return str(error)


def tied(ranks):
    """Logits of a model whose head is its embedding."""
    return digest(steps.logits(parallel.Sharded(dataclasses.replace(TINY, tied_embeddings=True), ranks), [1, 2, 3]))


def recorded(ranks, folder):
    """Every rank keeps a row of its own number; how many it wrote."""
    record = Record(measure.TENSOR_PARALLEL, "0123456789ab", ranks, Path(folder))
    row = dict.fromkeys(measure.TENSOR_PARALLEL.columns, 0) | {"model": f"of rank {ranks.rank}"}
    record.keep([row])
    return record.written


def process_id(_):
    return os.getpid()


def asleep(_):
    time.sleep(60)
