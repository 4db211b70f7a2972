"""A decoder on 1, 2, 4 and 8 ranks: one digest, in random batches too; what ranks cannot share is said by name."""
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from kernels.__main__ import main
from kernels.bits import digest, same_bits
from kernels.lab import provenance, records
from kernels.lab.parallel import measure, room, work
from kernels.lab.parallel.record import all_threads
from kernels.lab.proofs import model as proof
from kernels.model import parallel, steps
from kernels.model.config import PRESETS
from kernels.model.llama import Llama
from kernels.model.parallel import Ranks, cut
from kernels.model.parallel.cut import check, fingerprint, local, piece
from kernels.ops.all_reduce import symmetric
from kernels.ops.matmul.order import order
from tests.model import ranks_parallel as on_ranks

SIZES = (1, 2, 4, 8)
GOLDEN = records.ROOT / "tests" / "lab" / "proofs" / "recorded"
CPU = torch.device("cpu")


def golden(tokens: int) -> dict[str, str]:
    rows = proof.recorded("cpu", GOLDEN).query(f"model == 'byte' and shared == 8 and form == 'window' and "
                                               f"tokens == {tokens}")
    return dict(zip(rows.part, rows.digest, strict=True))


# One digest.

@pytest.mark.parametrize("size", [2, 8])
def test_the_byte_model_has_its_recorded_digests_layer_by_layer(size, processes):
    recorded = golden(8)
    for found in processes.run(on_ranks.digests, "invariant", 8, size=size):
        assert len(found) == 5 and found == {part: recorded[part] for part in found}


def test_the_default_follows_the_number_of_ranks(processes):
    found = [processes.run(on_ranks.digests, "default", 8, size=size) for size in SIZES]
    assert all(answer == answers[0] for answers in found for answer in answers)
    assert len({answers[0]["logits"] for answers in found}) > 1
    assert len({answers[0]["embedding"] for answers in found}) == 1


def test_twenty_random_batches_have_one_digest_on_any_number_of_ranks(processes):
    alone = Llama(work.POCKET, ops="invariant", device="cpu")
    seeds = list(range(20))
    expected = [digest(work.batch_logits(alone, seed)) for seed in seeds]
    assert len(set(expected)) == len(seeds)
    for size in SIZES[1:]:
        assert all(found == expected for found in processes.run(work.batches, seeds, size=size))


def test_a_piece_by_rows_keeps_the_order_of_the_whole_weight(processes):
    qkv = on_ranks.TALL.layer_shapes["qkv"]
    assert order(*qkv).segments == 1 < order(qkv[0] // 2, qkv[1]).segments
    alone = digest(steps.logits(Llama(on_ranks.TALL, ops="invariant", device="cpu"), [1, 2]))
    assert processes.run(on_ranks.tall, size=2) == [alone] * 2


def test_forms_and_greedy_tokens_are_those_of_one_process(processes):
    (forms, tokens, _), = processes.run(on_ranks.in_forms, size=1)
    for size, heads in ((2, (4, 1)), (8, (1, 1))):  # with eight ranks, four share each head of keys and values
        for found in processes.run(on_ranks.in_forms, size=size):
            assert found[:2] == (forms, tokens) and found[2][:2] == heads and f"of {size} on cpu" in found[2][2]
    assert len(forms) == 1


def test_the_engine_serves_a_shared_model_with_the_answers_of_one_process(processes):
    alone, = processes.run(on_ranks.served, size=1)
    assert [state for state, *_ in alone] == ["done"] * 4 and len({digest for *_, digest in alone}) == 4
    for size in (2, 8):
        assert all(found == alone for found in processes.run(on_ranks.served, size=size))


# Which piece a rank has.

@pytest.mark.parametrize("size", SIZES[1:])
def test_the_pieces_make_up_the_whole(size, processes):
    whole = Llama(on_ranks.TINY, ops="invariant", device="cpu", seed=3).weights()
    pieces = processes.run(on_ranks.pieces, size=size)
    q = on_ranks.TINY.heads * 64
    for name, weight in whole.items():
        mine, part = [p[name] for p in pieces], name.rpartition(".")[2]
        if part in ("output", "down"):
            assert same_bits(torch.cat(mine, 1), weight), name
        elif part == "gate_up":
            assert same_bits(torch.cat([half for n in (0, 1) for half in (m.chunk(2)[n] for m in mine)]), weight), name
        elif part == "qkv":
            kv = max(1, 4 // size) * 64
            assert same_bits(torch.cat([m[: q // size] for m in mine]), weight[:q]), name
            keys = [m[q // size : q // size + kv] for m in mine]
            each = keys[:: max(1, size // 4)]  # with eight ranks, two have each head
            assert same_bits(torch.cat(each), weight[q : q + 256]), name
            assert size < 8 or all(same_bits(keys[i], keys[i + 1]) for i in range(0, 8, 2))
            assert same_bits(torch.cat([m[q // size + kv :] for m in mine][:: max(1, size // 4)]), weight[q + 256 :])
        elif part == "head":
            assert same_bits(torch.cat(mine), weight)
        else:
            assert all(same_bits(m, weight) for m in mine), name


def test_a_tied_heads_rows_are_the_embeddings():
    config = dataclasses.replace(on_ranks.TINY, tied_embeddings=True)
    table = torch.arange(256, dtype=torch.float32)[:, None].expand(256, 64)
    assert torch.equal(piece(config, "head", table, 4, 2)[:, 0], torch.arange(128.0, 192.0))
    assert local(config, 8).kv_heads == 1 and local(config, 2).kv_heads == 2


def test_a_tied_head_has_the_digest_of_one_process(processes):
    config = dataclasses.replace(on_ranks.TINY, tied_embeddings=True)
    alone = digest(steps.logits(Llama(config, ops="invariant", device="cpu"), [1, 2, 3]))
    assert processes.run(on_ranks.tied, size=2) == [alone] * 2


def test_pieces_are_contiguous():
    weight = torch.zeros(64, 512)
    assert all(piece(on_ranks.TINY, f"0.{part}", weight, 2, 1).is_contiguous() for part in ("output", "down"))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b", "qwen3-8b", "byte", "small"])
def test_published_models_can_be_shared_by_eight(name):
    for size in SIZES:
        check(dataclasses.replace(PRESETS[name], shared=8), size)


# Bad input.

@pytest.mark.parametrize("kind, size, said", [
    ("heads", 8, "heads of tiny must be a multiple of the 8 ranks, got 12"),
    ("kv_heads", 8, "kv_heads of tiny must be a multiple or a divisor of the 8 ranks, got 6"),
    ("vocab", 4, "vocab_size of tiny must be a multiple of the 4 ranks, got 250"),
    ("shared", 2, "shared of tiny must be 8, the order that several ranks can carry out, got 1"),
    ("leaves", 2, "the k of output in tiny must be a multiple of 256 and at least 512, so that eight leaves end where "
                  "ranks' shares do, got 128"),
    ("seed", 4, "all ranks must have the same model: weight embedding is"),
    ("dtype", 2, "all ranks must have the same model: dtype is torch.float16 on rank 1 and torch.bfloat16 on rank 0"),
    ("ops", 2, "all ranks must have the same model: ops is default on rank 1 and invariant on rank 0"),
    ("one weight", 4, "all ranks must have the same model: weight 1.down is torch.bfloat16 (64, 512)"),
    ("eps", 2, "all ranks must have the same model: sizes is Config(")])
def test_what_ranks_cannot_share_is_said_on_all_of_them(kind, size, said, processes):
    for answer in processes.run(on_ranks.refused, kind, size=size):
        assert answer.startswith(said) and (size < 4 or kind not in ("seed", "one weight") or "on rank 3 and" in answer)


def test_other_ops_are_refused(processes):
    assert set(processes.run(on_ranks.other_ops, size=2)) == {
        "ops must be default or invariant on several ranks, got 'tiled'"}


@pytest.mark.parametrize("rank, size, said", [(0, 3, "the number of ranks must be 1, 2, 4 or 8"),
                                              (2, 2, "rank must be a whole number from 0 to 1, got 2")])
def test_numbers_that_are_no_ranks_are_refused(rank, size, said):
    with pytest.raises(ValueError, match=said):
        Ranks(rank, size, CPU)


def test_a_fingerprint_tells_values_places_and_signs_apart(monkeypatch):
    x = torch.arange(1.0, 9.0)
    assert len({fingerprint(t) for t in (x, -x, x.flip(0), x + 1, x[:7], x.bfloat16())}) == 6
    assert fingerprint(x) == fingerprint(x.clone())
    whole = fingerprint(x)
    monkeypatch.setattr(cut, "_CHUNK", 3)
    assert fingerprint(x) == whole != fingerprint(torch.cat([x[3:6], x[:3], x[6:]]))


# Joining.

@pytest.fixture
def variables(monkeypatch):
    """set(name=value, ...): torchrun's variables, of a rank alone unless named; None leaves one out."""
    def given(**changed):
        every = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        for name, value in {**every, **changed}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        monkeypatch.setenv(name, os.environ.get(name, "lo" if "IFNAME" in name else "0"))
    threads = torch.get_num_threads()
    yield given
    parallel.leave()
    torch.set_num_threads(threads)


def test_without_torchrun_the_command_says_how_to_start(variables, capsys):
    variables(RANK=None, MASTER_PORT=None)
    assert main(["parallel"]) == 1
    assert ("error: this process was not started by torchrun (RANK, MASTER_PORT not set): torchrun --standalone "
            "--nproc-per-node N -m kernels parallel, with 1, 2, 4 or 8 for N") in capsys.readouterr().err


@pytest.mark.parametrize("changed, device, said", [
    ({"WORLD_SIZE": 3}, "cpu", "the number of ranks must be 1, 2, 4 or 8, which divide the eight leaves of k, got 3"),
    ({"RANK": "first"}, "cpu", "RANK must be a whole number, as torchrun sets it, got 'first'"),
    ({}, "meta", "device must be cpu, or cuda where there is a GPU, got 'meta'"),
    ({"LOCAL_RANK": 64}, "cuda", "device must be cpu, or cuda where there is a GPU|has no GPU of its own")])
def test_variables_that_make_no_rank_are_refused(changed, device, said, variables):
    variables(**changed)
    with pytest.raises((RuntimeError, ValueError), match=said):
        parallel.join(device)


@pytest.mark.parametrize("changed, device, said", [
    ({"LOCAL_RANK": 2}, "cuda", "rank 2 of this machine has no GPU of its own: there are 2. Start as many ranks"),
    ({}, "cuda:1", "device must be cuda alone, for each rank has the GPU of its own number, got 'cuda:1'")])
def test_a_rank_has_the_gpu_of_its_number(changed, device, said, variables, monkeypatch):
    join = sys.modules[parallel.join.__module__]
    monkeypatch.setattr(join, "runtime", types.SimpleNamespace(HAS_GPU=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    variables(**changed)
    with pytest.raises(ValueError, match=said):
        parallel.join(device)


def test_a_rank_of_a_cpu_has_one_thread_and_leaves_no_sum_to_a_switch(variables, monkeypatch):
    variables(MASTER_PORT=free_port())
    for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name)
    torch.set_num_threads(2)
    monkeypatch.setattr(symmetric, "TIMEOUT_MS", 1)
    assert str(parallel.join("cpu", 90)) == "rank 0 of 1 on cpu" and torch.get_num_threads() == 1
    assert symmetric.TIMEOUT_MS == 90_000
    assert os.environ["NCCL_NVLS_ENABLE"] == "0" and os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert os.environ.get("GLOO_SOCKET_IFNAME") == {"linux": "lo", "darwin": "lo0"}.get(sys.platform)


def test_a_port_that_is_taken_is_said(variables):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        variables(MASTER_PORT=server.getsockname()[1], WORLD_SIZE=2)
        with pytest.raises(RuntimeError, match=r"MASTER_PORT \d+ is taken by another program: let torchrun choose"):
            parallel.join("cpu", timeout=5)


def test_ranks_that_do_not_come_are_an_error_in_time(variables):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    variables(MASTER_PORT=port, WORLD_SIZE=2)
    with pytest.raises(RuntimeError, match=rf"rank 0 of 2 on cpu could not join the others at 127.0.0.1:{port}"):
        parallel.join("cpu", timeout=1)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""
RANK = """
import sys, time
from kernels.model import parallel
print("joins", flush=True)
parallel.join("cpu")
print("joined", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("size, said", [(1, ["joins", "joined"]), (2, ["joins"])], ids=["that works", "that waits"])
def test_a_rank_ends_when_its_parent_is_killed(size, said):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": f"{free_port()}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, RANK], cwd=records.ROOT, env={**os.environ, **variables},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert [parent.stdout.readline().strip() for _ in said] == said
        time.sleep(1)  # for the one that waits to be about it
        parent.kill()
        assert parent.communicate(timeout=5)[0] == "", "the rank holds the pipe until it is gone"
    finally:
        parent.kill()


STARTER = """
from kernels.lab.parallel.processes import Processes
from tests.model import ranks_parallel
processes = Processes(1)
print(processes._process.pid, *processes.run(ranks_parallel.process_id), flush=True)
processes.run(ranks_parallel.asleep)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which processes there are")
def test_processes_end_at_their_work_when_their_starter_is_killed():
    def there(process):
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except FileNotFoundError:
            return False
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, cwd=records.ROOT, stdout=subprocess.PIPE, text=True) as start:
        found = start.stdout.readline().split()
        assert len(found) == 2 and all(map(there, found))
        start.kill()
        end = time.monotonic() + 5
        while any(map(there, found)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(there, found))


def test_a_process_that_left_the_ranks_outlives_its_parent(monkeypatch):
    join = sys.modules[parallel.join.__module__]
    ended, left, asked = [], threading.Event(), threading.Event()
    monkeypatch.setattr(join, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(join.os, "_exit", lambda status: (ended.append(status), left.set()))
    numbers = iter([7, 7, 7])
    monkeypatch.setattr(join.os, "getppid", lambda: next(numbers, None) or (asked.set(), 1)[1])
    join.end_with_parent(left)
    assert asked.wait(5) and left.wait(5) and ended == [1]
    numbers = iter([7])
    left.set()
    join.end_with_parent(left)
    time.sleep(0.1)
    assert ended == [1]


def test_a_gpu_that_waited_in_vain_ends_its_process_with_a_word(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(sys.modules[parallel.join.__module__].os, "_exit", ended.append)
    with parallel.ends_where_lost(Ranks(0, 2, CPU)):
        raise RuntimeError("CUDA error: unspecified launch failure\nmore words")
    assert ended == [1] and capsys.readouterr().err.endswith(
        "more words\nerror: rank 0 of 2 on cpu waited for a rank that ended or did not come in time (CUDA error: "
        "unspecified launch failure)\n")
    for size, said in ((2, "another"), (1, "launch failure")):
        with pytest.raises(RuntimeError, match=said), parallel.ends_where_lost(Ranks(0, size, CPU)):
            raise RuntimeError(said)
    assert ended == [1]


# The command.

@pytest.mark.parametrize("where", ["cache", "forward"])
def test_a_cell_that_does_not_fit_on_one_rank_is_said_by_all(where, processes):
    for said, met in processes.run(on_ranks.without_room, where, size=4, seconds=30):
        assert said == "decode of batch 2 at context 4 does not fit on rank 3 of 4: CUDA out of memory. Tried"
        assert met == [0, 1, 2, 3]


def test_a_rehearsal_waits_for_nobody_and_has_all_logits(processes):
    *others, (rehearsed, real) = processes.run(on_ranks.alone, size=4)
    assert rehearsed == real == (9, 64) and all(found == ((), real) for found in others)


def test_a_row_is_the_same_on_all_ranks_but_for_the_clock(processes):
    first, *others = processes.run(on_ranks.one_row, size=4)
    assert (first["model"], first["ops"], first["gpus"], first["phase"]) == ("pocket", "invariant", 4, "decode")
    assert len({row["logit_digest"] for row in [first, *others]}) == 1 and first["ms_p50"] > 0
    alone, = processes.run(on_ranks.one_row, size=1)
    assert alone["logit_digest"] == first["logit_digest"]


def test_the_time_is_the_slowest_ranks(processes):
    assert processes.run(on_ranks.slowest, size=2) == [7.0, 7.0]


def test_ranks_with_other_logits_are_an_error(processes):
    said = "ranks have other logits of decode of batch 2 at context 4: the residual streams differ"
    assert processes.run(on_ranks.other_logits, size=2) == [said] * 2


def test_one_rank_writes_the_record(processes, tmp_path):
    assert processes.run(on_ranks.recorded, str(tmp_path), size=2) == [1, 0]
    assert measure.TENSOR_PARALLEL.read(tmp_path).model.tolist() == ["of rank 0"]


def test_threads_are_as_many_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with all_threads():
            assert torch.get_num_threads() == len(os.sched_getaffinity(0)) if sys.platform == "linux" else True
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_prompts_behind_decode_are_read_some_at_a_time(processes):
    found = {at_once: processes.run(on_ranks.decoded, at_once, size=1)[0] for at_once in (1, 12, 30)}
    assert len({digest for digest, _ in found.values()}) == 1
    assert {at_once: calls for at_once, (_, calls) in found.items()} == {
        1: [6] * 5 + [5, 6, 5], 12: [12, 12, 6, 5, 12, 5], 30: [30, 5] * 2}


def test_an_end_that_hides_a_lack_of_memory_is_one():
    def work():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        finally:
            raise RuntimeError("the capture ended early")

    def other():
        raise RuntimeError("unlike")
    monkey = types.SimpleNamespace(rank=0, size=1, group=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room.words, "told_objects", lambda value, _: [value])
        with pytest.raises(MemoryError, match="a cell does not fit on rank 0 of 1: CUDA out of memory. Tried to allo"):
            room.together(work, monkey, "a cell")
        with pytest.raises(RuntimeError, match="unlike"):
            room.together(other, monkey, "a cell")
        assert room.together(lambda: 5, monkey, "a cell") == 5


@pytest.fixture
def command(variables, tmp_path, monkeypatch):
    """run(*words): the command of a rank alone, recording in tmp_path; (its status, what it measured)."""
    asked, plan = [], {"stop": 99}

    def measured(model, point, repeats):
        asked.append((point.batch, model.ops_name))
        if len(asked) == plan["stop"]:
            raise RuntimeError("a GPU fell off the bus")
        if asked[-1] == (64, "invariant"):
            raise MemoryError(f"{point} does not fit on rank 0 of 1: it is too large")
        return {**measure._key(model, point), "ms_p05": 1.0, "ms_p50": 1.0, "ms_p95": 1.0, "logit_digest": "0" * 64,
                "recorded_at": records.now(), "source": measure.source()}

    def run(*words, stop=99):
        asked.clear()
        plan["stop"] = stop
        variables(MASTER_PORT=free_port())
        status = main(["parallel", "--device", "cpu", "--phases", "decode", "--batches", "1", "64",
                       "2", "--record", "--out", str(tmp_path), "--machine", "here", *words])
        return status, asked
    monkeypatch.setattr(measure, "model_of", lambda _, ranks, ops, __: parallel.Sharded(work.POCKET, ranks, ops=ops))
    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "_introduced", lambda *_: None)
    return run


EVERY = [(batch, ops) for batch in (1, 64, 2) for ops in ("default", "invariant")]


def test_rows_are_recorded_as_they_come_and_skipped_when_asked_again(command, tmp_path, capsys):
    def written():
        return set(measure.TENSOR_PARALLEL.read(tmp_path / "here")[["batch", "ops"]].itertuples(index=False, name=None))

    assert command(stop=3) == (1, EVERY[:3]) and written() == {(1, "default"), (1, "invariant")}, "in turns"
    assert json.loads((tmp_path / "here" / "machine.json").read_text())["command"], "noted before the end"
    capsys.readouterr()
    assert command() == (0, EVERY[2:])
    assert written() == set(EVERY) - {(64, "invariant")}
    said = capsys.readouterr().out
    assert "1 do not fit on 1:\n  decode of batch 64 at context 64, invariant ops\n" in said
    assert "recorded 3 rows in" in said
    assert command() == (0, [(64, "invariant")]) and command("--again") == (0, EVERY)


def test_rows_of_other_code_are_measured_again(command, tmp_path, monkeypatch):
    assert command() == (0, EVERY)
    monkeypatch.setattr(measure, "source", lambda: "0123456789ab")
    assert command() == (0, EVERY)
    monkeypatch.setattr(provenance, "known_as", lambda now: frozenset({now, "0123456789ab"}))
    monkeypatch.setattr(measure, "source", lambda: "ba9876543210")
    assert command() == (0, [(64, "invariant")])


def test_sums_are_recorded_as_they_come_and_skipped_when_asked_again(command, tmp_path, monkeypatch):
    from kernels.lab.parallel import sums

    def counts():
        return sorted(set(records.TOKEN_SWEEP.read(tmp_path / "here").tokens))
    at, seen = sums._at, []

    def stopping(ranks, shape, part, *rest):
        seen.append(len(part))
        if len(seen) == 2:
            raise RuntimeError("stopped")
        return at(ranks, shape, part, *rest)
    monkeypatch.setattr(sums, "_at", stopping)
    words = ("--sums", "--shape", "N=64", "--counts", "1", "2", "5")
    assert command(*words)[0] == 1 and counts() == [1]
    assert command(*words)[0] == 0 and counts() == [1, 2, 5] and seen == [1, 2, 2, 5]
    assert command(*words)[0] == 0 and seen == [1, 2, 2, 5]
    assert command(*words, "--again")[0] == 0 and seen[4:] == [1, 2, 5]


def test_torchrun_records_the_digest_of_one_process(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "kernels", "parallel", "--ops", "invariant", "--phases", "prefill", "--contexts", "8",
                           "--tokens", "0", "--repeats", "1", "--device", "cpu", "--record", "--out", str(tmp_path),
                           "--machine", "here"],
                          cwd=records.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    row, = measure.TENSOR_PARALLEL.read(tmp_path / "here").to_dict("records")
    alone = Llama(dataclasses.replace(PRESETS["byte"], shared=8), ops="invariant", device="cpu",
                  weights=_stored())
    tokens = torch.tensor([[37 * i + i * i % 11 for i in range(8)]], dtype=torch.int64) % 256
    assert row["logit_digest"] == digest(alone(tokens, alone.cache(1, 8), logits="all")[0])
    assert (row["gpus"], row["ops"], row["phase"]) == (2, "invariant", "prefill") and row["ms_p50"] > 0
    assert done.stdout.count("logits of 64 tokens") == 1  # rank 0 alone speaks
    assert golden(64)["logits"] in done.stdout


def _stored():
    from kernels.lab.proofs.model_forms import FOLDER
    from kernels.model import folder

    weights = folder.load(FOLDER, device="cpu").weights()
    return lambda name, _: weights[name]


@pytest.mark.parametrize("words, said", [(["--batches", "0"], "must be a whole number of at least 1, got '0'"),
                                         (["--ops", "tiled"], "invalid choice: 'tiled'")])
def test_arguments_that_are_none_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        main(["parallel", *words])
    assert said in capsys.readouterr().err


@pytest.mark.gpu
def test_one_gpu_and_two_have_one_digest(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = set()
    for gpus in (1, 2):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                               str(gpus), "-m", "kernels", "parallel", "--ops", "invariant", "--tokens", "8",
                               "--contexts", "64", "300", "--batches", "1", "5", "64", "--repeats", "2", "--record",
                               "--out", str(tmp_path), "--machine", "here"],
                              cwd=records.ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert golden(64)["logits"] in done.stdout
        rows = measure.TENSOR_PARALLEL.read(tmp_path / "here").query(f"gpus == {gpus}")
        found.add(tuple(rows.sort_values(["phase", "batch", "context"]).logit_digest))
    assert len(found) == 1 and len(next(iter(found))) == 8
