"""Processes that are stopped and go on."""

import time

import psutil


def until_stopped(pid: int, within: float = 30) -> None:
    """Wait until a SIGSTOP has taken hold of each of a process's threads."""
    deadline = time.monotonic() + within
    while not _is_stopped(pid):
        assert time.monotonic() < deadline, f"{pid} does not stop"
        time.sleep(0.002)


def _is_stopped(pid: int) -> bool:
    try:
        return all(
            psutil.Process(thread.id).status() == psutil.STATUS_STOPPED
            for thread in psutil.Process(pid).threads()
        )
    except psutil.NoSuchProcess:
        return True
