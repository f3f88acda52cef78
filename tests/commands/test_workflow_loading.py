"""Workflows that a command is told of: every form it takes, and every fault it names."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from commands import flows

from langgraph_peerctx.durability.workflow import checkpointer_of
from langgraph_peerctx.errors import ConfigurationError, StoreError
from langgraph_peerctx.workflow_loading import declared, opened

FLOWS = Path(__file__).with_name("flows.py")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, and nothing that stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())


def written(config: Any, name: str = "langgraph.json") -> Path:
    path = Path.cwd() / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    "attribute", ["graph", "owned", "supervised", "made", "made_later", "kept_open"]
)
async def test_a_workflow_is_taken_in_each_form(attribute: str) -> None:
    told = declared([f"flow={FLOWS}:{attribute}"], None)
    async with opened(told.places) as workflows:
        found = workflows["flow"]
    assert found.approve_below_coverage == (
        0.5 if attribute in {"supervised", "kept_open"} else None
    )
    assert type(found.workflow) is type(flows.graph)
    assert checkpointer_of(found.workflow) is flows.graph.checkpointer


async def test_a_checkpointer_of_a_loop_is_open_as_long_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_THREADS", f"{tmp_path}/threads.db")
    place = {"configurable": {"thread_id": "thread"}}
    async with opened(declared([f"flow={FLOWS}:on_sqlite"], None).places) as workflows:
        workflow = workflows["flow"].workflow
        assert (await workflow.ainvoke({"log": ["in"]}, place))["log"] == ["in", "worked"]
    with pytest.raises(ValueError, match="no active connection"):
        await workflow.aget_state(place)


async def test_a_module_has_the_name_by_which_agents_import_it() -> None:
    async with opened(declared([f"flow={FLOWS}:graph"], None).places) as workflows:
        assert workflows["flow"].workflow is flows.graph  # not a second one of the same file


async def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    told = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        text = FLOWS.read_text().replace('name="flow"', f'name="{folder}"')
        (tmp_path / folder / "flows-of-a-team.py").write_text(text)
        told.append(f"{folder}={folder}/flows-of-a-team.py:graph")
    async with opened(declared(told, None).places) as workflows:
        assert {n: w.workflow.get_name() for n, w in workflows.items()} == {
            "one": "one",
            "two": "two",
        }


async def test_langgraph_json_names_workflows_variables_and_folders(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "peerctx_test_lib.py").write_text(FLOWS.read_text())
    (tmp_path / "flow.py").write_text("from peerctx_test_lib import graph\n")
    (tmp_path / ".env").write_text("# ours\nexport FLOW_COLOUR='deep blue'\nFLOW_EMPTY=\n")
    written(
        {
            "dependencies": [".", "./lib", "langchain"],
            "env": ".env",
            "peerctx": {"workflows": {"flow": "./flow.py:graph"}},
        }
    )
    told = declared([], None)
    told.prepare()
    assert (os.environ["FLOW_COLOUR"], os.environ["FLOW_EMPTY"]) == ("deep blue", "")
    assert sys.path[-2:] == [str(tmp_path), str(tmp_path / "lib")]
    try:
        async with opened(told.places) as workflows:
            assert list(workflows) == ["flow"]
    finally:
        for name in ("flow", "peerctx_test_lib"):
            sys.modules.pop(name, None)


def test_variables_may_stand_in_langgraph_json_itself() -> None:
    config = written(
        {"env": {"FLOW_SIZE": 3}, "peerctx": {"workflows": {"flow": f"{FLOWS}:graph"}}}, "own.json"
    )
    declared([], config).prepare()
    assert os.environ["FLOW_SIZE"] == "3"


@pytest.mark.parametrize("command", [["supervise"], ["recover", "agent", "thread"]])
@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["flow"], "expected NAME=FILE.py:ATTRIBUTE"),
        (["=flows.py:graph"], "expected NAME=FILE.py:ATTRIBUTE"),
        (["flow=flows:graph"], "expected NAME=FILE.py:ATTRIBUTE"),
        ([f"flow={FLOWS}"], "expected NAME=FILE.py:ATTRIBUTE"),
        (["flow=nowhere.py:graph"], "there is no file"),
        ([f"flow={FLOWS}:nothing"], "there is no such attribute"),
        ([f"flow={FLOWS}:number"], "workflow is a int"),
        ([f"flow={FLOWS}:builder"], "a StateGraph that is not compiled"),
        ([f"flow={FLOWS}:bare"], "has no checkpointer"),
        ([f"flow={FLOWS}:made_of"], "is called without arguments"),
        ([f"flow={FLOWS}:Flow"], "is a class, not a graph or a function"),
        ([f"flow={FLOWS}:graph", f"flow={FLOWS}:made"], "two workflows are called 'flow'"),
        ([], "no workflow is named"),
    ],
)
def test_a_workflow_that_cannot_be_had_is_a_sentence_and_exit_code_two(
    run: Run, command: list[str], named: list[str], said: str
) -> None:
    options = [word for one in named for word in ("--workflow", one)]
    outcome = run(*command, *options, PEER_CONTEXT_MOCK_MODE="always")
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is no valid JSON"),
        ("[]", "is no JSON object"),
        ('{"peerctx": {"workflows": {"a": "x.py:y", "a": "x.py:z"}}}', "'a' is there twice"),
        ("{}", "names no workflow"),
        ({"peerctx": {"workflows": []}}, "names no workflow"),
        ({"peerctx": {"workflows": {"a": "b"}}}, "expected NAME=FILE.py:ATTRIBUTE"),
        ({"peerctx": {"workflows": {"a": "./b.py:c"}}}, "there is no file"),
        ({"env": ".env", "peerctx": {"workflows": {"a": f"{FLOWS}:graph"}}}, "names no file"),
        ({"dependencies": 3, "peerctx": {"workflows": {"a": f"{FLOWS}:graph"}}}, "is no list"),
    ],
)
def test_a_langgraph_json_that_is_wrong_is_a_sentence(config: Any, said: str) -> None:
    written(config)
    with pytest.raises(ConfigurationError, match=said):
        declared([], None)


def test_a_langgraph_json_that_is_not_there_is_a_sentence(run: Run) -> None:
    outcome = run("supervise", "--config", "nowhere.json")
    assert outcome.code == 2
    assert "nowhere.json cannot be read" in outcome.err


async def test_what_fails_while_it_is_opened_is_an_outage() -> None:
    with pytest.raises(StoreError, match="the disk is gone"):
        async with opened(declared([f"flow={FLOWS}:refused"], None).places):
            pass


async def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigurationError, match="No module named 'nothing_of_this_name'"):
        async with opened(declared(["flow=broken.py:graph"], None).places):
            pass
