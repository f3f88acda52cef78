"""Commands that run on: `peerctx supervise`, `agents` and `sentinel`, as processes."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from chaos.processes import Child, agent
from chaos.scenario import FINAL, Scenario
from command_line import PEERCTX, Command, Outcome, Run, environment_of
from services.kafka import KafkaServer

from langgraph_peerctx.persistence.incidents import ControlDatabase

HERE = Path(__file__).parent
FLOW = f"flow={HERE / 'flows.py'}:graph"


@pytest.fixture
def alone(nobody: str, tmp_path: Path) -> dict[str, str]:
    """An environment without a broker, with a shared control database."""
    return {
        "KAFKA_BOOTSTRAP_SERVERS": nobody,
        "KAFKA_CONNECT_TIMEOUT_SECONDS": "1",
        "PEER_CONTEXT_DATABASE_URL": f"sqlite:///{tmp_path}/events.db",
        "PEER_CONTEXT_CONTROL_DATABASE_URL": f"sqlite:///{tmp_path}/control.db",
        "PEER_CONTEXT_SENTINEL_DIRECTORY": f"{tmp_path}/s",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_supervisor_is_ended_by_a_signal_and_that_is_no_error(
    alone: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    with Command(tmp_path, "supervise", "--workflow", FLOW, "--json", env=alone) as command:
        command.until("recovery is on hold")
        outcome = command.end(number)
    assert outcome.code == 0
    assert [line["event"] for line in outcome.lines] == ["supervising", "notice", "ended"]
    assert outcome.lines[0]["workflows"] == ["flow"]
    assert outcome.lines[0]["open_runs"] == 0
    assert "recovery is on hold" not in outcome.err
    assert "Traceback" not in outcome.err


def test_a_supervisor_of_a_langgraph_json_speaks_to_people(
    alone: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "langgraph.json").write_text(
        json.dumps({"peerctx": {"workflows": {"flow": f"{HERE / 'flows.py'}:graph"}}})
    )
    with Command(tmp_path, "supervise", env=alone) as command:
        command.until("supervising flow; 0 runs are open now")
        outcome = command.end()
    assert outcome.code == 0
    assert outcome.out.endswith("what was under way is handed over\n")


def test_without_a_shared_control_database_nobody_supervises(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEER_CONTEXT_CONTROL_DATABASE_URL")
    outcome = run("supervise", "--workflow", FLOW, PEER_CONTEXT_MOCK_MODE="always")
    assert outcome.code == 2
    assert "automatic recovery is off" in outcome.err


def test_a_second_sentinel_says_that_one_runs_and_the_first_is_ended_by_a_signal(
    alone: dict[str, str], tmp_path: Path, run: Run
) -> None:
    with Command(tmp_path, "sentinel", "--json", env=alone) as first:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("s/*.sock")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = run("sentinel", **alone)
        assert second.code == 0
        assert "runs on this host already" in second.out
        (told,) = run("sentinel", "--json").lines
        assert told["event"] == "running_already"
        outcome = first.end()
    assert outcome.code == 0
    (ended,) = outcome.lines
    assert (ended["event"], ended["sentinel_id"]) == ("ended", told["sentinel_id"])


def test_an_idle_sentinel_ends_by_itself(alone: dict[str, str], run: Run) -> None:
    assert run("sentinel", "--idle-seconds", "0.1", **alone).code == 0


def test_a_sentinel_that_nobody_could_hear_is_refused(run: Run, alone: dict[str, str]) -> None:
    outcome = run("sentinel", **alone, PEER_CONTEXT_MOCK_MODE="always")
    assert outcome.code == 2
    assert "needs a broker" in outcome.err


def test_a_broker_for_development_has_the_topics_until_it_is_told_to_end(
    alone: dict[str, str], tmp_path: Path, run: Run
) -> None:
    with Command(tmp_path, "broker", env=alone) as broker:
        said = broker.until("not for production")
        export, comment = said.splitlines()
        assert comment.startswith("# ")
        name, _, servers = export.removeprefix("export ").partition("=")
        assert name == "KAFKA_BOOTSTRAP_SERVERS"
        assert servers.startswith("127.0.0.1:")
        found = run("doctor", "--json", **alone | {name: servers}).findings
        assert found["broker"]["state"] == "ok"
        assert found["topic agent.presence"]["state"] == "ok"
        assert found["recovery"]["state"] == "ok"
        outcome = broker.end(signal.SIGINT)
    assert (outcome.code, outcome.err) == (0, "")


def test_a_broker_without_its_extra_is_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    outcome = run("broker")
    assert outcome.code == 2
    assert "pip install 'langgraph-peerctx[embedded]'" in outcome.err


def test_without_a_broker_there_are_no_agents_to_show(run: Run, alone: dict[str, str]) -> None:
    outcome = run("agents", "--once", **alone)
    assert outcome.code == 1
    assert outcome.err.startswith("peerctx: no Kafka broker")


async def command(env: dict[str, str], *arguments: str) -> Outcome:
    """Run a command in a process of its own."""
    running = await asyncio.create_subprocess_exec(
        PEERCTX, *arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await running.communicate()
    assert running.returncode is not None
    return Outcome(running.returncode, out.decode(), err.decode())


def live(env: dict[str, str]) -> tuple[int, str]:
    """Show the table on a terminal until it is there, and end it as Ctrl-C does."""
    ours, theirs = pty.openpty()
    screen = b""
    with subprocess.Popen(
        [PEERCTX, "agents"], env=env | {"TERM": "xterm"}, stdout=theirs, stderr=theirs
    ) as running:
        os.close(theirs)
        while b"leases are not known" not in screen:
            screen += os.read(ours, 65_536)
        running.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal says that nobody is there any more
            while data := os.read(ours, 65_536):
                screen += data
        code = running.wait(60)
    os.close(ours)
    return code, screen.decode()


def environment(scenario: Scenario, name: str) -> dict[str, str]:
    return {
        **environment_of(scenario.settings(name)),
        "LAUNCH_SCENARIO": json.dumps(asdict(scenario)),
        "PYTHONPATH": str(HERE.parent),
        "COLUMNS": "250",
    }


@pytest.mark.kafka
async def test_heartbeats_are_shown_while_there_is_no_control_database(
    kafka: KafkaServer, tmp_path: Path, run: Run
) -> None:
    scenario = Scenario(
        servers=kafka.bootstrap_servers,
        folder=str(tmp_path),
        control=f"sqlite:///{tmp_path}/agents.db",
        pause=2.0,
    )
    child = Child(agent, scenario, "launcher")
    try:
        await child.until("ready")
        elsewhere = environment(scenario, "viewer") | {
            "PEER_CONTEXT_CONTROL_DATABASE_URL": f"sqlite:///{tmp_path}/nowhere.db"
        }
        seen = await asyncio.to_thread(run, "agents", "--json", **elsewhere)
        assert seen.code == 0, seen.err
        (row,) = seen.json
        assert (row["state"], row["agents"], row["holds"]) == ("alive", ["launcher"], None)
        assert "listening to heartbeats" in seen.err
        assert not (tmp_path / "nowhere.db").exists()
        table = (await asyncio.to_thread(run, "agents")).out
        assert "launcher" in table
        assert "alive" in table
        code, screen = await asyncio.to_thread(live, elsewhere)
        assert code == 0
        assert "launcher" in screen
        assert "leases are not known" in screen
    finally:
        await child.leave()


@pytest.mark.kafka
async def test_a_killed_agent_is_recovered_by_the_command_and_shown(
    kafka: KafkaServer, tmp_path: Path, run: Run
) -> None:
    scenario = Scenario(
        servers=kafka.bootstrap_servers, folder=str(tmp_path), pause=2.0, work_seconds=1.0
    )
    with ControlDatabase(scenario.control_url):
        pass
    env = environment(scenario, "supervisor-1")
    named = f"launch={HERE / 'launch.py'}:launch"
    child = Child(agent, scenario, "launcher")
    with Command(tmp_path, "supervise", "--workflow", named, "--json", env=env) as supervise:
        try:
            await child.until("ready")
            await asyncio.to_thread(supervise.until, "supervising")
            before = await command(env, "agents", "--once", "--json")
            assert {row["process_id"]: row["state"] for row in before.json} == {
                f"launcher-{child.pid}": "alive",
                "supervisor-1": "alive",
            }
            child.tell("run", "thread-1")
            while not scenario.ledger.exists():
                await asyncio.sleep(0.02)
        finally:
            child.kill()
        await asyncio.to_thread(supervise.until, '"recovery"')
        shown = await asyncio.to_thread(run, "agents", "--once", "--json", **env)
        table = await asyncio.to_thread(run, "agents", "--once")
        listed = await command(env, "incidents", "list", "--json")
        text = await command(env, "incidents", "show", listed.json[0]["incident_id"])
        outcome = await asyncio.to_thread(supervise.end)
    _see_the_recovery(outcome)
    by_name: dict[str, Any] = {row["process_id"].split("-")[0]: row for row in shown.json}
    assert by_name["launcher"]["state"] == "dead"
    assert by_name["launcher"]["agents"] == ["launcher"]
    assert by_name["supervisor"]["supervises"] is True
    assert "dead" in table.out
    (incident,) = listed.json
    assert (incident["thread_id"], incident["status"]) == ("thread-1", "recovered")
    assert incident["result"]["final_state"]["log"] == FINAL
    assert "resumed" in text.out
    assert " ms " in text.out


def _see_the_recovery(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err
    lost = next(line for line in outcome.lines if line["event"] == "lost")
    assert (lost["agent_id"], lost["thread_id"], lost["why"]) == ("launcher", "thread-1", "silent")
    recovered = next(line for line in outcome.lines if line["event"] == "recovery")
    assert recovered["status"] == "resumed"
    assert recovered["recovered"] is True
    assert outcome.lines[-1]["event"] == "ended"
