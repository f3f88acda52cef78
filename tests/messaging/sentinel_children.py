"""What the tests of the sentinel start: short directories, and processes that register."""

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "registering_child.py"


@contextmanager
def short_directory() -> Iterator[Path]:
    """A socket's name is short; pytest's own directories are not."""
    folder = tempfile.mkdtemp(prefix="pcx-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def until(true: Callable[[], Any], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


class Child:
    """One registered process; `answer` is what the sentinel said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.answer: dict[str, Any] = {}

    async def hear(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await self.process.stdout.readline()).decode().strip()

    async def do(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        await self.process.stdin.drain()

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def registered(
    socket: Path, process_id: str, incarnation: str = "life-1", **about: Any
) -> AsyncIterator[Child]:
    """A process that has registered; it is killed at the end, if it still lives."""
    told = {"socket": str(socket), "process_id": process_id, "incarnation": incarnation, **about}
    child = Child(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(CHILD), json.dumps(told)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
    )
    try:
        child.answer = json.loads(await child.hear() or "{}")
        yield child
    finally:
        await child.end()
