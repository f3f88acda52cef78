"""The notebooks run from top to bottom, each in a kernel of its own, and show what they promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOWN = {
    "01_first_gather": ["everybody was asked and has told all", "silent: pricing-agent"],
    "02_recover_a_killed_agent": ["exit code -9", "steps of the recovery", "never interrupted"],
    "03_recovery_in_the_graph": ["coverage is 0.67, below 1", "resumed", "already_finished"],
    "04_on_real_kafka": [
        "agent.context.response.notebook",
        "50 gathers from 8 peers",
        "no peer answered",
    ],
}


def cells(notebook: Path) -> list[dict[str, Any]]:
    body = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in body["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_here() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SHOWN.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_is_kept_without_what_one_machine_has_shown(name: str) -> None:
    for cell in cells(NOTEBOOKS / f"{name}.ipynb"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.kafka if "kafka" in name else ()) for name in SHOWN],
)
@pytest.mark.timeout(180)
def test_a_notebook_runs_and_shows_what_it_promises(name: str, tmp_path: Path) -> None:
    command = ["nbconvert", "--execute", "--to", "notebook", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(NOTEBOOKS / f"{name}.ipynb")],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    outputs = [o for cell in cells(tmp_path / f"{name}.ipynb") for o in cell["outputs"]]
    shown = json.dumps(outputs)
    for words in SHOWN[name]:
        assert words in shown, words
    assert "Traceback" not in shown
    pictures = [o for o in outputs if "text/html" in o.get("data", {})]
    assert len(pictures) >= 2
