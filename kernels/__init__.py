"""Same Bits: batch-invariant kernels. Each op has three names: `.cuda`, `.python`, `.triton`."""
from . import runtime  # first: without a GPU it chooses Triton's interpreter before Triton is imported
from .matmul import matmul
from .mean import mean, sum
from .op import Op
from .rms_norm import rms_norm
from .softmax import log_softmax, softmax

OPS: dict[str, Op] = {op.name: op for op in (rms_norm, softmax, log_softmax, sum, mean, matmul)}

# without `sum`: import * must not hide Python's own
__all__ = ["OPS", "Op", "log_softmax", "matmul", "mean", "rms_norm", "runtime", "softmax"]
