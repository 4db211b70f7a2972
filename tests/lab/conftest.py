"""What the tests of several widgets share."""
import time

import pytest


@pytest.fixture
def seconds_to_stop():
    """From a click on Stop until the widget says that it has stopped; it draws a last time after that."""
    def seconds(widget) -> float:
        said = []
        widget.status.observe(lambda change: "stopped after" in change["new"] and said.append(time.monotonic()),
                              "value")
        start = time.monotonic()
        widget.stop_button.click()
        widget.join(20)
        return said[0] - start
    return seconds
