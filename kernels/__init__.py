"""Same Bits: batch-invariant kernels. Each op has three names: `.cuda`, `.python`, `.triton`."""
from . import runtime  # first: without a GPU it chooses Triton's interpreter before Triton is imported
from .op import Op
from .rms_norm import rms_norm

OPS: dict[str, Op] = {op.name: op for op in (rms_norm,)}

__all__ = ["OPS", "Op", "rms_norm", "runtime"]
