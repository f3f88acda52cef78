"""`peerctx recover` and `peerctx incidents`, on SQLite and without a broker."""

import json
import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import PEERCTX, Outcome, Run
from commands import flows

from langgraph_peerctx.cli import _value
from langgraph_peerctx.durability.admission import packed
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.runs import NewRun, Owner, RunInput
from langgraph_peerctx.reconstruction import recoverer

FLOWS = Path(__file__).with_name("flows.py")
Lose = Callable[..., None]
Recover = Callable[..., Outcome]


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlDatabase:
    monkeypatch.setenv("FLOW_THREADS", f"{tmp_path}/threads.db")
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "always")
    return ControlDatabase(f"sqlite:///{tmp_path}/control.db")


@pytest.fixture
def lose(control: ControlDatabase) -> Lose:
    """Leave a run behind that nobody works at, or whose owner may be alive."""

    def lose(*log: str, is_held: bool = False, workflow: str = "flow") -> None:
        given = RunInput(value=packed(flows.graph, {"log": list(log)}, name="input"))
        control.admit(
            NewRun(
                run_id="run",
                agent_id="agent",
                thread_id="thread",
                workflow=workflow,
                given=given,
            ),
            Owner(owner_id="owner", incarnation="life", ttl_seconds=60),
        )
        if not is_held:
            control.hand_over("life")

    return lose


@pytest.fixture
def recover(run: Run) -> Recover:
    def recover(*options: str, attribute: str = "on_sqlite") -> Outcome:
        named = ("--workflow", f"flow={FLOWS}:{attribute}")
        return run("recover", "agent", "thread", *named, *options)

    return recover


def test_a_thread_is_recovered_by_hand_and_a_second_time_it_was_so_elsewhere(
    lose: Lose, recover: Recover, run: Run
) -> None:
    lose("in")
    first = recover("--json")
    assert first.code == 0
    assert first.json["status"] == "restarted"
    assert first.json["final_state"]["log"] == ["in", "worked"]
    assert first.json["degraded"]  # mock mode
    again = recover("--json")
    assert (again.code, again.json["status"]) == (0, "recovered_elsewhere")
    (incident,) = run("incidents", "list", "--json").json
    assert (incident["status"], incident["attempts"]) == ("recovered", 1)
    said = recover()
    assert "recovered_elsewhere" in said.out
    assert '"log": ["in", "worked"]' in said.out


def test_a_thread_that_nobody_knows_needs_nothing(
    recover: Recover, control: ControlDatabase
) -> None:
    control.close()
    outcome = recover("--json")
    assert (outcome.code, outcome.json["status"]) == (0, "nothing_to_recover")


def test_a_thread_whose_owner_may_be_alive_is_left_alone(lose: Lose, recover: Recover) -> None:
    lose("in", is_held=True)
    outcome = recover("--json")
    assert (outcome.code, outcome.json["status"]) == (4, "unreachable")
    assert "owner holds the thread's lease" in outcome.json["reasons"][0]


def test_a_recovery_that_fails_says_so_and_is_not_begun_again_at_once(
    lose: Lose, recover: Recover, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoverer, "FIRST_RETRY_SECONDS", 60)
    lose("fail")
    outcome = recover("--json")
    assert (outcome.code, outcome.json["status"]) == (1, "failed")
    (incident,) = run("incidents", "list", "--status", "open", "--json").json
    assert incident["next_attempt_at"] is not None
    assert (again := recover("--json")).code == 4
    assert again.json["status"] == "recovering_elsewhere"


def test_a_run_of_another_workflow_is_refused(lose: Lose, recover: Recover) -> None:
    lose("in", workflow="other")
    outcome = recover()
    assert outcome.code == 2
    assert "the run is of workflow 'other'" in outcome.err


def test_an_illegal_agent_is_refused(run: Run) -> None:
    outcome = run("recover", "a/b", "thread", "--workflow", f"flow={FLOWS}:graph")
    assert outcome.code == 2
    assert "agent_id" in outcome.err


@pytest.mark.parametrize("how", ["json", "text"])
def test_a_question_is_shown_answered_and_the_recovery_goes_on(
    lose: Lose, recover: Recover, run: Run, how: str
) -> None:
    lose("in")
    asked = recover("--json", attribute="approved_on_sqlite")
    assert (asked.code, asked.json["status"]) == (3, "waiting_for_human")
    (incident,) = run("incidents", "list", "--status", "waiting_for_human", "--json").json
    short = incident["incident_id"][:8]
    shown = run("incidents", "show", short)
    assert "Answer true or false" in shown.out
    assert f"peerctx recover --answer {short} VALUE" in shown.out
    answered = run("recover", "--answer", short, "true" if how == "json" else "yes", "--json")
    assert answered.code == 0
    assert answered.json["answer"]["value"] == (True if how == "json" else "yes")
    ended = recover("--json", attribute="approved_on_sqlite")
    assert (ended.code, ended.json["status"]) == (0, "restarted")
    refused = run("recover", "--answer", short, "true")
    assert refused.code == 2
    assert "is not waiting for an answer: it is recovered" in refused.err


def test_a_dead_letter_is_shown_with_its_steps_and_redriven(
    lose: Lose, recover: Recover, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MAX_ATTEMPTS", "1")
    lose("fail")
    assert recover().code == 1
    assert recover("--json").json["status"] == "dead_letter"
    (incident,) = run("incidents", "list", "--status", "dead_letter", "--json").json
    short = incident["incident_id"][:8]
    shown = run("incidents", "show", short).out
    assert "as it was told to" in shown
    assert f"peerctx incidents redrive {short}" in shown
    steps = {line.split()[0] for line in shown.splitlines() if " ms " in line}
    assert {"load_checkpoint", "reconstruct"} & steps or len(steps) > 2, shown
    listed = run("incidents", "list")
    assert short in listed.out
    assert "dead_letter" in listed.out
    redriven = run("incidents", "redrive", short)
    assert redriven.code == 0
    assert "is open again" in redriven.out
    assert run("incidents", "show", short, "--json").json["attempts"] == 0
    assert recover("--json").json["status"] in {"failed", "dead_letter"}


@pytest.mark.parametrize(
    "command",
    [
        ("incidents", "show", "nothing"),
        ("incidents", "redrive", "nothing"),
        ("recover", "--answer", "nothing", "1"),
    ],
)
def test_an_incident_that_is_not_there_is_a_sentence(
    run: Run, control: ControlDatabase, command: tuple[str, ...]
) -> None:
    control.close()
    outcome = run(*command)
    assert outcome.code == 2
    assert "there is no incident 'nothing'" in outcome.err


def test_a_beginning_that_two_incidents_share_names_none(
    lose: Lose, recover: Recover, run: Run, tmp_path: Path
) -> None:
    lose("in")
    recover()
    database = sqlite3.connect(tmp_path / "control.db")
    with database:
        database.execute("UPDATE peerctx_incidents SET incident_id = 'abc1'")
        database.execute("CREATE TABLE other AS SELECT * FROM peerctx_incidents")
        database.execute("UPDATE other SET incident_id = 'abc2', lost_epoch = 99")
        database.execute("INSERT INTO peerctx_incidents SELECT * FROM other")
    database.close()
    assert run("incidents", "show", "abc").code == 2
    assert run("incidents", "show", "abc2", "--json").json["lost_epoch"] == 99


def test_without_a_control_database_there_is_nothing_to_look_at(run: Run, tmp_path: Path) -> None:
    for command in (("list",), ("show", "x"), ("redrive", "x")):
        outcome = run("incidents", *command)
        assert outcome.code == 2
        assert "there is no control database yet" in outcome.err
        assert f"{tmp_path}/control.db" in outcome.err
    assert not (tmp_path / "control.db").exists()


def test_a_control_database_in_a_folder_that_is_not_there_is_named(
    run: Run, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/nowhere/control.db"
    outcome = run("incidents", "list", PEER_CONTEXT_CONTROL_DATABASE_URL=url)
    assert outcome.code == 2
    assert f"{tmp_path}/nowhere does not exist" in outcome.err


@pytest.mark.parametrize("column", [80, 120])
def test_incidents_are_read_in_a_narrow_terminal(
    lose: Lose, recover: Recover, run: Run, column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(column))
    lose("in", "x" * 150)
    assert recover("--json", attribute="approved_on_sqlite").code == 3
    listed = run("incidents", "list").out
    assert {"waiting_for_human", "thread"} <= set(listed.split())
    (incident,) = run("incidents", "list", "--json").json
    shown = run("incidents", "show", incident["incident_id"][:8]).out
    table, _, values = shown.partition("\nquestion\n")
    assert all(len(line) <= column for line in table.splitlines())
    assert "waiting_for_human" in table
    question = values[: values.index("\n}\n") + 3]
    assert json.loads(question) == incident["question"]


def test_an_incident_of_a_workflow_that_nobody_supervises_says_what_to_do(
    lose: Lose, control: ControlDatabase, run: Run
) -> None:
    lose("in", workflow="other")
    lost = control.open_run("agent", "thread")
    assert lost is not None
    said = {"status": "unknown_workflow", "reasons": ["nobody supervises 'other'"]}
    control.note(lost, said, again_seconds=60)
    for command in (("list",), ("show", run("incidents", "list", "--json").json[0]["incident_id"])):
        out = run("incidents", *command).out
        assert "unknown_workflow: no supervisor that saw it knows its workflow" in out
        assert "peerctx supervise --workflow" in out


def test_what_a_workflow_prints_is_no_part_of_the_answer(
    lose: Lose, control: ControlDatabase, tmp_path: Path, recover: Recover, nobody: str
) -> None:
    lose("in")
    control.close()
    assert recover("--json", attribute="loud_on_sqlite").json["status"] == "restarted"
    lose_again = NewRun(
        run_id="again",
        agent_id="agent",
        thread_id="thread-2",
        workflow="flow",
        given=RunInput(value=packed(flows.graph, {"log": ["in"]}, name="input")),
    )
    with ControlDatabase(f"sqlite:///{tmp_path}/control.db") as again:
        again.admit(lose_again, Owner(owner_id="owner", incarnation="life", ttl_seconds=60))
        again.hand_over("life")
    named = f"flow={FLOWS}:loud_on_sqlite"
    done = subprocess.run(
        [PEERCTX, "recover", "agent", "thread-2", "--json", "--workflow", named],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(FLOWS.parents[1]), "KAFKA_BOOTSTRAP_SERVERS": nobody},
    )
    assert json.loads(done.stdout)["status"] == "restarted"
    assert {"a node prints", "a child prints"} <= set(done.stderr.splitlines())


REPORT: dict[str, Any] = {
    "agent_id": "agent",
    "thread_id": "thread",
    "steps": [],
    "checkpoint": {"checkpoint_id": "c1"},
    "coverage": {"asked": ["host-1", "host-2"], "answered": ["host-1"], "silent": ["host-2"]},
    "conflicts": [
        {
            "interaction_id": "e9",
            "versions": {
                "b": {"kind": "order", "payload": 1, "occurred_at": "2030-01-01T00:00:01+00:00"}
            },
        }
    ],
    "in_doubt": [],
    "provenance": [
        {
            "fact": "state.log",
            "source": "checkpoint",
            "event_id": "c1",
            "occurred_at": "2030-01-01T00:00:00+00:00",
        }
    ],
    "effects": [
        {
            "key": "k1",
            "name": "charge",
            "peer": "payments",
            "position": "p",
            "status": "done",
            "source": "peer",
            "done_at": "2030-01-01T00:00:02+00:00",
        }
    ],
    "times": {
        "last_heartbeat_at": "2030-01-01T00:00:00.100000+00:00",
        "known_at": "2030-01-01T00:00:04.100000+00:00",
        "why": "silent",
        "claimed_at": "2030-01-01T00:00:04.200000+00:00",
        "requested_at": "2030-01-01T00:00:04.300000+00:00",
        "answers": [
            {
                "responder_id": "host-1",
                "agents": {"b\x1b[2J": "context"},
                "at": "2030-01-01T00:00:04.350000+00:00",
                "after_seconds": 0.05,
            }
        ],
        "reconstructed_at": None,
        "resumed_at": "2030-01-01T00:00:05Z",
        "first_checkpoint_at": None,
        "ended_at": "2030-01-01T00:00:06.100000+00:00",
        "clocks": "several",
        "took": {
            "to_known": 4.0,
            "to_claimed": 0.1,
            "to_answers": 0.15,
            "to_resumed": 0.05,
            "to_first_checkpoint": None,
            "total": 6.0,
        },
    },
}


@pytest.fixture
def reported(lose: Lose, recover: Recover, tmp_path: Path) -> Callable[[Any], None]:
    """Recover a thread, and let its report be this one."""
    lose("in")
    assert recover("--json").code == 0

    def reported(report: Any) -> None:
        database = sqlite3.connect(tmp_path / "control.db")
        with database:
            database.execute("UPDATE peerctx_incidents SET report = ?", [json.dumps(report)])
        database.close()

    return reported


def shown(run: Run, *options: str) -> list[list[str]]:
    """The words of each line."""
    (incident,) = run("incidents", "list", "--json").json
    outcome = run("incidents", "show", incident["incident_id"], *options)
    assert outcome.code == 0
    return [line.split() for line in outcome.out.splitlines()]


def test_an_incidents_times_are_read_with_what_each_part_took(
    reported: Callable[[Any], None], run: Run
) -> None:
    reported(REPORT)
    lines = shown(run)
    begin = lines.index(["moment", "at", "(UTC)", "took"])
    assert lines[begin + 1 : begin + 10] == [
        ["last", "heartbeat", "00:00:00.100"],
        ["known", "(silent)", "00:00:04.100", "4.000", "s"],
        ["claimed", "00:00:04.200", "100.0", "ms"],
        ["asked", "00:00:04.300"],
        ["last", "answer", "00:00:04.350", "150.0", "ms"],
        ["resumed", "00:00:05.000", "50.0", "ms"],
        ["ended", "00:00:06.100"],
        ["in", "all", "6.000", "s"],
        ["these", "are", "the", "clocks", "of", "several", "hosts"],
    ]


def test_an_incident_shows_who_answered_what_became_of_effects_and_where_facts_come_from(
    reported: Callable[[Any], None], run: Run
) -> None:
    reported(REPORT)
    lines = shown(run)
    assert ["host-1", "50.0", "ms", "b\ufffd[2J:", "context"] in lines
    coverage = "coverage: not complete; asked host-1, host-2; answered host-1; silent host-2"
    assert coverage.split() in lines
    assert ["charge", "done", "peer:", "payments", "2030-01-01", "00:00:02"] in lines
    assert ["event.e9", "order", "1", "b", "2030-01-01", "00:00:01"] in lines
    assert ["restored:", "1", "from", "checkpoint;", "--all", "names", "each"] in lines
    everything = shown(run, "--all")
    assert ["state.log", "checkpoint", "c1", "2030-01-01", "00:00:00"] in everything


def test_json_has_the_report_as_it_is(reported: Callable[[Any], None], run: Run) -> None:
    reported(REPORT)
    (incident,) = run("incidents", "list", "--json").json
    assert run("incidents", "show", incident["incident_id"], "--json").json["report"] == REPORT


def test_an_incident_of_an_earlier_version_is_shown_without_what_it_lacks(
    reported: Callable[[Any], None], run: Run
) -> None:
    old = {key: value for key, value in REPORT.items() if key not in {"times", "effects"}}
    reported({**old, "coverage": None})
    lines = shown(run)
    assert ["moment", "at", "(UTC)", "took"] not in lines
    assert ["restored:", "1", "from", "checkpoint;", "--all", "names", "each"] in lines
    reported({})
    assert shown(run)


def test_no_incidents_is_said_and_an_empty_list(run: Run, control: ControlDatabase) -> None:
    control.close()
    assert run("incidents", "list").out == "no incidents\n"
    assert run("incidents", "list", "--json").json == []


@pytest.mark.parametrize(
    "command",
    [
        ("recover",),
        ("recover", "agent"),
        ("recover", "agent", "thread", "--answer", "id", "1"),
        ("recover", "--answer", "id"),
        ("incidents", "list", "--status", "lost"),
        ("incidents", "list", "--limit", "0"),
        ("sentinel", "--idle-seconds", "0"),
    ],
)
def test_a_command_line_that_is_wrong_is_exit_code_two(run: Run, command: tuple[str, ...]) -> None:
    assert run(*command).code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("-5", -5),
        ('{"approve": true}', {"approve": True}),
        ("yes, go on", "yes, go on"),
        ("NaN", "NaN"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_an_answer_is_json_or_plain_text(text: str, value: object) -> None:
    assert _value(text) == value


def test_every_commands_help_says_its_exit_codes(run: Run) -> None:
    for command in ("doctor", "agents", "supervise", "recover", "sentinel"):
        assert "Exit codes" in run(command, "--help").out
    assert json.dumps(run("--help").out).count("Exit codes") == 1
