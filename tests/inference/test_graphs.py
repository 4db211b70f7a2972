"""Decode steps as graphs, in pieces around attention: on a GPU, and without one by a recorder in a graph's place."""
from types import SimpleNamespace

import pytest
import torch
from served import engine, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.inference import graphs
from kernels.lab.load import small_model


class Recorder(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph on a CPU: keeps the operations of a capture, and runs them into the same memory.

    A capture begins with memory of its own that holds nothing: results of other pieces must be read where they lie.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def capture_begin(self, pool, capture_error_mode):
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        for *_, results in self.calls:  # a capture computes nothing
            for result in results:
                if result.is_floating_point() and result._base is None:
                    result.fill_(float("nan"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        self.calls.append((func, args, kwargs or {}, [leaf for leaf in tree_leaves(result)
                                                      if isinstance(leaf, torch.Tensor) and id(leaf) not in given]))
        return result

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=False):
                    if old._base is None:  # a view shows what lies there
                        old.copy_(new)


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def recorded(monkeypatch):
    """graphs.py with a recorder for CUDA's graphs."""
    from contextlib import nullcontext

    cuda = SimpleNamespace(CUDAGraph=Recorder, Stream=Stream, current_stream=Stream, stream=lambda s: nullcontext(),
                           synchronize=lambda *_: None, graph_pool_handle=lambda: (0, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(**{name: getattr(torch, name) for name in (
        "zeros", "tensor", "int64", "Tensor")}, cuda=cuda))


def served(model, make=None):
    serving = engine(model, max_batch=5, budget=40, chunk=40)
    if make is not None:
        serving.graphs = make(model, serving.cache, 5)
    requests = [serving.submit(prompt(i, 3 + 2 * i), 3 + 2 * i) for i in range(5)]
    for _ in range(3):
        serving.step()
    late = serving.submit(prompt(7, 9), 3)
    serving.run()
    serving.check()
    return serving, [*requests, late]


def digests(requests):
    return [request.logit_digest for request in requests]


@pytest.mark.parametrize("ops", ["default", "tiled"])
def test_pieces_between_attention_are_the_forward(ops, recorded):
    """The default's logits may follow the padded batch."""
    model = small_model(ops)
    serving, found = served(model, graphs.DecodeGraphs)
    wanted = served(model)[1]
    assert [request.answer for request in found] == [request.answer for request in wanted]
    assert digests(found) == digests(wanted) or ops == "default"
    assert serving.graphs.replays > 5 and set(serving.graphs.graphs) <= {1, 2, 4, 5}
    graph = serving.graphs.graphs[5]
    assert len(graph.pieces) == model.config.layers + 1 == len(graph.between) + 1


def test_a_warm_engine_captures_nothing_more(recorded):
    model = small_model()
    serving = engine(model, max_batch=5, budget=40, chunk=40)
    serving.graphs = made = graphs.DecodeGraphs(model, serving.cache, 5)
    serving.warm_up()
    captured = dict(made.graphs)
    assert list(captured) == made.sizes == [1, 2, 4, 5] and made.replays == 0
    requests = [serving.submit(prompt(i, 3 + 2 * i), 3 + 2 * i) for i in range(5)]
    serving.run()
    assert made.graphs == captured and made.replays > 5
    assert digests(requests) == digests(served(model)[1][:5])
    engine().warm_up()  # without graphs there is nothing to capture


@pytest.mark.gpu
@pytest.mark.parametrize("ops", ["invariant", "default"])
def test_graphs_on_a_gpu_are_the_forward(ops):
    model = small_model(ops, torch.bfloat16, "cuda")
    serving, found = served(model)
    eager, wanted = served(model, lambda *_: None)
    assert serving.graphs.replays > 5 and eager.graphs is None
    if ops == "invariant":
        assert digests(found) == digests(wanted)
    assert all(request.state == "done" for request in found)


@pytest.mark.gpu
def test_an_answer_on_a_gpu_is_a_cpus():
    found = [digests(served(small_model("invariant", device=device))[1]) for device in ("cuda", "cpu")]
    assert found[0] == found[1]
