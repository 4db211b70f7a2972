"""What of a call decides its kernels' code and numbers: shapes, strides, pages; not how long its sequences are."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from .order import scale_of


@dataclass(frozen=True)
class Form:
    """q (T, heads, width), k and v with kv_heads heads.

    strides  of q (token, head), of k and of v (row of the cache or page, key, head), in elements
    page     keys a page, 0 without pages; table: pages a sequence has in the table
    adder    in Triton's interpreter, whose product has NumPy's order: the dtype to add as, else ""
    """

    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    strides: tuple[int, ...]
    page: int
    table: int
    window: int
    lse: bool
    adder: str = ""

    @classmethod
    def of(cls, q, k, v, sequences, window: int, lse: bool, adder: str = "") -> Form:
        """The form of a call's readable arguments."""
        return cls(q.shape[1], k.shape[2], q.shape[2], q.dtype, (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
                   sequences.page_size or 0, 0 if sequences.table is None else sequences.table.shape[1], window, lse,
                   adder)

    @property
    def group(self) -> int:
        """Heads of q that share one of k."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        """Columns of a tile: those beyond the width are 0."""
        return 64 if self.width <= 64 else 128

    @property
    def inputs(self) -> dict[str, torch.dtype]:
        """The pointers that every kernel of keys reads."""
        return {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), self.dtype), "pages_ptr": torch.int32,
                "work_ptr": torch.int32}

    @property
    def outputs(self) -> dict[str, torch.dtype]:
        return {"o_ptr": self.dtype, "lse_ptr": torch.float32}

    @property
    def scalars(self) -> dict[str, int | float]:
        """Their run-time numbers."""
        names = ("q_token", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")
        return {**dict(zip(names, self.strides, strict=True)), "table_width": self.table, "window": self.window,
                "scale": scale_of(self.width)}

    @property
    def constants(self) -> dict[str, int | bool | str]:
        """What their code is compiled for."""
        return {"HEADS": self.heads, "GROUP": self.group, "D": self.width, "WIDTH": self.columns, "PAGE": self.page,
                "WINDOW": self.window > 0, "ADDER": self.adder}
