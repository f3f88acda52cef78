"""One tree of errors, drawn where it is defined."""

import pickle
import re

import pytest

from langgraph_peerctx import errors
from langgraph_peerctx.errors import PeerContextError, ProtocolError, TooFewResponsesError

EVERY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, PeerContextError)
]


def drawn(text: str) -> dict[str, str | None]:
    """Return error -> its parent, as a drawing of the tree has it."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in text.splitlines():
        found = re.match(
            r"^((?:[│ ]   |├── |└── )*)([A-Z]\w+Error)\b", line.strip(" ") and line[4:]
        )
        if found:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else None
    return parents


def test_the_tree_is_as_it_is_drawn() -> None:
    real = {
        error.__name__: None if error is PeerContextError else error.__bases__[0].__name__
        for error in EVERY
    }
    assert drawn(errors.__doc__ or "") == real


@pytest.mark.parametrize("error", EVERY)
def test_every_error_crosses_a_process_boundary_whole(error: type[PeerContextError]) -> None:
    arguments = {
        ProtocolError: ("empty", "the value is empty"),
        TooFewResponsesError: (1, 2),
    }.get(error, ("what to do",))
    original = error(*arguments)
    copy = pickle.loads(pickle.dumps(original))  # noqa: S301 - our own bytes
    assert type(copy) is error
    assert str(copy) == str(original)
    assert vars(copy) == vars(original)


def test_a_protocol_error_says_its_fault_in_a_word() -> None:
    assert str(ProtocolError("empty", "the value is empty")) == "the value is empty (empty)"
