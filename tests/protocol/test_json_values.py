"""Values are made plain where they enter, so that every store and peer takes them alike."""

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx.errors import ProtocolError
from langgraph_peerctx.protocol.codec import decode, encode
from langgraph_peerctx.protocol.json_values import plain, plain_object, plain_text
from langgraph_peerctx.protocol.messages import AgentAnswer, ContextResponse

wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(st.dictionaries(st.text(st.characters(), max_size=5), wild, max_size=4))
def test_whatever_is_made_plain_is_read_back_the_same_by_the_strictest_parser(value: Any) -> None:
    answer = AgentAnswer(agent_id="b", status="context", memory_state=plain_object(value))
    response = ContextResponse(
        sent_at=datetime.now(UTC),
        correlation_id="c",
        responder_id="p",
        failed_agent_id="a",
        thread_id="t",
        agents=(answer,),
    )
    assert decode(encode(response)) == response


@given(wild)
def test_making_plain_twice_changes_nothing(value: Any) -> None:
    once = plain(value)
    assert plain(once) == once


def test_what_stores_disagree_about_is_replaced() -> None:
    assert plain_text("a\0b\ud800c") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert plain([math.nan, math.inf, -math.inf, 1.5]) == [None, None, None, 1.5]
    assert plain([2**63, 2**63 - 1]) == [str(2**63), 2**63 - 1]
    assert plain(10**5_000) == hex(10**5_000)
    assert plain((1, (2,))) == [1, [2]]


def test_characters_beyond_the_basic_plane_stay() -> None:
    assert plain_text("\N{GRINNING FACE}\0") == "\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), 1j])
def test_what_is_no_json_is_refused_by_name(value: object) -> None:
    with pytest.raises(ProtocolError, match=r"payload\.x holds a"):
        plain_object({"x": value})


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ProtocolError, match="JSON keys are strings"):
        plain_object({"a": {1: 2}})


def test_deep_nesting_is_refused() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ProtocolError, match="too_deep"):
        plain(value)


def test_an_object_must_be_a_mapping() -> None:
    with pytest.raises(ProtocolError, match="must be a mapping"):
        plain_object([1])  # type: ignore[arg-type]  # what a caller may do all the same
