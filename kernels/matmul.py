"""The matrix product y = x @ weight.T + bias, in F.linear's layout, in one order at every token count.

The order of one element of y, for weight (N, K). float16 and bfloat16: a chain over k, sixteen products a step, each
step one addition of the tensor core (kernels/tensor_core.py says what that rounds). float32: a chain over k of fused
multiply-adds, one rounding each. A weight with few rows would leave a GPU idle while it walks one chain: where
`order(N, K)` says so, k is cut into segments of one length, each with a chain of its own that starts from zero.
The sum starts from +0, the chains are added to it in sequence in float32, then the bias; the result is rounded
once to the dtype.

Why a batch cannot change it: the order names one row of x, one row of the weight, and the two numbers N and K.
The number of tokens chooses tiles, warps, and whether segments run side by side, which is no part of the order.
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from . import bits, schedules, tensor_core
from .elementary import fma, tl_fma
from .launch import Launch, Plans, check_tensors
from .op import Op, Shape, Work
from .runtime import HAS_GPU, Compiled, Unavailable, current_device, current_stream, has_pdl, require_triton, tl, triton
from .schedules import Schedule

SEGMENT_STEP = 256  # segments are so many k long, or a multiple: every tile's block of k divides them
SHORTEST_SEGMENT = 512  # two blocks of k at least: a compiler may merge segments of one block into one chain
FEW_ROWS = 2048  # as many rows fill a GPU with one chain each


def order(n: int, k: int) -> tuple[int, int]:
    """(segments, length): k of a weight (n, k) is cut every `length`, into so many segments; (1, k) is one chain."""
    wanted = 1
    while wanted < 8 and wanted * n < FEW_ROWS:
        wanted *= 2
    length = max(-(-k // wanted), SHORTEST_SEGMENT)
    length += -length % SEGMENT_STEP
    return (1, k) if wanted == 1 or length >= k else (-(-k // length), length)


def _cuda(x, weight, bias=None):
    """The default: F.linear."""
    return F.linear(x, weight, bias)


def _python(x, weight, bias=None):
    """The specification: x (..., K), weight (N, K), bias (N,) or None -> (..., N) in x's dtype.

    float32, float16 or bfloat16, all of one dtype. Raises TypeError or ValueError for anything else.
    """
    if torch.is_grad_enabled() and _wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, _specified)
    return _specified(x, weight, bias)


def _specified(x, weight, bias, whole=False):
    """The specification without gradients; `whole` makes it one chain whatever (N, K)."""
    _check(x, weight, bias)
    segments, length = (1, x.shape[-1]) if whole else order(*weight.shape)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    total = torch.zeros(len(rows), len(weight), dtype=torch.float32, device=x.device)
    for start in range(0, segments * length, max(length, 1)):
        piece = slice(start, start + length)
        total = total + _chain(rows[:, piece], weight[:, piece])
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).view(*x.shape[:-1], len(weight))


def _chain(x, weight):
    """One chain over k: x (M, K), weight (N, K) -> (M, N) float32."""
    if x.dtype != torch.float32:
        return tensor_core.chain(x, weight)
    total = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        total = fma(x[:, k, None].expand_as(total), weight[None, :, k].expand_as(total), total)
    return total


def _triton(x, weight, bias=None):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""
    if torch.compiler.is_compiling():
        return _matmul_op(x, weight, bias)
    if torch.is_grad_enabled() and _wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, _run)
    return _run(x, weight, bias)


def _wants_gradient(x, weight, bias):
    return getattr(x, "requires_grad", False) or getattr(weight, "requires_grad", False) or getattr(
        bias, "requires_grad", False)


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile number -> first token, first weight row: GROUP tiles of tokens pass over the weights together."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    width = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // width * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    return (first + tile % width % size) * BLOCK_M, tile % width // size * BLOCK_N


@triton.jit
def _dot(x, weight, total, SWAP: tl.constexpr, EXPLICIT: tl.constexpr):
    """total + x @ weight.T, or its transpose: tiles x [BLOCK_M, BLOCK_K], weight [BLOCK_N, BLOCK_K]."""
    if EXPLICIT:  # NumPy's product in the interpreter has an order of its own
        for k in range(x.shape[1]):
            here = tl.arange(0, x.shape[1])[None, :] == k
            x_k = tl.sum(tl.where(here, x, 0.0), axis=1)
            weight_k = tl.sum(tl.where(here, weight, 0.0), axis=1)
            if SWAP:
                total = tl_fma(weight_k[:, None], x_k[None, :], total)
            else:
                total = tl_fma(x_k[:, None], weight_k[None, :], total)
    elif SWAP:
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def _finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
            BIAS: tl.constexpr):
    """Add the bias, round once, store: total [BLOCK_M, BLOCK_N] (or its transpose) at token m0, weight row n0."""
    n = n0 + tl.arange(0, BLOCK_N)
    if BIAS:
        b = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        total += b[:, None] if SWAP else b[None, :]
    y = total.to(y_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    m = m0 + tl.arange(0, BLOCK_M)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + place, y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments):
    """Leave this segment's chain; whoever comes last adds all of them in sequence. -> the sum, whether we are last."""
    SIZE: tl.constexpr = chain.shape[0] * chain.shape[1]
    place = tl.arange(0, chain.shape[0])[:, None] * chain.shape[1] + tl.arange(0, chain.shape[1])[None, :]
    first_ptr = partial_ptr + (tile * segments).to(tl.int64) * SIZE + place
    tl.store(first_ptr + segment * SIZE, chain)
    tl.debug_barrier()  # every thread's numbers are stored before one thread says so
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == segments - 1
    total = tl.zeros_like(chain)
    if last:
        for s in range(segments):
            total += tl.load(first_ptr + s * SIZE, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return total, last


@triton.jit(do_not_specialize=["M"])
def _pointer_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, x_stride, x_step,
                    weight_stride, weight_step, segments, length,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                    SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
                    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, EXPLICIT: tl.constexpr, PDL: tl.constexpr):
    """One tile of y a program (with SPLIT: one segment of one tile), any sizes and strides."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    segment = 0
    start = 0
    end = K
    if SPLIT:
        segment = tile % segments
        tile = tile // segments
        start = segment * length
        end = tl.minimum(K, start + length)
    m0, n0 = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    weight_row = weight_ptr + n.to(tl.int64)[:, None] * weight_stride
    m_inside = (m < M)[:, None]
    n_inside = (n < N)[:, None]
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros_like(chain)
    for block in tl.range(start, end, BLOCK_K):
        k = (block + tl.arange(0, BLOCK_K))[None, :]
        x_at = x_row + k.to(tl.int64) * x_step
        weight_at = weight_row + k.to(tl.int64) * weight_step
        if EVEN_K:
            x = tl.load(x_at, mask=m_inside, other=0.0)
        else:
            x = tl.load(x_at, mask=m_inside & (k < end), other=0.0)
        if EVEN_K and EVEN_N:
            weight = tl.load(weight_at)
        elif EVEN_K:
            weight = tl.load(weight_at, mask=n_inside, other=0.0)
        else:
            weight = tl.load(weight_at, mask=n_inside & (k < end), other=0.0)
        chain = _dot(x, weight, chain, SWAP, EXPLICIT)
        if CUT and not SPLIT:  # noqa: SIM102 - the second condition is run-time
            if (block + BLOCK_K) % length == 0:
                total += chain
                chain = tl.zeros_like(chain)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT:
        total, last = _add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments)
        if last:
            _finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        total += chain
        _finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)


@triton.jit
def _tma_tile(tile, x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
              SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr):
    segment = 0
    start = 0
    end = K
    if SPLIT:
        segment = tile % segments
        tile = tile // segments
        start = segment * length
        end = tl.minimum(K, start + length)
    m0, n0 = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros_like(chain)
    for k in tl.range(start, end, BLOCK_K):
        x = x_desc.load([m0, k])
        weight = weight_desc.load([n0, k])
        chain = _dot(x, weight, chain, SWAP, False)
        if CUT and not SPLIT:  # noqa: SIM102 - the second condition is run-time
            if (k + BLOCK_K) % length == 0:
                total += chain
                chain = tl.zeros_like(chain)
    if SPLIT:
        total, last = _add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments)
        if last:
            _finish(total, y, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        total += chain
        if STORE:
            if BIAS:
                n = n0 + tl.arange(0, BLOCK_N)
                total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            y.store([m0, n0], total.to(x_desc.dtype))
        else:
            _finish(total, y, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)


@triton.jit(do_not_specialize=["M"])
def _tma_kernel(x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr,
                PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, PDL: tl.constexpr):
    """Tiles read by bulk copies (sm_90 and up), which fill what lies outside with zeros; K contiguous in both."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN,
                             warp_specialize=SPECIALIZE):
            _tma_tile(tile, x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
                      BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, BIAS, STORE)
    else:
        _tma_tile(tl.program_id(0), x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments,
                  length, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, BIAS, STORE)


class _Counters:
    """Zeros that the programs of a split product count up and leave at zero: a slice for each stream, and one for
    each captured call, because a graph may be replayed beside its stream."""

    SLICE, BANK = 4096, 1 << 20

    def __init__(self):
        self.banks: dict[int, list] = {}  # GPU -> [tensor, counters taken]
        self.full: list = []  # kept as long as the process: a captured graph may count in them
        self.streams: dict[tuple[int, int], int] = {}

    def take(self, index: int, stream: int, count: int) -> int:
        """The address of `count` counters, or 0 while a graph is captured and there are none left."""
        if torch.cuda.is_current_stream_capturing():
            return self._cut(index, count)
        bank = self.banks.get(index)
        if bank is None or bank[1] > self.BANK // 2:  # while none is captured: a capture cannot make one
            self.full += [bank] if bank else []
            self.banks[index] = [torch.zeros(self.BANK, dtype=torch.int32, device=f"cuda:{index}"), 0]
            torch.cuda.synchronize(index)  # zero before any other stream counts
        address = self.streams.get((index, stream))
        if not address:
            address = self.streams[index, stream] = self._cut(index, self.SLICE)
        return address

    def _cut(self, index, count):
        count += -count % 4  # addresses that are multiples of 16, as the kernels are told
        bank = self.banks.get(index)
        if bank is None or bank[1] + count > self.BANK:
            return 0
        bank[1] += count
        return bank[0].data_ptr() + 4 * (bank[1] - count)


_COUNTERS = _Counters()


class Unsuitable(ValueError):
    """This schedule cannot carry out this product."""


class _Plan:
    """Everything about a call that shapes and strides decide, kept so that the next such call only launches."""

    def __init__(self, x, weight, bias, whole=False, schedule=None):
        _check(x, weight, bias)
        require_triton("matmul")
        self.n, self.k = weight.shape
        self.shape = (*x.shape[:-1], self.n)
        self.m = math.prod(x.shape[:-1])
        self.index, self.dtype, self.bias = x.get_device(), x.dtype, bias is not None
        self.cut = (1, self.k) if whole else order(self.n, self.k)
        self.copies = x.dim() != 2 and not x.is_contiguous()
        self.x_strides = x.stride() if x.dim() == 2 else (self.k, 1)
        self.weight_strides = weight.stride()
        self.empty = not (self.m and self.n and self.k)
        self.forced, self.wanted = schedule is not None, [schedule]
        if not (self.forced or self.empty):
            shape = Shape(N=self.n, K=self.k)
            self.wanted = list(schedules.choose("matmul", shape, x.dtype, self.m, self.index))
        self.ready: dict = {}

    def __call__(self, x, weight, bias):
        if self.copies:
            x = x.contiguous()
        if self.empty:
            return self._nothing(x, bias)
        y = torch.empty(self.shape, dtype=self.dtype, device=x.device)
        if self.index < 0:
            self._interpret(x, weight, bias, y)
        elif current_device() == self.index:
            self._launch(x, weight, bias, y)
        else:
            with torch.cuda.device(self.index):
                self._launch(x, weight, bias, y)
        return y

    def _nothing(self, x, bias):
        """No tokens, no weight rows, or a sum of no products: +0, and the bias added to it."""
        zeros = torch.zeros(self.shape, dtype=torch.float32, device=x.device)
        return (zeros if bias is None else zeros + bias.float()).to(x.dtype)

    def _launch(self, x, weight, bias, y):
        px, pw, py = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        pb = px if bias is None else bias.data_ptr()
        low = (px | pw | pb) & 15
        chosen = self.ready.get(low == 0)
        if chosen is None:
            self.ready[low == 0] = self._first_that_runs(low, px, pw, pb, py, y.device)
        else:
            chosen(low, px, pw, pb, py, y.device)

    def _first_that_runs(self, *call):
        """The first schedule that compiles and fits this GPU, after its first launch; any other has the same bits."""
        failures = []
        for schedule in self.wanted:
            try:
                chosen = _Chosen(self, schedule)
                chosen(*call)
                return chosen
            except Exception as error:  # noqa: BLE001 - compilers raise what they like
                failures.append(error)
        if self.forced:
            raise failures[0]
        raise RuntimeError(f"no schedule of this product runs on this GPU; {self.wanted[0]} says: {failures[0]}")

    def check(self, schedule) -> None:
        """Raise Unsuitable if this schedule cannot carry out the order."""
        if self.cut[0] > 1 and self.cut[1] % schedule.block_k:
            raise Unsuitable(f"block_k must divide the order's segments of {self.cut[1]}, got {schedule}")

    def programs(self, schedule) -> tuple[int, int]:
        """Tiles, and programs to launch for them."""
        tiles = -(-self.m // schedule.block_m) * -(-self.n // schedule.block_n)
        if schedule.split:
            return tiles, tiles * self.cut[0]
        return tiles, min(tiles, multiprocessors(self.index)) if schedule.persistent else tiles

    def _interpret(self, x, weight, bias, y):
        """Triton's interpreter is wrong for bf16: it gets float32 copies, and torch rounds."""
        schedule = next(s for s in self.wanted if self.forced or s.kind == "pointer")
        if schedule.kind != "pointer":
            raise Unsuitable(f"the interpreter runs schedules of kind pointer alone, got {schedule}")
        self.check(schedule)
        x, weight, out = x.reshape(-1, self.k).float(), weight.float(), torch.empty(y.shape, dtype=torch.float32)
        bias = x if bias is None else bias.float()
        schedule = replace(schedule, split=schedule.split and self.cut[0] > 1)
        tiles, programs = self.programs(schedule)
        partial = torch.empty(programs * schedule.block_m * schedule.block_n)
        scalars = (self.m, self.n, self.k, *x.stride(), *weight.stride(), *self.cut)
        tensors = (x, weight, bias, out, partial, torch.zeros(tiles, dtype=torch.int32))
        dtypes = tuple(t.dtype for t in tensors)
        Launch(_pointer_kernel, programs, dtypes, scalars, _pointer_constants(self, schedule), -1).interpret(*tensors)
        y.copy_(out.to(y.dtype))


class _Chosen:
    """One schedule made ready for one plan."""

    def __init__(self, plan, schedule):
        self.plan, self.schedule = plan, replace(schedule, split=schedule.split and plan.cut[0] > 1)
        s, index = self.schedule, plan.index
        plan.check(s)
        self.tiles, self.programs = plan.programs(s)
        if s.split and self.tiles > _Counters.SLICE:
            raise Unsuitable(f"{self.tiles} tiles are too many to split, got {s}")
        self.partials = self.programs * s.block_m * s.block_n
        self.bulk, self.in_sequence = s.kind != "pointer", None
        if self.bulk:
            self._describe()
        else:
            scalars = (plan.m, plan.n, plan.k, *plan.x_strides, *plan.weight_strides, *plan.cut)
            self.launch = Launch(_pointer_kernel, self.programs, (*4 * (plan.dtype,), torch.float32, torch.int32),
                                 scalars, _pointer_constants(plan, s), index, num_warps=s.warps, num_stages=s.stages)

    def __call__(self, low, px, pw, pb, py, device):
        index, at, count = self.plan.index, py, py
        if self.schedule.split:
            count = _COUNTERS.take(index, current_stream(index), self.tiles)
            if not count:  # while a graph is captured: walk the segments in sequence, which has the same bits
                self.in_sequence = self.in_sequence or _Chosen(self.plan, replace(self.schedule, split=False))
                self.in_sequence(low, px, pw, pb, py, device)
                return
            partials = torch.empty(self.partials, dtype=torch.float32, device=device)
            at = partials.data_ptr()
        if not self.bulk:
            self.launch(low, px, pw, pb, py, at, count)
            return
        if low & 15:
            raise Unsuitable("bulk copies need tensors aligned to 16 bytes")
        weight = self.weights.get(pw)
        if weight is None:
            if len(self.weights) >= 1024:
                self.weights.clear()
            weight = self.weights[pw] = _Descriptor(pw, self.examples[1])
        x = _Descriptor(px, self.examples[0])
        if self.schedule.kind == "hopper":
            high, wide = (weight, x) if self.schedule.swap else (x, weight)
            self.launch(current_stream(index), high, wide, py, pb)
            return
        y = _Descriptor(py, self.examples[2]) if self.schedule.store else py
        self.launch(current_stream(index), x, weight, y, pb, at, count)

    def _describe(self):
        """Compile for bulk copies of x, the weight and perhaps y. Raises Unsuitable if they cannot be copied so."""
        s, plan = self.schedule, self.plan
        if not has_pdl(plan.index) or s.kind == "hopper" and torch.cuda.get_device_capability(plan.index) != (9, 0):
            raise Unsuitable(f"this GPU cannot run schedules of kind {s.kind}")
        small = torch.empty(16, dtype=plan.dtype, device=f"cuda:{plan.index}")
        kernel, self.examples, given, arguments, options = bulk_launch(plan, s, small)
        self.weights: dict[int, _Descriptor] = {}
        self.launch = Compiled(kernel, self.programs, given, (), arguments, **options)


def _pointer_constants(plan, s) -> tuple:
    """The pointer kernel's constants but PDL, in the order of its arguments."""
    cut = plan.cut[0] > 1
    explicit = plan.index < 0 and plan.dtype == torch.float32
    return (s.block_m, s.block_n, s.block_k, s.group, s.swap, cut, cut and s.split, plan.bias,
            plan.n % s.block_n == 0, plan.k % s.block_k == 0, explicit)


def bulk_launch(plan, s, small) -> tuple:
    """What a schedule with bulk copies compiles: (kernel, descriptors, run-time examples, other arguments, options).

    `plan` says dtype, m, n, k, x_strides, weight_strides, cut and bias; `small` is a little memory of its dtype.
    """
    if s.kind == "hopper":
        return _hopper_launch(plan, s, small)
    cut = plan.cut[0] > 1
    if cut and s.split and (s.store or s.persistent):
        raise Unsuitable(f"persistent programs and bulk stores walk segments in sequence, got {s}")
    if s.store and s.swap:
        raise Unsuitable(f"a swapped tile has no bulk store, got {s}")
    examples = (_described(small, (plan.m, plan.k), plan.x_strides, s.block_m, s.block_k),
                _described(small, (plan.n, plan.k), plan.weight_strides, s.block_n, s.block_k),
                _described(small, (plan.m, plan.n), (plan.n, 1), s.block_m, s.block_n) if s.store else small)
    given = (*examples, small, small.new_empty(4, dtype=torch.float32), small.new_empty(4, dtype=torch.int32))
    arguments = (plan.m, plan.n, plan.k, *plan.cut, s.block_m, s.block_n, s.block_k, s.group, s.swap, cut,
                 cut and s.split, plan.bias, s.store, s.persistent, s.flatten, s.specialize, True)
    return _tma_kernel, examples, given, arguments, {"num_warps": s.warps, "num_stages": s.stages, **_OPTIONS}


_OPTIONS = {"enable_fp_fusion": False, "launch_pdl": True}


def _hopper_launch(plan, s, small):
    consumers = s.warps // 4
    high, wide = (s.block_n, s.block_m) if s.swap else (s.block_m, s.block_n)
    rows = high if s.pingpong else high // max(consumers, 1)
    if (plan.dtype == torch.float32 or s.split or s.warps not in (4, 8, 12) or high not in (rows, rows * consumers)
            or rows not in (64, 128) or wide not in (16, 32, 64, 128, 256)):
        raise Unsuitable("schedules of kind hopper take 16-bit numbers, walk segments in sequence, and have 4, 8 or 12 "
                         f"warps with 64 or 128 rows for each four, got {s}")
    if s.pingpong and (s.warps != 8 or rows * wide > 128 * 128 or plan.cut[0] > 1):
        raise Unsuitable(f"two groups of four warps that take turns walk one chain of a tile up to 128x128, got {s}")
    from .matmul_hopper import kernel, with_layout

    x = with_layout(_described(small, (plan.m, plan.k), plan.x_strides, wide if s.swap else rows, s.block_k))
    weight = with_layout(_described(small, (plan.n, plan.k), plan.weight_strides, rows if s.swap else wide, s.block_k))
    arguments = (plan.m, plan.n, plan.k, plan.cut[1], rows, wide, s.block_k, s.group, consumers, s.stages, s.swap,
                 plan.cut[0] > 1, plan.bias, s.store, s.pingpong, 160 if consumers == 3 else 232, True)
    given = (weight, x) if s.swap else (x, weight)
    return kernel, (x, weight), (*given, small, small), arguments, {"num_warps": 4, **_OPTIONS}


def _described(base, shape, strides, rows, columns):
    """A descriptor of a tensor of this form at another address. Raises Unsuitable if there can be none."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    stride, step = strides
    if step != 1 or stride * base.itemsize % 16 or stride < shape[1]:
        raise Unsuitable(f"bulk copies need contiguous rows aligned to 16 bytes, got strides {strides}")
    return TensorDescriptor(base, list(shape), list(strides), [rows, columns])


class _Descriptor:
    """What a launch reads of a TensorDescriptor, at another address: it keeps no tensor alive and checks nothing."""

    __slots__ = ("data_ptr", "shape", "strides", "base")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, pointer, like):
        self.data_ptr, self.shape, self.strides, self.base = lambda: pointer, like.shape, like.strides, self


def multiprocessors(index: int) -> int:
    """How many of them GPU `index` has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def run_schedule(schedule: Schedule, x, weight, bias=None):
    """Run one given schedule; tests and the tuner use it. Same arguments and bits as the rest.

    Raises Unsuitable (a ValueError) if the schedule cannot carry out this shape's order or read these strides.
    """
    return _run(x, weight, bias, schedule=schedule)


_PLANS = Plans()


def _run(x, weight, bias, whole=False, schedule=None):
    """The product by a kept plan; `whole` makes it one chain whatever (N, K), for a k that is a token count."""
    try:
        if x.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg()):
            x, weight = x.resolve_neg(), weight.resolve_neg()  # lazily negated: the memory holds the opposite
            bias = None if bias is None else bias.resolve_neg()
        key = (x.shape, x.stride(), x.dtype, x.get_device(), weight.shape, weight.stride(), weight.dtype,
               weight.get_device(), whole, schedule)
        if bias is not None:
            key += (bias.shape, bias.dtype, bias.get_device())
    except (AttributeError, RuntimeError):  # not tensors, or without strides: say so by name
        _check(x, weight, bias)
        raise
    plan = _PLANS.get(key) or _PLANS.keep(key, _Plan(x, weight, bias, whole, schedule))
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    return plan(x, weight, bias)


def _check(x, weight, bias):
    check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions (N, K), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have a last dimension of {weight.shape[1]}, the K of weight {tuple(weight.shape)}, "
                         f"got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), the N of weight, got {tuple(bias.shape)}")


class _Linear(torch.autograd.Function):
    """The product with a backward pass whose three sums have an order too.

    dx = dy @ weight          as a product by weight.t(): order(K, N)
    dweight = dy.t() @ x      one chain over the tokens, in their order; so it depends on how many there are
    dbias = dy.t() @ ones     the same chain
    """

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return (*_gradients(ctx.needs_input_grad, dy, *ctx.saved_tensors, ctx.product), None)


def _gradients(needs, dy, x, weight, product):
    """(dx, dweight, dbias), None for those not needed; product(x, weight, bias, whole) as in `_run`."""
    tokens = math.prod(x.shape[:-1])
    rows, dy_rows = x.reshape(tokens, x.shape[-1]), dy.reshape(tokens, dy.shape[-1])
    dx = product(dy_rows, weight.t(), None).view(x.shape) if needs[0] else None
    dweight = product(dy_rows.t(), rows.t(), None, True) if needs[1] else None
    dbias = None
    if needs[2]:
        ones = torch.ones(1, tokens, dtype=x.dtype, device=x.device)
        dbias = product(dy_rows.t(), ones, None, True)[:, 0]
    return dx, dweight, dbias


@torch.library.custom_op("same_bits::matmul", mutates_args=())
def _matmul_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
               whole: bool = False) -> torch.Tensor:
    return _run(x, weight, bias, whole)


@_matmul_op.register_fake
def _(x, weight, bias=None, whole=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _backward(ctx, dy):
    needs = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    return (*_gradients(needs, dy, *ctx.saved_tensors, _matmul_op), None)


_matmul_op.register_autograd(_backward, setup_context=_save)


def tiled(x, weight, bias=None):
    """Batch-invariant in plain PyTorch: 128 rows at a time, the last ones padded, so that every call has one shape.

    The order is the library's, unknown but the same for a row in any batch, if a row's place in its tile does not
    matter to the library: *certified by test, not by construction*.
    """
    _check(x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % 128))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(128) if len(padded)]
    y = torch.cat(tiles)[: len(rows)] if tiles else rows.new_empty(0, len(weight))
    return y.view(*x.shape[:-1], len(weight))


FROZEN = Schedule("pointer", 128, 128, 64, warps=8, stages=3, group=8)
_FROZEN_FLOAT32 = replace(FROZEN, block_k=16)


def frozen(x, weight, bias=None):
    """Batch invariance as it is usually had: one schedule, tiles of 128 by 128 by 64, for all token counts."""
    return run_schedule(FROZEN if x.dtype != torch.float32 else _FROZEN_FLOAT32, x, weight, bias)


_SWITCH = {torch.bfloat16: "allow_bf16_reduced_precision_reduction",
           torch.float16: "allow_fp16_reduced_precision_reduction"}


def cublas_no_split_k(x, weight, bias=None):
    """F.linear with cuBLAS told not to split k; the settings are put back afterwards.

    *Certified by test, not by construction*: cuBLAS still chooses a kernel by the number of tokens.
    Raises Unavailable on a CPU and for float32, which have no such setting.
    """
    if not x.is_cuda or x.dtype not in _SWITCH:
        raise Unavailable(f"cuBLAS has no setting against split-K for {x.dtype} on {x.device.type}")
    switches, name, library = torch.backends.cuda.matmul, _SWITCH[x.dtype], torch.backends.cuda.preferred_blas_library
    before, preferred = (getattr(switches, name), getattr(switches, f"{name}_split_k")), library()
    try:
        library("cublaslt")  # the only one of cuBLAS's interfaces that knows the setting
        setattr(switches, name, (False, False))
        return F.linear(x, weight, bias)
    finally:
        setattr(switches, name, before)
        library(preferred)


def _spread(width: int, step: int, dtype, device) -> torch.Tensor:
    """2**-4 to 2**4 over the columns: 8-bit numbers of one size have sums that are exact, and so no order."""
    exponent = torch.arange(width, device=device) * step % 9
    return ((torch.ones_like(exponent) << exponent) * 2.0**-4).to(dtype)


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    shape = Shape.parse(shape)
    x = bits.portable(tokens, shape["K"], dtype, device, seed) * _spread(shape["K"], 7, dtype, device)
    weight = bits.portable(shape["N"], shape["K"], dtype, device, seed + 1) * _spread(shape["K"], 5, dtype, device)
    bias = bits.portable(1, shape["N"], dtype, device, seed + 2)[0] if shape.get("bias") else None
    return x, weight, bias


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    shape = Shape.parse(shape)
    n, k = shape["N"], shape["K"]
    bias = n if shape.get("bias") else 0
    return Work(bytes=(tokens * (n + k) + n * k + bias) * dtype.itemsize, flops=2 * tokens * n * k)


def _index() -> int:
    return current_device() if HAS_GPU else -1


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    n, k = (Shape.parse(shape)[name] for name in "NK")
    shape = Shape(N=n, K=k)
    chosen = [s for tokens in (1 << i for i in range(18)) for index in {-1, _index()}
              for s in schedules.choose("matmul", shape, dtype, tokens, index)]
    if dtype == torch.float32:
        tiles = [Schedule("pointer", *tile, warps=4, stages=2) for tile in ((16, 16, 16), (32, 64, 32))]
    else:
        tiles = [Schedule("pointer", m, n, k, warps=w, stages=s) for m, n, k, w, s in (
            (16, 16, 16, 1, 2), (16, 128, 64, 4, 3), (64, 32, 128, 4, 2), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4))]
    turned = [replace(s, swap=not s.swap) for s in tiles]
    every = list(dict.fromkeys(chosen + tiles + turned))
    if order(n, k)[0] > 1:
        every += [replace(s, split=not s.split) for s in every if not (s.persistent or s.store)]
        every = [s for s in every if not order(n, k)[1] % s.block_k]
    every = [s for s in every if s.kind == "pointer" or HAS_GPU and has_pdl(_index()) and k * dtype.itemsize % 16 == 0]
    return list(dict.fromkeys(every))


def _schedule(tokens, shape, dtype) -> str:
    return str(next(schedules.choose("matmul", shape, dtype, tokens, _index())))


_LLAMA_8B = ("N=6144,K=4096", "N=4096,K=4096", "N=28672,K=4096", "N=4096,K=14336", "N=128256,K=4096")
_SHARDS = ("N=1280,K=8192", "N=7168,K=8192", "N=8192,K=1024", "N=8192,K=3584", "N=1024,K=4096", "N=512,K=4096")

matmul = Op(
    name="matmul",
    title="Matrix product",
    order="a chain over k; small weights: k in segments of fixed length, added in sequence",
    cuda=_cuda,
    python=_python,
    triton=_triton,
    inputs=_inputs,
    work=_work,
    per_token=(0,),
    shapes=_LLAMA_8B + _SHARDS,
    schedules=_schedules,
    schedule=_schedule,
    extras={"tiled": tiled, "frozen": frozen, "cublas_no_split_k": cublas_no_split_k},
)
