"""Compiles backward passes for GPUs that need not be here: [pass, target] pairs as JSON from stdin, code to stdout."""
import json
import sys

import torch
from triton.runtime import driver

from kernels.lab.proofs.generated_code import Absent, bare_ptx
from kernels.training.attention import attention_backward
from kernels.training.cross_entropy import cross_entropy_backward
from kernels.training.rms_norm import rms_norm_backward
from kernels.training.swiglu import swiglu_backward


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def long_row(width, dtype=torch.bfloat16):
    return meta(32, width, dtype=dtype), meta(width, dtype=dtype), meta(32, width, dtype=dtype)


Q, KV, LSE = meta(2048, 8, 64), meta(2048, 2, 64), meta(2048, 8, dtype=torch.float32)
WIDE, WIDE_KV = meta(2048, 4, 128), meta(2048, 4, 128)
CASES = {
    "attention": (attention_backward, (Q, KV, KV, Q, LSE, Q, 1024)),
    "attention of 128": (attention_backward, (WIDE, WIDE_KV, WIDE_KV, WIDE, LSE[:, :4], WIDE, 1024)),
    "rms_norm": (rms_norm_backward, (*long_row(256), meta(32, 256), 1e-5)),
    "rms_norm of 5000": (rms_norm_backward, (*long_row(5000, torch.float32), None, 1e-5)),
    "swiglu": (swiglu_backward, (meta(32, 2048), meta(32, 1024))),
    "cross_entropy": (cross_entropy_backward, (meta(32, 256, dtype=torch.float32), meta(32, dtype=torch.int64),
                                               meta(dtype=torch.float32)))}


def compiled(name, target):
    """Of each launch: PTX, bytes of shared memory, and warps."""
    driver.set_active(Absent(target))
    (each, arguments), found = CASES[name], []
    for step in each.call.launches(each.call.schedule(*arguments), *arguments):
        given = (*step.examples("cpu"), *step.arguments(target >= 90))
        kernel = step.kernel.warmup(*given, grid=(1,), **step.compile_options(target >= 90))
        found.append([bare_ptx(kernel.asm["ptx"]), kernel.metadata.shared, step.options["num_warps"]])
    return found


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr
    json.dump([compiled(*job) for job in json.load(sys.stdin)], out)
