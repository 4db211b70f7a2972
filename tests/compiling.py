"""Compiling ahead of time in a test: beside other tests a second process gains nothing, and takes long to start."""
import os
from functools import partial

from kernels.lab.proofs import generated_code

compile_ahead = partial(generated_code.compile_ahead, workers=1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
