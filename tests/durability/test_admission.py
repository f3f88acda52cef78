"""What tells one input from another, wherever it is looked at."""

import os
import string
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph.message import add_messages
from pydantic import BaseModel, SecretStr

from langgraph_peerctx.durability.admission import digest_of

MIDNIGHT = datetime(2026, 1, 2, tzinfo=UTC)
FIXED = UUID("01234567-89ab-4def-8123-456789abcdef")


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


class Place(NamedTuple):
    row: int
    shelf: int


@dataclass
class Item:
    sku: str
    tags: set[str] = field(default_factory=set)


class Order(BaseModel):
    items: list[Item] = []
    size: Size = Size.SMALL


class Plain:
    def __init__(self, sku: str) -> None:
        self.sku = sku


class Told(Plain):
    def __repr__(self) -> str:
        return "Told()"


class Broken(Plain):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(string.printable + "äß€\U0001f600"),
    st.binary(),
    st.datetimes(timezones=st.none() | st.just(UTC)),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.sampled_from(Size),
)
inputs = st.recursive(
    scalars | st.frozensets(scalars),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(string.ascii_letters), inner)
    ),
)


def turned(value: Any) -> Any:
    """Return an equal value that was put together in another order, and of other classes."""
    if isinstance(value, dict):
        return OrderedDict((key, turned(value[key])) for key in reversed(value))
    if isinstance(value, frozenset):
        backwards = [*value][::-1]
        return set(backwards)
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, list) else list)(map(turned, value))
    return value


def deep(levels: int, value: Any) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def everything() -> Any:
    return {
        "tags": {"umbrella", "boots", "coat", "scarf"},
        "nested": [{"sizes": frozenset({Size.SMALL, Size.LARGE})}],
        "order": Order(items=[Item("boots", {"winter", "brown", "new"})]),
        "at": (MIDNIGHT, MIDNIGHT.date(), time(3, 4), timedelta(1)),
        "more": [FIXED, Decimal("1.50"), Path("a/b"), b"\x00", 10**5000, 1.5, Place(1, 2)],
        "messages": [HumanMessage("hello"), AIMessage("hi", id="a-1")],
    }


_ELSEWHERE = """
from durability.test_admission import digest_of, everything
print(digest_of(everything()))
"""


def test_an_input_has_the_same_digest_in_every_process() -> None:
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": tests}
    found = {
        subprocess.run(
            [sys.executable, "-c", _ELSEWHERE],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }
    assert found == {digest_of(everything())}
    assert "None" not in found


@given(inputs)
def test_equal_inputs_have_equal_digests_of_32_digits(value: Any) -> None:
    digest = digest_of(value)
    assert digest is not None
    assert len(digest) == 32
    assert set(digest) <= set(string.hexdigits.lower())
    assert digest_of(turned(value)) == digest


@given(inputs)
def test_an_input_that_was_stored_has_the_digest_that_it_had_before(value: Any) -> None:
    serializer = JsonPlusSerializer()
    assert digest_of(serializer.loads_typed(serializer.dumps_typed(value))) == digest_of(value)


def test_what_a_strict_serializer_gives_back_has_the_digest_of_what_it_was_given() -> None:
    serializer = JsonPlusSerializer(allowed_msgpack_modules=None)
    value = everything()
    value["more"].remove(10**5000)  # which it does not take
    stored = serializer.loads_typed(serializer.dumps_typed(value))
    assert isinstance(stored["order"], dict), "it does not know the class"
    assert digest_of(stored) == digest_of(value)


APART = [
    *(None, "None", "", "null", True, "True", 1, 1.0, "1", Decimal(1), -1, b"1", 10**5000),
    *(10**5000 + 1, float("inf"), float("nan"), "a", b"a", "\ud800", "?", False, 0),
    *([], {}, set(), [None], [[]], {"": None}, [1, 2], [2, 1], [12], ["1", "2"], {1, 2}),
    *({"a": 1}, {"a": "1"}, {"a": [1]}, {"a": 1, "b": None}, {1: "a"}, {"1": "a"}, [["a", 1]]),
    *({(1, 2): 1}, {"1,2": 1}, [[1], 2], [1, [2]], [["a"], "b"], ["a", ["b"]], ["ab"]),
    *(deep(30, 1), deep(30, 2), deep(31, 1)),
    *(MIDNIGHT, MIDNIGHT.replace(tzinfo=None), MIDNIGHT.date(), "2026-01-02", str(MIDNIGHT)),
    *(
        MIDNIGHT.time(),
        timedelta(0),
        FIXED,
        str(FIXED),
        Path("a"),
        Item("a"),
        Item("b"),
        Order(items=[Item("a")]),
    ),
    *(HumanMessage("a"), AIMessage("a"), HumanMessage("b"), HumanMessage("a", id="1")),
    *(RemoveMessage(id=str(FIXED)), RemoveMessage(id=str(FIXED)[::-1]), HumanMessage(["a"])),
]


def test_inputs_that_differ_in_anything_have_different_digests() -> None:
    for wrapped in (APART, [{"x": [value]} for value in APART]):
        digests = [digest_of(value) for value in wrapped]
        assert None not in digests
        assert len(set(digests)) == len(APART)


def test_an_id_that_is_made_up_for_a_message_does_not_count() -> None:
    message = HumanMessage("hello")
    before = digest_of({"messages": [message]})
    add_messages([], [message])
    assert message.id is not None, "it is made up in place"
    assert digest_of({"messages": [message]}) == before


def test_an_id_that_says_which_message_to_remove_counts() -> None:
    ids = [str(uuid4()) for _ in range(2)]
    one, other = (digest_of([RemoveMessage(id=made)]) for made in ids)
    assert one != other


def endless() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "make",
    [
        *(object, lambda: Plain("a"), lambda: Told("a"), lambda: Broken("a"), lambda: Plain),
        *(lambda: SecretStr("a"), lambda: print, lambda: iter([1]), lambda: deep(100_000, 1)),
        endless,
    ],
)
def test_what_has_no_form_that_stays_the_same_has_no_digest(make: Any) -> None:
    assert digest_of(make()) is None
    assert digest_of({"x": [make()], "y": 1}) is None
