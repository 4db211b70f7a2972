"""Who measures for a widget waits until its rows are drawn, and for no other rows: the process and the thread."""
import io
import threading
import time

import pytest

from kernels.lab.widgets import base, serve


@pytest.fixture
def server():
    return serve.Server(io.BytesIO(), io.BytesIO())


def reporting_rows(server) -> threading.Thread:
    thread = threading.Thread(target=server.report, args=("rows", [1]), daemon=True)
    thread.start()
    return thread


def ends(thread: threading.Thread, seconds: float = 10) -> bool:
    thread.join(seconds)
    return not thread.is_alive()


def test_rows_wait_for_their_own_answer(server, monkeypatch):
    monkeypatch.setattr(serve, "DRAWN_WITHIN", 0.0)
    server.report("rows", [0])  # nobody answers in time
    monkeypatch.setattr(serve, "DRAWN_WITHIN", 60.0)
    thread = reporting_rows(server)
    server.hear("shown")  # the late answer
    assert not ends(thread, 0.2)
    server.hear("shown")
    assert ends(thread)


def test_a_stop_ends_the_wait(server, monkeypatch):
    monkeypatch.setattr(serve, "DRAWN_WITHIN", 60.0)
    thread = reporting_rows(server)
    server.hear("stop")
    assert ends(thread)


def test_a_job_begins_without_answers_owed(server, monkeypatch):
    monkeypatch.setattr(serve, "DRAWN_WITHIN", 0.0)
    server.report("rows", [0])
    server.hear("job", b"")
    monkeypatch.setattr(serve, "DRAWN_WITHIN", 60.0)
    thread = reporting_rows(server)
    server.hear("shown")
    assert ends(thread)


def test_other_reports_do_not_wait(server, monkeypatch):
    monkeypatch.setattr(serve, "DRAWN_WITHIN", 60.0)
    thread = threading.Thread(target=server.report, args=("doing", "a product"), daemon=True)
    thread.start()
    assert ends(thread)


class Listed(base.Measuring):
    """A widget that lists what it was given."""

    def __init__(self):
        super().__init__()
        self.drawn, self.given, self.meanwhile = [], [], lambda: None

    def _on_started(self, _):
        self.meanwhile()

    def _on_rows(self, rows):
        self.given += rows

    def _draw(self):
        self.drawn = list(self.given)


def test_rows_reported_while_others_are_shown_wait_for_their_own(monkeypatch):
    monkeypatch.setattr(base, "SHOWN_SECONDS", 60.0)
    widget = Listed()
    worker = threading.Thread(target=widget._report, args=("rows", [1]), daemon=True)

    def report_more():
        worker.start()
        while widget._queue.empty():
            time.sleep(0.001)

    widget.meanwhile = report_more
    widget._report("started")
    widget._take()
    assert not ends(worker, 0.2) and widget.drawn == []
    widget._take()
    assert ends(worker) and widget.drawn == [1]


def test_a_stop_ends_the_threads_wait(monkeypatch):
    monkeypatch.setattr(base, "SHOWN_SECONDS", 60.0)
    widget = Listed()
    worker = threading.Thread(target=widget._report, args=("rows", [1]), daemon=True)
    worker.start()
    widget.stop()
    assert ends(worker) and widget.drawn == []
