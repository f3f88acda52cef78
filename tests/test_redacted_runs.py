"""What is hidden of a run's input is in no store but its checkpoints, also when it is recovered."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langgraph.types import Command, interrupt
from owning import AGENT, GHOST, THREAD, State, asks, new_run, newest, settled, workflow

from langgraph_peerctx import current_effect, effect
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability import admission
from langgraph_peerctx.durability.admission import digest_of, is_redacted, packed_input
from langgraph_peerctx.durability.run_effects import running_loop
from langgraph_peerctx.errors import ConfigurationError, StoreBusyError
from langgraph_peerctx.owned import own_runs, owned
from langgraph_peerctx.persistence.incidents import ControlDatabase, Settlement
from langgraph_peerctx.persistence.runs import Run, RunInput
from langgraph_peerctx.protocol.tickets import EffectTicket
from langgraph_peerctx.reconstruction.reconstructor import recover_and_resume_workflow_async
from langgraph_peerctx.reconstruction.standing import storable

pytestmark = pytest.mark.usefixtures("_no_runtime_left")

CARD = "card 4111-1111"
GIVEN: Any = {"log": [CARD]}


@pytest.fixture
def named(settings: PeerContextSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a control database: any run is owned then."""
    monkeypatch.setenv("PEER_CONTEXT_CONTROL_DATABASE_URL", settings.control_url)


def hidden(_given: Any) -> Any:
    return {"log": ["***"]}


def as_it_is(given: Any) -> Any:
    return given


class Pays:
    """A workflow's second node, which pays, asks, and pays again; it keeps its tickets."""

    def __init__(self) -> None:
        self.tickets: list[EffectTicket] = []

    async def node(self, _state: State) -> State:
        await effect("first", self.pay)
        said = interrupt("again?")
        await effect("second", self.pay)
        return {"log": [said]}

    async def pay(self) -> None:
        self.tickets.append(current_effect())


@pytest.mark.parametrize(
    ("redact", "digest"), [(hidden, None), (as_it_is, digest_of(GIVEN)), (None, digest_of(GIVEN))]
)
async def test_a_ticket_has_a_digest_only_of_what_is_stored_as_it_was(
    control: ControlDatabase, redact: Any, digest: str | None
) -> None:
    del control
    pays = Pays()
    async with owned(workflow(pays.node), agent_id=AGENT, thread_id=THREAD, redact=redact) as run:
        await run.ainvoke(GIVEN)
        await run.ainvoke(Command(resume="yes"))
    assert [ticket.input_digest for ticket in pays.tickets] == [digest, digest]


async def test_an_input_without_a_form_that_stays_the_same_has_a_run_and_no_digest(
    control: ControlDatabase,
) -> None:
    class Thing:
        def model_dump(self) -> Any:
            return {"sku": "a"}

    pays = Pays()
    async with owned(workflow(pays.node), agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke({"log": [Thing()]})
    assert [ticket.input_digest for ticket in pays.tickets] == [None]
    assert newest(control).end_kind == "returned"


TASKS = [
    {"name": "first", "state": "finished", "error": None},
    {"name": "second", "state": "unfinished", "error": f"ValueError('{CARD}')"},
]
HIDDEN = [TASKS[0], {**TASKS[1], "error": "redacted"}]
ENDED = Settlement(
    status="open",
    end_kind="handed_over",
    error=f"failed: ValueError: cannot charge {CARD}",
    result={
        "status": "failed",
        "reasons": [
            "no_broker: nobody was asked",
            f"failed: ValueError: 'cannot charge {CARD}'",
            f"waiting_for_human: second asks '{CARD}?'",
        ],
        "final_state": {"log": [CARD]},
    },
    report={
        "checkpoint": {"step": 1, "tasks": TASKS},
        "steps": [
            {"step": "load_checkpoint", "detail": {"tasks": TASKS}},
            {"step": "resume_workflow", "detail": {"error": "ValueError"}},
        ],
    },
)


def admitted(control: ControlDatabase, *inputs: Any, redact: Any) -> Run:
    """Return the run that was given these, of which all but the first are answers."""
    app = workflow()
    values = [packed_input(app, given, redact) for given in inputs]
    control.admit(replace(new_run(app), given=RunInput(value=values[0])), GHOST)
    run = newest(control)
    assert isinstance(run, Run)
    return replace(run, inputs=tuple(RunInput(value=value) for value in values))


@pytest.mark.parametrize("inputs", [(GIVEN,), ({"log": ["***"]}, GIVEN)])
def test_of_a_redacted_runs_recovery_is_stored_how_it_ended_and_no_word_of_it(
    control: ControlDatabase, inputs: Any
) -> None:
    found = storable(admitted(control, *inputs, redact=hidden), ENDED)
    assert CARD not in repr(found)
    assert found == replace(
        ENDED,
        error="failed: ValueError",
        result={
            "status": "failed",
            "reasons": ["no_broker", "failed: ValueError", "waiting_for_human"],
            "final_state": None,
        },
        report={
            "checkpoint": {"step": 1, "tasks": HIDDEN},
            "steps": [
                {"step": "load_checkpoint", "detail": {"tasks": HIDDEN}},
                {"step": "resume_workflow", "detail": {"error": "ValueError"}},
            ],
        },
    )


@pytest.mark.parametrize(
    "ended",
    [
        Settlement(status="open", end_kind="handed_over", error="the recoverer leaves"),
        Settlement(status="recovered", end_kind="returned", report={"checkpoint": None}),
    ],
)
def test_an_end_that_tells_nothing_of_a_redacted_run_is_stored_whole(
    control: ControlDatabase, ended: Settlement
) -> None:
    assert storable(admitted(control, GIVEN, redact=hidden), ended) == ended


def test_of_any_other_run_all_is_stored(control: ControlDatabase) -> None:
    assert storable(admitted(control, GIVEN, redact=as_it_is), ENDED) is ENDED


async def lost_run(control: ControlDatabase, app: Any) -> None:
    """Leave what a process leaves that was killed before the first checkpoint of its run."""
    given = packed_input(app, GIVEN, hidden)
    control.admit(replace(new_run(app), given=RunInput(value=given)), GHOST)
    while control.lease_of(AGENT, THREAD).seconds_left > 0:  # type: ignore[union-attr]
        await asyncio.sleep(0.01)


async def recovered(app: Any) -> Any:
    return await recover_and_resume_workflow_async(
        workflow=app, agent_id=AGENT, thread_id=THREAD, initial_state=GIVEN
    )


async def test_a_recovery_returns_what_was_redacted_and_stores_nothing_of_it(
    control: ControlDatabase, tmp_path: Path
) -> None:
    app = workflow()
    await lost_run(control, app)
    result = await recovered(app)
    assert result["final_state"]["log"] == [CARD, "first", "second"]
    incident = await settled(control)
    assert incident.result is not None
    assert incident.result["status"] == "restarted"
    assert incident.result["final_state"] is None
    assert CARD not in in_files(tmp_path)


async def test_a_recovery_that_fails_stores_the_type_of_what_was_raised(
    control: ControlDatabase, tmp_path: Path
) -> None:
    def second(state: State) -> State:
        raise ValueError("cannot charge " + state["log"][0])

    app = workflow(second)
    await lost_run(control, app)
    result = await recovered(app)
    assert CARD in str(result["reasons"]), "whoever asked is told all"
    incident = await settled(control, "open")
    assert incident.result is not None
    assert "failed: ValueError" in incident.result["reasons"]
    assert newest(control).error == "failed: ValueError"
    assert CARD not in json.dumps([incident.result, incident.report])
    assert CARD not in in_files(tmp_path)


async def test_an_end_that_is_owed_tells_no_more_of_a_redacted_run(
    control: ControlDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_thread, refused = ControlDatabase.in_thread, []

    async def full_once(self: ControlDatabase, work: Any, **more: Any) -> Any:
        if not refused and "_settled" in repr(work):
            refused.append(work)
            raise StoreBusyError("no thread is free")
        return await in_thread(self, work, **more)

    monkeypatch.setattr(ControlDatabase, "in_thread", full_once)

    def second(state: State) -> State:
        raise ValueError("cannot charge " + state["log"][0])

    app = workflow(second)
    await lost_run(control, app)
    await recovered(app)
    assert refused, "the end was owed, and paid when the runtime was closed"
    incident = await settled(control, "open")
    assert incident.result is not None
    assert "failed: ValueError" in incident.result["reasons"]
    assert newest(control).error == "failed: ValueError"
    assert CARD not in in_files(tmp_path)


async def begun_anew(node: Any, redact: Any) -> Any:
    """Recover a run of which no record is left as that of a workflow whose runs are owned."""
    app = own_runs(workflow(node), agent_id=AGENT, redact=redact)
    return await recover_and_resume_workflow_async(
        workflow=app,
        agent_id=AGENT,
        thread_id=THREAD,
        initial_state=GIVEN,
        use_peer_context=False,
        despite_silence=True,
    )


@pytest.mark.parametrize(
    ("redact", "digest"), [(hidden, None), (as_it_is, digest_of(GIVEN)), (None, digest_of(GIVEN))]
)
async def test_a_run_of_which_no_record_is_left_is_redacted_as_its_workflow_is(
    control: ControlDatabase, tmp_path: Path, named: None, redact: Any, digest: str | None
) -> None:
    del named
    pays = Pays()

    async def second(_state: State) -> State:
        await effect("pay", pays.pay)
        return {"log": ["paid"]}

    result = await begun_anew(second, redact)
    assert (result["status"], result["final_state"]["log"]) == (
        "restarted",
        [CARD, "first", "paid"],
    )
    assert [ticket.input_digest for ticket in pays.tickets] == [digest]
    run = newest(control)
    assert run.end_kind == "returned"
    assert is_redacted(run) is (redact is hidden)
    incident = await settled(control)
    assert incident.result is not None
    assert (incident.result["final_state"] is None) is (redact is not None)
    assert (CARD in in_files(tmp_path)) is (redact is not hidden)


async def test_a_redacted_run_that_is_begun_anew_and_fails_stores_the_type_of_what_was_raised(
    control: ControlDatabase, tmp_path: Path, named: None
) -> None:
    del named

    def second(state: State) -> State:
        raise ValueError("cannot charge " + state["log"][0])

    result = await begun_anew(second, hidden)
    assert CARD in str(result["reasons"]), "whoever asked is told all"
    assert (newest(control).end_kind, newest(control).error) == ("raised", "ValueError")
    assert CARD not in in_files(tmp_path)


async def test_nothing_is_begun_anew_if_its_input_cannot_be_redacted(
    control: ControlDatabase, named: None
) -> None:
    del named

    def fails(given: Any) -> Any:
        raise ValueError(given)

    with pytest.raises(ConfigurationError, match="redact raised ValueError"):
        await begun_anew(None, fails)
    assert newest(control) is None


@pytest.mark.parametrize("redact", [None, as_it_is])
async def test_a_digest_is_of_what_was_given_whatever_nodes_have_made_of_it_since(
    control: ControlDatabase, redact: Any
) -> None:
    del control
    pays = Pays()

    def first(state: Any) -> State:
        state["log"][0]["paid"] = True
        return {"log": []}

    app = workflow(pays.node, first=first)
    async with owned(app, agent_id=AGENT, thread_id=THREAD, redact=redact) as run:
        await run.ainvoke({"log": [{"sku": "boots"}]})
    assert [t.input_digest for t in pays.tickets] == [digest_of({"log": [{"sku": "boots"}]})]


async def test_a_digest_is_taken_once_beside_the_loop_and_of_a_run_without_effects_never(
    control: ControlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []

    def watched(given: Any) -> str | None:
        taken.append(running_loop())
        return digest_of(given)

    monkeypatch.setattr(admission, "digest_of", watched)
    pays = Pays()
    async with owned(workflow(asks), agent_id=AGENT, thread_id="without") as run:
        await run.ainvoke(GIVEN)
        await run.ainvoke(Command(resume="yes"))
    assert control.newest_run(AGENT, "without").end_kind == "returned"  # type: ignore[union-attr]
    assert taken == []

    async def second(state: State) -> State:
        await asyncio.gather(*(effect(f"{n}", pays.pay) for n in range(4)))
        return await pays.node(state)

    async with owned(workflow(second), agent_id=AGENT, thread_id=THREAD) as run:
        await run.ainvoke(GIVEN)
        assert taken == [None]
        await run.ainvoke(Command(resume="yes"))
    assert taken == [None, None], "an answer's is taken anew"
    assert {ticket.input_digest for ticket in pays.tickets} == {digest_of(GIVEN)}
    assert len(pays.tickets) == 6


def in_files(folder: Path) -> str:
    """Return all that is stored in the databases of a folder, as text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return "".join(path.read_bytes().decode(errors="replace") for path in files)


@pytest.mark.parametrize(("redact", "digest"), [(hidden, None), (None, digest_of(GIVEN))])
async def test_a_recovery_by_hand_of_a_run_that_has_ended_sends_no_digest_either(
    control: ControlDatabase, redact: Any, digest: str | None
) -> None:
    tickets: list[EffectTicket] = []
    fails = [True]

    async def pay(_state: State) -> State:
        if fails.pop() if fails else False:
            raise ValueError("no paper")
        await effect("pay", keep)
        return {"log": ["paid"]}

    async def keep() -> None:
        tickets.append(current_effect())

    app = workflow(pay)
    async with owned(app, agent_id=AGENT, thread_id=THREAD, redact=redact) as run:
        with pytest.raises(ValueError, match="no paper"):
            await run.ainvoke(GIVEN)
    assert newest(control).end_kind == "raised"
    result = await recover_and_resume_workflow_async(
        workflow=app,
        agent_id=AGENT,
        thread_id=THREAD,
        initial_state=GIVEN,
        use_peer_context=False,
    )
    assert result["status"] == "resumed"
    assert [ticket.input_digest for ticket in tickets] == [digest]
