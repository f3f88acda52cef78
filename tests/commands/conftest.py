"""Command lines in this process, each in an environment of its own."""

import sys
from pathlib import Path
from uuid import uuid4

import pytest
from command_line import Outcome, Run
from services.kafka import KafkaServer, free_ports

from langgraph_peerctx import cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in this process, with an environment of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/events.db")
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/control.db")
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: str, **environment: str) -> Outcome:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["peerctx", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def nobody() -> str:
    """Return an address where nobody listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
def own(kafka: KafkaServer) -> dict[str, str]:
    """Return the environment of a team that nobody else on the broker knows."""
    team = uuid4().hex[:8]
    return {
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "KAFKA_CONTEXT_REQUEST_TOPIC": f"{team}.request",
        "KAFKA_CONTEXT_RESPONSE_TOPIC_PREFIX": f"{team}.response",
        "KAFKA_PRESENCE_TOPIC": f"{team}.presence",
    }
