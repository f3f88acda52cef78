"""What docs/operating.md says is true."""

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
from command_line import Run

from langgraph_peerctx.commands.recovering import _CODES
from langgraph_peerctx.persistence.incidents import IncidentStatus
from langgraph_peerctx.reconstruction.failure_detector import State
from langgraph_peerctx.reconstruction.resume import RecoveryStatus
from langgraph_peerctx.workflow_loading import declared, opened

TEXT = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def rows_after(heading: str) -> list[list[str]]:
    table = TEXT.split(heading, 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row]


async def test_the_workflow_and_the_langgraph_json_that_it_shows_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("THREADS", f"{tmp_path}/threads.db")
    (python,), (config,) = blocks("python"), blocks("json")
    (tmp_path / "flows.py").write_text(python)
    (tmp_path / "langgraph.json").write_text(config)
    (tmp_path / ".env").touch()
    assert json.loads(config)["peerctx"]["workflows"] == {"launch": "./flows.py:launch"}
    for told in (declared([], None), declared(["launch=flows.py:launch"], None)):
        told.prepare()
        async with opened(told.places) as workflows:
            final = await workflows["launch"].workflow.ainvoke(
                {"messages": []}, {"configurable": {"thread_id": "thread"}}
            )
            assert final == {"messages": []}


def test_each_state_and_each_status_is_explained() -> None:
    states = rows_after("| state | what it means | what happens |\n| --- | --- | --- |\n")
    assert [row[0].strip("`") for row in states] == list(get_args(State))
    statuses = rows_after("| status | what it means | what to do |\n| --- | --- | --- |\n")
    assert [row[0].strip("`") for row in statuses] == list(get_args(IncidentStatus))


def test_the_exit_code_of_each_result_is_the_real_one() -> None:
    (row,) = [
        r for r in rows_after("| --- | --- | --- | --- | --- | --- |\n") if r[0] == "`recover`"
    ]
    told = {
        status: code for code, cell in enumerate(row[1:]) for status in re.findall(r"`(\w+)`", cell)
    }
    assert told == {status: _CODES.get(status, 1) for status in get_args(RecoveryStatus)}


def test_the_commands_that_it_shows_exist(run: Run) -> None:
    named = set(re.findall(r"peerctx ((?:incidents )?[a-z]+)(?= |`|$|\])", TEXT, re.MULTILINE))
    assert len(named) > 6
    for command in named - {"incidents"}:
        assert run(*command.split(), "--help").code == 0, command
