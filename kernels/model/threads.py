"""Pieces of one step on several cores: a specification's operations are so short that PyTorch keeps each on one."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def on_cores(function: Callable, pieces: Iterable) -> list:
    """[function(piece) for piece in pieces], without gradients, on as many cores as PyTorch has threads."""
    pieces, threads = list(pieces), torch.get_num_threads()
    if threads == 1 or len(pieces) < 2:
        return [function(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(torch.no_grad()(function), pieces))  # a thread begins with gradients on
