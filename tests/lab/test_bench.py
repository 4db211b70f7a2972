"""The clocks, on a GPU and a host clock that are played: what is timed, on which inputs, and in which unit."""
import gc
import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kernels.lab import bench

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
L2 = 4096  # bytes


class Device:
    """A GPU whose work takes the time that it is told, and a host that waits for it in `synchronize`.

    The host's clock counts seconds, the device's milliseconds. `did` is what happened, in order. A capture that was
    `broken` ends with an error, and its stream stays the current one, as with torch.
    """

    def __init__(self):
        self.host = self.device = self.queued = 0.0
        self.did, self.graph, self.broken, self.stream = [], None, False, "the caller's"

    def work(self, ms, note):
        """A kernel: captured if a graph is being made, queued otherwise."""
        self.did.append(note)
        if self.graph is not None:
            self.graph.append(ms)
        else:
            self.device += ms
            self.queued += ms

    def synchronize(self, device=None):
        self.host, self.queued = self.host + self.queued / 1e3, 0.0


@pytest.fixture
def gpu(monkeypatch):
    """A played GPU 0, whose tensors lie on the CPU."""
    gpu = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.device

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        replays = 0

        def replay(self):  # the first is slow, each further one a little slower than the one before
            self.replays += 1
            gpu.work(sum(self.kernels) * (50 if self.replays == 1 else self.replays), f"replay {self.kernels[0]}")

    @contextmanager
    def capture(graph):
        before, gpu.stream, gpu.broken = gpu.stream, "the capture's", False
        gpu.graph = graph.kernels = []
        try:
            yield
        finally:
            gpu.graph = None
            if gpu.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            gpu.stream = before

    zeros, total = torch.zeros, torch.Tensor.sum
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.Tensor, "sum", lambda x: gpu.work(1000.0, f"evict {x.nbytes}") or total(x))
    for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": gpu.synchronize,
                        "current_stream": lambda: gpu.stream, "set_stream": partial(setattr, gpu, "stream"),
                        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=L2)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: gpu.host)
    return gpu


def contender(gpu, ms, given):
    """A function of one tensor that takes the device `ms`, and keeps in `given` what it was called with."""
    def function(x):
        given.append(x)
        gpu.work(ms, f"call {ms}")
    return function


def timed(gpu, clock, set_bytes, repeats=3):
    """(timings, inputs made, what each of two contenders of 2 and 3 ms was given)"""
    made, given = [], ([], [])

    def inputs(i):
        made.append(torch.full((4,), float(i)))
        return (made[-1],)

    contenders = {"a": contender(gpu, 2.0, given[0]), "b": contender(gpu, 3.0, given[1])}
    return bench.measure(contenders, inputs, clock, device=CUDA, set_bytes=set_bytes, repeats=repeats), made, given


@pytest.mark.parametrize("clock", ["cold", "graph"])
def test_a_replay_is_timed_in_microseconds_a_call_without_its_first_round(gpu, clock):
    timings, *_ = timed(gpu, clock, set_bytes=4 * L2)
    assert {name: timing.us for name, timing in timings.items()} == {
        "a": [2000.0 * n for n in (2, 3, 4)], "b": [3000.0 * n for n in (2, 3, 4)]}


def test_contenders_take_turns_and_cold_evicts_before_each(gpu):
    timed(gpu, "cold", set_bytes=4 * L2)
    evicted = f"evict {3 * L2}"
    assert gpu.did[-16:] == [evicted, "replay 2.0", evicted, "replay 3.0"] * 4
    gpu.did.clear()
    timed(gpu, "graph", set_bytes=4 * L2)
    assert gpu.did[-8:] == ["replay 2.0", "replay 3.0"] * 4 and evicted not in gpu.did


@pytest.mark.parametrize("set_bytes, sets", [(L2, 3), (L2 // 2, 6), (1, 48), (0, 48), (10 * L2, 2)])
def test_cold_takes_as_many_separate_inputs_as_fill_three_caches(gpu, set_bytes, sets):
    _, made, given = timed(gpu, "cold", set_bytes)
    assert bench.sets("cold", set_bytes, CUDA) == sets == len(made)
    assert [x.tolist() for x in made] == [[float(i)] * 4 for i in range(sets)]
    for warm_up, *captured in given:
        assert [x.data_ptr() for x in captured] == [x.data_ptr() for x in made]
        assert torch.equal(warm_up, made[0]) and warm_up.data_ptr() != made[0].data_ptr(), "what it writes is lost"


@pytest.mark.parametrize("set_bytes, calls", [((1 << 26) - 1, 20), (1 << 26, 4)])
def test_graph_calls_on_one_input(gpu, set_bytes, calls):
    _, made, given = timed(gpu, "graph", set_bytes)
    assert len(made) == 1 == bench.sets("graph", set_bytes, CUDA)
    assert all([x.data_ptr() for x in captured] == [made[0].data_ptr()] * calls for _, *captured in given)


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_call_is_host_time_with_the_device_waited_for(gpu, device):
    """A call takes the host 1 ms and the GPU 4 ms, its first one 1 s more; 20 ms hold four such calls, or twenty."""
    calls = []

    def function(x):
        gpu.host += 1.0 if not calls else 0.001
        gpu.work(4.0, "call")
        calls.append(x)

    timing = bench.measure({"a": function}, lambda i: (i,), "call", device=device, set_bytes=1, repeats=3)["a"]
    a_call, queue = (5000.0, 4) if device.type == "cuda" else (1000.0, 20)
    assert timing.us == pytest.approx([a_call] * 3)
    assert calls == [0] * (1 + 1 + 3 * queue)


@pytest.mark.parametrize("seconds, queue", [(1.0, 1), (1e-9, 200)])
def test_a_queue_holds_1_to_200_calls(gpu, seconds, queue):
    calls = []

    def function():
        gpu.host += seconds
        calls.append(1)

    bench.measure({"a": function}, lambda i: (), "call", device=CPU, set_bytes=1, repeats=2)
    assert len(calls) == 2 + 2 * queue


@pytest.mark.parametrize("clock", bench.CLOCKS)
def test_a_contender_that_fails_costs_no_other(gpu, clock):
    def broken(x):
        raise IndexError("no")

    contenders = {"broken": broken, "a": contender(gpu, 2.0, [])}
    found = bench.measure(contenders, lambda i: (torch.ones(4),), clock, device=CUDA, set_bytes=1, repeats=2)
    assert isinstance(found["broken"], IndexError) and len(found["a"].us) == 2


def failing(gpu, calls, error, breaks=False):
    """A function that fails at call number `calls`, with this error or none, and breaks the capture or does not."""
    made = []

    def function(x):
        made.append(gpu.graph is not None)
        gpu.work(1.0, "call")
        if len(made) == calls:
            gpu.broken = breaks
            if error:
                raise error
    return function, made


@pytest.mark.parametrize("device, clock", [(CUDA, "call"), (CUDA, "event"), (CUDA, "flush"), (CPU, "call")], ids=str)
@pytest.mark.parametrize("calls", [2, 3, 6])
def test_a_contender_that_fails_at_a_later_call_costs_no_other(gpu, device, clock, calls):
    function, made = failing(gpu, calls, IndexError("no"))

    def slow(x):  # one call a queue
        gpu.host += 1.0
        function(x)

    contenders = {"a": contender(gpu, 2.0, []), "broken": slow, "b": contender(gpu, 3.0, [])}
    found = bench.measure(contenders, lambda i: (torch.ones(4),), clock, device=device, set_bytes=1, repeats=5)
    assert isinstance(found["broken"], IndexError) and len(made) == calls, "called no more"
    assert len(found) == 3 and [len(found[name].us) for name in "ab"] == [5, 5]
    if device.type == "cuda":
        assert found["a"].us == pytest.approx([2000.0] * 5) and found["b"].us == pytest.approx([3000.0] * 5)


@pytest.mark.parametrize("clock", ["cold", "graph"])
@pytest.mark.parametrize("breaks", [False, True])
def test_a_contender_that_fails_in_a_capture_costs_no_other(gpu, clock, breaks):
    """Each is called once before; the first error is told, not the one with which torch ends a broken capture."""
    function, captured = failing(gpu, 2, KeyError("part_ptr"), breaks)
    silent, _ = failing(gpu, 2, None, breaks=True)
    given = []
    contenders = {"broken": function, "a": contender(gpu, 2.0, given), "silent": silent, "b": contender(gpu, 3.0, [])}
    found = bench.measure(contenders, lambda i: (torch.ones(4),), clock, device=CUDA, set_bytes=4 * L2, repeats=2)
    assert captured == [False, True] and isinstance(found["broken"], KeyError)
    assert isinstance(found["silent"], RuntimeError) and "previous error" in str(found["silent"])
    assert [found["a"].us, found["b"].us] == [[2000.0 * n for n in (2, 3)], [3000.0 * n for n in (2, 3)]]
    assert (gpu.stream, gpu.graph) == ("the caller's", None) and len(given) > 1


@pytest.mark.parametrize("clock, calls", [(clock, calls) for clock in bench.CLOCKS for calls in (1, 2)])
def test_what_a_contender_that_failed_has_held_is_freed_at_once(gpu, monkeypatch, clock, calls):
    """A graph that only a later collection frees would be freed within another capture, which breaks that one."""
    held, graphs, made, given = [], [], torch.cuda.CUDAGraph, []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(weakref.ref(graph := made())) or graph)

    def inputs(i):
        held.append(weakref.ref(x := torch.ones(4)))
        return (x,)

    def broken(x):
        given.append(gpu.work(1.0, "call"))
        if len(given) == calls:
            try:
                raise IndexError("first")
            except IndexError as error:
                raise KeyError("second") from error

    works = contender(gpu, 2.0, SimpleNamespace(append=id))  # which keeps nothing
    gc.disable()
    try:
        found = bench.measure({"a": works, "broken": broken, "b": works}, inputs, clock, device=CUDA,
                              set_bytes=4 * L2, repeats=2)
        assert isinstance(found["broken"], KeyError) and len(given) == calls and len(found["b"].us) == 2
        assert [kept for kept in held + graphs if kept() is not None] == []
        assert held and len(graphs) == ((1 + calls) if clock in ("cold", "graph") else 0)
    finally:
        gc.enable()


def test_no_garbage_is_collected_within_a_capture(gpu):
    def function(x):
        gpu.work(1.0, "call")
        found.append((gpu.graph is not None, gc.isenabled()))

    def measure():
        found.clear()
        bench.measure({"a": function}, lambda i: (torch.ones(4),), "cold", device=CUDA, set_bytes=4 * L2, repeats=1)
        return set(found), gc.isenabled()

    found = []
    assert measure() == ({(False, True), (True, False)}, True)
    gc.disable()
    try:
        assert measure() == ({(False, False), (True, False)}, False)
    finally:
        gc.enable()


def test_clocks_are_a_devices_and_others_are_refused():
    assert bench.clocks(CPU) == bench.known(CPU) == ("call",)
    assert bench.clocks(CUDA) == ("cold", "graph", "call") and bench.known(CUDA) == bench.CLOCKS
    assert bench.measure({}, lambda i: (), "call", device=CPU, set_bytes=1) == {}
    for device, clock in ((CPU, "cold"), (CUDA, "sundial")):
        with pytest.raises(ValueError, match=f"clock must be one of .* on {device}, got '{clock}'"):
            bench.measure({"a": print}, lambda i: (), clock, device=device, set_bytes=1)


def test_percentiles_are_those_of_all_samples():
    timing = bench.Timing([float(n) for n in range(60, 101)]) + bench.Timing([float(n) for n in range(60)])
    assert timing.percentiles() == pytest.approx(
        {"us_p05": 5.0, "us_p20": 20.0, "us_p50": 50.0, "us_p80": 80.0, "us_p95": 95.0})


@pytest.mark.parametrize("clock", ["event", "flush"])
def test_an_event_pair_around_each_call(gpu, clock):
    """The first round warms up. Only `flush` evicts, before the pair, and calls one contender after the other."""
    timings, made, given = timed(gpu, clock, set_bytes=1)
    evict = [f"evict {3 * L2}"] * 4 if clock == "flush" else []
    assert [did for did in gpu.did if not did.startswith("wait")] == [
        "call 2.0", "call 3.0", *[*evict, "call 2.0", *evict, "call 3.0"] * 4]
    assert {name: timing.us for name, timing in timings.items()} == {"a": [2000.0] * 3, "b": [3000.0] * 3}
    assert len(made) == 1 and [len(g) for g in given] == [5, 5]


# ceilings


def squares(gpu):
    """A function whose first call takes 100 s; then three calls take 1 s each, three 4 s, three 9 s and so on."""
    calls = []

    def call(*_):
        gpu.host += ((len(calls) + 2) // 3) ** 2 if calls else 100.0
        calls.append(1)
    return call


def test_the_copy_ceiling_is_bytes_read_and_written_in_the_median_time(gpu, monkeypatch):
    monkeypatch.setattr(bench, "LARGE_COPY", {"cpu": 1000})
    monkeypatch.setattr(torch.Tensor, "copy_", squares(gpu))
    assert bench.copy_gbytes_per_s(CPU) == pytest.approx(2 * 4 * 1000 / 36 / 1e9)  # of 1, 4, ... 121 s


@pytest.mark.parametrize("device, n, dtype", [(CPU, 1024, torch.float32), (CUDA, 8192, torch.bfloat16)], ids=str)
def test_the_product_ceiling_is_two_operations_a_product(gpu, monkeypatch, device, n, dtype):
    made = []
    monkeypatch.setattr(torch, "randn", lambda *size, **kind: made.append((size, kind)) or torch.ones(1))
    monkeypatch.setattr(torch.Tensor, "__matmul__", squares(gpu))
    assert bench.matmul_tflops(device) == pytest.approx(2 * n**3 / 36 / 1e12)
    assert made == [((n, n), {"device": device, "dtype": dtype})] * 2


@pytest.mark.parametrize("free, numbers", [(None, 1 << 26), (1 << 32, 1 << 26), (1 << 30, 1 << 25), (1 << 10, 1 << 20)])
def test_a_large_copy_leaves_three_quarters_of_what_is_free(monkeypatch, free, numbers):
    monkeypatch.setattr(bench, "free_memory", lambda device: free)
    assert bench.ceilings_bytes(CPU) == 8 * numbers
