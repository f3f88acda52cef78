"""A process's side of the sentinel: registered while one runs, and started where none does.

The sentinel sees a process end, by its pidfd: a forked child has another, and its end or its going
on says nothing. A process that replaces itself with `exec` has not ended either; silence tells.
Where the system has no pidfd, the sentinel gets the read end of a pipe instead, whose write end
nobody has but us: `exec` closes it, and a forked child closes its copy.
"""

import asyncio
import logging
import os
import random
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from pydantic import SecretStr, ValidationError

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, PeerContextError
from langgraph_peerctx.messaging.sentinel_place import (
    HANDSHAKE_SECONDS,
    LINE_LIMIT_BYTES,
    Answer,
    DescriptorKind,
    Leaving,
    Registration,
    SentinelPlace,
    line_of,
    lock_if_free,
    peer_of,
    place_of,
)

_logger = logging.getLogger(__name__)

OnChange = Callable[[str | None], None]

IDLE_SECONDS = 30
"""How long a sentinel that was started on demand stays after its last client."""
START_SECONDS = 15.0
"""The longest that a started sentinel may take to listen: it imports for a second or two."""
POLL_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
LONGEST_START_PAUSE_SECONDS = 300.0
LEAVE_SECONDS = 1.0
"""How long leaving waits until the sentinel has heard it."""
_NOT_FOR_A_SENTINEL = {
    "kafka",
    "process_id",
    "requester_id",
    "database_url",
    "control_database_url",
    "mock_mode",
    "sentinel_directory",
}
_IN_THE_BACKGROUND = '"$@" &'

_clients: "weakref.WeakSet[SentinelClient]" = weakref.WeakSet()


class _NoSentinelError(Exception):
    """None listens; never leaves this module."""


class SentinelClient:
    """Keeps this process registered with its host's sentinel; on the loop that starts it.

    Args:
        settings: Mode, directory, cluster and process id.
        incarnation: This life of the process, as its heartbeats say it.
        on_change: Called on the loop with who watches from now on, or None.
        command: What starts a sentinel; by default `peerctx sentinel` by this interpreter.
        pid: Our process id, which decides whether we may start one.

    Attributes:
        sentinel_id: Who watches us now, if anybody.
    """

    def __init__(
        self,
        settings: PeerContextSettings,
        incarnation: str,
        *,
        on_change: OnChange | None = None,
        command: Sequence[str] | None = None,
        pid: int | None = None,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._on_change = on_change
        self._command = tuple(
            command
            or (
                *(sys.executable, "-m", "langgraph_peerctx"),
                *("sentinel", "--idle-seconds", str(IDLE_SECONDS)),
            )
        )
        self._pid = os.getpid() if pid is None else pid
        self.sentinel_id: str | None = None
        self._running: asyncio.Task[None] | None = None
        self._connection: socket.socket | None = None
        self._ends: DeathDescriptor | None = None
        self._is_closing = self._has_warned = False
        self._start_pause = 2 * START_SECONDS
        self._no_start_before = float("-inf")

    async def start(self) -> None:
        """Begin to look for a sentinel; waits for nothing, and a missing one is no error."""
        if self._settings.sentinel == "off" or self._running is not None:
            return
        if self._settings.mock_mode == "always":
            _logger.info("mock mode: no sentinel is asked for, its notices would go nowhere")
            return
        if not hasattr(socket, "send_fds"):
            self._warn("this system has no Unix sockets")
            return
        self._is_closing = False
        self._ends = DeathDescriptor()
        _clients.add(self)
        self._running = asyncio.create_task(self._run(), name="peerctx-sentinel-client")

    async def close(self) -> None:
        """Say that we leave, wait a second at most, and close everything. Safe to call twice."""
        running, self._running = self._running, None
        if running is None:
            return
        self._is_closing = True
        if self._connection is None or not self._has_said_that_we_leave(self._connection):
            running.cancel()
        await asyncio.wait({running}, timeout=LEAVE_SECONDS)
        running.cancel()
        await asyncio.wait({running})
        self._release()

    def forget_parent(self) -> None:
        """Close what a forked child has inherited, without a word: it is not its own."""
        self._running = None
        self._release()

    def _release(self) -> None:
        self.sentinel_id = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        ends, self._ends = self._ends, None
        if ends is not None:
            ends.close()

    async def _run(self) -> None:
        place = place_of(self._settings)
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._be_watched(place)
                pause = FIRST_PAUSE_SECONDS
            except (OSError, PeerContextError, _NoSentinelError) as error:
                self._warn(error)
            except Exception:  # a service loop logs and goes on
                _logger.exception("looking for a sentinel failed")
            if self._is_closing:
                return
            # All who have lost one look for the next: not all in the same moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no cryptography
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _be_watched(self, place: SentinelPlace) -> None:
        """Register, and return when the sentinel is gone, or has heard that we leave."""
        self._connection, sentinel_id = await self._registered(place)
        try:
            self._start_pause, self._no_start_before = 2 * START_SECONDS, float("-inf")
            self._has_warned = False
            _logger.info("%s would see this process die", sentinel_id)
            self._now(sentinel_id)
            with suppress(OSError):
                while await asyncio.get_running_loop().sock_recv(self._connection, 64):
                    pass
        finally:
            self._connection.close()
            self._connection = None
        if not self._is_closing:
            self._warn(f"{sentinel_id} is gone")
            self._now(None)

    def _now(self, sentinel_id: str | None) -> None:
        self.sentinel_id = sentinel_id
        if self._on_change is not None:
            self._on_change(sentinel_id)

    def _warn(self, why: object) -> None:
        """Say once, for as long as it lasts, that nobody watches."""
        level = logging.INFO if self._has_warned else logging.WARNING
        self._has_warned = True
        _logger.log(level, "deaths on this host are now noticed by silence alone: %s", why)

    async def _registered(self, place: SentinelPlace) -> tuple[socket.socket, str]:
        try:
            return await self._register(place)
        except _NoSentinelError as error:
            self._check_may_start(error)
        place.prepare()
        now = asyncio.get_running_loop().time()
        self._no_start_before = now + self._start_pause
        self._start_pause = min(2 * self._start_pause, LONGEST_START_PAUSE_SECONDS)
        with lock_if_free(place.starting) as is_ours:  # else somebody starts one right now
            if is_ours:
                await asyncio.to_thread(self._start_one, place)
            return await self._register_within(place, now + START_SECONDS)

    def _check_may_start(self, error: _NoSentinelError) -> None:
        if self._settings.sentinel != "auto":
            raise error
        if self._pid == 1:
            raise ConfigurationError(
                f"{error}, and we start none: we are PID 1, and it would die with us. Run "
                "`peerctx sentinel` outside of this container, in the host's PID namespace"
            )
        if asyncio.get_running_loop().time() < self._no_start_before:
            raise error

    async def _register_within(
        self, place: SentinelPlace, deadline: float
    ) -> tuple[socket.socket, str]:
        while True:
            try:
                return await self._register(place)
            except _NoSentinelError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(POLL_SECONDS)

    async def _register(self, place: SentinelPlace) -> tuple[socket.socket, str]:
        """Connect and register.

        Raises:
            _NoSentinelError: If none listens, or it does not take us in time.
            ConfigurationError: If the place is not ours alone, or the sentinel refuses us.
            OSError: If the connection breaks.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(0)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                return connection, await self._shake_hands(place, connection)
        except BaseException as error:
            # It may have registered us by now, or do so later: our end would look like a death.
            self._has_said_that_we_leave(connection)
            connection.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise _NoSentinelError(f"no sentinel listens at {place.socket}") from None
            if isinstance(error, TimeoutError):
                raise _NoSentinelError(f"the sentinel at {place.socket} is silent") from None
            raise

    async def _shake_hands(self, place: SentinelPlace, connection: socket.socket) -> str:
        place.check()
        await asyncio.get_running_loop().sock_connect(connection, str(place.socket))
        if peer_of(connection).is_foreign:
            raise ConfigurationError(f"{place.socket} is another user's")
        assert self._ends is not None  # noqa: S101 - since the start
        registration = Registration(
            process_id=self._settings.process_id,
            incarnation=self._incarnation,
            kind=self._ends.kind,
        )
        with suppress(BrokenPipeError):  # refused before we spoke: the answer says why
            socket.send_fds(connection, [line_of(registration)], [self._ends.descriptor])
        answer = await _answer_on(connection)
        if answer.sentinel_id is None:
            raise ConfigurationError(f"the sentinel refuses us: {answer.refused!r:.200}")
        return answer.sentinel_id

    def _start_one(self, place: SentinelPlace) -> None:
        """Start a sentinel that is nobody's child: no zombie of ours, no part of our session."""
        _logger.info("a sentinel is started for this host")
        done = subprocess.run(  # noqa: S603 - our own command, the settings go by environment
            ["/bin/sh", "-c", _IN_THE_BACKGROUND, "sh", *self._command],
            env=environment_for(self._settings, place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode:
            _logger.warning("a sentinel could not be started: exit code %d", done.returncode)

    def _has_said_that_we_leave(self, connection: socket.socket) -> bool:
        try:
            connection.send(line_of(Leaving(leaving=True)))
        except OSError:
            return False
        return True


async def _answer_on(connection: socket.socket) -> Answer:
    received = b""
    while b"\n" not in received and len(received) < LINE_LIMIT_BYTES:
        data = await asyncio.get_running_loop().sock_recv(connection, LINE_LIMIT_BYTES)
        if not data:
            raise ConnectionResetError("the sentinel closed the connection")
        received += data
    try:
        return Answer.model_validate_json(received.partition(b"\n")[0])
    except ValidationError:
        raise ConnectionResetError("what the sentinel says is no answer") from None


class DeathDescriptor:
    """What becomes readable when this process ends: its pidfd, or where there is none, a pipe."""

    def __init__(self) -> None:
        self.kind: DescriptorKind = "pidfd"
        self._held: int | None = None
        try:
            self.descriptor: int = os.pidfd_open(os.getpid())
        except (AttributeError, OSError):  # another system, an old kernel, or a strict container
            self.kind = "pipe"
            self.descriptor, self._held = os.pipe()

    def close(self) -> None:
        """Close both ends."""
        os.close(self.descriptor)
        if self._held is not None:
            os.close(self._held)


def environment_for(settings: PeerContextSettings, place: SentinelPlace) -> dict[str, str]:
    """Return our environment with the settings in it, secrets too: arguments are for all to see."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KAFKA_", "PEER_CONTEXT_"))
    }
    told = {
        **_variables(settings.kafka),
        **_variables(settings),
        "PEER_CONTEXT_MOCK_MODE": "never",
        "PEER_CONTEXT_SENTINEL_DIRECTORY": str(place.directory),
    }
    return own | told


def _variables(settings: PeerContextSettings | KafkaConfig) -> dict[str, str]:
    values = {
        name: getattr(settings, name)
        for name in type(settings).model_fields
        if name not in _NOT_FOR_A_SENTINEL
    }
    return {
        settings.variable_of(name): _text(value)
        for name, value in values.items()
        if value is not None
    }


def _text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
