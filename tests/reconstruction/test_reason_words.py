"""Each word that a reason begins with is explained in docs/resuming.md."""

import ast
import re
from pathlib import Path
from typing import get_args

from langgraph_peerctx.reconstruction import resume

DOCUMENT = Path(__file__).parents[2] / "docs" / "resuming.md"
SOURCES = Path(resume.__file__).parent
STATUSES = set(get_args(resume.RecoveryStatus))
OTHERS = {"anything"}
"""Words that other texts begin with."""


def words_said() -> set[str]:
    """Return the words before the colon that texts in the sources begin with."""
    texts = [
        node.value
        for source in SOURCES.glob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return {found[1] for text in texts if (found := re.match(r"([a-z_]+): ", text))} - OTHERS


def words_explained() -> set[str]:
    table = DOCUMENT.read_text().split("| reason |")[1].split("\n\n")[0]
    firsts = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    return {word for first in firsts for word in re.findall(r"`(\w+)`", first)}


def test_every_reasons_word_is_explained_and_no_other() -> None:
    assert words_said() - STATUSES <= words_explained()
    assert words_explained() <= words_said()
