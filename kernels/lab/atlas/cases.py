"""The table of the atlas: PyTorch's own ops, each with one size for a CPU and one for a GPU.

A case is a line: a name, what its arguments look like, the sizes, and the call. Arguments are written as
``"M,K K,N T:V M,D^3"``: M,K a tensor of that shape, T:V whole numbers below V, ^3 values up to 2**3. An argument whose
first size is M holds one row for each element of the batch; the result must then hold one row for each as well.
"""
from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import bits
from ...op import Shape
from ...runtime import Unavailable

_ARGUMENT = re.compile(r"(?P<sizes>[A-Z0-9,]+)(?::(?P<below>[A-Z]+))?(?:\^(?P<scale>\d+))?")


@dataclass(frozen=True)
class Case:
    """One op of the atlas.

    name       torch's name, with a suffix for its variant, backend or direction
    arguments  what they look like, as above
    cpu, gpu   the sizes, as data/ writes a shape; M is the largest batch
    call       the op. It may raise runtime.Unavailable
    query      (call, arguments) -> (positions, expected, got) for other numbers of queries, positions first; or None
    lacks      property -> why it cannot be tested
    contents   what the neighbours of a row may hold
    few        fewer batch sizes and thread counts, where every new shape costs a compilation
    """

    name: str
    arguments: str
    cpu: str
    gpu: str
    call: Callable
    query: Callable | None = None
    lacks: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    contents: tuple[str, ...] = ("other", "zero", "huge", "nan")
    few: bool = False

    def size(self, device) -> str:
        """The shape tested on this device, as data/ writes it."""
        return self.gpu if torch.device(device).type == "cuda" else self.cpu

    @property
    def per_row(self) -> tuple[int, ...]:
        """Which arguments hold one row for each element of the batch."""
        return tuple(i for i, text in enumerate(self.arguments.split()) if text.split(",")[0].split(":")[0] == "M")

    def inputs(self, dtype: torch.dtype, device, seed: int = 0, content: str = "other") -> tuple[torch.Tensor, ...]:
        """Portable arguments. `seed` changes the rows alone, not the weights; `content` may be zero, huge or nan."""
        shape = Shape.parse(self.size(device))
        made = []
        for i, text in enumerate(self.arguments.split()):
            part = _ARGUMENT.fullmatch(text)
            sizes = tuple(shape[s] if s.isalpha() else int(s) for s in part["sizes"].split(","))
            own = 10 * seed + i if i in self.per_row or not self.per_row else i
            if part["below"]:
                made.append(_whole_numbers(sizes, shape[part["below"]], str(device), own, content == "zero"))
            else:
                made.append(_floats(sizes, dtype, str(device), own, int(part["scale"] or 0), content))
        return tuple(made)


@lru_cache(16)
def _portable(rows, width, dtype, device, seed, scale):
    return bits.portable(rows, width, dtype, device, seed, scale)


def _floats(sizes, dtype, device, seed, scale, content) -> torch.Tensor:
    rows = sizes[0] if len(sizes) > 1 else 1
    x = _portable(rows, math.prod(sizes) // rows, dtype, device, seed, scale).view(sizes)
    if content in ("zero", "nan"):
        return torch.full_like(x, 0.0 if content == "zero" else math.nan)
    return x * 2.0**10 if content == "huge" else x.clone()


def _whole_numbers(sizes, below, device, seed, zero) -> torch.Tensor:
    rows = sizes[0] if len(sizes) > 1 else 1
    x = _portable(rows, math.prod(sizes) // rows, torch.float32, device, seed, 0).view(sizes)
    return ((x + 1) * (0.0 if zero else below / 2)).long().clamp(max=below - 1)


# --- calls


def _backward(forward: Callable, *wanted: int) -> Callable:
    """The gradient of `forward` for the arguments `wanted`; the last argument is the gradient of its result."""
    def call(*arguments):
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(arguments[:-1])]
            grads = torch.autograd.grad(forward(*leaves), [leaves[i] for i in wanted], arguments[-1])
        return grads if len(wanted) > 1 else grads[0]
    return call


def _compiled(function: Callable) -> Callable:
    """torch.compile of `function`, one specialised kernel a shape."""
    @cache
    def made():
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        return torch.compile(function, dynamic=False)

    def call(*arguments):
        try:
            return made()(*arguments)
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise Unavailable(f"torch.compile: {_first_line(error)}") from None
            raise
    return call


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_BACKENDS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@contextmanager
def _backend(name: str | None):
    """Restrict scaled_dot_product_attention to this backend. Unavailable where it has no kernel for the call."""
    if name is None:
        yield
        return
    try:
        with warnings.catch_warnings(), sdpa_kernel(_BACKENDS[name]):
            warnings.simplefilter("ignore")  # PyTorch warns of each backend that is not used
            yield
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise Unavailable(f"no {name} kernel for this device and dtype") from None
        if name == "cudnn" and "cudnn" in str(error).lower():
            raise Unavailable(f"cuDNN refuses: {_first_line(error)}") from None
        raise


def _prefill(backend: str | None = None) -> Callable:
    """Causal attention of all positions to those before them."""
    def call(q, k, v):
        with _backend(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    return call


def _decode(backend: str | None = None) -> Callable:
    """Attention of one new position to a whole cache."""
    def call(q, k, v):
        with _backend(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return call


def _attention_backward(backend: str | None = None) -> Callable:
    def call(*arguments):
        with _backend(backend):
            return _backward(_prefill(), 0, 1, 2)(*arguments)
    return call


def _index_put(table, index, values):
    return table.index_put((index,), values, accumulate=True)


def _sample(weights):
    generator = torch.Generator(weights.device).manual_seed(7)
    return torch.multinomial(weights.abs(), 1, generator=generator)


def _dropout(x):
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(7)
        return F.dropout(x, 0.5)


def _scaled_mm(x, w):
    """Both factors in 8 bits; the second is passed by columns, as the op requires."""
    one = torch.ones((), dtype=torch.float32, device=x.device)
    eight = torch.float8_e4m3fn
    try:
        return torch._scaled_mm(x.to(eight), w.to(eight).t(), scale_a=one, scale_b=one, out_dtype=x.dtype)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise Unavailable(_first_line(error)) from None


# --- other numbers of queries


def _last(dim: int, out: int | None = None, extra: int = 0) -> Callable[..., Iterator]:
    """The last n positions along `dim` of the first argument, and `extra` before them, which a convolution needs."""
    def query(call, arguments):
        x, *rest = arguments
        length, at = x.shape[dim] - extra, dim if out is None else out
        whole = call(*arguments).movedim(at, 0)
        for n in (1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 64):
            if n < length:
                some = call(x.narrow(dim, x.shape[dim] - n - extra, n + extra).contiguous(), *rest)
                yield range(length - n, length), whole[length - n:], some.movedim(at, 0)
    return query


def _prefill_or_decode(call, arguments) -> Iterator:
    """Causal rows of a whole prefill against the same rows of a shorter prefill, and against one decoded from a cache.

    Lengths for which a backend has no kernel are left out. Raises Unavailable if it has none for any length.
    """
    q, k, v = arguments
    length, whole = q.shape[2], call(q, k, v).movedim(2, 0)
    found, lacking = False, None
    for n in sorted({1, 2, 3, 7, 8, 16, 31, 64, 100, 128, 200, 255, 256, 384, length // 2, length - 1, length}):
        for start in (n - 1, 0) if n <= length else ():
            try:
                got = call(q[:, :, start:n].contiguous(), k[:, :, :n], v[:, :, :n]).movedim(2, 0)
            except Unavailable as error:
                lacking = error
            else:
                found = True
                yield range(start, n), whole[start:n], got
    if not found:
        raise lacking


# --- the table

_HOST = {"graph": "its random numbers are seeded on the host at every call"}
_WAITS = {"graph": "it waits for the host"}
_MM = {"cpu": "M=64,N=512,K=2048", "gpu": "M=512,N=4096,K=4096"}
_3D = {"cpu": "M=8,T=32,N=256,K=1024", "gpu": "M=32,T=128,N=1024,K=4096"}
_VECTOR = {"cpu": "N=512,K=4096", "gpu": "N=4096,K=16384"}
_HEADS = {"cpu": "M=6,H=2,T=257,D=64", "gpu": "M=8,H=8,T=1024,D=128"}
_CACHE = {"cpu": "M=16,H=2,S=512,D=64", "gpu": "M=32,H=8,S=2048,D=128"}
_TRAINED = {"cpu": "M=6,H=2,T=129,D=64", "gpu": "M=8,H=8,T=512,D=128"}
_ROWS = {"cpu": "M=64,D=4096", "gpu": "M=256,D=4096"}
_VOCABULARY = {"cpu": "M=12,V=32000", "gpu": "M=256,V=32000"}
_POINTS = {"cpu": "M=64,D=4099", "gpu": "M=256,D=4099"}
_TOKENS = {"cpu": "T=512,D=1024", "gpu": "T=4096,D=4096"}
_IMAGES = {"cpu": "M=8,C=32,O=32,H=14,W=14", "gpu": "M=64,C=128,O=256,H=32,W=32"}
_SEQUENCE = {"cpu": "M=8,C=64,O=64,T=131", "gpu": "M=32,C=512,O=512,T=1027"}
_TABLE = {"cpu": "V=1000,T=4096,D=64", "gpu": "V=1000,T=16384,D=256"}
_NUMBERS = {"cpu": "V=1000,T=4194304", "gpu": "V=1000,T=4194304"}
_PICK = {"cpu": "M=16,V=4096,T=4096", "gpu": "M=256,V=4096,T=16384"}
_LINEAR_BACKWARD = {"cpu": "M=64,N=512,K=1024", "gpu": "M=512,N=4096,K=4096"}
_WEIGHT_BACKWARD = {"cpu": "T=512,N=256,K=512", "gpu": "T=4096,N=4096,K=4096"}


def _rms(x, w):
    return F.rms_norm(x, w.shape, w, 1e-6)


def _layer(x, w, b):
    return F.layer_norm(x, w.shape, w, b)


def _mm(x, w):
    return torch.mm(x, w)


def _linear_gelu(x, w, b):
    return F.gelu(F.linear(x, w, b))


def _softmax(x):
    return torch.softmax(x, -1)


CASES: tuple[Case, ...] = (
    # products
    Case("mm", "M,K K,N", **_MM, call=torch.mm),
    Case("addmm", "N M,K K,N", **_MM, call=torch.addmm),
    Case("linear", "M,T,K N,K", **_3D, call=F.linear, query=_last(1)),
    Case("linear[bias]", "M,T,K N,K N", **_3D, call=F.linear, query=_last(1)),
    Case("matmul[1d@1d]", "K K", **_VECTOR, call=torch.matmul),
    Case("matmul[1d@2d]", "K K,N", **_VECTOR, call=torch.matmul),
    Case("matmul[2d@1d]", "M,K K", **_MM, call=torch.matmul),
    Case("matmul[2d@2d]", "M,K K,N", **_MM, call=torch.matmul),
    Case("matmul[3d@1d]", "M,T,K K", **_3D, call=torch.matmul, query=_last(1)),
    Case("matmul[1d@3d]", "K M,K,N", cpu="M=16,N=64,K=1024", gpu="M=64,N=1024,K=1024", call=torch.matmul),
    Case("matmul[3d@2d]", "M,T,K K,N", **_3D, call=torch.matmul, query=_last(1)),
    Case("matmul[2d@3d]", "T,K M,K,N", cpu="M=16,T=33,N=64,K=512", gpu="M=64,T=33,N=1024,K=1024", call=torch.matmul),
    Case("matmul[3d@3d]", "M,T,K M,K,N", cpu="M=16,T=33,N=64,K=512", gpu="M=64,T=33,N=1024,K=1024",
         call=torch.matmul, query=_last(1)),
    Case("matmul[4d@4d]", "M,H,T,K M,H,K,N", cpu="M=8,H=2,T=33,N=64,K=512", gpu="M=32,H=8,T=33,N=128,K=1024",
         call=torch.matmul, query=_last(2)),
    Case("bmm", "M,T,K M,K,N", cpu="M=16,T=65,N=64,K=512", gpu="M=64,T=64,N=1024,K=1024", call=torch.bmm,
         query=_last(1)),
    Case("baddbmm", "M,T,N M,T,K M,K,N", cpu="M=16,T=17,N=64,K=512", gpu="M=64,T=64,N=1024,K=1024",
         call=torch.baddbmm),
    Case("einsum", "M,T,H,D M,S,H,D", cpu="M=8,T=33,S=128,H=2,D=64", gpu="M=16,T=64,S=1024,H=8,D=128",
         call=lambda q, k: torch.einsum("bthd,bshd->bhts", q, k), query=_last(1, out=2)),
    Case("_scaled_mm[float8]", "M,K N,K", cpu="M=8,N=64,K=256", gpu="M=512,N=4096,K=4096", call=_scaled_mm),
    Case("conv1d", "M,C,T O,C,4", **_SEQUENCE, call=F.conv1d, query=_last(2, extra=3)),
    Case("conv1d[depthwise]", "M,C,T C,1,4", **_SEQUENCE, call=lambda x, w: F.conv1d(x, w, groups=len(w)),
         query=_last(2, extra=3)),
    Case("conv2d", "M,C,H,W O,C,3,3 O", **_IMAGES, call=F.conv2d),
    # attention
    *(Case(f"sdpa[{b}]", "M,H,T,D M,H,T,D M,H,T,D", **_HEADS, call=_prefill(b), query=_prefill_or_decode)
      for b in _BACKENDS),
    Case("sdpa[decode]", "M,H,1,D M,H,S,D M,H,S,D", **_CACHE, call=_decode()),
    *(Case(f"sdpa[{b},decode]", "M,H,1,D M,H,S,D M,H,S,D", **_CACHE, call=_decode(b))
      for b in _BACKENDS),
    *(Case(f"sdpa[{b}].backward", "M,H,T,D M,H,T,D M,H,T,D M,H,T,D", **_TRAINED, call=_attention_backward(b))
      for b in _BACKENDS),
    # norms
    Case("rms_norm", "M,D D", **_ROWS, call=_rms),
    Case("layer_norm", "M,D D D", **_ROWS, call=_layer),
    Case("group_norm", "M,C,T C C", cpu="M=16,C=64,T=256", gpu="M=64,C=512,T=1024",
         call=lambda x, w, b: F.group_norm(x, 32, w, b)),
    Case("batch_norm[eval]", "M,C,T C C C C", cpu="M=16,C=64,T=257", gpu="M=64,C=512,T=1023",
         call=lambda x, mean, var, w, b: F.batch_norm(x, mean, var.abs() + 0.5, w, b)),
    Case("rms_norm.backward[input]", "M,D D M,D", **_ROWS, call=_backward(_rms, 0)),
    Case("rms_norm.backward[weight]", "T,D D T,D", **_TOKENS, call=_backward(_rms, 1)),
    Case("layer_norm.backward[input]", "M,D D D M,D", **_ROWS, call=_backward(_layer, 0)),
    Case("layer_norm.backward[weight]", "T,D D D T,D", **_TOKENS, call=_backward(_layer, 1, 2)),
    # softmax and its like
    Case("softmax", "M,V^3", **_VOCABULARY, call=_softmax),
    Case("log_softmax", "M,V^3", **_VOCABULARY, call=lambda x: torch.log_softmax(x, -1)),
    Case("logsumexp", "M,V^3", **_VOCABULARY, call=lambda x: torch.logsumexp(x, -1)),
    Case("softmax.backward", "M,V^3 M,V", **_VOCABULARY, call=_backward(_softmax, 0)),
    Case("cross_entropy", "M,V^3 M:V", **_VOCABULARY, call=lambda x, y: F.cross_entropy(x, y, reduction="none")),
    Case("cross_entropy[mean]", "T,V^3 T:V", cpu="T=12,V=32000", gpu="T=1024,V=32000", call=F.cross_entropy),
    Case("cross_entropy.backward", "M,V^3 M:V M", **_VOCABULARY,
         call=_backward(lambda x, y: F.cross_entropy(x, y, reduction="none"), 0)),
    # sums
    Case("sum", "M,D", **_ROWS, call=lambda x: x.sum(-1)),
    Case("sum[dim=0]", "M,D", cpu="M=64,D=2048", gpu="M=256,D=16384", call=lambda x: x.t().contiguous().sum(0)),
    Case("sum[all]", "T", cpu="T=1048576", gpu="T=4194304", call=torch.sum),
    Case("mean", "M,D", **_ROWS, call=lambda x: x.mean(-1)),
    Case("var", "M,D", **_ROWS, call=lambda x: x.var(-1)),
    Case("vector_norm", "M,D", **_ROWS, call=lambda x: torch.linalg.vector_norm(x, dim=-1)),
    Case("cumsum", "M,V", **_VOCABULARY, call=lambda x: x.cumsum(-1)),
    Case("prod", "M,D", **_ROWS, call=lambda x: (1 + x / 64).prod(-1)),
    # order, no arithmetic
    Case("amax", "M,V", **_VOCABULARY, call=lambda x: x.amax(-1)),
    Case("argmax", "M,V", **_VOCABULARY, call=lambda x: x.argmax(-1)),
    Case("topk", "M,V", **_VOCABULARY, call=lambda x: tuple(x.topk(50))),
    Case("sort", "M,V", **_VOCABULARY, call=lambda x: tuple(x.sort(-1))),
    # indexing
    Case("embedding", "M,T:V V,D", cpu="M=16,T=64,V=1000,D=64", gpu="M=64,T=256,V=32000,D=1024", call=F.embedding),
    Case("embedding.backward", "T:V V,D T,D", **_TABLE, call=_backward(F.embedding, 1)),
    Case("embedding_bag", "M,T:V V,D", cpu="M=32,T=64,V=1000,D=64", gpu="M=64,T=256,V=32000,D=1024",
         call=lambda i, t: F.embedding_bag(i, t, mode="mean")),
    Case("gather", "M,V M,T:V", **_PICK, call=lambda x, i: x.gather(1, i)),
    Case("gather.backward", "M,V M,T:V M,T", **_PICK, call=_backward(lambda x, i: x.gather(1, i), 0)),
    Case("scatter_add", "M,V M,T:V M,T", **_PICK, call=lambda x, i, y: x.scatter_add(1, i, y)),
    Case("scatter_add[1d]", "V T:V T", **_NUMBERS, call=lambda x, i, y: x.scatter_add(0, i, y)),
    Case("scatter_reduce[mean]", "M,V M,T:V M,T", **_PICK, call=lambda x, i, y: x.scatter_reduce(1, i, y, "mean")),
    Case("index_add", "V,D T:V T,D", **_TABLE, call=lambda x, i, y: x.index_add(0, i, y)),
    Case("index_select.backward", "V,D T:V T,D", **_TABLE, call=_backward(lambda x, i: x.index_select(0, i), 0)),
    Case("index_put[accumulate]", "V T:V T", **_NUMBERS, call=_index_put),
    Case("bincount[weights]", "T:V T", **_NUMBERS, lacks=_WAITS,
         call=lambda i, y: torch.bincount(i, y, minlength=1000)),
    # element by element
    *(Case(name, "M,D^3", **_POINTS, call=call) for name, call in {
        "exp": torch.exp, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu,
        "gelu[tanh]": lambda x: F.gelu(x, approximate="tanh")}.items()),
    Case("gelu.backward", "M,D^3 M,D", **_POINTS, call=_backward(F.gelu, 0)),
    # random numbers from a generator that every call seeds alike
    Case("multinomial", "M,V", **_VOCABULARY, lacks=_HOST, contents=("other",), call=_sample),
    Case("dropout", "M,D", **_POINTS, lacks=_HOST, call=_dropout),
    # gradients of products
    Case("linear.backward[input]", "M,K N,K M,N", **_LINEAR_BACKWARD, call=_backward(F.linear, 0)),
    Case("linear.backward[weight]", "T,K N,K T,N", **_WEIGHT_BACKWARD, call=_backward(F.linear, 1)),
    Case("linear.backward[bias]", "T,K N,K N T,N", **_WEIGHT_BACKWARD, call=_backward(F.linear, 2)),
    Case("conv2d.backward[weight]", "T,C,H,W O,C,3,3 T,O,H,W", cpu="T=8,C=32,O=64,H=16,W=16",
         gpu="T=64,C=128,O=256,H=32,W=32", call=_backward(lambda x, w: F.conv2d(x, w, padding=1), 1)),
    # compiled
    Case("compile(mm)", "M,K K,N", **_MM, few=True, call=_compiled(_mm)),
    Case("compile(linear+gelu)", "M,K N,K N", **_MM, few=True, call=_compiled(_linear_gelu)),
    Case("compile(rms_norm)", "M,D D", **_ROWS, few=True, call=_compiled(_rms)),
    Case("compile(softmax)", "M,V^3", **_VOCABULARY, few=True, call=_compiled(_softmax)),
)
