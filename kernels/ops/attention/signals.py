"""How programs of one launch wait for each other: counters in memory, which they leave at zero.

A program waits only for programs of lower numbers. A GPU starts those first, so what it waits for runs or has ended,
however few programs fit at a time.
"""
from __future__ import annotations

from ...runtime import device_function, tl


@device_function
def signal(counter_ptr):
    """Count this program as one whose numbers are stored."""
    tl.debug_barrier()  # every thread's numbers are stored before one thread says so
    tl.atomic_add(counter_ptr, 1, sem="release")


@device_function
def wait_for(counter_ptr, programs, readers):
    """Wait until so many programs have signalled; the last of the readers leaves the counter at zero.

    What they stored must be loaded from L2 (.cg): L1 may hold what was there before.
    """
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < programs:
        pass
    if tl.atomic_add(counter_ptr, 1, sem="relaxed") == programs + readers - 1:
        tl.store(counter_ptr, 0)


@device_function
def is_last(counter_ptr, programs):
    """Whether all other programs have stored their numbers before this one; the last one leaves the counter at zero."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
