"""Rotary positions as an op; the order is in order.py beside this file."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import bits
from ...call import KernelCall, check_tensors
from ...launch import Step, compiled
from ...op import Op, Shape, Work
from ...runtime import tl, triton
from .order import angles, check_angles, tl_angles, tl_turned, turned

HEADS_A_PROGRAM = 8


def _cuda(x, table, positions):
    """The default: PyTorch's own operations. A position outside the table is PyTorch's error, on a GPU an assertion."""
    (cos, sin), (a, b) = table[positions][:, None].chunk(2, -1), x.chunk(2, -1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1).to(x.dtype)


def _python(x, table, positions):
    """The specification: x (T, H, D), table (context, D) float32, positions (T,) int64 -> (T, H, D) in x's dtype.

    float32, float16 or bfloat16; D even. Raises TypeError or ValueError for anything else, ValueError for a position
    outside the table on a CPU. Differentiable by x.
    """
    _CALL.check(x, table, positions)
    return turned(x, *angles(table, positions)).to(x.dtype)


@triton.jit
def _rotary_kernel(x_ptr, table_ptr, positions_ptr, y_ptr, context, x_stride, HEADS: tl.constexpr, HALF: tl.constexpr,
                   COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK heads of one token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    cos, sin = tl_angles(table_ptr, tl.load(positions_ptr + token), context, column, HALF)
    mask = (head < HEADS) & (column < HALF)
    at = x_ptr + token * x_stride + head * 2 * HALF + column
    a, b = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
    a, b = tl_turned(a, b, cos, sin)
    into = y_ptr + (token * HEADS + head) * 2 * HALF + column
    tl.store(into, a.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(into + HALF, b.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Schedule:
    """How it is carried out: heads of a token a program, and warps."""

    heads: int = HEADS_A_PROGRAM
    warps: int = 4

    def __str__(self):
        return f"heads={self.heads} warps={self.warps}"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def choose(heads: int, width: int) -> Schedule:
    """HEADS_A_PROGRAM heads a program, or all if there are fewer; four pairs a thread, 16 bytes of the table's row."""
    block = min(HEADS_A_PROGRAM, power_of_two(heads))
    return Schedule(block, min(8, max(1, block * power_of_two(width // 2) // 128)))


def _sizes(shape) -> tuple[int, int, int]:
    shape = Shape.parse(shape, "H", "D", "context")
    return shape["H"], shape["D"], shape["context"]


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    heads, width, _ = _sizes(shape)
    others = [Schedule(block, warps) for block, warps in ((1, 1), (1, 4), (2, 2), (8, 2), (16, 8))]
    return list(dict.fromkeys([*others, choose(heads, width)]))


def _head_stride(x) -> int | None:
    """The stride between the tokens of x (T, H, D), whose heads must lie one after the other; None if they do not."""
    beside = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x.stride(0) if beside else x.shape[1] * x.shape[2] if x.is_contiguous() else None


class _Rotary(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

    name = "rotary"
    parameters = "Tensor x, Tensor table, Tensor positions"
    Schedule, kernel = Schedule, _rotary_kernel

    def check(self, x, table, positions):
        check_tensors(x=x)
        if x.dim() != 3 or x.shape[2] % 2:
            raise ValueError(f"x must have shape (T, H, D) with an even D, got {tuple(x.shape)}")
        check_angles("x", x, table, positions)

    def schedule(self, x, table, positions):
        return choose(x.shape[1], x.shape[2])

    def readable(self, x, table, positions):
        return x.contiguous() if _head_stride(x) is None else x, table.contiguous(), positions.contiguous()

    def in_float32(self, x, table, positions):
        return x.float(), table, positions

    def steps(self, schedule, x, table, positions):
        tokens, heads, width = x.shape
        return [Step(_rotary_kernel, tokens * -(-heads // schedule.heads),
                     {"x_ptr": x.dtype, "table_ptr": torch.float32, "positions_ptr": torch.int64, "y_ptr": x.dtype},
                     {"context": len(table), "x_stride": _head_stride(x)},
                     {"HEADS": heads, "HALF": width // 2, "COLUMNS": power_of_two(width // 2),
                      "BLOCK": schedule.heads}, {"num_warps": schedule.warps})]

    def launch(self, plan, x, table, positions):
        if plan.copies:
            x, table, positions = self.readable(x, table, positions)
        y = plan.like(x)
        px, pt, pp = x.data_ptr(), table.data_ptr(), positions.data_ptr()
        plan.first(px | pt | pp, px, pt, pp, y.data_ptr())
        return y

    def memory(self, plan, x, table, positions):
        return {"x_ptr": x, "table_ptr": table, "positions_ptr": positions,
                "y_ptr": torch.empty(x.shape, dtype=torch.float32, device=x.device)}


_CALL = _Rotary()


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """Any position of the table for each row; the table's numbers lie where cosines and sines do."""
    heads, width, context = _sizes(shape)
    x = bits.portable(tokens, heads * width, dtype, device, seed).view(tokens, heads, width)
    rows = torch.arange(tokens, dtype=torch.int64, device=device)
    positions = bits.hashed(rows, seed + 2) % context if x.device.type != "meta" else rows
    return x, bits.portable(context, width, torch.float32, device, seed + 1), positions


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    heads, width, context = _sizes(shape)
    numbers = tokens * heads * width
    return Work(bytes=2 * numbers * dtype.itemsize + 4 * context * width + 8 * tokens, flops=3 * numbers)


rotary = Op(
    name="rotary", title="Rotary positions", order="two products, each rounded, then their sum",
    cuda=_cuda, python=_CALL.specification(_python), triton=_CALL.triton, inputs=_inputs, work=_work, per_token=(0, 2),
    shapes=("H=40,D=128,context=4096", "H=40,D=64,context=4096"), schedules=_schedules,
    schedule=lambda tokens, shape, dtype: str(choose(*_sizes(shape)[:2])),
    extras={"compile": compiled(_cuda)}, call=_CALL)
