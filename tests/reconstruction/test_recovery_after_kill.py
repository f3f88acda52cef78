"""Workflows killed by SIGKILL in a process of their own, and recovered in this one."""

import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forking import exit_code_of
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from reconstruction.child import main
from reconstruction.fake_runtime import FakeRuntime
from reconstruction.workflows import WORKFLOWS, Script

from langgraph_peerctx.reconstruction.reconstructor import (
    RecoveryResult,
    recover_and_resume_workflow_async,
)


@dataclass
class Case:
    """A workflow, and what is left of it on disk."""

    workflow: str
    place: Path

    @property
    def ledger(self) -> Path:
        return self.place / "ledger"

    @property
    def input(self) -> Any:
        return ["in"] if self.workflow == "functional" else {"log": ["in"]}

    @property
    def visits(self) -> Counter[str]:
        return Script(ledger=self.ledger).visits()

    def run(
        self,
        kill_in: str | None,
        *,
        durability: str = "sync",
        kill_on_visit: int = 1,
        after_writes: int = 0,
        after_checkpoints: int = 0,
        resume: str | None = None,
        recover: bool = False,
    ) -> None:
        """Run it in a child process, which must die exactly if it is told to."""
        order = {
            "workflow": self.workflow,
            "database": str(self.place / "checkpoints.db"),
            "ledger": str(self.ledger),
            "durability": durability,
            "kill_in": kill_in,
            "kill_on_visit": kill_on_visit,
            "after_writes": after_writes,
            "after_checkpoints": after_checkpoints,
            "input": self.input,
            "resume": resume,
            "recover": recover,
        }
        assert exit_code_of(main, order) == (-signal.SIGKILL if kill_in else 0)

    def recover_and_die(self, kill_in: str, *, kill_on_visit: int) -> None:
        """Recover it in a child process that dies as well."""
        self.run(kill_in, kill_on_visit=kill_on_visit, recover=True)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Any]:
        database = str(self.place / "checkpoints.db")
        async with AsyncSqliteSaver.from_conn_string(database) as saver:
            yield WORKFLOWS[self.workflow](Script(ledger=self.ledger), saver)

    async def recover(self, **options: Any) -> RecoveryResult:
        async with self.opened() as workflow:
            return await recover_and_resume_workflow_async(
                workflow=workflow,
                agent_id="product-agent",
                thread_id="thread-1",
                runtime=FakeRuntime(),
                **options,
            )

    async def uninterrupted(self) -> Any:
        """Return what the same workflow ends with when nobody kills it."""
        script = Script(ledger=self.place / "other-ledger")
        async with AsyncSqliteSaver.from_conn_string(":memory:") as saver:
            workflow = WORKFLOWS[self.workflow](script, saver)
            return await workflow.ainvoke(self.input, {"configurable": {"thread_id": "other"}})


def without_facts(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {key: value for key, value in state.items() if key != "peer_context"}


@dataclass
class Kill:
    """Where a workflow dies, and how often each node will have begun in the end."""

    workflow: str
    kill_in: str
    visits: dict[str, int]
    kill_on_visit: int = 1
    after_writes: int = 0

    def __str__(self) -> str:
        return f"{self.workflow}-in-{self.kill_in}"


KILLS = [
    Kill("line", "first", {"first": 2, "second": 1, "third": 1}),
    Kill("line", "second", {"first": 1, "second": 2, "third": 1}),
    Kill("line", "third", {"first": 1, "second": 1, "third": 2}),
    # START's writes and left's
    Kill("fan_out", "right", {"left": 1, "right": 2, "join": 1}, after_writes=2),
    Kill("fan_out", "join", {"left": 1, "right": 1, "join": 2}),
    Kill(
        "map_reduce",
        "work-2",
        {"plan": 1, "work-0": 1, "work-1": 1, "work-2": 2, "work-3": 1, "reduce": 1},
        # START's and plan's writes, and those of the three other workers
        after_writes=5,
    ),
    Kill("loop", "turn", {"turn": 4, "done": 1}, kill_on_visit=2),
    Kill("subgraph", "inner-2", {"inner-1": 1, "inner-2": 2, "inner-3": 1, "after": 1}),
    Kill("remembering_subgraph", "inner-2", {"inner-1": 1, "inner-2": 2, "inner-3": 1, "after": 1}),
]


@pytest.mark.parametrize("kill", KILLS, ids=str)
async def test_a_killed_workflow_ends_as_it_would_have_ended(kill: Kill, tmp_path: Path) -> None:
    case = Case(kill.workflow, tmp_path)
    case.run(kill.kill_in, kill_on_visit=kill.kill_on_visit, after_writes=kill.after_writes)

    result = await case.recover()

    assert result["status"] == "resumed"
    assert result["recovered"]
    assert result["peer_context_used"]
    assert result["final_state"]["peer_context"]["order-1"]["told_by"] == ["inventory-agent"]
    assert without_facts(result["final_state"]) == without_facts(await case.uninterrupted())
    assert case.visits == kill.visits


async def test_an_unsaved_subgraph_runs_again_whole(tmp_path: Path) -> None:
    case = Case("unsaved_subgraph", tmp_path)
    case.run("inner-2", durability="async", after_checkpoints=2)

    result = await case.recover()

    assert result["status"] == "resumed"
    assert without_facts(result["final_state"]) == without_facts(await case.uninterrupted())
    assert case.visits == {"inner-1": 2, "inner-2": 2, "inner-3": 1, "after": 1}


async def test_a_functional_workflow_keeps_its_finished_tasks(tmp_path: Path) -> None:
    case = Case("functional", tmp_path)
    case.run("step-2", after_writes=1)

    result = await case.recover()

    assert result["status"] == "resumed"
    assert result["final_state"] == await case.uninterrupted()
    assert case.visits == {"step-1": 1, "step-2": 2, "step-3": 1}
    assert not result["peer_context_used"]
    assert [reason.split(":")[0] for reason in result["reasons"]] == ["no_channel"]


@pytest.mark.parametrize("durability", ["sync", "async"])
async def test_what_was_killed_beside_a_question_is_finished_and_the_question_stays(
    tmp_path: Path, durability: str
) -> None:
    case = Case("question_beside_work", tmp_path)
    # START's writes and the question, on the input's checkpoint and the first step's
    case.run("work", after_writes=2, after_checkpoints=2, durability=durability)

    result = await case.recover()

    assert (result["status"], result["recovered"]) == ("waiting_for_human", True)
    assert case.visits["work"] == 2
    again = await case.recover()
    assert (again["status"], again["recovered"]) == ("waiting_for_human", False)
    assert case.visits["work"] == 2


async def test_an_answered_question_is_not_asked_again(tmp_path: Path) -> None:
    case = Case("two_questions", tmp_path)
    case.run(None)
    case.run("between", resume="yes", after_writes=1)

    result = await case.recover()

    assert (result["status"], result["recovered"]) == ("waiting_for_human", True)
    assert "second?" not in result["reasons"]
    assert case.visits == {"ask": 3, "between": 2}


async def test_a_second_question_is_not_answered_by_the_first_answer(tmp_path: Path) -> None:
    case = Case("two_questions", tmp_path)
    case.run(None)
    case.run(None, resume="yes")

    result = await case.recover()

    assert (result["status"], result["recovered"]) == ("waiting_for_human", False)
    assert case.visits["behind"] == 0


async def test_a_second_answer_is_read_after_a_kill(tmp_path: Path) -> None:
    case = Case("two_questions", tmp_path)
    case.run(None)
    case.run(None, resume="yes")
    case.run("behind", resume="no", after_writes=1)

    result = await case.recover()

    assert result["status"] == "resumed"
    assert result["final_state"]["log"] == ["in", "yes no"]


async def test_a_second_answer_equal_to_the_first_is_asked_for_again(tmp_path: Path) -> None:
    case = Case("two_questions", tmp_path)
    case.run(None)
    case.run(None, resume="yes")
    case.run("behind", resume="yes", after_writes=1)

    # What is stored is the same as if the second question had not been answered.
    assert (await case.recover())["status"] == "waiting_for_human"


async def test_three_deaths_in_one_superstep_deliver_the_facts_once(tmp_path: Path) -> None:
    case = Case("fan_out", tmp_path)
    case.run("right", after_writes=2)
    for visit in (2, 3):
        case.recover_and_die("right", kill_on_visit=visit)

    result = await case.recover()

    assert result["status"] == "resumed"
    assert result["peer_context_used"]
    assert list(result["final_state"]["peer_context"]) == ["order-1"]
    assert case.visits == {"left": 1, "right": 4, "join": 1}


async def test_exit_durability_restarts_from_the_initial_state(tmp_path: Path) -> None:
    case = Case("line", tmp_path)
    case.run("third", durability="exit")

    nothing = await case.recover()
    result = await case.recover(initial_state=case.input)

    assert nothing["status"] == "nothing_to_recover"
    assert result["status"] == "restarted"
    assert without_facts(result["final_state"]) == without_facts(await case.uninterrupted())
    assert case.visits == {"first": 2, "second": 2, "third": 2}


async def test_async_durability_ends_as_it_would_have_ended(tmp_path: Path) -> None:
    case = Case("line", tmp_path)
    # START's, first's and second's, and all checkpoints: the input's and one a step
    case.run("third", durability="async", after_writes=3, after_checkpoints=4)

    result = await case.recover()

    assert result["status"] == "resumed"
    assert without_facts(result["final_state"]) == without_facts(await case.uninterrupted())
    assert case.visits == {"first": 1, "second": 1, "third": 2}
