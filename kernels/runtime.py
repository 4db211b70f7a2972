"""Where we run, Triton or its absence, and a launch path short enough not to be the thing measured.

Decided once, at import: with a CUDA GPU, Triton compiles; without one, Triton's interpreter is chosen
before Triton is first imported; without Triton, kernels are stand-ins that explain themselves.
"""
from __future__ import annotations

import inspect
import os
import platform
import re
from functools import cache, wraps

import torch

_PYTHON = torch._C._dispatch_key_parse("Python")
HAS_GPU = torch.cuda.is_available() and torch.version.hip is None
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Unavailable(RuntimeError):
    """This machine cannot run that implementation; the message says why and what to do."""


class _StandIn:
    """Takes the place of `triton` and `tl` where there is no Triton, so that kernel files still import."""

    def __init__(self, why: str):
        self._why = why

    def jit(self, fn=None, **_):
        return _StandInKernel(fn, self._why) if fn else lambda f: _StandInKernel(f, self._why)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(self._why)

    def __call__(self, *_, **__):
        raise Unavailable(self._why)


class _StandInKernel:
    def __init__(self, fn, why):
        self.fn, self._why = fn, why

    def __getitem__(self, grid):
        raise Unavailable(self._why)


try:
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    HAS_TRITON = True
    WHY_NOT = ""
    # Triton builds tl.sum and its like when it is first imported; too late for the interpreter afterwards.
    compiles = isinstance(tl.sum, JITFunction)
    if HAS_GPU and not compiles:
        WHY_NOT = "TRITON_INTERPRET is set, but there is a GPU: unset it and restart the kernel."
    elif not HAS_GPU and compiles and os.environ["TRITON_INTERPRET"] != "1":
        WHY_NOT = f"there is no GPU, and TRITON_INTERPRET={os.environ['TRITON_INTERPRET']!r}: unset it and restart."
    elif not HAS_GPU and compiles:
        WHY_NOT = ("Triton was imported before `kernels`, so its interpreter could not be chosen. "
                   "Restart the kernel and import kernels first.")
except ImportError as error:
    HAS_TRITON = False
    way_out = ("install it with pip install -r requirements.txt, or" if platform.system() == "Linux" else
               f"it has wheels for Linux alone, so on {platform.system()}")
    WHY_NOT = f"Triton cannot be imported here ({error}): {way_out} use .python, which gives the same bits."
    triton = tl = _StandIn(WHY_NOT)


def device_function(fn):
    """`triton.jit` for what kernels call.

    In the interpreter it calls the rewritten function itself: Triton's wrapper would patch triton.language anew at
    every call, which takes milliseconds.
    """
    made = triton.jit(fn)
    if not hasattr(made, "rewrite"):
        return made

    @wraps(fn)
    def call(*arguments, **named):
        return made.rewrite()(*arguments, **named)
    return call


def require_triton(name: str) -> None:
    """Raise Unavailable, with the way out, where `name`.triton cannot run."""
    if WHY_NOT:
        raise Unavailable(f"{name}.triton: {WHY_NOT}")


_SMALLEST, _ONE = 5e-324, 1.0


def require_subnormals() -> None:
    """Raise RuntimeError if this thread of the CPU flushes subnormal numbers to zero: then no order keeps its bits."""
    if _SMALLEST * _ONE == 0.0:
        raise RuntimeError("this process flushes subnormal numbers to zero, which changes bits: call "
                           "torch.set_flush_denormal(False), or find the library that set it at import")


def device() -> torch.device:
    """Where examples run: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


def modes_are_asked() -> bool:
    """Whether a dispatch mode sees the calls of this thread. One may be on where PyTorch's key for them is off."""
    return torch._C._len_torch_dispatch_stack() > 0 and not torch._C._dispatch_tls_is_dispatch_key_excluded(_PYTHON)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of contiguous memory; with them torch.empty_strided takes half the time of torch.empty."""
    return torch.empty(shape, dtype=torch.float32, device="meta").stride()


@cache
def has_pdl(index: int) -> bool:
    """Whether GPU `index` can start a kernel's blocks while the one before it ends (sm_90 and later)."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


@cache
def slug(index: int) -> str:
    """GPU `index` as a name for its folder and its table: h200, h100, b200 and so on."""
    name = torch.cuda.get_device_name(index)
    known = re.search(r"\b([HABL]\d{2,3}|GH200|GB200|RTX.*)\b", name)
    return re.sub(r"[^a-z0-9]+", "-", (known[1] if known else name.removeprefix("NVIDIA ")).lower()).strip("-")


def where() -> str:
    """One of LIVE, INTERPRETER, RECORDED: how `.triton` runs here."""
    if WHY_NOT:
        return "RECORDED"
    return "LIVE" if HAS_GPU else "INTERPRETER"


class Compiled:
    """One compiled kernel bound to its grid and arguments: a call launches it with no binder in between.

    `fn` is a @triton.jit function, `examples` stand for its pointers, `arguments` are all others. What Triton
    specialises on (pointer alignment, divisibility, values of 1, integer width) must be part of the key under which
    the caller keeps this object.
    """

    __slots__ = ("_run", "_fixed", "_nested", "_rest", "_grid", "kernel")

    def __init__(self, fn, grid: int, examples: tuple, arguments: tuple, **options):
        self.kernel = fn.warmup(*examples, *arguments, grid=(1,), **options)
        self.kernel._init_handles()  # loads the module now: it must not happen inside a graph capture
        self._rest, self._grid = arguments, grid
        self._run, self._fixed, self._nested = _launcher(self.kernel)

    def __call__(self, stream: int, *pointers):
        if self._nested:
            self._run(self._grid, 1, 1, stream, *self._fixed, (*pointers, *self._rest))
        else:
            self._run(self._grid, 1, 1, stream, *self._fixed, *pointers, *self._rest)

    def described(self, descriptors) -> tuple:
        """What a launch takes for its tensor descriptors: made once, if Triton lets us, and not at each launch."""
        if self._run is self.kernel.run:
            return tuple(descriptors)
        from triton.backends.nvidia.driver import make_tensordesc_arg

        meta = iter(self.kernel.metadata.tensordesc_meta or [None] * len(descriptors))
        return tuple(piece for d in descriptors
                     for piece in ((None,) if d is None else make_tensordesc_arg(d, next(meta))))


def _launcher(kernel) -> tuple:
    """(function, its arguments between the stream and the kernel's, whether the kernel's own are one tuple).

    The function is the one in C under Triton's launcher, in the versions whose launchers we know: the Python around it
    takes microseconds. Otherwise it is Triton's launcher.
    """
    run, function, version = kernel.run, _in_c(kernel.run), tuple(triton.__version__.split(".")[:2])
    if version not in KNOWN_LAUNCHERS or function is None or run.global_scratch_size or run.profile_scratch_size:
        return run, (kernel.function, kernel.packed_metadata, None, None, None), False
    start = (kernel.function, run.launch_cooperative_grid, run.launch_pdl)
    if version == ("3", "6"):
        return function, (*start, None, None, kernel.packed_metadata, None, None, None), False
    return function, (*start, kernel.packed_metadata, *5 * (None,), run.arg_annotations, run.kernel_signature), True


KNOWN_LAUNCHERS = (("3", "6"), ("3", "7"))


def _in_c(run):
    """What Triton's launcher calls, under the Python around it where there are tensor descriptors; None if unknown."""
    function = getattr(run, "launch", None)
    if inspect.isfunction(function):
        return inspect.getclosurevars(function).nonlocals.get("launcher")
    return function


if HAS_GPU:  # torch.cuda's own wrappers of these cost a microsecond together
    current_stream, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
else:
    current_device = torch.cuda.current_device

    def current_stream(index: int) -> int:
        raise Unavailable("there is no CUDA GPU here")
