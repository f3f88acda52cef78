"""The threads of the process's background runtime."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from langgraph_peerctx import background

OURS = ("peerctx-runtime", "peerctx-background")


def running_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in OURS]


@contextmanager
def no_runtime_left() -> Iterator[None]:
    """Begin and end without a runtime: its threads would go on in the next tests."""
    assert background.settings_in_use() is None
    yield
    background.stop_kept_runtime()
    deadline = time.monotonic() + 20
    while running_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert background.settings_in_use() is None
    assert running_threads() == []
