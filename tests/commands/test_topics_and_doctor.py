"""`peerctx topics` and `peerctx doctor`: what they print, what they make, and how they exit."""

import asyncio
import json
import re
import socket
import sqlite3
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from command_line import PEERCTX, Run
from services.postgres import PostgresServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.producer import publish
from langgraph_peerctx.messaging.sentinel_place import place_of
from langgraph_peerctx.messaging.transport import TopicSpec
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.migrations import VERSION_TABLE
from langgraph_peerctx.persistence.runs import LostRun, NewRun, Owner, Packed, RunInput
from langgraph_peerctx.protocol.messages import Heartbeat


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
    alone = run("doctor", "--json", **own)
    assert alone.code == 0
    assert {f["name"] for f in alone.json if f["state"] != "ok"} == {"supervisors"}
    assert "peerctx supervise" in alone.findings["supervisors"]["remedy"]
    beat(own, process_id="watcher", supervises=True)
    beat(own, process_id="agent")
    beat(own, process_id="former", supervises=True)
    beat(own, process_id="former", supervises=True, leaving=True, sequence=2)
    # Each of them beats once: none is silent before the doctor has come.
    well = run("doctor", "--json", PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS="60", **own)
    assert {finding["state"] for finding in well.json} == {"ok"}
    assert well.findings["supervisors"]["detail"] == "1: watcher"
    assert "from ours" in well.findings["broker's clock"]["detail"]


def beat(own: dict[str, str], *, process_id: str, sequence: int = 1, **more: Any) -> None:
    """Send one heartbeat."""

    async def send() -> None:
        transport = KafkaTransport(KafkaConfig(bootstrap_servers=own["KAFKA_BOOTSTRAP_SERVERS"]))
        await transport.start()
        told = Heartbeat(
            sent_at=datetime.now(UTC),
            process_id=process_id,
            incarnation=f"{process_id}-1",
            sequence=sequence,
            **more,
        )
        await publish(transport, own["KAFKA_PRESENCE_TOPIC"], told, max_bytes=100_000)
        await transport.close()

    asyncio.run(send())


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
    assert "schema 0003" in found["event store"]["detail"]
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
    assert outcome.code == 2
    assert "requester_id" in outcome.err


def test_making_topics_without_a_broker_fails_in_a_sentence(run: Run, nobody: str) -> None:
    outcome = run("topics", "--create", KAFKA_BOOTSTRAP_SERVERS=nobody)
    assert outcome.code == 1
    assert outcome.err.startswith(f"peerctx: no Kafka broker at {nobody}")


def test_an_unknown_option_is_exit_code_two(run: Run) -> None:
    assert run("doctor", "--nonsense").code == 2


def test_the_version_is_told(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"peerctx {version('langgraph-peerctx')}\n")


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [PEERCTX, "topics", "--json"], capture_output=True, check=True, cwd=tmp_path, timeout=60
    )
    assert len(json.loads(done.stdout)) == 3
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_says_that_automatic_recovery_is_off(
    run: Run, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEER_CONTEXT_CONTROL_DATABASE_URL")
    found = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody).findings["recovery"]
    assert found["state"] == "warning"
    assert "automatic recovery is off" in found["detail"]
    assert "PEER_CONTEXT_CONTROL_DATABASE_URL" in found["remedy"]


def test_the_doctor_counts_what_is_open_and_what_waits_for_a_person(
    run: Run, nobody: str, tmp_path: Path
) -> None:
    owner = Owner(owner_id="dead", incarnation="life", ttl_seconds=30)
    given = RunInput(value=Packed(kind="json", data=b"{}"))
    with ControlDatabase(f"sqlite:///{tmp_path}/control.db") as control:
        lease = control.admit(
            NewRun(run_id="run", agent_id="agent", thread_id="thread", given=given), owner
        )
        control.hand_over("life")
        lost = control.open_run("agent", "thread")
        assert isinstance(lost, LostRun)
        other = Owner(owner_id="other", incarnation="other", ttl_seconds=30)
        control.begin_recovery(lost, other, max_attempts=0)
    assert lease.epoch == 1
    found = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody).findings
    assert found["open runs"]["detail"] == "1"
    assert found["incidents"]["state"] == "warning"
    assert found["incidents"]["detail"] == "1 dead_letter"
    assert found["incidents"]["remedy"] == "peerctx incidents list --status dead_letter"


def test_the_doctor_warns_of_runs_whose_workflow_nobody_supervises(
    run: Run, nobody: str, tmp_path: Path
) -> None:
    given = RunInput(value=Packed(kind="json", data=b"{}"))
    with ControlDatabase(f"sqlite:///{tmp_path}/control.db") as control:
        for thread in ("one", "two"):
            new = NewRun(run_id=thread, agent_id="agent", thread_id=thread, given=given)
            control.admit(new, Owner(owner_id="dead", incarnation="life", ttl_seconds=30))
        control.hand_over("life")
        for thread, status in (("one", "unknown_workflow"), ("two", "failed")):
            lost = control.open_run("agent", thread)
            assert lost is not None
            said = {"status": status, "reasons": ["no unknown_workflow"]}
            control.note(lost, said, again_seconds=60)
    found = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody).findings["incidents"]
    assert found["state"] == "warning"
    assert found["detail"] == "2 open; of 1 nobody supervises the workflow"
    assert "peerctx supervise" in found["remedy"]


@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_the_doctor_warns_that_without_a_broker_no_death_is_noticed(
    run: Run, nobody: str, mode: str
) -> None:
    found = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody, PEER_CONTEXT_MOCK_MODE=mode)
    recovery = found.findings["recovery"]
    assert recovery["state"] == "warning"
    assert recovery["detail"] == "no death can be noticed without a broker"


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [("0001", "warning", "is upgraded to"), ("9999", "fault", "install the release that made it")],
)
def test_the_doctor_compares_the_schema_with_this_release(
    run: Run, nobody: str, tmp_path: Path, version: str, state: str, said: str
) -> None:
    with EventStore(f"sqlite:///{tmp_path}/events.db"):
        pass
    database = sqlite3.connect(tmp_path / "events.db")
    with database:
        statement = f"UPDATE {VERSION_TABLE} SET version_num = ?"  # noqa: S608 - a constant
        database.execute(statement, [version])
    database.close()
    found = run("doctor", "--json", KAFKA_BOOTSTRAP_SERVERS=nobody).findings["event store"]
    assert found["state"] == state
    assert said in found["detail"]


@pytest.mark.parametrize(
    ("mode", "state", "said"),
    [
        ("off", "ok", "silence alone"),
        ("auto", "ok", "started on demand"),
        ("connect", "warning", "silence alone"),
    ],
)
def test_the_doctor_says_what_it_means_that_no_sentinel_runs(
    run: Run, nobody: str, tmp_path: Path, mode: str, state: str, said: str
) -> None:
    found = run(
        "doctor",
        "--json",
        KAFKA_BOOTSTRAP_SERVERS=nobody,
        PEER_CONTEXT_SENTINEL=mode,
        PEER_CONTEXT_SENTINEL_DIRECTORY=str(tmp_path / "s"),
    ).findings["sentinel"]
    assert found["state"] == state
    assert said in found["detail"]
    assert not (tmp_path / "s").exists()


def test_the_doctor_sees_a_sentinel_and_a_directory_that_is_not_ours_alone(
    run: Run, nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", nobody)
    monkeypatch.setenv("PEER_CONTEXT_SENTINEL", "connect")
    monkeypatch.setenv("PEER_CONTEXT_SENTINEL_DIRECTORY", str(tmp_path / "s"))
    place = place_of(PeerContextSettings())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place.socket))
        listener.listen()
        found = run("doctor", "--json").findings["sentinel"]
    assert (found["state"], found["detail"]) == ("ok", f"{place.sentinel_id} runs")
    (tmp_path / "s").chmod(0o755)
    found = run("doctor", "--json").findings["sentinel"]
    assert found["state"] == "fault"
    assert "open to others" in found["detail"]


@pytest.mark.postgres
def test_the_doctor_looks_at_a_servers_clock_and_at_what_its_user_may_do(
    run: Run, nobody: str, postgres_server: PostgresServer, postgres_url: str
) -> None:
    EventStore(postgres_url).close()
    found = run(
        "doctor",
        "--json",
        KAFKA_BOOTSTRAP_SERVERS=nobody,
        PEER_CONTEXT_CONTROL_DATABASE_URL=postgres_url,
    ).findings
    assert found["control database"]["state"] == "ok"
    assert found["control database's clock"]["state"] == "ok"
    database = postgres_url.rpartition("/")[2]
    role = f"writer_{database}"
    postgres_server.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'hunter2'")
    try:
        for granted in ("SELECT", "INSERT"):
            postgres_server.execute(
                f"GRANT {granted} ON ALL TABLES IN SCHEMA public TO {role}", database
            )
        url = postgres_server.url(database, role, password="hunter2")  # noqa: S106 - a test's
        found = run("doctor", "--json", PEER_CONTEXT_CONTROL_DATABASE_URL=url).findings
    finally:
        postgres_server.execute(f"DROP OWNED BY {role}", database)
        postgres_server.execute(f"DROP ROLE {role}")
    assert found["control database"]["state"] == "fault"
    assert "grant UPDATE on peerctx_leases" in found["control database"]["detail"]
