"""What a supervisor says, and how a command that runs on is ended."""

import asyncio
import json
import logging
import os
import signal
from datetime import UTC, datetime
from typing import Any

import pytest

from langgraph_peerctx.commands import printing
from langgraph_peerctx.commands.supervising import _Lines, _notices, _pass_on, _Sentences
from langgraph_peerctx.commands.until_told import _until_told
from langgraph_peerctx.reconstruction import failure_detector
from langgraph_peerctx.reconstruction.failure_detector import AgentFailure

FAILURE = AgentFailure(
    agent_id="agent",
    thread_id="[thread]",
    run_id="run",
    workflow="flow",
    epoch=1,
    process_id="host-1",
    incarnation="life",
    why="silent",
    noticed_at=datetime(2030, 1, 1, tzinfo=UTC),
    silent_seconds=4.2,
    by="heartbeats",
)
RESULT: Any = {
    "recovered": True,
    "status": "resumed",
    "peer_context_used": False,
    "degraded": True,
    "reasons": ["no peer answered"],
    "final_state": {"secret": "of the workflow"},
    "incident": {"incident_id": "one", "elapsed_seconds": 0.25},
}


def test_people_read_what_was_lost_and_how_it_was_recovered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell = _Sentences()
    tell.began(["flow"], 1)
    tell.began(["flow"], 0)
    tell.noticed("recovery is on hold")
    tell.failed(FAILURE)
    tell.recovered(FAILURE, RESULT)
    assert capsys.readouterr().out.splitlines() == [
        "supervising flow; 1 run is open now; SIGTERM or Ctrl-C ends it",
        "supervising flow; 0 runs are open now; SIGTERM or Ctrl-C ends it",
        "notice     recovery is on hold",
        "lost       [thread] of agent: silent, owned by host-1, silent for 4.2 s",
        "recovery   [thread] of agent: resumed, degraded, 0.250 s",
        "           no peer answered",
    ]


def test_programs_read_one_object_a_line_without_the_workflows_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell = _Lines()
    tell.began(["flow"], 3)
    tell.noticed("recovery is on hold")
    tell.failed(FAILURE)
    tell.recovered(FAILURE, RESULT)
    tell.ended()
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines] == [
        "supervising",
        "notice",
        "lost",
        "recovery",
        "ended",
    ]
    assert lines[0]["open_runs"] == 3
    assert lines[1]["message"] == "recovery is on hold"
    assert lines[2]["noticed_at"] == "2030-01-01T00:00:00Z"
    assert (lines[3]["incident_id"], lines[3]["reasons"]) == ("one", ["no peer answered"])
    assert "secret" not in out
    assert all(datetime.fromisoformat(line["at"]) for line in lines)


class Told(_Sentences):
    def __init__(self) -> None:
        self.said: list[str] = []

    def noticed(self, said: str) -> None:
        self.said.append(said)


async def test_what_holds_recoveries_up_is_told_once_and_so_is_its_end() -> None:
    logger, told = logging.getLogger(failure_detector.__name__), Told()
    async with _notices() as notices:
        passing = asyncio.create_task(_pass_on(notices, told))
        logger.info("all is well, as it was")
        logger.info("run %r is lost", "run", extra={"thread_id": "thread"})
        await asyncio.to_thread(logger.warning, "recovery is on %s", "hold")
        logger.info("recovery goes on")
        logger.info("recovery goes on and on")
        await asyncio.sleep(0.05)
        passing.cancel()
        await asyncio.wait({passing})
    logger.warning("this is for others")
    assert told.said == ["recovery is on hold", "recovery goes on"]
    assert logger.level == logging.NOTSET


async def test_a_fault_of_ours_stays_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with _notices() as notices:
        logging.getLogger(failure_detector.__name__).error("a look failed")
    assert notices.empty()
    assert "a look failed" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_does_not_disturb_the_orderly_end(number: signal.Signals) -> None:
    done = []

    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.05)
            done.append("in order")

    await _until_told(work)
    assert done == ["in order"]


async def test_what_ends_by_itself_or_fails_needs_no_signal() -> None:
    async def work() -> None:
        raise OSError("as told")

    with pytest.raises(OSError, match="as told"):
        await _until_told(work)
    await _until_told(lambda: asyncio.sleep(0, None))


async def test_a_cancellation_from_within_is_not_taken_for_a_signal() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await _until_told(work)


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "?"), (0.04, "0.0 s"), (99.94, "99.9 s"), (4_000.4, "4000 s")]
)
def test_how_long_ago_is_said_with_three_digits(seconds: float | None, said: str) -> None:
    assert printing.ago(seconds) == said


def test_long_values_are_cut() -> None:
    assert printing.cut({"a": "ä" * 50}, 10) == '{"a": "ää…'
