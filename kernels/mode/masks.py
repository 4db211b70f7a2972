"""Reading a mask: which keys each query of a scaled_dot_product_attention sees.

Attention has an order by positions (ops/attention/order.py), counted from a sequence's first key. So a mask is read
for what it says: each query sees neighbouring keys, all queries of a sequence from the same first key on (or a window
of the last few), as causal masks, padding on the left, padding on the right and a cache's free end do. Other masks
have no order here.
"""
from __future__ import annotations

import itertools
import threading
import weakref
from typing import NamedTuple

import numpy as np
import torch

from .seen import Seen, neighbours
from .switch import Unsupported

READ: dict[int, Seen] = {}  # what compiled graphs have read, by a number, which they can carry
_NUMBERS, KEPT, _LOCK = itertools.count(1), 16, threading.Lock()


def number_of(mask: torch.Tensor, batch: int, queries: int, keys: int) -> int:
    """Read a mask -> the number under which READ has what it says; 0 for one without an order.

    A CUDA graph may have written to a mask unseen, so its numbers are compared each time.
    """
    try:
        seen = of_mask(mask, batch, queries, keys, mask.device, compare=True)
    except Unsupported:
        return 0  # attention is given the mask too, and refuses it by name
    with _LOCK:
        for number, known in READ.items():
            if known is seen:
                return number
        number = next(_NUMBERS)
        READ[number] = seen
        for old in list(READ)[:-KEPT]:
            del READ[old]
    return number


# what torch 2.10, for one, writes for False in a boolean mask before it calls cuDNN; rounded, in bfloat16, to -65536
FOR_CUDNN = -65504.0
COPIED = 1 << 22  # numbers of a mask that is kept, to be compared with the next ones
LAST = 4  # masks that are kept: a forward may have one of all keys and one of a window, in turn
_LAST: list[_Last] = []


class _Last(NamedTuple):
    """A mask that was read: layers share it, or each gets one like it."""

    mask: weakref.ref
    version: int | None
    copy: torch.Tensor | None
    sizes: tuple
    seen: Seen

    def may_be(self, mask: torch.Tensor) -> bool:
        """Whether its numbers can be compared with a mask's."""
        kinds = [(t.dtype, t.device, t.layout, t.shape) for t in (self.copy, mask) if t is not None]
        return len(kinds) == 2 and kinds[0] == kinds[1]


def _alike(known: list[_Last], mask: torch.Tensor) -> list[_Last]:
    """Those that have a mask's numbers: one wait for the GPU, where reading a mask takes several."""
    some = [last for last in known if last.may_be(mask)]
    same = torch.stack([(last.copy == mask).all() for last in some]).tolist() if some else []
    return [last for last, is_same in zip(some, same, strict=True) if is_same]


def of_mask(mask: torch.Tensor, batch: int, queries: int, keys: int, device: torch.device,
            compare: bool = False) -> Seen:
    """What a mask says. Raises Unsupported for one that is not of the kind above.

    On a GPU the same tensor is not read again unless PyTorch knows that it was written to, or `compare` is set: what a
    captured graph or a kernel of one's own writes there is not seen.
    """
    version = None if mask.is_inference() else mask._version
    sizes = batch, queries, keys, device
    known = [last for last in tuple(_LAST) if last.sizes == sizes]
    if mask.is_cuda and not compare and version is not None:
        for last in known:
            if last.mask() is mask and last.version == version:
                return last.seen
    for last in _alike(known, mask):  # PyTorch makes each layer a mask of its own, of the one that it was given
        return _keep(last._replace(mask=weakref.ref(mask), version=version), last)
    copy = mask.detach().clone() if mask.numel() <= COPIED else None
    seen = _read(mask if copy is None else copy, *sizes)  # the copy, or another thread could write in between
    return _keep(_Last(weakref.ref(mask), version, copy, sizes, seen))


def _keep(last: _Last, before: _Last | None = None) -> Seen:
    """Put a mask first, in the place of what it was `before`: the next layer that is given it need not compare it."""
    _LAST[:] = [last, *(other for other in _LAST if other is not before)][:LAST]
    return last.seen


def _read(mask, batch, queries, keys, device) -> Seen:
    if mask.layout != torch.strided or mask.dim() < 2:
        raise Unsupported(f"has an order for masks of two dimensions and more, and attn_mask has {mask.dim()}")
    shown = _shown(mask)
    try:
        while shown.dim() < 4:
            shown = shown[None]
        if shown.shape[1] > 1 and not (shown == shown[:, :1]).all():
            raise Unsupported("has an order for masks that are the same for all heads, and attn_mask is not")
        numbers = _counted(shown[:, 0].expand(-1, -1, keys)).expand(3, batch, queries)
    except RuntimeError:
        raise Unsupported(f"has an order for masks that fit ({batch}, heads, {queries}, {keys}), and attn_mask has "
                          f"shape {tuple(mask.shape)}") from None
    return _sequences(*numbers.cpu().numpy(), keys, device)


def _counted(table: torch.Tensor) -> torch.Tensor:
    """(B, Q, K) of switches -> (3, B, Q): how many keys each query sees, its first one, and the one behind its last."""
    if not table.shape[2]:
        return torch.zeros((3, *table.shape[:2]), dtype=torch.int64, device=table.device)
    ones = table.to(torch.uint8)
    return torch.stack((ones.sum(2), ones.argmax(2), table.shape[2] - ones.flip(2).argmax(2)))


def _shown(mask) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    shown = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if mask.dtype in (torch.bfloat16, torch.float16):  # cuDNN takes no others
        hidden |= mask == torch.tensor(FOR_CUDNN, dtype=mask.dtype, device="cpu").item()
    other = (~(shown | hidden)).nonzero()
    if len(other):
        place = tuple(other[0].tolist())
        raise Unsupported("has an order for masks that show or hide keys, and attn_mask is dense: it adds other "
                          f"numbers, such as {mask[place].item():g} at {list(place)}")
    return shown


def _sequences(count: np.ndarray, first: np.ndarray, last: np.ndarray, keys: int, device) -> Seen:
    batch, queries = count.shape
    end = first + count
    some = count > 0
    gaps = some & (last != end)
    start = np.where(some, first, keys).min(1, initial=keys, keepdims=True)
    window = 0 if (first == start)[some].all() else int(count.max(initial=0))
    if gaps.any() or window and (first != np.maximum(start, end - window))[some].any():
        raise Unsupported("has an order for masks in which each query sees neighbouring keys up to one place, and "
                          "attn_mask is dense in another way")
    runs = [(b, place, length, int(end[b, place + length - 1] - start[b, 0]))
            for b, place, length in neighbours(some, np.diff(end, axis=1, prepend=0) == 1)]
    return Seen(batch, queries, keys, device, tuple(0 if s == keys else s for s in start[:, 0].tolist()), tuple(runs),
                window)
