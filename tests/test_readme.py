"""What the README says is true."""

import asyncio
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from runtime_threads import no_runtime_left

from langgraph_peerctx import errors
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
ROWS = dict(re.findall(r"^\| `([A-Z_]+)` \| (`[^`]*`|none) \|", README, re.MULTILINE))


def defaults() -> dict[str, str]:
    found = {}
    for settings in (KafkaConfig(), PeerContextSettings()):
        for name in type(settings).model_fields:
            value = getattr(settings, name)
            text = str(value).lower() if isinstance(value, bool) else str(value)
            found[settings.variable_of(name)] = "none" if value is None else f"`{text}`"
    found["PEER_CONTEXT_PROCESS_ID"] = "`HOST-PID`"
    del found["PEER_CONTEXT_KAFKA"]
    return found


def test_the_table_names_every_variable_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEER_CONTEXT_SENTINEL")
    assert defaults() == ROWS


def test_the_tree_of_errors_is_the_real_one() -> None:
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "Error" in line][1:]
    assert textwrap.dedent("\n".join(drawn)) in README


def test_every_document_that_is_named_is_there() -> None:
    for name in re.findall(r"\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / name).exists(), name


async def test_the_code_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "always")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/events.db")
    names: dict[str, Any] = {}
    body = textwrap.indent("\n".join(BLOCKS), "    ")
    exec(f"async def readme():\n{body}\n    return result\n", names)  # noqa: S102 - our own README
    with no_runtime_left():  # the node starts one
        async with asyncio.timeout(30):
            result = await names["readme"]()
    assert result["status"] == "restarted"
    assert result["degraded"]
    assert "restarted" in capsys.readouterr().out
