"""Time, measured in several ways, with contenders interleaved.

cold   device time a call, inputs out of cache: a CUDA graph of calls on as many separate inputs, replayed
       after a read of three L2s' worth of memory has evicted them; CUDA events around the replay, divided
graph  device time a call on warm inputs: a CUDA graph of calls on one input
call   host wall clock a call over a queue of calls, launch included: what eager code pays
event  an event pair around each eager call on warm inputs, the device idle before: what papers often report.
       Up to some tens of microseconds it measures the launch
flush  an event pair around an eager call after a read of three L2s' worth of memory: a check of `cold`,
       above it by the pair and the launch gap
"""
from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from .. import runtime
from ..model.cache import free_memory

CLOCKS = ("cold", "graph", "call", "event", "flush")
LARGE_COPY = {"cuda": 1 << 30, "cpu": 1 << 26}  # float32 numbers
PERCENTILES = (5, 20, 50, 80, 95)


def gigabytes(n: float) -> str:
    """So many bytes in words."""
    return f"{n / 1e9:.1f} GB" if n < 10e9 else f"{n / 1e9:,.0f} GB" if n < 1e15 else f"{n / 1e9:.0e} GB"


@dataclass
class Timing:
    """Samples in microseconds a call, one a round."""

    us: list[float]

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.us + other.us)

    def percentiles(self) -> dict[str, float]:
        """us_p05 ... us_p95"""
        return {f"us_p{p:02d}": float(v) for p, v in zip(PERCENTILES, np.percentile(self.us, PERCENTILES), strict=True)}


def clocks(device: torch.device) -> tuple[str, ...]:
    """The clocks of a sweep that names none: cold, graph and call on a GPU, `call` on a CPU."""
    return CLOCKS[:3] if device.type == "cuda" else ("call",)


def known(device: torch.device) -> tuple[str, ...]:
    """Every clock there is on this device."""
    return CLOCKS if device.type == "cuda" else ("call",)


def measure(contenders: Mapping[str, Callable], inputs: Callable[[int], tuple], clock: str, *, device: torch.device,
            set_bytes: int, repeats: int = 7) -> dict[str, Timing | Exception]:
    """Time each contender, interleaved round by round, so that drift affects all alike.

    inputs(i) makes the i-th set of arguments. set_bytes is how many bytes one call touches; it decides how many sets a
    graph holds. A contender that fails gives its exception; the others go on.
    """
    if clock not in known(device):
        raise ValueError(f"clock must be one of {', '.join(known(device))} on {device}, got {clock!r}")
    if not contenders:
        return {}
    if clock == "call":
        return _call(contenders, inputs(0), device, repeats)
    if clock in ("event", "flush"):
        return _pairs(contenders, inputs(0), clock == "flush", device, repeats)
    return _replay(contenders, inputs, clock == "cold", device, set_bytes, repeats)


def sets(clock: str, set_bytes: int, device: torch.device) -> int:
    """How many separate sets of inputs a clock holds at once."""
    return int(np.clip(3 * l2_bytes(device) // max(set_bytes, 1), 2, 48)) if clock == "cold" else 1


def _replay(contenders, inputs, cold, device, set_bytes, repeats):
    if cold:
        arguments = [inputs(i) for i in range(sets("cold", set_bytes, device))]
    else:
        arguments = [inputs(0)] * (20 if set_bytes < 1 << 26 else 4)
    calls = len(arguments)
    results, graphs = {}, {}
    for name, function in contenders.items():
        try:
            graphs[name] = _capture(function, arguments)
        except Exception as error:  # noqa: BLE001 - one contender's failure must not cost the others' points
            results[name] = without_frames(error)
    evict = torch.zeros(3 * l2_bytes(device) // 4 if cold else 1, dtype=torch.float32, device=device)
    events = {name: [] for name in graphs}
    for _ in range(repeats + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cold:
                evict.sum()
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize(device)
    for name, pairs in events.items():  # the first round only warms up
        results[name] = Timing([a.elapsed_time(b) * 1e3 / calls for a, b in pairs[1:]])
    return results


def _capture(function, sets):
    function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in sets[0]))  # compiles and loads before capture
    torch.cuda.synchronize()
    graph, stream, failed = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), []
    try:
        with _uncollected(), torch.cuda.graph(graph):
            try:
                for arguments in sets:  # results are dropped, so that the graph's pool gives their memory to the next
                    function(*arguments)
            except Exception as error:  # noqa: BLE001 - kept, for the end of a broken capture raises another
                failed.append(without_frames(error))
    except Exception as error:  # noqa: BLE001 - as above
        failed.append(without_frames(error))
    finally:
        torch.cuda.set_stream(stream)  # a capture that ends with an error leaves its own stream the current one
    if failed:
        raise failed[0]
    return graph


@contextmanager
def _uncollected():
    """No garbage is collected meanwhile: if another graph is freed while one is captured, the capture is lost."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def without_frames(error: Exception) -> Exception:
    """The exception without the frames it came through, whose inputs and graphs it would hold, in a circle."""
    error.__cause__ = error.__context__ = None  # they have frames of their own
    return error.with_traceback(None)


def _pairs(contenders, arguments, flush, device, repeats):
    evict = torch.zeros(3 * l2_bytes(device) // 4 if flush else 1, dtype=torch.float32, device=device)
    results, samples = {}, {name: [] for name in contenders}
    for name, function in contenders.items():
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - as above
            results[name] = without_frames(error)
            del samples[name]
    for _ in range(repeats + 1):
        _round(samples, results, lambda name: _pair(contenders[name], arguments, evict if flush else None, device))
    return {**results, **{name: Timing(us[1:]) for name, us in samples.items()}}  # the first round only warms up


def _round(samples, results, sample):
    """One more sample of each contender; one that fails now gives its exception, and has no more rounds."""
    for name in list(samples):
        try:
            samples[name].append(sample(name))
        except Exception as error:  # noqa: BLE001 - in later calls too
            results[name] = without_frames(error)
            del samples[name]


def _pair(function, arguments, evict, device) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    for _ in range(0 if evict is None else 4):  # keeps the device busy while the host queues the call
        evict.sum()
    start.record()
    function(*arguments)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e3


def _call(contenders, arguments, device, repeats, budget_s=0.02):
    results, queue = {}, {}
    for name, function in contenders.items():
        try:
            function(*arguments)
            queue[name] = int(np.clip(budget_s / max(_wall(function, arguments, device, 1), 1e-7), 1, 200))
        except Exception as error:  # noqa: BLE001 - as above
            results[name] = without_frames(error)
    samples = {name: [] for name in queue}
    for _ in range(repeats):
        _round(samples, results, lambda name: 1e6 * _wall(contenders[name], arguments, device, queue[name]))
    return {**results, **{name: Timing(us) for name, us in samples.items()}}


def _wall(function, arguments, device, calls) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def l2_bytes(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def copy_gbytes_per_s(device: torch.device | None = None, repeats: int = 11) -> float:
    """Measured ceiling for moving memory: bytes read plus bytes written by a large copy, in GB/s."""
    device = device or runtime.device()
    source = torch.ones(_large_copy(device), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device, repeats) / 1e9


def _large_copy(device) -> int:
    """As many numbers as tell the bandwidth, and fewer where they would take more than a quarter of what is free."""
    free = free_memory(device)
    return min(LARGE_COPY.get(device.type, 1 << 26), max((free or 1 << 40) // 32, 1 << 20))


def ceilings_bytes(device: torch.device) -> int:
    """Bytes that `ceilings` takes, if they are not known yet."""
    return 8 * _large_copy(device)


def matmul_tflops(device: torch.device | None = None, dtype=None, repeats: int = 11) -> float:
    """Measured ceiling for arithmetic: a large matrix product on random data, in TFLOP/s."""
    device = device or runtime.device()
    n, dtype = (8192, dtype or torch.bfloat16) if device.type == "cuda" else (1024, dtype or torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best(lambda: a @ b, device, repeats) / 1e12


def ceilings(device: torch.device, known: Mapping = MappingProxyType({})) -> dict[str, float]:
    """{"copy_gbytes_per_s", "matmul_tflops"} of this device: those in `known`, the others measured now, in seconds."""
    measured = {"copy_gbytes_per_s": (copy_gbytes_per_s, 1), "matmul_tflops": (matmul_tflops, 3)}
    return {name: known[name] if name in known else round(measure(device), digits)
            for name, (measure, digits) in measured.items()}


def _best(function, device, repeats) -> float:
    function()
    return float(np.median([_wall(function, (), device, 3) for _ in range(repeats)]))
