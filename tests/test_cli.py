"""The `peerctx` command: what it prints, what it makes, and how it exits."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from services.kafka import KafkaServer, free_ports

from langgraph_peerctx import cli
from langgraph_peerctx.config import KafkaConfig
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.transport import TopicSpec
from langgraph_peerctx.persistence.event_store import EventStore


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def findings(self) -> dict[str, dict[str, str]]:
        return {finding["name"]: finding for finding in self.json}


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in this process, with an environment of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/events.db")
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", f"sqlite:///{tmp_path}/control.db")

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


def test_topics_needs_no_broker_to_say_what_is_needed(run: Run, nobody: str) -> None:
    outcome = run("topics", KAFKA_BOOTSTRAP_SERVERS=nobody)
    assert outcome.code == 0
    assert "agent.context.request" in outcome.out
    assert f"kafka-topics.sh --bootstrap-server {nobody} --create" in outcome.out


def test_topics_are_asked_for_by_each_requester(run: Run) -> None:
    outcome = run("topics", "--json", "--requester-id", "one", "--requester-id", "two")
    assert [topic["name"] for topic in outcome.json][2:] == [
        "agent.context.response.one",
        "agent.context.response.two",
    ]
    assert all(topic["settings"]["compression.type"] == "uncompressed" for topic in outcome.json)


@pytest.mark.kafka
def test_topics_are_made_with_their_settings_and_the_doctor_is_content(
    run: Run, own: dict[str, str]
) -> None:
    missing = run("doctor", "--json", **own)
    assert missing.code == 1
    request = missing.findings[f"topic {own['KAFKA_CONTEXT_REQUEST_TOPIC']}"]
    assert request["state"] == "fault"
    assert request["remedy"] == "peerctx topics --create"
    for _ in range(2):
        assert run("topics", "--create", **own).code == 0
    well = run("doctor", "--json", **own)
    assert well.code == 0
    assert {finding["state"] for finding in well.json} == {"ok"}


@pytest.mark.kafka
def test_the_doctor_warns_of_a_topic_with_other_settings(run: Run, own: dict[str, str]) -> None:
    name = own["KAFKA_CONTEXT_REQUEST_TOPIC"]

    async def make() -> None:
        transport = KafkaTransport(KafkaConfig(bootstrap_servers=own["KAFKA_BOOTSTRAP_SERVERS"]))
        await transport.start()
        await transport.ensure_topics([TopicSpec(name=name, partitions=3)])
        await transport.close()

    asyncio.run(make())
    run("topics", "--create", **own)
    outcome = run("doctor", "--json", **own)
    assert outcome.code == 0
    found = outcome.findings[f"topic {name}"]
    assert found["state"] == "warning"
    assert "has 3 partitions, not 1" in found["detail"]
    assert "message.timestamp.type=CreateTime, not LogAppendTime" in found["detail"]
    assert found["remedy"].startswith("change it with kafka-configs.sh")
    assert "warning" in run("doctor", **own).out


def test_the_doctor_says_that_nobody_listens_and_what_follows(run: Run, nobody: str) -> None:
    outcome = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody)
    assert outcome.code == 1
    found = outcome.findings
    assert found["broker"]["state"] == "fault"
    assert nobody in found["broker"]["detail"]
    assert found["mock mode"]["state"] == "warning"
    assert "on now" in found["mock mode"]["detail"]
    assert found["event store"]["state"] == "ok"
    assert "not there yet" in found["event store"]["detail"]
    text = run("doctor").out
    assert "KAFKA_BOOTSTRAP_SERVERS" in text.replace("\n", "")


def test_a_narrow_terminal_cuts_nothing_off(run: Run, nobody: str, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/[red]/events.db"
    outcome = run(
        "doctor",
        COLUMNS="80",
        KAFKA_BOOTSTRAP_SERVERS=nobody,
        PEER_CONTEXT_DATABASE_URL=database,
    )
    assert "KAFKA_BOOTSTRAP_SERVERS" in outcome.out
    assert "PEER_CONTEXT_MOCK_MODE=never" in outcome.out
    assert "[red]" in re.sub(r"[\s│]", "", outcome.out)
    assert "…" not in run("topics", COLUMNS="80").out


def test_the_doctor_waits_ten_seconds_at_most_for_a_silent_broker(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        outcome = run(
            "doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{silent.getsockname()[1]}"
        )
    assert time.monotonic() - started < 10
    assert "no answer within" in outcome.findings["broker"]["detail"]


def test_the_doctor_looks_at_databases_without_making_them(run: Run, tmp_path: Path) -> None:
    with EventStore(f"sqlite:///{tmp_path}/events.db"):
        pass
    found = run("doctor", "--json").findings
    assert "schema 0002" in found["event store"]["detail"]
    assert not (tmp_path / "control.db").exists()


def test_a_database_that_is_none_is_a_fault(run: Run, tmp_path: Path) -> None:
    (tmp_path / "events.db").write_text("no database at all, but long enough to be looked at\n" * 9)
    outcome = run("doctor", "--json")
    assert outcome.code == 1
    assert outcome.findings["event store"]["state"] == "fault"
    assert outcome.findings["event store"]["remedy"] == "see PEER_CONTEXT_DATABASE_URL"


def test_a_database_server_that_is_silent_is_a_fault_in_time(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        port = silent.getsockname()[1]
        outcome = run(
            "doctor",
            "--json",
            PEER_CONTEXT_DATABASE_URL=f"postgresql://agent:secret@127.0.0.1:{port}/memory",
        )
    assert time.monotonic() - started < 10
    assert outcome.findings["event store"]["state"] == "fault"
    assert "secret" not in outcome.out


@pytest.mark.parametrize(
    ("mode", "state"), [("always", "warning"), ("never", "ok"), ("auto", "warning")]
)
def test_the_doctor_says_what_mock_mode_means(run: Run, nobody: str, mode: str, state: str) -> None:
    outcome = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody, PEER_CONTEXT_MOCK_MODE=mode)
    assert outcome.findings["mock mode"]["state"] == state


def test_a_wrong_setting_is_a_sentence_and_exit_code_two(run: Run) -> None:
    outcome = run("doctor", PEER_CONTEXT_TIMEOUT_SECONDS="soon")
    assert outcome.code == 2
    assert outcome.err.startswith("peerctx: PEER_CONTEXT_TIMEOUT_SECONDS")
    assert "Traceback" not in outcome.err


def test_an_illegal_requester_id_is_refused(run: Run) -> None:
    outcome = run("topics", "--requester-id", "a/b")
    assert outcome.code == 1
    assert "requester_id" in outcome.err


def test_making_topics_without_a_broker_fails_in_a_sentence(run: Run, nobody: str) -> None:
    outcome = run("topics", "--create", KAFKA_BOOTSTRAP_SERVERS=nobody)
    assert outcome.code == 1
    assert outcome.err.startswith(f"peerctx: no Kafka broker at {nobody}")


def test_an_unknown_option_is_exit_code_two(run: Run) -> None:
    assert run("doctor", "--nonsense").code == 2


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("peerctx")
    done = subprocess.run(
        [command, "topics", "--json"], capture_output=True, check=True, cwd=tmp_path, timeout=60
    )
    assert len(json.loads(done.stdout)) == 3
    assert list(tmp_path.iterdir()) == []
