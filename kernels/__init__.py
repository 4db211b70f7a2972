"""Same Bits: batch-invariant kernels. Each op has three names: `.cuda`, `.python`, `.triton`."""
from . import bits, runtime  # runtime chooses Triton's interpreter where there is no GPU, before Triton is imported
from .arithmetic import elementary, sums, tensor_core
from .mode import batch_invariant
from .op import Op
from .ops.attention.op import attention_chunk, attention_decode, attention_prefill
from .ops.matmul.op import matmul
from .ops.matmul.tuning import tuning, warm
from .ops.mean import mean, sum
from .ops.rms_norm import rms_norm
from .ops.rotary import rotary
from .ops.softmax import log_softmax, softmax
from .ops.swiglu import swiglu

OPS: dict[str, Op] = {op.name: op for op in (rms_norm, softmax, log_softmax, sum, mean, matmul,
                                           rotary, swiglu, attention_decode, attention_prefill, attention_chunk)}

# without `sum`: import * must not hide Python's own
__all__ = ["OPS", "Op", "attention_chunk", "attention_decode", "attention_prefill", "batch_invariant", "bits",
           "elementary", "log_softmax", "matmul", "mean", "rms_norm", "rotary", "runtime", "softmax", "sums", "swiglu",
           "tensor_core", "tuning", "warm"]
