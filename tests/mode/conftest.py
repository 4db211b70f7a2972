"""Fixtures of this folder's files."""
import pytest
import torch
from playing import attention, gpu  # noqa: F401

from kernels.mode import active, switch


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    keys = [torch._C._dispatch_tls_is_dispatch_key_included(key) for key in (switch.KEY, switch.EARLY)]
    assert not active() and keys == [False, False]
    assert switch._STRICT == {True: 0, False: 0} and switch._THREAD.entered == []
