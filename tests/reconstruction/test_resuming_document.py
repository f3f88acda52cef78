import re
from pathlib import Path
from typing import get_args

import pytest

from langgraph_peerctx.reconstruction.resume import RecoveryStatus

DOCUMENT = Path(__file__).parents[2] / "docs" / "resuming.md"


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
)
def test_every_block_runs_as_written(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    exec(compile(block, str(DOCUMENT), "exec"), {"__name__": "document"})  # noqa: S102 - our own


def test_every_status_is_explained() -> None:
    table = DOCUMENT.read_text().split("## How it can end")[1].split("\n\n")[1]

    statuses = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(statuses[1:]) == sorted(get_args(RecoveryStatus))  # the first is the heading
