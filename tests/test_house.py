"""The rules of the house that no tool checks."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "langgraph_peerctx").rglob("*.py"))
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_nothing_private_of_langgraph_is_imported() -> None:
    private = re.compile(r"^langgraph\.(_|.*\._)")
    found = {(p.name, name) for p in SOURCES for name in imports_of(p) if private.match(name)}
    assert found == set()


def test_nothing_is_unpickled_or_evaluated() -> None:
    banned = {"pickle", "marshal", "shelve", "langchain_core.load", "yaml"}
    assert {name for path in SOURCES for name in imports_of(path)} & banned == set()
    for path in SOURCES:
        assert not re.search(r"(?<![\w.])(eval|exec)\(", path.read_text()), path


@pytest.mark.parametrize("name", ["constraints.txt", "tests/services/pom.xml"])
def test_what_is_pinned_names_no_address(name: str) -> None:
    text = (ROOT / name).read_text().replace("http://maven.apache.org/POM/4.0.0", "")
    assert "://" not in text
    assert "@" not in text


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.+]*", line) for line in lines)
    names = [line.partition("==")[0].lower() for line in lines]
    assert sorted(set(names)) == sorted(names)


def test_no_path_of_a_machine_and_no_lock_file_is_kept() -> None:
    machine = re.compile(r"/(home|root|Users)/[a-z]|/work/")
    own = Path(__file__).name
    for name in TRACKED:
        path = ROOT / name
        assert not name.endswith(("uv.lock", "poetry.lock", "pdm.lock", "package-lock.json"))
        if path.suffix in {".py", ".toml", ".md", ".txt", ".xml"} and path.name != own:
            assert not machine.search(path.read_text()), name
