"""For any bytes, decode returns a message or raises ProtocolError."""

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx.errors import ProtocolError
from langgraph_peerctx.protocol.codec import MESSAGE_TYPES, decode, encode
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextRequest,
    ContextResponse,
    DeathNotice,
    Heartbeat,
    InDoubtAnswer,
    InDoubtKey,
    Interaction,
    Message,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

plain_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=12,
)
identifiers = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
moments = st.datetimes(
    min_value=datetime(1970, 1, 2),  # noqa: DTZ001 - hypothesis adds the zone
    max_value=datetime(2200, 1, 1),  # noqa: DTZ001 - the same
    timezones=st.just(UTC),
)
interactions = st.builds(
    Interaction,
    interaction_id=identifiers,
    thread_id=identifiers,
    from_agent=identifiers,
    to_agent=identifiers,
    kind=st.just("message"),
    payload=st.dictionaries(plain_text, json_values, max_size=3),
    occurred_at=moments,
    sequence=st.none() | st.integers(0, 2**63 - 1),
    effect_key=st.none() | identifiers,
)
requests = st.builds(
    ContextRequest,
    sent_at=moments,
    correlation_id=identifiers,
    requester_id=identifiers,
    failed_agent_id=identifiers,
    thread_id=identifiers,
    time_window_seconds=st.floats(0.001, 86_400),
    addressees=st.lists(identifiers, max_size=3).map(tuple),
    in_doubt=st.lists(
        st.builds(
            InDoubtKey,
            effect_key=identifiers,
            peer_id=identifiers,
            epoch=st.integers(0, 9),
            intent_at=moments,
        ),
        max_size=2,
    ).map(tuple),
)
responses = st.builds(
    ContextResponse,
    sent_at=moments,
    correlation_id=identifiers,
    responder_id=identifiers,
    failed_agent_id=identifiers,
    thread_id=identifiers,
    agents=st.lists(
        st.builds(
            AgentAnswer,
            agent_id=identifiers,
            status=st.sampled_from(["context", "nothing", "declined", "busy"]),
            interactions=st.lists(interactions, max_size=2).map(tuple),
            memory_state=st.dictionaries(plain_text, json_values, max_size=2),
        ),
        max_size=2,
    ).map(tuple),
    in_doubt=st.lists(
        st.builds(
            InDoubtAnswer,
            effect_key=identifiers,
            agent_id=identifiers,
            verdict=st.sampled_from(["seen", "not_seen", "cannot_tell"]),
            reply=json_values,
        ),
        max_size=2,
    ).map(tuple),
)
messages = (
    requests
    | responses
    | st.builds(
        Heartbeat,
        sent_at=moments,
        process_id=identifiers,
        incarnation=identifiers,
        sequence=st.integers(0, 2**63 - 1),
    )
    | st.builds(
        DeathNotice,
        sent_at=moments,
        process_id=identifiers,
        incarnation=identifiers,
        sentinel_id=identifiers,
        died_at=moments,
    )
)


def request(**changes: Any) -> bytes:
    """A valid request as bytes, with fields changed; a change to `...` takes a field away."""
    body: dict[str, Any] = {
        "message_type": "REQUEST_CONTEXT",
        "schema_version": 1,
        "message_id": "m1",
        "sent_at": NOW.isoformat(),
        "correlation_id": "c1",
        "requester_id": "r1",
        "failed_agent_id": "product-agent-1",
        "thread_id": "t1",
        "time_window_seconds": 3600,
    }
    body |= changes
    return json.dumps({k: v for k, v in body.items() if v is not ...}).encode()


def fault(value: bytes | None) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(value)
    assert str(caught.value)
    return caught.value.fault


@given(messages)
def test_every_message_comes_back_as_it_went(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_protocol_error(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(value)


@given(st.data(), requests)
def test_any_damage_to_a_message_gives_a_message_or_a_protocol_error(
    data: st.DataObject, message: ContextRequest
) -> None:
    value = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(value))
    except ProtocolError as error:
        assert error.fault  # noqa: PT017 - either outcome is right, another error is not


@given(st.dictionaries(st.sampled_from(list(ContextRequest.model_fields)), json_values))
def test_any_json_in_any_field_gives_a_message_or_a_protocol_error(changes: Any) -> None:
    try:
        assert isinstance(decode(request(**changes)), ContextRequest)
    except ProtocolError as error:
        assert error.fault in {"field", "version", "message_type", "bad_number", "too_deep"}  # noqa: PT017 - the same


@pytest.mark.parametrize("value", [b"", None])
def test_an_empty_value_and_a_tombstone_are_refused(value: bytes | None) -> None:
    assert fault(value) == "empty"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_valid_json_in_another_encoding_is_refused(encoding: str) -> None:
    assert fault(request().decode().encode(encoding)) in {"not_utf8", "not_json"}


def test_invalid_utf8_is_refused() -> None:
    assert fault(request().replace(b"product", b"pro\xffuct")) == "not_utf8"


def test_a_byte_order_mark_is_refused() -> None:
    assert fault(b"\xef\xbb\xbf" + request()) == "not_json"


def test_json_cut_at_any_offset_is_refused() -> None:
    value = request()
    assert {fault(value[:length]) for length in range(1, len(value))} == {"not_json"}


@pytest.mark.parametrize(
    "value",
    [
        b"[" * 100_000,
        b"[" * 50_000 + b"]" * 50_000,
        b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
        b'"' + b'\\"' * 120_000,
        b'"a' * 120_000,
        b"{" + b'"\\' * 120_000,
        b"{" + b",".join(b'"k%d":1' % (n // 2) for n in range(24_000)) + b"}",
    ],
    ids=["open", "balanced", "objects", "escapes", "quotes", "odd escapes", "duplicates"],
)
def test_hostile_json_is_refused_at_once(value: bytes) -> None:
    started = time.thread_time()  # what others do on the machine meanwhile is not counted
    assert fault(value) in {"too_deep", "not_json", "message_type"}
    assert time.thread_time() - started < 0.5  # 50 ms on an idle machine


def response(memory: str) -> bytes:
    """A response whose one agent remembers this JSON."""
    bare = ContextResponse(
        sent_at=NOW,
        correlation_id="c",
        responder_id="p",
        failed_agent_id="a",
        thread_id="t",
        agents=(AgentAnswer(agent_id="b", status="context", memory_state={"is": "x"}),),
    )
    return encode(bare).replace(b'"x"', memory.encode())


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_24_levels_of_a_value_are_read_and_25_are_not(opening: str, closing: str) -> None:
    assert decode(response(opening * 23 + "1" + closing * 23))
    assert fault(response(opening * 24 + "1" + closing * 24)) == "too_deep"


@pytest.mark.parametrize(
    "number",
    [
        *("9" * 5_000, "1e999", "-1e999", "NaN", "Infinity", "-Infinity"),
        *(str(2**63), str(2**64), str(-(2**63) - 1)),
    ],
)
def test_numbers_that_do_not_travel_are_refused(number: str) -> None:
    assert fault(response(number)) in {"bad_number", "not_json"}
    assert fault(response(f"[[{number}]]")) in {"bad_number", "not_json"}
    epoch = request(epoch=7).replace(b'"epoch": 7', b'"epoch": ' + number.encode())
    assert fault(epoch) in {"field", "bad_number", "not_json"}


def test_minus_zero_is_zero() -> None:
    message = decode(response("-0"))
    assert isinstance(message, ContextResponse)
    assert message.agents[0].memory_state == {"is": 0}
    window = request().replace(b"3600", b"-0")
    assert fault(window) == "field"


def test_the_largest_64_bit_integers_are_read() -> None:
    message = decode(request(epoch=2**63 - 1))
    assert isinstance(message, ContextRequest)
    assert message.epoch == 2**63 - 1
    assert decode(response(str(-(2**63))))


@pytest.mark.parametrize("text", [r"a\u0000b", r"\ud800", r"\udfff\ud800", r"\uDBFF!"])
def test_nul_and_lone_surrogates_are_refused(text: str) -> None:
    value = request().replace(b'"t1"', b'"' + text.encode() + b'"')
    assert fault(value) == "bad_text"


def test_a_surrogate_pair_is_the_character_that_it_stands_for() -> None:
    message = decode(request(thread_id="\N{GRINNING FACE}"))
    assert isinstance(message, ContextRequest)
    assert message.thread_id == "\N{GRINNING FACE}"


def test_of_a_duplicate_key_the_last_counts() -> None:
    message = decode(request()[:-1] + b', "thread_id": "t2"}')
    assert isinstance(message, ContextRequest)
    assert message.thread_id == "t2"


@pytest.mark.parametrize("value", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_what_is_no_object_is_refused(value: bytes) -> None:
    assert fault(value) == "not_an_object"


@pytest.mark.parametrize("version", [0, 2, 99, "1", True, 1.5, None, ...])
def test_another_version_is_refused(version: Any) -> None:
    assert fault(request(schema_version=version)) == "version"


@pytest.mark.parametrize("message_type", ["REQUEST", "", None, 5, ["REQUEST_CONTEXT"], ...])
def test_an_unknown_type_is_refused(message_type: Any) -> None:
    assert fault(request(message_type=message_type)) == "message_type"


@pytest.mark.parametrize(
    "changes",
    [
        {"thread_id": ...},
        {"extra": 1},
        {"thread_id": 5},
        {"time_window_seconds": "3600"},
        {"time_window_seconds": 0},
        {"sent_at": "2026-01-01T00:00:00"},
        {"sent_at": 1_700_000_000},
        {"attempt": 0},
        {"in_doubt": {}},
        {"in_doubt": [{"effect_key": "k"}]},
    ],
    ids=repr,
)
def test_a_missing_extra_or_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    assert fault(request(**changes)) == "field"


@pytest.mark.parametrize(
    "text",
    [
        "../x",
        "a\nb",
        "a" * 300,
        "\N{CYRILLIC SMALL LETTER A}",
        "*",
        "",
        "a.b",
        "-a",
        "a\n",
        " a",
        "a/b",
        "__consumer_offsets",
    ],
)
def test_an_id_that_is_no_legal_topic_part_is_refused(text: str) -> None:
    assert fault(request(requester_id=text)) == "field"
    assert fault(request(failed_agent_id=text)) == "field"


def test_a_response_topic_is_read_and_means_nothing() -> None:
    message = decode(request(response_topic="__consumer_offsets"))
    assert isinstance(message, ContextRequest)
    assert message.requester_id == "r1"


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_the_size_limit_is_exact(excess: int) -> None:
    value = request(run_id="x")
    if excess <= 0:
        assert decode(value, max_bytes=len(value) - excess)
    else:
        with pytest.raises(ProtocolError, match="too_large"):
            decode(value, max_bytes=len(value) - excess)


def test_a_message_over_the_limit_is_not_encoded() -> None:
    message = decode(request())
    with pytest.raises(ProtocolError, match="too_large"):
        encode(message, max_bytes=100)


def test_a_message_that_nobody_would_read_is_not_encoded() -> None:
    deep: Any = "x"
    for _ in range(40):
        deep = [deep]
    answer = AgentAnswer(agent_id="b", status="context", memory_state={"deep": deep})
    message = ContextResponse(
        sent_at=NOW,
        correlation_id="c",
        responder_id="p",
        failed_agent_id="a",
        thread_id="t",
        agents=(answer,),
    )
    with pytest.raises(ProtocolError, match="too_deep"):
        encode(message)


def test_constructor_lookalikes_stay_plain_data() -> None:
    payload = {"lc": 1, "type": "constructor", "id": ["OPENAI_API_KEY"], "kwargs": {}}
    interaction = Interaction(
        interaction_id="i",
        thread_id="t",
        from_agent="a",
        to_agent="b",
        kind="message",
        payload=payload,
        occurred_at=NOW,
    )
    answer = AgentAnswer(agent_id="b", status="context", interactions=(interaction,))
    message = ContextResponse(
        sent_at=NOW,
        correlation_id="c",
        responder_id="p",
        failed_agent_id="a",
        thread_id="t",
        agents=(answer,),
    )
    back = decode(encode(message))
    assert isinstance(back, ContextResponse)
    assert back.agents[0].interactions[0].payload == payload


def test_there_is_a_model_for_each_type() -> None:
    assert {"REQUEST_CONTEXT", "PROVIDE_CONTEXT", "HEARTBEAT", "AGENT_DIED"} == MESSAGE_TYPES
