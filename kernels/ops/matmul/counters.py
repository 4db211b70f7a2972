"""Zeros that the programs of a product count up, and leave at zero."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch


class Counters:
    """Zeros that the programs of a product count up and leave at zero: a slice for each stream, and one for each
    captured call, because a graph may be replayed beside its stream."""

    SLICE, BANK = 4096, 1 << 20

    def __init__(self):
        self.banks: dict[int, list] = {}  # GPU -> [tensor, counters taken]
        self.full: list = []  # kept as long as the process: a captured graph may count in them
        self.streams: dict[tuple[int, int], int] = {}
        self.lock = Lock()  # of everything but a look at a stream's slice

    def take(self, index: int, stream: int, count: int) -> int:
        """The address of `count` counters, or 0 while a graph is captured and there are none left."""
        if torch.cuda.is_current_stream_capturing():
            with self.lock:
                return self._cut(index, count)
        address = self.streams.get((index, stream))
        if address and self.banks[index][1] <= self.BANK // 2:
            return address
        return self._slice(index, stream)

    def _slice(self, index, stream):
        with self.lock:
            self._renew(index)
            if (index, stream) not in self.streams:
                self.streams[index, stream] = self._cut(index, self.SLICE)
            return self.streams[index, stream]

    def _renew(self, index):
        """Make a bank if there is none or it is half taken, while no graph is captured: a capture cannot make one."""
        bank = self.banks.get(index)
        if bank is None or bank[1] > self.BANK // 2:
            with ThreadPoolExecutor(1) as other:  # torch.compile may give this thread's memory to a graph
                made = other.submit(self._make, index).result()
            self.full += [bank] if bank else []
            self.banks[index] = [made, 0]

    def _make(self, index):
        zeros = torch.zeros(self.BANK, dtype=torch.int32, device=f"cuda:{index}")
        torch.cuda.synchronize(index)  # zero before anyone counts
        return zeros

    def _cut(self, index, count):
        count += -count % 4  # addresses that are multiples of 16, as the kernels are told
        bank = self.banks.get(index)
        if bank is None or bank[1] + count > self.BANK:
            return 0
        bank[1] += count
        return bank[0].data_ptr() + 4 * (bank[1] - count)


COUNTERS = Counters()
