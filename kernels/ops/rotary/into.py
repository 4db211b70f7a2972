"""Queries and keys turned in place, keys and values written to the cache: what a model's layer does in one launch."""
from __future__ import annotations

import torch
from torch.autograd import forward_ad

from ...call import Plans, check_tensors, refuse_foreign
from ...launch import Launch, Step
from ...runtime import require_triton, tl, triton
from .op import Schedule, choose, power_of_two
from .order import angles, check_angles, check_places, tl_angles, tl_turned, turned


@triton.jit
def _into_kernel(qkv_ptr, table_ptr, positions_ptr, slots_ptr, kv_ptr, context, slots, slot_stride,
                 QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK heads of one token: queries and keys turned in place, keys and values written to the token's slot."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    HEADS: tl.constexpr = QUERIES + 2 * KEYS
    BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    cos, sin = tl_angles(table_ptr, tl.load(positions_ptr + token), context, column, HALF)
    slot = tl.load(slots_ptr + token)
    mask, turns = (head < HEADS) & (column < HALF), head < QUERIES + KEYS
    at = qkv_ptr + (token * HEADS + head) * 2 * HALF + column
    a, b = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
    c, d = tl_turned(a, b, cos, sin)
    a = tl.where(turns, c.to(a.dtype), a)  # a value is copied, whatever the angle
    b = tl.where(turns, d.to(b.dtype), b)
    tl.store(at, a, mask=mask & turns)
    tl.store(at + HALF, b, mask=mask & turns)
    into = kv_ptr + slot * slot_stride + (head - QUERIES) * 2 * HALF + column
    keep = mask & (head >= QUERIES) & (slot >= 0) & (slot < slots)
    tl.store(into, a, mask=keep)
    tl.store(into + HALF, b, mask=keep)


def into_step(qkv, table, positions, slots, kv, heads: int, schedule: Schedule | None = None) -> Step:
    """The launch of `rotary_into` for tensors like these."""
    (tokens, every, width), schedule = qkv.shape, schedule or choose(*qkv.shape[1:])
    return Step(_into_kernel, tokens * -(-every // schedule.heads),
                {"qkv_ptr": qkv.dtype, "table_ptr": torch.float32, "positions_ptr": torch.int64,
                 "slots_ptr": torch.int64, "kv_ptr": kv.dtype},
                {"context": len(table), "slots": len(kv), "slot_stride": kv.stride(0)},
                {"QUERIES": heads, "KEYS": kv.shape[1] // 2, "HALF": width // 2, "COLUMNS": power_of_two(width // 2),
                 "BLOCK": schedule.heads}, {"num_warps": schedule.warps})


_LAUNCHES = Plans()


def rotary_into(qkv, table, positions, slots, kv, heads: int) -> None:
    """Queries and keys turned in place, keys and values written to the cache, with the bits of `rotary`.

    qkv        (T, heads + 2 * kv_heads, D), contiguous: queries, keys, values; a value is not turned
    table      (context, D) float32, contiguous; positions: (T,) int64, as `rotary` takes them
    slots      (T,) int64: the row of kv that gets a token's keys and values, another for each; one outside kv
               writes nothing
    kv         (slots, 2 * kv_heads, D) of qkv's dtype, contiguous in its last two dimensions

    One launch on a GPU, where the host reads nothing back; plain PyTorch on a CPU. Raises TypeError or ValueError that
    names the argument for anything else, RuntimeError where a gradient is asked for.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _INTO(qkv, table, positions, slots, kv, heads)
    return _into(qkv, table, positions, slots, kv, heads)


def _into(qkv, table, positions, slots, kv, heads) -> None:
    given = (qkv, table, positions, slots, kv)
    try:
        key = (heads, torch.is_grad_enabled(), *((
            t.__class__, t.shape, t.stride(), t.dtype, t.get_device(), t.requires_grad, t.is_neg()) for t in given))
        launch = _LAUNCHES.get(key)
    except (AttributeError, RuntimeError, TypeError):  # not tensors, without strides: say so by name
        launch = None
    if launch is None or forward_ad._current_level >= 0:
        _check_into(*given, heads)
        if qkv.get_device() < 0:
            return _into_on_a_cpu(*given, heads)
        if not len(qkv):
            return None
        require_triton("rotary_into")
        launch = _LAUNCHES.keep(key, Launch(into_step(*given, heads), qkv.get_device()))
    at = [t.data_ptr() for t in given]
    return launch(at[0] | at[1] | at[2] | at[3] | at[4], *at)


def _into_on_a_cpu(qkv, table, positions, slots, kv, heads) -> None:
    turns = qkv[:, : heads + kv.shape[1] // 2]
    turns.copy_(turned(turns, *angles(table, positions)))
    keep = (slots >= 0) & (slots < len(kv))
    kv[slots[keep]] = qkv[keep, heads:]


_INTO = torch.library.custom_op(
    "same_bits::rotary_into", _into, mutates_args=("qkv", "kv"), schema=
    "(Tensor(a!) qkv, Tensor table, Tensor positions, Tensor slots, Tensor(b!) kv, int heads) -> ()")
_INTO.register_fake(lambda *given: None)


def _check_into(qkv, table, positions, slots, kv, heads) -> None:
    given = {"qkv": qkv, "table": table, "positions": positions, "slots": slots, "kv": kv}
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor):
            refuse_foreign("rotary_into", name, tensor)
    check_tensors(qkv=qkv, kv=kv)
    if qkv.dim() != 3 or qkv.shape[2] % 2:
        raise ValueError(f"qkv must have shape (T, heads, D) with an even D, got {tuple(qkv.shape)}")
    if kv.dim() != 3 or kv.shape[1] % 2 or not kv.shape[1] or kv.shape[2] != qkv.shape[2]:
        raise ValueError(f"kv must have shape (slots, 2 * kv_heads, {qkv.shape[2]}), got {tuple(kv.shape)}")
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads must be an int, got {heads!r}")
    if heads < 1 or qkv.shape[1] != heads + kv.shape[1]:
        raise ValueError(f"qkv must hold heads + {kv.shape[1]} heads, kv's, got {qkv.shape[1]} and heads = {heads}")
    check_angles("qkv", qkv, table, positions)
    check_places("slots", slots, "qkv", qkv)
    for name, tensor in given.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"rotary_into has no backward, and {name} requires a gradient: "
                               "call it under torch.no_grad()")
        if tensor.is_neg() or not (tensor[:1] if name == "kv" else tensor).is_contiguous():
            raise ValueError(f"{name} must be contiguous and not negated, got strides {tensor.stride()}")


def rotary_into_default(qkv, table, positions, slots, kv, heads: int) -> None:
    """`rotary_into` as PyTorch's own operations do it: the same arguments, the default's bits.

    Positions and slots must be inside: PyTorch raises on a CPU, and on a GPU an assertion ends the process' use of it.
    """
    cos, sin = table[positions][:, None].chunk(2, -1)
    a, b = qkv[:, : heads + kv.shape[1] // 2].chunk(2, -1)
    c, d = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    a.copy_(c)
    b.copy_(d)
    kv.index_copy_(0, slots, qkv[:, heads:])
