"""Every op in NumPy, step by step as its docstring says, and how far a result may lie from float64.

A pencil takes the op and its arguments on a CPU; torch only rounds to 16 bits. Errors are pairs (error, allowed).
"""
import math
from fractions import Fraction

import numpy as np
import torch

from kernels.arithmetic import tensor_core
from kernels.arithmetic.elementary import exp, log
from kernels.op import dtype_name
from kernels.ops.matmul.order import order


def neighbours_added(numbers):
    """A power of two of numbers, added in pairs until one is left."""
    while len(numbers) > 1:
        numbers = np.array([numbers[j] + numbers[j + 1] for j in range(0, len(numbers), 2)])
    return numbers[0]


def smallest(dtype):
    """The smallest subnormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# RMSNorm


def norm(op, x, weight, residual=None, eps=1e-6):
    def rounded(numbers):
        return torch.from_numpy(numbers).to(x.dtype)

    ys, streams = [], []
    for i in range(len(x)):
        row = x[i].float().numpy() if residual is None else x[i].float().numpy() + residual[i].float().numpy()
        h = rounded(row).float().numpy()
        squares = np.append(h * h, np.zeros(-len(h) % 1024, np.float32)).reshape(-1, 1024)
        sums = squares[0]
        for chunk in squares[1:]:
            sums = sums + chunk
        mean = neighbours_added(sums) * np.float32(1 / len(h))
        scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
        ys.append(rounded((h * scale) * weight.float().numpy()))
        streams.append(rounded(row))
    return torch.stack(ys) if residual is None else (torch.stack(ys), torch.stack(streams))


# Relative to |y|: half an ulp of the dtype for the last rounding, and a little for float32 before it.
NORM = {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.005, "float32": 2.0**-24 * 16}


def norm_errors(op, name, result, x, weight, residual=None, eps=1e-6):
    """In float64 from the stream rounded to the dtype, as every implementation has it; and that stream's."""
    stream = x if residual is None else (x.double() + residual.double()).to(x.dtype)
    h = stream.double()
    wanted = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps) * weight.double()
    y = result if residual is None else result[0]
    yield (y.double() - wanted).abs(), NORM[dtype_name(y.dtype)] * wanted.abs() + smallest(x.dtype) / 2
    if residual is not None:
        total = x.double() + residual.double()
        yield (result[1].double() - total).abs(), torch.finfo(x.dtype).eps / 2 * total.abs()


def norm_rounded_twice(op, x, weight, residual=None):
    """Rounded before the weight, as some kernels do."""
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


# softmax and log_softmax


def e(x):
    return exp(torch.from_numpy(np.atleast_1d(x))).numpy().reshape(np.shape(x))


def softmax(op, x, dim=-1, *, whole=32, segment=8):
    one, rows = np.float32(1), []
    for row in x.float().numpy():
        width = next((2**i for i in range(10) if 2**i >= len(row)), 1024)
        chunks = np.full((-(-len(row) // width), width), -np.inf, np.float32)
        chunks.flat[:len(row)] = row
        size = len(chunks) if len(chunks) <= whole else segment
        m, s = np.full(width, np.finfo(np.float32).min), np.zeros(width, np.float32)
        for i in range(0, len(chunks), size):
            larger = np.max([m, *chunks[i : i + size]], axis=0)
            s = s * e(m - larger)
            m = larger
            for chunk in chunks[i : i + size]:
                s = s + e(chunk - m)
        total = neighbours_added(s * e(m - m.max()))
        if op.name == "log_softmax":
            y = (chunks - m.max()) - log(torch.from_numpy(np.atleast_1d(total))).numpy()
        else:
            y = e(chunks - m) * (e(m - m.max()) * (one / total))
        rows.append(torch.from_numpy(y.reshape(-1)[: len(row)]).to(x.dtype))
    return torch.stack(rows)


# Half an ulp of the dtype for the last rounding, and float32's before it, of which x - m, up to 32 here, is the
# largest. Of softmax relative to y, of log_softmax relative to 1 + |y|.
SOFTMAX = {"softmax": {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.01, "float32": 2.0**-24 * 32},
           "log_softmax": {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.001, "float32": 2.0**-24 * 4}}


def softmax_errors(op, name, y, x, dim=-1):
    """Half the smallest subnormal number is forgiven."""
    wanted, tolerance = op.cuda(x.double(), dim), SOFTMAX[op.name][dtype_name(y.dtype)]
    of_log = op.name == "log_softmax"
    yield (y.double() - wanted).abs(), tolerance * (wanted.abs() + of_log) + (0 if of_log else smallest(y.dtype) / 2)


def softmax_rounded_twice(op, x, dim=-1):
    """x - m rounded first."""
    shifted = (x.float() - x.float().amax(dim, keepdim=True)).to(x.dtype)
    return op.cuda(shifted.float(), dim).to(x.dtype)


# SwiGLU


def sigmoid(gate):
    below = e(-np.abs(gate))
    return np.where(gate < 0, below, np.float32(1)) / (np.float32(1) + below)


def gated(op, gate_up):
    gate, up = np.split(gate_up.float().numpy(), 2, axis=1)
    return torch.from_numpy((gate * sigmoid(gate)) * up).to(gate_up.dtype)


# Relative to |y|: half an ulp of the dtype for the last rounding, and float32's before it.
GATED = {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.004, "float32": 2.0**-24 * 6}


def gated_errors(op, name, y, gate_up):
    wanted, up = op.cuda(gate_up.double()), gate_up.double().chunk(2, -1)[1]
    yield (y.double() - wanted).abs(), GATED[dtype_name(y.dtype)] * wanted.abs() + 2.0**-142 * up.abs() + (
        smallest(y.dtype) / 2)


def gated_rounded_twice(op, gate_up):
    """silu rounded first, as the default has it."""
    return op.cuda(gate_up)


# sum and mean


def reduction(op, x, dim=None, keepdim=False):
    given = () if dim is None else dim if isinstance(dim, tuple) else (dim,)
    reduced = sorted(d % x.dim() for d in given) if given and x.dim() else list(range(x.dim()))
    kept = [i for i in range(x.dim()) if i not in reduced]
    count = math.prod(x.shape[i] for i in reduced)
    rows = np.transpose(x.float().numpy(), (*kept, *reduced)).reshape(-1, count)
    found = []
    for row in rows:
        width = min(1024, 1 << (count - 1).bit_length())
        columns = np.zeros(width, np.float32)
        for j in range(width):
            column = [*row[j::width], *([np.float32(0)] if j >= count % width > 0 else [])]
            columns[j] = column[0]
            for number in column[1:]:
                columns[j] = columns[j] + number
        total = neighbours_added(columns) + np.float32(0)
        found.append(total * np.float32(1 / count) if op.name == "mean" else total)
    shape = [1 if i in reduced else n for i, n in enumerate(x.shape) if keepdim or i not in reduced]
    return torch.from_numpy(np.array(found, np.float32)).to(x.dtype).view(shape)


# Half an ulp of the dtype for the last rounding, relative to |y|. Before it each of the tree's float32 additions, and
# the mean's factor and product, err by 2**-24 at most, relative to the sum of |x|.
REDUCTION = {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.005, "float32": 2.0**-24 * 1.001}


def reduction_errors(op, name, y, x, dim=-1):
    width, wanted = x.shape[-1], op.cuda(x.double(), dim)
    depth = math.ceil(width / 1024) - 1 + math.ceil(math.log2(min(width, 1024))) + 2
    before = 1.01 * depth * 2.0**-24 * x.double().abs().sum(-1) / (width if op.name == "mean" else 1)
    yield (y.double() - wanted).abs(), (REDUCTION[dtype_name(x.dtype)] * wanted.abs() + before
                                        + smallest(x.dtype) / 2)


def reduction_rounded_twice(op, x, dim=-1):
    """Rounded between two chunks."""
    total = x[:, :1024].float().sum(1).to(x.dtype) + x[:, 1024:].float().sum(1).to(x.dtype)
    return total / x.shape[-1] if op.name == "mean" else total


# the matrix product


def to_float32(value: Fraction) -> float:
    """The float32 nearest to an exact value, ties to even (for what is neither subnormal nor too large)."""
    if not value:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) - 23
    while abs(value) / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while abs(value) / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def product(op, x, weight, bias=None, starts=None):
    """float32 one element at a time in exact fractions, 16 bits by the tensor core's chain; `starts` of segments."""
    starts = starts or [*range(0, x.shape[1], order(*weight.shape).length)]
    pieces = list(zip(starts, [*starts[1:], x.shape[1]], strict=True))
    if x.dtype != torch.float32:
        total = torch.zeros(len(x), len(weight))
        for start, end in pieces:
            total = total + tensor_core.chain(x[:, start:end], weight[:, start:end])
        return (total if bias is None else total + bias.float()).to(x.dtype)
    y = np.zeros((len(x), len(weight)), np.float32)
    for i, row in enumerate(x.tolist()):
        for j, weights in enumerate(weight.tolist()):
            total = 0.0
            for start, end in pieces:
                chain = 0.0
                for k in range(start, end):
                    chain = to_float32(Fraction(row[k]) * Fraction(weights[k]) + Fraction(chain))
                total = to_float32(Fraction(total) + Fraction(chain))
            y[i, j] = total if bias is None else to_float32(Fraction(total) + Fraction(bias[j].item()))
    return torch.from_numpy(y)


def exact_product(x, weight, bias=None):
    """In float64; with whole numbers no operation rounds."""
    y = x.double() @ weight.double().t() + 0.0  # our sums begin at +0; float64's single product may be -0
    return y if bias is None else y + bias.double()


# Relative to sum |x||w|: for float32 and the chains before the last rounding, about 2**-24 a step (tensor cores cut,
# steps of 16); then half an ulp of the result.
PRODUCT = {"float32": 2.0**-24 * 64, "bfloat16": 2.0**-21, "float16": 2.0**-21}


def product_errors(op, name, y, x, weight, bias=None):
    wanted, size = exact_product(x, weight, bias), exact_product(*(None if t is None else t.abs() for t in (
        x, weight, bias)))
    eps = torch.finfo(y.dtype).eps
    tolerance = PRODUCT[dtype_name(y.dtype)]
    of_a_sum = tolerance if name in ("python", "triton") else max(tolerance, 4 * eps)
    yield (y.double() - wanted).abs(), of_a_sum * size + eps / 2 * wanted.abs() * 1.01


def product_rounded_twice(op, x, weight, bias):
    """The bias added after the rounding."""
    return op.python(x, weight) + bias
