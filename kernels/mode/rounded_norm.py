"""RMSNorm as torch.compile sees it under the mode: its operations and the addition before them, as one opaque op.

Models write the norm of x (..., D), of float32, float16 or bfloat16, in operations that each round:

    stream = x + residual                                            rounded to x's dtype
    scale  = rsqrt(mean(float32(stream)**2) + eps)                   in float32
    y      = weight * (float32(stream) * scale rounded to x's dtype) rounded to x's dtype

The mean is opaque to Inductor, which so makes three kernels of a norm. `fuse` finds these operations in a graph and
puts an op in their place that has their bits: it adds as ops/mean.py does and rounds where they round. A GPU's rsqrt
is one approximate instruction in PyTorch, in Inductor and here. (PyTorch's takes subnormal numbers too, Triton's makes
them zero, so eps is to be a normal number.)

A norm stays as it is where something else reads what it computes on the way, as backward passes do.
"""
from __future__ import annotations

import operator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from ..arithmetic.sums import tree
from ..op import DTYPES
from ..ops.mean import mean
from ..ops.rms_norm import RESIDENT_WIDTH, RMSNorm
from ..runtime import tl, triton
from .elements import steady
from .opaque import defined
from .products import how

SMALLEST_EPS, LARGEST_EPS = 1e-30, 1e30  # normal numbers of float32


@triton.jit
def _rounded_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rows, x_stride, residual_stride, eps,
                    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                    PDL: tl.constexpr):
    """ROWS rows a program, held in registers; every load is issued before the first addition waits for one."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    CHUNKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    dtype = y_ptr.dtype.element_ty
    xs = ()
    residuals = ()
    weights = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        inside = (row < rows) & (j < D)
        xs = xs + (tl.load(x_ptr + row * x_stride + j, mask=inside, other=0.0),)
        if HAS_RESIDUAL:
            residuals = residuals + (tl.load(residual_ptr + row * residual_stride + j, mask=inside, other=0.0),)
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        weights = weights + (tl.load(weight_ptr + j, mask=j < D, other=0.0),)

    total = tl.zeros([ROWS, WIDTH], tl.float32)
    streams = ()
    for c in tl.static_range(CHUNKS):
        h = xs[c]
        if HAS_RESIDUAL:
            j = c * WIDTH + column
            h = (h.to(tl.float32) + residuals[c].to(tl.float32)).to(dtype)
            tl.store(stream_ptr + row * D + j, h, mask=(row < rows) & (j < D))
        streams = streams + (h,)
        square = h.to(tl.float32) * h.to(tl.float32)
        total = square if c == 0 else total + square

    if PDL:  # the next kernel's blocks may come while this one's stores drain; they wait before touching memory
        tl.extra.cuda.gdc_launch_dependents()
    scale = tl.rsqrt(tree(total) * (1.0 / D) + eps)
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + column
        normed = (streams[c].to(tl.float32) * scale).to(dtype)
        y = normed.to(tl.float32) * weights[c].to(tl.float32)
        tl.store(y_ptr + row * D + j, y.to(dtype), mask=(row < rows) & (j < D))


class _RoundedNorm(RMSNorm):
    """RMSNorm that rounds as the operations do of which models make it, for rows that registers hold."""

    name, kernel = "rounded_rms_norm", _rounded_kernel

    def check(self, x, weight, residual=None, eps=1e-6):
        super().check(x, weight, residual, eps)
        if x.shape[-1] > RESIDENT_WIDTH:
            raise ValueError(f"x must have rows of at most {RESIDENT_WIDTH} numbers, got {x.shape[-1]}")
        if not SMALLEST_EPS <= eps <= LARGEST_EPS:
            raise ValueError(f"eps must be between {SMALLEST_EPS} and {LARGEST_EPS}, got {eps}")

    def steps(self, schedule, x, weight, residual, eps):
        if schedule.streaming:
            raise ValueError(f"schedule {schedule} reads rows twice, for which there is no kernel here")
        return [replace(step, kernel=_rounded_kernel) for step in super().steps(schedule, x, weight, residual, eps)]

    def interpret(self, plan, x, weight, residual, eps):
        """Numbers of 16 bits meet their weight afterwards: a kernel of float32 does not round what it multiplies."""
        if x.dtype == torch.float32:
            return super().interpret(plan, x, weight, residual, eps)
        self.check(x, weight, residual, eps)
        found = super().interpret(plan, x, torch.ones_like(weight), residual, eps)
        return weight * found if residual is None else (weight * found[0], found[1])


_CALL = _RoundedNorm()
_rsqrt = steady("rsqrt", 1)


def _run(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the stream: a schedule on a GPU, and on a CPU the operations, as the mode's rules take them."""
    if x.is_cuda and residual is not None:
        return _CALL.triton(x, weight, residual, eps)
    if x.is_cuda:
        return _CALL.triton(x, weight, None, eps), x
    stream = x if residual is None else x + residual
    h = stream.float()
    shifted = how(x, mean)(h * h, -1, True) + eps
    scale = _rsqrt(shifted) if shifted.numel() else shifted
    return (weight * (h * scale).to(x.dtype)).contiguous(), stream.contiguous()


_NORM = defined("rounded_rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor",
                lambda x, weight, eps: _run(x, None, weight, eps)[0],
                lambda x, weight, eps: x.new_empty(x.shape))
_ADDED = defined("add_rounded_rms_norm", "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
                 _run, lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)))

_ADD, _MULTIPLY, _CONVERT = ("aten::add.Tensor",), ("aten::mul.Tensor",), ("prims::convert_element_type",)
_SQUARE = ("aten::pow.Tensor_Scalar", "same_bits_mode::aten_pow_Tensor_Scalar")
_RSQRT = ("aten::rsqrt", "same_bits_mode::aten_rsqrt")
_MEAN = ("same_bits_mode::aten_mean_dim",)


class _Norm(NamedTuple):
    """A norm in a graph: what it reads, and its nodes in the order of the graph, the last of which is y."""

    x: Node
    weight: Node
    eps: float
    nodes: list[Node]


def fuse(module: torch.fx.GraphModule, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Put one op in the place of each norm on these kinds of device, and of the addition before it."""
    found = False
    for node in list(module.graph.nodes):
        norm = _norm(node, devices) if _called(node, *_MEAN) else None
        if norm is not None:
            (_put_with_addition if _takes_addition(norm) else _put)(module.graph, norm)
            found = True
    if found:
        module.recompile()


def _called(node, *names: str) -> bool:
    """Whether a node calls one of these ops, without named arguments."""
    return isinstance(node, Node) and getattr(node.target, "name", str)() in names and not node.kwargs


def _chain(node: Node, *ops: tuple[str, ...]) -> list[Node]:
    """The nodes that follow as ops are named, each the one user of that before; empty if others do."""
    found = [node]
    for names in ops:
        users = list(found[-1].users)
        if len(users) != 1 or not _called(users[0], *names):
            return []
        found.append(users[0])
    return found


def _norm(mean: Node, devices) -> _Norm | None:
    """The norm around a mean, if there is one that the op can stand for."""
    start = _ADD, _RSQRT, _MULTIPLY
    chain = _chain(mean, *start, _CONVERT, _MULTIPLY) or _chain(mean, *start, _MULTIPLY)
    square = mean.args[0]
    if not chain or list(square.users) != [mean]:
        return None
    _, shifted, scale, scaled, *_, y = chain
    normed = chain[-2]
    h, weight = _other(scaled, scale), _other(y, normed)
    if not isinstance(weight, Node) or weight is normed or not _squares(square, h):
        return None
    before = [square]
    x = h
    if normed is not scaled:
        if not _called(h, *_CONVERT) or set(h.users) != {square, scaled}:
            return None
        x, before = h.args[0], [h, square]
    norm = _Norm(x, weight, shifted.args[1], [*before, *chain])
    return norm if _fits(norm, h, normed, mean.args[1:], devices) and _contiguous(y) else None


def _other(node: Node, factor: Node):
    """The other argument of an op of two."""
    return node.args[1] if node.args[0] is factor else node.args[0]


def _squares(square: Node, h) -> bool:
    return isinstance(h, Node) and (square.args == (h, 2) and _called(square, *_SQUARE)
                                    or square.args == (h, h) and _called(square, *_MULTIPLY))


def _fits(norm: _Norm, h: Node, normed: Node, reduced: tuple, devices) -> bool:
    """Whether dtypes, shapes and numbers are those of the op."""
    x, weight, eps = norm.x.meta["val"], norm.weight.meta["val"], norm.eps
    if not isinstance(eps, (int, float)) or not SMALLEST_EPS <= eps <= LARGEST_EPS:
        return False
    if not isinstance(weight, torch.Tensor) or x.device.type not in devices or x.dtype not in DTYPES.values():
        return False
    width = x.shape[-1] if x.dim() else 0
    return (isinstance(width, int) and 0 < width <= RESIDENT_WIDTH and reduced in (([-1], True), ([x.dim() - 1], True))
            and h.meta["val"].dtype == torch.float32 and normed.meta["val"].dtype == x.dtype == weight.dtype
            and weight.dim() == 1 and statically_known_true(weight.shape[0] == width))


def _takes_addition(norm: _Norm) -> bool:
    """Whether x is a sum of two alike, and all else that reads it comes where the op can give it."""
    x = norm.x
    if not _called(x, *_ADD) or x is norm.weight or not all(isinstance(a, Node) for a in x.args):
        return False
    after = max(x, norm.weight)
    return _contiguous(x) and all(_alike(a.meta["val"], x.meta["val"]) for a in x.args) and \
        all(after < user for user in x.users if user not in norm.nodes)


def _contiguous(node: Node) -> bool:
    """Whether a result lies as the op's will: whoever called the graph was told its strides."""
    return is_contiguous_or_false(node.meta["val"])


def _alike(a, b) -> bool:
    return isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and a.dim() == b.dim() and \
        statically_known_true(sym_eq(tuple(a.shape), tuple(b.shape)))


def _put(graph: torch.fx.Graph, norm: _Norm) -> None:
    y = norm.nodes[-1]
    with graph.inserting_before(y):
        _replace(y, graph.call_function(_NORM, (norm.x, norm.weight, float(norm.eps))))
    _erase(graph, norm.nodes)


def _put_with_addition(graph: torch.fx.Graph, norm: _Norm) -> None:
    x, y = norm.x, norm.nodes[-1]
    with graph.inserting_after(max(x, norm.weight)):
        both = graph.call_function(_ADDED, (*x.args, norm.weight, float(norm.eps)))
    both.meta["val"] = y.meta["val"], x.meta["val"]
    with graph.inserting_after(both):
        for place, node in enumerate((y, x)):
            _replace(node, graph.call_function(operator.getitem, (both, place)))
    _erase(graph, [x, *norm.nodes])


def _replace(node: Node, by: Node) -> None:
    by.meta = dict(node.meta)
    node.replace_all_uses_with(by)


def _erase(graph: torch.fx.Graph, nodes: list[Node]) -> None:
    for node in reversed(nodes):
        graph.erase_node(node)
