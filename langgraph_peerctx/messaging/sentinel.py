"""The sentinel: one a host and cluster; it publishes a death when it happens.

A process passes a descriptor that becomes readable when it ends: its pidfd, or where there is none
the end of a pipe. Only that descriptor tells of a death, never a connection that closes; and a
process that says that it leaves is forgotten. A notice is a hint, not a verdict: it lets a lease be
taken at once, and should it be false, the fence makes that harmless.

All reading is done in the loop's callbacks, without a task for each connection, so that a last word
that has arrived is always read before the death that came with it.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    PeerContextError,
    SentinelRunningError,
)
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.presence import Presence
from langgraph_peerctx.messaging.producer import publish
from langgraph_peerctx.messaging.sentinel_place import (
    HANDSHAKE_SECONDS,
    LINE_LIMIT_BYTES,
    Answer,
    Leaving,
    Peer,
    Registration,
    line_of,
    peer_of,
    place_of,
    take_lock,
)
from langgraph_peerctx.messaging.topics import topics_for
from langgraph_peerctx.messaging.transport import Transport
from langgraph_peerctx.protocol.messages import DeathNotice

_logger = logging.getLogger(__name__)

MAX_CLIENTS = 10_000
ANNOUNCE_SECONDS = 60.0
"""How long a notice is tried: later, heartbeats and leases have told everybody."""
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 2.0
TOPIC_RETRY_SECONDS = 5.0
LAST_WORD_SECONDS = 1.0
"""How long notices that are under way may delay our own end."""
PLACE_SECONDS = 30.0
"""How often we see that our socket is still where it was."""
FULL_PAUSE_SECONDS = 1.0
"""How long nobody is let in when the system has no descriptors left."""
_MAX_DESCRIPTORS = 4
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


@dataclass(slots=True, kw_only=True, eq=False)
class _Watch:
    """One process that would be seen to die; owns the descriptor."""

    registration: Registration
    descriptor: int
    pid: int | None
    client: "_Client"

    @property
    def key(self) -> tuple[str, str]:
        return self.registration.process_id, self.registration.incarnation

    def has_ended(self) -> bool:
        """Tell whether the readable descriptor means the end: a pipe may hold bytes."""
        if self.registration.kind == "pidfd":
            return True
        try:
            return os.read(self.descriptor, LINE_LIMIT_BYTES) == b""
        except BlockingIOError:
            return False


class _Client:
    """One connection, from the handshake to its end; owns the socket."""

    def __init__(self, sentinel: "Sentinel", connection: socket.socket, peer: Peer) -> None:
        self._sentinel = sentinel
        self._connection = connection
        self.peer = peer
        self._received = b""
        self._descriptors: list[int] = []
        self._watch: _Watch | None = None
        self._is_closed = False
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HANDSHAKE_SECONDS, self.refuse, "too slow")
        self._loop = loop
        loop.add_reader(connection, self.read)

    def read(self) -> None:
        """Take what has arrived; never waits."""
        if self._is_closed:
            return
        try:
            data = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._received += data
        if len(self._descriptors) > 1:  # before they are many
            self.refuse("not one descriptor")
        while not self._is_closed and b"\n" in self._received[:LINE_LIMIT_BYTES]:
            line, _, self._received = self._received.partition(b"\n")
            self._take(line)
        if len(self._received) >= LINE_LIMIT_BYTES and not self._is_closed:
            self.refuse("too long")

    def refuse(self, why: str) -> None:
        """Say why, and close; who is watched already stays watched."""
        if not self._is_closed:
            self._sentinel.counters[f"refused.{why}"] += 1
            _logger.info("a client with pid %s is refused: %s", self.peer.pid, why)
            self._say(Answer(refused=why))
            self.close()

    def close(self) -> None:
        """Close the connection, which says nothing of the process. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._deadline.cancel()
        self._loop.remove_reader(self._connection)
        self._connection.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._sentinel.gone(self)

    def _receive(self) -> bytes:
        if self._watch is not None:  # the kernel closes whatever descriptor comes with it
            return self._connection.recv(LINE_LIMIT_BYTES)
        data, descriptors, _, _ = socket.recv_fds(
            self._connection, LINE_LIMIT_BYTES, _MAX_DESCRIPTORS, _CLOSE_ON_EXEC
        )
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - positional only
        self._descriptors += descriptors
        return data

    def _take(self, line: bytes) -> None:
        if self._watch is not None:
            self._take_leave(line, self._watch)
            return
        try:
            registration = Registration.model_validate_json(line)
        except ValidationError:
            self.refuse("no registration")
            return
        fault = self._fault(registration) or self._sentinel.fault_of(registration, self.peer)
        if fault:
            self.refuse(fault)
            return
        self._deadline.cancel()
        self._watch = _Watch(
            registration=registration,
            descriptor=self._descriptors.pop(),
            pid=self.peer.pid,
            client=self,
        )
        self._sentinel.watch(self._watch)
        self._say(Answer(sentinel_id=self._sentinel.sentinel_id))

    def _take_leave(self, line: bytes, watch: _Watch) -> None:
        try:
            Leaving.model_validate_json(line)
        except ValidationError:
            self.refuse("no last word")
            return
        self._sentinel.forget(watch)
        self.close()  # which tells that we have heard it

    def _fault(self, registration: Registration) -> str | None:
        """Say what is wrong with the descriptor: nobody may register anybody else."""
        if len(self._descriptors) != 1:
            return "not one descriptor"
        if registration.kind == "pipe":
            is_pipe = stat.S_ISFIFO(os.fstat(self._descriptors[0]).st_mode)
            return None if is_pipe else "no pipe"
        if self.peer.pid == 0:
            return "another PID namespace: the sentinel must run in the host's"
        if process_of(self._descriptors[0]) != self.peer.pid:
            return "not its own pidfd"
        return None

    def _say(self, answer: Answer) -> None:
        # Who is gone may have said more before: that is still read, and then the end.
        with contextlib.suppress(OSError):
            self._connection.send(line_of(answer))


def process_of(descriptor: int) -> int | None:
    """Return the process id behind a pidfd, as we number it; None if it is no pidfd."""
    try:
        told = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    except OSError:
        return None
    for line in told.splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value)
    return None


class Sentinel:
    """Watches this host's processes; an async context manager that serves from when it is entered.

    Args:
        settings: Cluster, presence topic and directory. Mock mode is never entered: a sentinel
            whose broker is away waits for it.
        idle_seconds: End so long after the last client has gone, in seconds; None: never.
        transport: A started transport to borrow; by default one of its own, closed with it.
        max_clients: How many connections, and how many processes, at once.
        announce_seconds: How long a notice is tried, in seconds.

    Attributes:
        counters: What happened: `registered`, `left`, `died`, `announced`, `lost`, `refused.*`.
    """

    def __init__(
        self,
        settings: PeerContextSettings,
        *,
        idle_seconds: float | None = None,
        transport: Transport | None = None,
        max_clients: int = MAX_CLIENTS,
        announce_seconds: float = ANNOUNCE_SECONDS,
    ) -> None:
        self._place = place_of(settings)
        self.sentinel_id: str = self._place.sentinel_id
        self._settings = settings.model_copy(
            update={"process_id": self.sentinel_id, "mock_mode": "never"}
        )
        if settings.mock_mode == "always":
            raise ConfigurationError(
                "PEER_CONTEXT_MOCK_MODE=always: a sentinel needs a broker that hears it"
            )
        self._idle_seconds = idle_seconds
        self._borrowed = transport
        self._max_clients = max_clients
        self._announce_seconds = announce_seconds
        self.counters: Counter[str] = Counter()
        self._clients: set[_Client] = set()
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._announcing: set[asyncio.Task[None]] = set()
        self._idle: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self._is_closing = False
        self._fault: ConfigurationError | None = None
        self._speaks = asyncio.Event()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Begin to serve; waits for no broker.

        Raises:
            SentinelRunningError: If another one serves this host and cluster.
            ConfigurationError: If the directory is not ours alone.
        """
        self._loop = asyncio.get_running_loop()
        self._place.prepare()
        async with AsyncExitStack() as stack:
            self._take_place(stack)
            self._transport = self._borrowed or create_transport(self._settings)
            if self._borrowed is None:
                stack.push_async_callback(self._transport.close)
            self._presence = Presence(self._transport, self._settings, new_id(), listens=False)
            stack.push_async_callback(self._presence.close)
            tasks = [
                asyncio.create_task(self._speak(), name="peerctx-sentinel-speak"),
                asyncio.create_task(self._keep_place(), name="peerctx-sentinel-place"),
            ]
            stack.push_async_callback(_end, tasks)
            stack.push_async_callback(self._let_notices_go)
            stack.callback(self._let_everybody_go)
            self._listen(stack)
            self._stack = stack.pop_all()
        self._see_whether_idle()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_closing = True
        self._see_whether_idle()
        await self._stack.aclose()

    async def run(self) -> None:
        """Serve until `stop`, or until idle for long enough.

        Raises:
            ConfigurationError: If the broker refuses the credentials.
        """
        await self._ended.wait()
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        """Let `run` return."""
        self._ended.set()

    def fault_of(self, registration: Registration, peer: Peer) -> str | None:
        """Say why a process is not taken, or None."""
        known = self._watches.get((registration.process_id, registration.incarnation))
        if known is not None:
            return None if known.pid == peer.pid else "somebody else is known by this name"
        if len(self._watches) + len(self._announcing) >= self._max_clients:
            return "too many processes"
        return None

    def watch(self, watch: _Watch) -> None:
        """See from now on when it ends; takes over its descriptor."""
        if known := self._watches.get(watch.key):
            self._drop(known)
        self._watches[watch.key] = watch
        self.counters["registered"] += 1
        os.set_blocking(watch.descriptor, False)
        self._loop.add_reader(watch.descriptor, self._ended_or_not, watch)

    def forget(self, watch: _Watch) -> None:
        """Watch no longer: it leaves."""
        if self._watches.get(watch.key) is watch:
            self.counters["left"] += 1
            self._drop(watch)

    def gone(self, client: _Client) -> None:
        """Take note that a connection is closed."""
        self._clients.discard(client)
        self._see_whether_idle()

    def _drop(self, watch: _Watch) -> None:
        del self._watches[watch.key]
        self._loop.remove_reader(watch.descriptor)
        os.close(watch.descriptor)
        watch.client.close()
        self._see_whether_idle()

    def _ended_or_not(self, watch: _Watch) -> None:
        """Announce a death, unless the last word that came before it says otherwise."""
        if not watch.has_ended():
            return
        watch.client.read()
        if self._watches.get(watch.key) is not watch:
            return
        self.counters["died"] += 1
        name = f"peerctx-notice-{watch.registration.process_id}"
        announcing = asyncio.create_task(self._announce(watch.registration), name=name)
        self._announcing.add(announcing)
        announcing.add_done_callback(self._announced)
        self._drop(watch)

    def _announced(self, announcing: asyncio.Task[None]) -> None:
        self._announcing.discard(announcing)
        self._see_whether_idle()

    async def _announce(self, dead: Registration) -> None:
        """Publish a notice; tried again while the broker is away, but not for ever."""
        died_at = datetime.now(UTC)
        outcome = "lost"
        try:
            async with asyncio.timeout(self._announce_seconds):
                await self._speaks.wait()
                await self._until_published(dead, died_at)
            outcome = "announced"
            _logger.info("%s has died: everybody is told", dead.process_id)
        except TimeoutError:
            _logger.warning(
                "%s has died, and nobody could be told within %g s: its silence must tell",
                dead.process_id,
                self._announce_seconds,
            )
        finally:
            self.counters[outcome] += 1

    async def _until_published(self, dead: Registration, died_at: datetime) -> None:
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                await publish(
                    self._transport,
                    self._settings.kafka.presence_topic,
                    DeathNotice(
                        sent_at=datetime.now(UTC),
                        process_id=dead.process_id,
                        incarnation=dead.incarnation,
                        sentinel_id=self.sentinel_id,
                        died_at=died_at,
                    ),
                    max_bytes=self._settings.max_message_bytes,
                )
            except PeerContextError as error:
                _logger.info("the death of %s is not told yet: %s", dead.process_id, error)
            else:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    async def _speak(self) -> None:
        """Connect, beat, and see to the topic; the broker may be away for as long as it likes."""
        try:
            if self._borrowed is None:
                await self._transport.start()
        except BrokerUnavailableError as error:  # each sending looks for it again
            _logger.warning("nobody hears of deaths yet: %s", error)
        except ConfigurationError as error:
            self._fault = error
            self.stop()
            return
        await self._presence.start()
        self._speaks.set()
        topics = topics_for(
            self._settings.kafka, max_message_bytes=self._settings.max_message_bytes
        )
        presence = [t for t in topics if t.name == self._settings.kafka.presence_topic]
        while True:
            try:
                await self._transport.ensure_topics(presence)
            except PeerContextError as error:
                _logger.info("the presence topic is not ready: %s", error)
            else:
                return
            await asyncio.sleep(TOPIC_RETRY_SECONDS)

    def _take_place(self, stack: AsyncExitStack) -> None:
        lock = take_lock(self._place.lock)
        if lock is None:
            raise SentinelRunningError(
                f"a sentinel for {self._settings.kafka.bootstrap_servers} runs on this host "
                f"already: it holds {self._place.lock}"
            )
        stack.callback(os.close, lock)
        if not _is_at(os.fstat(lock), self._place.lock):  # taken away while we took it
            raise ConfigurationError(f"{self._place.lock} vanished: something cleans its directory")

    def _listen(self, stack: AsyncExitStack) -> None:
        path = self._place.socket
        path.unlink(missing_ok=True)  # whoever listened there no longer holds the lock
        self._listener = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # closed by the stack
        )
        self._listener.settimeout(0)
        self._listener.bind(str(path))
        self._bound = path.stat()
        stack.callback(self._unbind)
        self._listener.listen(1_024)
        self._loop.add_reader(self._listener, self._accept)
        stack.callback(self._loop.remove_reader, self._listener)

    def _unbind(self) -> None:
        if _is_at(self._bound, self._place.socket):
            self._place.socket.unlink()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            _logger.warning("nobody more is let in for a moment: %s", error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(FULL_PAUSE_SECONDS, self._accept_again)
            return
        connection.settimeout(0)
        client = _Client(self, connection, peer_of(connection))
        self._clients.add(client)
        self._see_whether_idle()
        if client.peer.is_foreign:
            client.refuse("another user")
        elif len(self._clients) > self._max_clients:
            client.refuse("too many clients")

    def _accept_again(self) -> None:
        if not self._is_closing:
            self._loop.add_reader(self._listener, self._accept)

    async def _keep_place(self) -> None:
        """End when our socket is no longer found; and keep it young, or cleaners take it away."""
        while _is_at(self._bound, self._place.socket):
            with contextlib.suppress(OSError):
                os.utime(self._place.lock)
                os.utime(self._place.socket)
            await asyncio.sleep(PLACE_SECONDS)
        _logger.warning("%s was taken away: nobody finds us, we end", self._place.socket)
        self.stop()

    def _see_whether_idle(self) -> None:
        if self._idle_seconds is None:
            return
        is_busy = bool(self._clients or self._watches or self._announcing) or self._is_closing
        if is_busy and self._idle is not None:
            self._idle.cancel()
            self._idle = None
        elif not is_busy and self._idle is None:
            self._idle = self._loop.call_later(self._idle_seconds, self.stop)

    def _let_everybody_go(self) -> None:
        for watch in list(self._watches.values()):
            self._drop(watch)
        for client in list(self._clients):
            client.close()

    async def _let_notices_go(self) -> None:
        """Give what is under way a moment: afterwards silence must tell."""
        if self._announcing:
            await asyncio.wait(self._announcing, timeout=LAST_WORD_SECONDS)
        await _end(list(self._announcing))


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_at(found: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(found, path.lstat())
    except OSError:
        return False


async def serve(settings: PeerContextSettings, *, idle_seconds: float | None) -> None:
    """Be this host's sentinel until SIGTERM or SIGINT, or until idle; what the command runs.

    Args:
        settings: As `Sentinel` takes them.
        idle_seconds: End so long after the last client has gone, in seconds; None: never.

    Raises:
        SentinelRunningError: If another one serves this host and cluster; it is all right to end.
        ConfigurationError: If the directory is not ours alone, or the broker refuses us.
    """
    _allow_many_descriptors()
    gc.freeze()  # a collection of all that was imported would delay a notice
    async with Sentinel(settings, idle_seconds=idle_seconds) as sentinel:
        with _ended_by_signals(sentinel):
            await sentinel.run()


def _allow_many_descriptors() -> None:
    """Two for each client, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CLIENTS + 1_000
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _ended_by_signals(sentinel: Sentinel) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, sentinel.stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
