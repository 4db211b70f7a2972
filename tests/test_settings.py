"""Settings of the process that a guest may have made: none moves a bit in silence."""
import ast
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from kernels import OPS, bits, runtime
from kernels.bits import adversarial, digest, portable, same_bits
from kernels.lab.records import ROOT

SHAPES = {"rms_norm": "D=70,residual", "softmax": "D=40", "log_softmax": "D=33", "sum": "D=30,inner=4",
          "mean": "D=130", "matmul": "N=5,K=48,bias", "rotary": "H=3,D=10,context=7", "swiglu": "F=40"}
LONG = {**SHAPES, "softmax": "D=20000", "rms_norm": "D=9000,residual", "matmul": "N=5,K=300,bias",
        "swiglu": "F=20000"}  # past one slice
HOWS = ["python"] + ([] if runtime.WHY_NOT else ["triton"])


@contextmanager
def undone(do, undo):
    do()
    try:
        yield
    finally:
        undo()


def numpy_raises():
    before = np.seterr(all="raise")
    return undone(lambda: None, lambda: np.seterr(**before))


SETTINGS = {
    "default dtype bfloat16": lambda: undone(lambda: torch.set_default_dtype(torch.bfloat16),
                                             lambda: torch.set_default_dtype(torch.float32)),
    "default dtype float64": lambda: undone(lambda: torch.set_default_dtype(torch.float64),
                                            lambda: torch.set_default_dtype(torch.float32)),
    "default device meta": lambda: undone(lambda: torch.set_default_device("meta"),
                                          lambda: torch.set_default_device(None)),
    "a device as a context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": lambda: undone(lambda: torch.use_deterministic_algorithms(True),
                                               lambda: torch.use_deterministic_algorithms(False)),
    "float32 precision medium": lambda: undone(lambda: torch.set_float32_matmul_precision("medium"),
                                               lambda: torch.set_float32_matmul_precision("highest")),
    "NumPy raises": numpy_raises,
}


def digests() -> dict:
    """Of every op and dtype, inputs made anew: portable and with rows that overflow or cancel."""
    found = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            given = OPS[name].inputs(2, shape, dtype, "cpu")
            hard = tuple(adversarial("wide", *a.shape, dtype) if i in OPS[name].per_token and a is not None
                         and a.dim() == 2 else a for i, a in enumerate(given))
            for how in HOWS:
                found[name, str(dtype), how] = digest([OPS[name].implementation(how)(*g) for g in (given, hard)])
        found[name, "long"] = digest(OPS[name].python(*OPS[name].inputs(2, LONG[name], torch.float32, "cpu")))
    return found


@pytest.fixture(scope="module")
def plain():
    return digests()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_moves_no_bit(setting, plain):
    with SETTINGS[setting]():
        under = digests()
    assert {key for key in plain if plain[key] != under[key]} == set()


@pytest.mark.parametrize("kind", bits.ADVERSARIAL)
@pytest.mark.parametrize("setting", ["default dtype bfloat16", "default device meta"])
def test_inputs_are_the_same_under_a_setting(setting, kind):
    wanted = portable(5, 70), adversarial(kind, 5, 70, torch.float16)
    with SETTINGS[setting]():
        assert same_bits((portable(5, 70), adversarial(kind, 5, 70, torch.float16)), wanted)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", SHAPES)
def test_flushed_subnormals_are_refused_by_name(name, how):
    """The one setting that plain PyTorch cannot undo; checked at every call, also on a kept plan."""
    given = OPS[name].inputs(2, SHAPES[name], torch.float32, "cpu")
    wanted = OPS[name].implementation(how)(*given)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        with pytest.raises(RuntimeError, match="flushes subnormal numbers.*set_flush_denormal"):
            OPS[name].implementation(how)(*given)
        with pytest.raises(RuntimeError, match="flushes subnormal numbers"):
            portable(2, 3)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(OPS[name].implementation(how)(*given), wanted)


FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "linspace", "rand", "randn", "randint", "eye",
             "randperm"}


def unnamed(text: str) -> list[str]:
    """torch's factory calls in this source that do not name both dtype and device."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
            and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            and not {"dtype", "device"} <= {k.arg for k in node.keywords}]


def test_every_factory_call_names_dtype_and_device():
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "figures").glob("*.py")]
    assert {f.name: found for f in files if (found := unnamed(f.read_text()))} == {}


@pytest.mark.parametrize("line", ["torch.zeros(3)", "torch.ones(3, dtype=d)", "torch.arange(3, device=x.device)"])
def test_a_factory_call_that_lacks_one_is_found(line):
    assert unnamed(line) == [line]


@pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="the interpreter does not run here")
def test_threads_take_turns_in_the_interpreter():
    given = {name: OPS[name].inputs(6, SHAPES[name], torch.float32, "cpu") for name in ("rms_norm", "softmax")}
    wanted = {name: OPS[name].python(*args) for name, args in given.items()}
    wrong = []

    def work():
        for _ in range(3):
            for name, args in given.items():
                try:
                    if not same_bits(OPS[name].triton(*args), wanted[name]):
                        wrong.append(f"{name}: other bits")
                except Exception as error:  # noqa: BLE001 - whatever a thread raises is what is looked for
                    wrong.append(f"{name}: {error!r}")
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
