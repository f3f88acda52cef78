"""A real Apache Kafka (KRaft, one process, loopback), fetched with Maven and started here."""

import base64
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self
from xml.etree import ElementTree as ET

from services.stopping import until_stopped

HERE = Path(__file__).parent
POM = HERE / "pom.xml"
CACHE = Path(os.environ.get("PEERCTX_KAFKA_CACHE", HERE.parents[1] / ".cache" / "kafka"))
START_TIMEOUT_SECONDS = 90.0
JAVA = ("java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


class KafkaMissingError(Exception):
    """Kafka cannot be had here; the message says why."""


def jars() -> Path:
    """Return the folder of Kafka's jars, fetched with Maven the first time."""
    version = ET.parse(POM).findtext(".//{*}kafka.version")  # noqa: S314 - our own file
    folder = CACHE / str(version)
    if folder.is_dir():
        return folder
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            raise KafkaMissingError(f"{tool} is not installed: Java 17 and Maven bring Kafka")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
        options = ["-DincludeScope=runtime", f"-DoutputDirectory={fresh}/jars"]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            raise KafkaMissingError(f"Maven could not bring Kafka: {done.stdout[-2_000:]}")
        with contextlib.suppress(OSError):  # somebody else was quicker
            Path(fresh, "jars").rename(folder)
    return folder


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = range(10_000 + _WORKER % 16, 32_000, 16)
"""Each test process has its own, and all are below those that the system gives to whoever asks for
any, as each connection does: one of them could be taken while a server is started, or again."""
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, and that this process has not returned before."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(PORTS)
        if port not in _given and _is_free(port):
            _given.add(port)
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class KafkaServer:
    """One broker, with data and ports of its own, which a test may kill, pause and restart.

    Args:
        properties: Further lines of server.properties.
        listeners: Further listeners, name -> security protocol; `address(name)` is where.
        advertised: Listener name -> the host:port that is told to clients (a proxy's).
    """

    def __init__(
        self,
        properties: Mapping[str, str] | None = None,
        *,
        listeners: Mapping[str, str] | None = None,
        advertised: Mapping[str, str] | None = None,
    ) -> None:
        self._properties = dict(properties or {})
        self._protocols = {"PLAIN": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **(listeners or {})}
        ports = free_ports(len(self._protocols))
        self._ports = dict(zip(self._protocols, ports, strict=True))
        self.advertised = dict(advertised or {})
        self._folder = Path(tempfile.mkdtemp(prefix="kafka-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        return self.address("PLAIN")

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> Path:
        return self._folder / "kafka.log"

    def address(self, listener: str) -> str:
        """Return where a listener really listens."""
        return f"127.0.0.1:{self._ports[listener]}"

    def start(self) -> Self:
        """Format at the first start, run, and wait until it serves."""
        classpath = f"{jars()}/*"
        config = self._write_config()
        if not (self._folder / "data").exists():
            identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            self._run(
                [
                    *JAVA,
                    "-cp",
                    classpath,
                    "kafka.tools.StorageTool",
                    "format",
                    f"--cluster-id={identity}",  # one in 64 begins with "-"
                    "-c",
                    str(config),
                ]
            )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*JAVA, "-cp", classpath, "kafka.Kafka", str(config)], stdout=log, stderr=log
            )
        self._wait_until_it_serves()
        return self

    def stop(self) -> None:
        """End the broker in an orderly way, or by force after ten seconds."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process = None

    def kill(self) -> None:
        """`kill -9`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: it accepts connections and never answers."""
        self._signal(signal.SIGSTOP)
        if self._process is not None:
            until_stopped(self._process.pid)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop, and start with the same data and ports."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _write_config(self) -> Path:
        listening = ",".join(f"{name}://{self.address(name)}" for name in self._protocols)
        clients = [name for name in self._protocols if name != "CONTROLLER"]
        told = ",".join(f"{n}://{self.advertised.get(n, self.address(n))}" for n in clients)
        protocols = ",".join(f"{name}:{protocol}" for name, protocol in self._protocols.items())
        one = ["offsets.topic", "transaction.state.log", "share.coordinator.state.topic"]
        lines = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{self.address('CONTROLLER')}",
            "listeners": listening,
            "advertised.listeners": told,
            "listener.security.protocol.map": protocols,
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAIN",
            "log.dirs": str(self._folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.min.isr": "1",
            **{f"{name}.replication.factor": "1" for name in one},
            **self._properties,
        }
        config = self._folder / "server.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
        return config

    def _wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            if "Kafka Server started" in self.log.read_text(errors="replace"):
                return
            time.sleep(0.05)
        raise KafkaMissingError(f"Kafka did not start: {self.log.read_text()[-3_000:]}")

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode:
            raise KafkaMissingError(f"{command[-4]} failed: {done.stdout}{done.stderr}")
