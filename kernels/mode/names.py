"""Names of ops: those of RULES, and those by which a reader called them."""
from __future__ import annotations

from functools import cache

import torch

_PUBLIC = {"_softmax": "softmax", "_log_softmax": "log_softmax", "_fused_rms_norm": "rms_norm",
           "native_layer_norm": "layer_norm", "native_dropout": "dropout", "_euclidean_dist": "cdist",
           "_cdist_forward": "cdist", "_cdist_backward": "cdist", "_fft_r2c": "fft", "_fft_c2r": "fft",
           "_fft_c2c": "fft", "_cholesky_solve_helper": "cholesky_solve", "_sparse_addmm": "sparse.addmm",
           "_sparse_sparse_matmul": "sparse.mm", "_sparse_mm_reduce_impl": "sparse.mm", "_sparse_csr_sum": "sparse.sum",
           "_sparse_sum": "sparse.sum", "_sparse_softmax": "sparse.softmax", "rrelu_with_noise": "rrelu",
           "rrelu_with_noise_": "rrelu", "rrelu_with_noise_functional": "rrelu", "normal_functional": "normal_",
           "_sparse_log_softmax": "sparse.log_softmax"}


def space_of(name: str) -> str:
    """The namespace of the op that RULES calls `name`."""
    return name.rpartition("::")[0] or "aten"


def full_name(name: str) -> str:
    """What the dispatcher calls the op that RULES calls `name`."""
    return name if "::" in name else f"aten::{name}"


@cache
def _registered() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def packet_of(name: str):
    """The overloads of the op that RULES calls `name`: 'mm', or 'quantized::linear' of another namespace than ATen's.
    None if this PyTorch has none."""
    return getattr(getattr(torch.ops, space_of(name)), name.rpartition("::")[2].partition(".")[0], None)


def op_of(name: str):
    """The op that RULES calls `name`: 'mm' or 'mm.out'. None if this PyTorch has none."""
    return getattr(packet_of(name), name.partition(".")[2] or "default", None)


def overloads_of(name: str) -> list[str]:
    """`name` and its overloads, as RULES calls them. None, if this PyTorch has no such op."""
    packet = packet_of(name)
    found = [] if packet is None else [name if o == "default" else f"{name}.{o}" for o in packet.overloads()]
    return [each for each in found if full_name(each) in _registered()]  # others are TorchScript's alone


def public(name: str) -> str:
    """The name by which a reader called ATen's op."""
    if name.startswith("_scaled_dot_product") or name == "_safe_softmax":
        return "scaled_dot_product_attention"
    packet, dot, overload = name.partition(".")
    if packet.startswith("_linalg_"):
        packet = packet[1:]
    return _PUBLIC.get(packet, packet) + dot + overload
