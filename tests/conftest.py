"""What every test gets: the `gpu` mark, and memory that is never zero by luck."""
import pytest
import torch

import kernels  # noqa: F401 - before anything imports Triton, so that the interpreter can be chosen

HAS_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _filled(make):
    """`make`, its memory filled with NaN or the largest integer: a fill runs on no path that is tested."""
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
    return filled


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """torch.empty and its like give NaN, so that an element a kernel forgets to write shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))
