"""A TCP proxy whose link a test can slow down, freeze and cut. It runs on the test's loop."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Self


class Proxy:
    """Forwards 127.0.0.1:`port` to `target`.

    Attributes:
        delay_seconds: One way, in both directions, for what passes from now on.
        frozen: While true nothing is forwarded and sockets stay open: a peer that vanished.
        refused: While true new connections are closed at once.
    """

    def __init__(self, target: str, *, port: int = 0) -> None:
        host, _, number = target.rpartition(":")
        self._target = (host, int(number))
        self.port = port
        self.delay_seconds = 0.0
        self.refused = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def frozen(self) -> bool:
        return not self._flowing.is_set()

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        if frozen:
            self._flowing.clear()
        else:
            self._flowing.set()

    def reset(self) -> None:
        """Cut every connection in the middle of whatever it carries."""
        for writer in self._writers:
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.add(writer)
            if self.refused:
                writer.transport.abort()
            else:
                self._spawn(self._serve(reader, writer))

        self._server = await asyncio.start_server(accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self.refused = True  # by what was accepted already, too
        self._server.close()
        while self._tasks:  # a connection that was just being made has others
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.reset()
        await asyncio.sleep(0)  # what was cut is closed at the loop's next turn

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(to_writer)
        for source, sink in ((reader, to_writer), (to_reader, writer)):
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
            self._spawn(self._read(source, queue))
            self._spawn(self._write(sink, queue))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(
        self, source: asyncio.StreamReader, queue: "asyncio.Queue[tuple[float, bytes]]"
    ) -> None:
        data = b"-"
        with suppress(OSError):
            while data:
                data = await source.read(65_536)
                due = asyncio.get_running_loop().time() + self.delay_seconds
                queue.put_nowait((due, data))

    async def _write(
        self, sink: asyncio.StreamWriter, queue: "asyncio.Queue[tuple[float, bytes]]"
    ) -> None:
        with suppress(OSError):
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                await self._flowing.wait()
                if not data:
                    break
                sink.write(data)
                await sink.drain()
        sink.close()
