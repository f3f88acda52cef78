"""Command lines of `peerctx`, in this process and in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

PEERCTX = Path(sys.executable).with_name("peerctx")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def findings(self) -> dict[str, dict[str, str]]:
        return {finding["name"]: finding for finding in self.json}


Run = Callable[..., Outcome]


class Command:
    """A `peerctx` that runs until it is told to end; its output is read from a file."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str]) -> None:
        self._out = folder / f"{arguments[0]}-{time.monotonic_ns()}.out"
        self._err = self._out.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [PEERCTX, *arguments],
                cwd=folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def until(self, text: str, within: float = 60) -> str:
        """Wait until it has said this, and return all that it has said."""
        deadline = time.monotonic() + within
        while text not in (said := self._out.read_text()):
            assert self._process.poll() is None, self._err.read_text()
            assert time.monotonic() < deadline, f"no {text!r}: {said} {self._err.read_text()}"
            time.sleep(0.02)
        return said

    def end(self, number: signal.Signals = signal.SIGTERM, within: float = 60) -> Outcome:
        """Tell it to end, and return what came of it."""
        self._process.send_signal(number)
        code = self._process.wait(within)
        return Outcome(code, self._out.read_text(), self._err.read_text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def environment_of(settings: Any) -> dict[str, str]:
    """Return settings as the variables that a process reads."""
    found = {}
    for part in (settings.kafka, settings):
        for name in type(part).model_fields:
            value = getattr(part, name)
            if name != "kafka" and value is not None:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                found[part.variable_of(name)] = text
    return found
