"""The ways in which a row is computed again: what else is in the call, and which part of a result is the row's."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .state import changed, tensors_in


@dataclass(frozen=True)
class Inputs:
    """A model's arguments, whose tensors hold one row for each element of the batch; others are the same for all.

    length  how many tokens a row has, where an argument is called input_ids; else 0
    """

    arguments: tuple
    named: dict
    batch: int
    length: int

    def rows(self, chosen) -> Inputs:
        """Some rows, in another order or alone."""
        kept = torch.as_tensor(chosen, dtype=torch.int64)
        return self._with(lambda t: t[kept.to(t.device)] if self._per_row(t) else t, batch=len(kept))

    def own(self) -> Inputs:
        """The same numbers in tensors of their own, which a forward may write into."""
        return self._with(torch.clone, self.batch)

    def tokens(self, change: Callable) -> Inputs:
        """Every argument that holds a number for each token, changed by `change(tensor, name)`."""
        named = {name: change(t, name) if self._per_token(t) else t for name, t in self.named.items()}
        return Inputs(self.arguments, named, self.batch, named["input_ids"].shape[1])

    def masks_fit(self) -> bool:
        """Whether an attention_mask, where there is one, has a number for each token."""
        mask = self.named.get("attention_mask")
        return mask is None or self._per_token(mask)

    def _with(self, change, batch) -> Inputs:
        arguments, named = changed((self.arguments, self.named), change)
        return Inputs(arguments, named, batch, self.length)

    def _per_row(self, t: torch.Tensor) -> bool:
        return t.dim() > 0 and t.shape[0] == self.batch

    def _per_token(self, t) -> bool:
        return isinstance(t, torch.Tensor) and t.dim() == 2 and self._per_row(t) and t.shape[1] == self.length


def of(inputs) -> Inputs:
    """A tensor, a tuple or list of arguments, or a dict of them by name. Raises TypeError or ValueError."""
    named = dict(inputs) if hasattr(inputs, "keys") else {}
    arguments = () if named else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    tensors = tensors_in((arguments, named))
    if not tensors:
        raise TypeError("inputs must be a tensor, a tuple or list with one, or a dict of arguments by name, got "
                        f"{type(inputs).__name__}")
    _no_nested({**dict(enumerate(arguments)), **named} if len(arguments) != 1 or named else {"": inputs})
    first = named.get("input_ids", tensors[0])
    if not first.dim() or first.shape[0] < 2:
        raise ValueError("inputs must hold a batch of at least two rows, in the first dimension of the first tensor, "
                         f"got shape {tuple(first.shape)}")
    ids = named.get("input_ids")
    return Inputs(arguments, named, first.shape[0], ids.shape[1] if ids is not None and ids.dim() == 2 else 0)


def _no_nested(arguments: dict) -> None:
    for name, value in arguments.items():
        if any(t.is_nested for t in tensors_in(value)):
            where = f"inputs[{name!r}]" if name != "" else "inputs"
            raise TypeError(f"{where} must be a tensor of one shape for all rows, got a nested tensor: pad it "
                            "(torch.nested.to_padded_tensor)")


@dataclass(frozen=True)
class Way:
    """One comparison. `first` and `again` make the two calls of a row; `says` is what differs between them."""

    says: str
    first: Callable[[Inputs, int], Inputs]
    again: Callable[[Inputs, int], Inputs]
    place: Callable[[Inputs, int], int] = lambda inputs, row: 0  # where the row is in `again`
    prefix: bool = False  # what belongs to tokens behind the row's own is left out
    needs: Callable[[Inputs], str] = lambda inputs: ""  # why it cannot be tried


def _alone(inputs, row):
    return inputs.rows([row])


def _whole(inputs, row):
    return inputs


def _padded(inputs, row, more: int = 5):
    """Behind the row's tokens some that its mask hides."""
    def longer(t, name):
        last = t[:, -1:] + torch.arange(1, more + 1, dtype=t.dtype, device=t.device) if name == "position_ids" \
            else torch.zeros(t.shape[0], more, dtype=t.dtype, device=t.device) if "mask" in name \
            else t[:, -1:].expand(-1, more)
        return torch.cat([t, last], 1)
    return _alone(inputs, row).tokens(longer)


def _shorter(inputs, row):
    return _alone(inputs, row).tokens(lambda t, name: t[:, :1])


def _why_not(inputs: Inputs) -> str:
    """A mask that is longer than the tokens is of a cache too, whose tokens would have to be left out with them."""
    return "" if inputs.masks_fit() else "needs an attention_mask as large as input_ids"


WAYS = {
    "run": Way("the same call a second time", _whole, _whole, lambda inputs, row: row),
    "batch": Way("the row alone, then among the others", _alone, _whole, lambda inputs, row: row),
    "place": Way("the rows in another order", _whole, lambda inputs, row: inputs.rows(
        [*range(1, inputs.batch), 0]), lambda inputs, row: (row - 1) % inputs.batch),
    "padding": Way("more padding behind the row", _alone, _padded, prefix=True, needs=lambda inputs:
                   "needs a dict with input_ids and attention_mask" if not inputs.length or
                   inputs.named.get("attention_mask") is None else _why_not(inputs)),
    "query": Way("one query, then many", _shorter, _alone, prefix=True, needs=lambda inputs:
                 _why_not(inputs) if inputs.length > 1 else
                 "needs a dict with input_ids of at least two tokens a row"),
}


def part(result: torch.Tensor, shape: tuple[int, ...], rows: int, row: int, prefix: bool) -> torch.Tensor | None:
    """The row's part of a result, as large as `shape`; None if the shapes do not say which part that is.

    A dimension holds the rows one after another, `rows` of them; with `prefix`, the row's numbers are the first ones.
    """
    if result.dim() != len(shape):
        return None
    for dim, wanted in enumerate(shape):
        have = result.shape[dim]
        if have == wanted:
            continue
        if prefix and have > wanted:
            result = result.narrow(dim, 0, wanted)
        elif not prefix and have == rows * wanted:
            result = result.narrow(dim, row * wanted, wanted)
        else:
            return None
    return result
