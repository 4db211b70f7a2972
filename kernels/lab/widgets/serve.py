"""The far side of process.py: runs one function at a time and reports what it finds.

    python -m kernels.lab.widgets.serve

Messages come pickled on standard input, reports leave pickled on standard output; what a function prints goes to
standard error. The process ends when its input does, so that it cannot outlive the kernel that started it.
"""
from __future__ import annotations

import contextlib
import os
import pickle
import queue
import sys
import threading

import torch

from .jobs import in_a_line

DRAWN_WITHIN = 1.0  # seconds to wait for rows to be drawn: a reader's busy kernel must not hold up a measurement


class Server:
    """Jobs from `inbox`, reports to `outbox`; `stop` is set once the job that runs is to end."""

    def __init__(self, inbox, outbox):
        self._inbox, self._outbox = inbox, outbox
        self._jobs, self.stop = queue.SimpleQueue(), threading.Event()
        self._answer, self._unanswered = threading.Condition(), 0  # rows sent that nobody has said to be shown

    def listen(self):
        """Take messages until there are no more, then end the process, whatever it is doing."""
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                what, value = pickle.load(self._inbox)
                self.hear(what, value)
        os._exit(0)

    def hear(self, what, value=None):
        """Act on one message: "job" with what is to run, "stop", or "shown" for the oldest rows not answered yet."""
        with self._answer:
            if what == "job":
                self._unanswered = 0
                self.stop.clear()
                self._jobs.put(value)
            elif what == "stop":
                self.stop.set()
            elif what == "shown":
                self._unanswered -= 1
            self._answer.notify()

    def serve(self):
        """Do one job after the other."""
        threading.Thread(target=self.listen, name="listen", daemon=True).start()
        self.report("started")
        while True:
            self._do(self._jobs.get())

    def report(self, what, value=None):
        """Send a report, and wait until its rows are drawn, so that drawing does not disturb a timing."""
        with self._answer:
            self._unanswered += what == "rows"
        pickle.dump((what, value), self._outbox)
        self._outbox.flush()
        if what == "rows":
            with self._answer:
                self._answer.wait_for(lambda: self.stop.is_set() or self._unanswered <= 0, DRAWN_WITHIN)

    def _do(self, job: bytes):
        try:
            function, arguments, threads, gpu = pickle.loads(job)
            torch.set_num_threads(threads)
            if gpu is not None:
                torch.cuda.set_device(gpu)
            function(self.report, self.stop, *arguments)
        except Exception as error:  # noqa: BLE001 - shown in the widget, where the reader looks
            self.report("failed", in_a_line(error))
        self.report("ended")


def _first_to_go():
    """Where memory runs out, Linux is to end this process and not the kernel with the reader's work."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _pipes():
    """Standard input and output for messages alone: what reads or prints finds nothing, or standard error."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return inbox, outbox


if __name__ == "__main__":
    _first_to_go()
    sys.exit(Server(*_pipes()).serve())
