"""Where a host's sentinel is found, and what is said there.

A Unix socket and a lock in a directory that nobody but us may enter. Their names carry a hash of
the cluster, so that one sentinel serves one host and cluster. What is said is one line of JSON
each: a `Registration` with a descriptor beside it, an `Answer`, and a `Leaving` at the end.
"""

import hashlib
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from langgraph_peerctx.config import PeerContextSettings, default_process_id
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import Identifier, RecordId
from langgraph_peerctx.protocol.messages import Frozen

if sys.platform != "win32":
    import fcntl

LINE_LIMIT_BYTES = 4_096
HANDSHAKE_SECONDS = 5.0
"""The longest that registering may take, at both ends."""
PATH_LIMIT_BYTES = 103
"""The shortest limit of the systems we run on: 107 on Linux, 103 on macOS."""
_CREDENTIALS = struct.Struct("3i")

DescriptorKind = Literal["pidfd", "pipe"]


class Registration(Frozen):
    """A process says who it is; the descriptor beside it tells when it ends."""

    process_id: Identifier
    incarnation: RecordId
    kind: DescriptorKind


class Leaving(Frozen):
    """A process says that its end will be no death."""

    leaving: Literal[True]


class Answer(Frozen):
    """The sentinel says who watches from now on, or why it does not."""

    sentinel_id: Identifier | None = None
    refused: str | None = None


def line_of(said: Registration | Leaving | Answer) -> bytes:
    """Return what is said as one line."""
    return said.model_dump_json(exclude_none=True).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelPlace:
    """The directory, and the files of one cluster in it."""

    directory: Path
    key: str

    @property
    def socket(self) -> Path:
        """Where the sentinel listens."""
        return self.directory / f"{self.key}.sock"

    @property
    def lock(self) -> Path:
        """What a sentinel holds for life; the file itself stays."""
        return self.directory / f"{self.key}.lock"

    @property
    def starting(self) -> Path:
        """What a process holds while it starts a sentinel, so that fifty do not start fifty."""
        return self.directory / f"{self.key}.start"

    @property
    def sentinel_id(self) -> str:
        """The process id of the sentinel: one for each host, user, directory and cluster."""
        host = default_process_id().rpartition("-")[0][:40]
        return f"sentinel-{host}-{_digest(self.key, str(self.directory), str(os.geteuid()))[:8]}"

    def check(self) -> None:
        """See that the directory is ours alone; whoever else could write there could pose as us.

        Raises:
            ConfigurationError: If it is somebody else's, open to others, no directory, or its name
                is too long for a socket.
            FileNotFoundError: If there is none.
        """
        if len(os.fsencode(self.socket)) > PATH_LIMIT_BYTES:
            raise ConfigurationError(
                f"{self.socket} is longer than the {PATH_LIMIT_BYTES} bytes that a socket's name "
                "may have: set PEER_CONTEXT_SENTINEL_DIRECTORY to a shorter one"
            )
        found = self.directory.lstat()
        fault = _fault_of(found)
        if fault:
            raise ConfigurationError(
                f"PEER_CONTEXT_SENTINEL_DIRECTORY={self.directory} {fault}: "
                "it must be a directory of our own with mode 0700"
            )

    def prepare(self) -> None:
        """Make the directory if there is none, and `check` it.

        Raises:
            ConfigurationError: If it cannot be made, or see `check`.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"PEER_CONTEXT_SENTINEL_DIRECTORY={self.directory} cannot be made: {error}"
            ) from error
        self.check()


def _fault_of(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to us"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def place_of(settings: PeerContextSettings) -> SentinelPlace:
    """Return where the sentinel of this host and of the settings' cluster is found."""
    servers = ",".join(sorted(settings.kafka.bootstrap_servers.split(",")))
    chosen = settings.sentinel_directory
    return SentinelPlace(
        directory=Path(os.path.abspath(chosen)) if chosen else _default_directory(),  # noqa: PTH100 - resolve() would follow the link that is refused
        key=_digest(servers, settings.kafka.presence_topic)[:12],
    )


def _default_directory() -> Path:
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own and Path(own).is_dir() and Path(own).stat().st_uid == os.geteuid():
        return Path(own) / "langgraph-peerctx"
    return Path(tempfile.gettempdir()) / f"langgraph-peerctx-{os.geteuid()}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def take_lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock while it is open, or None if somebody has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock meanwhile, if nobody else does; tells whether."""
    descriptor = take_lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # A forked child may have a copy, and closing ours alone would not release it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, by the kernel's word; None where the kernel does not tell.

    `pid` is 0 for a process that our PID namespace does not see.
    """

    pid: int | None = None
    uid: int | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether it is known to be another user."""
        return self.uid is not None and self.uid != os.geteuid()


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end of a Unix socket."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:  # the directory's mode alone keeps others out
        return Peer()
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
    )
    return Peer(pid=pid, uid=uid)
