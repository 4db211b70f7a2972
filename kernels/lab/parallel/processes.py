"""Processes of this machine's CPU as ranks, started once and given work by name: gloo over the loopback.

    with Processes(8) as processes:
        processes.run(work.text, "invariant", b"def ", 8, size=4)    # on the first four; their answers, in order

A function is sent by its name, so it stands in a module; it gets its Ranks first, then what is given. On Linux one
process imports torch and the others are forked from it, for an import takes seconds.

    python -m kernels.lab.parallel.processes      what is started; it reads its settings from stdin
"""
from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ...ops.matmul.shared import SHARES
from .. import records

START_SECONDS = 120.0


class Processes:
    """`count` ranks, of which the first 1, 2, 4 or 8 work together; a call waits for all of them.

    timeout  seconds that ranks wait for one another in a collective

    Raises ValueError for another count, RuntimeError with the last line that was said if they do not start.
    """

    def __init__(self, count: int = 8, timeout: float = 60.0):
        if count not in SHARES:
            raise ValueError(f"count must be 1, 2, 4 or 8 processes, got {count!r}")
        self.count, self.lost = count, ""
        self._folder = tempfile.TemporaryDirectory(prefix="same-bits-")
        self._said = Path(self._folder.name) / "said"
        key = secrets.token_bytes(16)
        with Listener(authkey=key) as listener:
            self._process = self._start({"address": listener.address, "key": key.hex(), "count": count,
                                         "timeout": timeout, "store": str(Path(self._folder.name) / "store")})
            try:
                self._connections = self._accepted(listener)
            except BaseException:
                self.close()
                raise

    def _start(self, settings: dict) -> subprocess.Popen:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # no other interface is needed
        with self._said.open("wb") as said:
            process = subprocess.Popen([sys.executable, "-m", __name__], cwd=records.ROOT, env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=said, stderr=said)
        process.stdin.write(json.dumps(settings))
        process.stdin.close()
        return process

    def _accepted(self, listener: Listener) -> list[Connection]:
        """One connection a rank, in their order."""
        found: dict[int, Connection] = {}

        def accept():
            while len(found) < self.count:
                connection = listener.accept()
                found[pickle.loads(connection.recv_bytes())] = connection

        thread = Thread(target=accept, daemon=True)
        thread.start()
        end = time.monotonic() + START_SECONDS
        while thread.is_alive() and self._process.poll() is None and time.monotonic() < end:
            thread.join(0.1)
        if len(found) < self.count or not all(self._is_ready(found[rank], end) for rank in range(self.count)):
            raise RuntimeError(f"{self.count} processes did not start: {self._last_line()}")
        return [found[rank] for rank in range(self.count)]

    @staticmethod
    def _is_ready(connection: Connection, end: float) -> bool:
        try:
            return connection.poll(max(0.0, end - time.monotonic())) and bool(connection.recv_bytes())
        except (EOFError, OSError):
            return False

    def run(self, function: Callable, *arguments, size: int | None = None, seconds: float = 300.0) -> list[Any]:
        """What function(ranks, *arguments) gives on each of `size` processes (default: all), in the order of ranks.

        Raises RuntimeError that names the first process that failed, ended, or did not answer in `seconds`.
        """
        size = size or self.count
        if size not in SHARES or size > self.count:
            known = ", ".join(str(s) for s in SHARES if s <= self.count)
            raise ValueError(f"size must be one of {known}, got {size!r}")
        if self.lost:
            raise RuntimeError(f"these processes can do no more, for {self.lost}: start others")
        job = pickle.dumps((function.__module__, function.__qualname__, size, arguments))
        for rank in range(size):
            self._connections[rank].send_bytes(job)
        answers = self._answers(size, seconds)
        self._raise_for(answers)
        return [answers[rank][1] for rank in range(size)]

    def _answers(self, size: int, seconds: float) -> dict[int, tuple]:
        waiting, answers = {self._connections[rank]: rank for rank in range(size)}, {}
        end = time.monotonic() + seconds
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                answers |= {rank: ("late", f"did not answer in {seconds:g} seconds") for rank in waiting.values()}
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    answers[rank] = ("ended", "ended while it worked")
        return answers

    def _raise_for(self, answers: dict[int, tuple]) -> None:
        """Of several failures the one that is a cause: an end before an error, an error before a rank that waited."""
        for kind in ("ended", "failed", "lost", "late"):
            ranks = [rank for rank, answer in sorted(answers.items()) if answer[0] == kind]
            if not ranks:
                continue
            others = [answer[1] for answer in answers.values() if answer[0] == "lost" and kind != "lost"]
            text = f"process {ranks[0]} of {len(answers)} {answers[ranks[0]][1]}" + (f"; {others[0]}" if others else "")
            if kind != "failed" or others:
                self.lost = f"process {ranks[0]} {kind}"
            raise RuntimeError(text)

    def _last_line(self) -> str:
        lines = [line for line in self._said.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "they said nothing"

    def close(self) -> None:
        """End them. Safe to call again."""
        for connection in getattr(self, "_connections", []):
            connection.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(10)
        self._folder.cleanup()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _work(rank: int, settings: dict) -> None:
    """One rank: joins the others, then does what it is told until the connection closes."""
    import torch
    import torch.distributed as dist

    from ...model.parallel import Ranks
    from ...model.parallel.join import end_with_parent

    end_with_parent(Event())
    torch.set_num_threads(1)
    timeout = _seconds(settings["timeout"])
    address = settings["address"]
    address = tuple(address) if isinstance(address, list) else address
    connection = Client(address, authkey=bytes.fromhex(settings["key"]))
    connection.send_bytes(pickle.dumps(rank))
    dist.init_process_group("gloo", init_method=Path(settings["store"]).as_uri(), rank=rank, timeout=timeout,
                            world_size=settings["count"])
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in SHARES if size <= settings["count"]}
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            module, name, size, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # whoever started us is gone; a group that lost a rank would wait in its own end
        ranks = Ranks(rank, size, torch.device("cpu"), groups[size])
        connection.send_bytes(pickle.dumps(_answer(module, name, ranks, arguments)))


def _answer(module: str, name: str, ranks, arguments) -> tuple[str, Any]:
    from ...ops.all_reduce.ranks import Lost

    try:
        return "done", getattr(import_module(module), name)(ranks, *arguments)
    except Lost as error:
        return "lost", f"{error}"
    except Exception as error:  # noqa: BLE001 - it is raised where the work was asked for
        return "failed", f"raised {type(error).__name__}: {error}"


def _seconds(value: float):
    from datetime import timedelta

    return timedelta(seconds=value)


def main() -> None:
    settings = json.load(sys.stdin)
    from ...model.parallel.join import end_with_parent
    from . import work  # noqa: F401 - torch and the model, once for all that are forked

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [context.Process(target=_work, args=(rank, settings)) for rank in range(settings["count"])]
    for rank in ranks:
        rank.start()
    end_with_parent(Event())  # not before the forks, which know one thread only
    for rank in ranks:
        rank.join()


if __name__ == "__main__":
    # under its own name, so that what is pickled for a process that is spawned can be found there
    import_module("kernels.lab.parallel.processes").main()
