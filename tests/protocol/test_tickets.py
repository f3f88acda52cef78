"""What names an effect on its way to a peer: told by header or by field, and never guessed."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx.errors import ProtocolError
from langgraph_peerctx.protocol.tickets import (
    EFFECT_FIELD,
    EFFECT_HEADER,
    NAME_LIMIT,
    TICKET_LIMIT_BYTES,
    EffectTicket,
)

FIELDS: dict[str, Any] = {
    "effect_key": "reserve@0123456789abcdef",
    "name": "reserve",
    "sender_id": "product",
    "thread_id": "thread 1",
    "run_id": "r",
    "input_digest": "0123456789abcdef" * 2,
    "epoch": 1,
}
TICKET = EffectTicket(**FIELDS)

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
letters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])
record_ids = st.text(letters, min_size=1, max_size=40)
tickets = st.builds(
    EffectTicket,
    effect_key=record_ids,
    name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=NAME_LIMIT),
    sender_id=ids,
    thread_id=record_ids,
    run_id=record_ids,
    input_digest=st.none() | st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    epoch=st.integers(0, 2**63 - 1),
)


@given(tickets)
def test_any_ticket_comes_back_as_it_was_by_header_and_by_field(ticket: EffectTicket) -> None:
    headers = ticket.as_headers()
    (line,) = headers.values()
    assert line.isascii()
    assert line.isprintable()
    assert EffectTicket.from_headers(headers) == ticket
    assert EffectTicket.from_headers({EFFECT_HEADER: line.encode()}) == ticket
    assert EffectTicket.from_field(ticket.as_field()) == ticket
    assert EffectTicket.from_field(json.loads(json.dumps(ticket.as_field()))) == ticket


@pytest.mark.parametrize("name", [EFFECT_HEADER, "Peerctx-Effect", "PEERCTX-EFFECT"])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_the_case_of_a_headers_name_does_not_matter(name: str, as_bytes: bool) -> None:  # noqa: FBT001 - a case
    (line,) = TICKET.as_headers().values()
    others = {"Content-Type": "application/json"}
    found = EffectTicket.from_headers(others | {name: line.encode() if as_bytes else line})
    assert found == TICKET


def test_a_name_in_any_script_stays_ascii_in_a_header() -> None:
    ticket = TICKET.model_copy(update={"name": "réserver 預約 🍖", "thread_id": "é\N{SNOWMAN}"})
    (line,) = ticket.as_headers().values()
    assert line.isascii()
    assert EffectTicket.from_headers(ticket.as_headers()) == ticket


def test_a_ticket_stands_beside_what_a_body_holds() -> None:
    body = {"item": "ham"} | TICKET.as_field()
    assert EffectTicket.from_field(body) == TICKET
    assert body[EFFECT_FIELD] == FIELDS


def test_a_call_without_a_ticket_is_said() -> None:
    with pytest.raises(ProtocolError, match="no header peerctx-effect"):
        EffectTicket.from_headers({"peerctx-effects": "x"})
    with pytest.raises(ProtocolError, match="no field peerctx_effect"):
        EffectTicket.from_field({"item": "ham"})


ILLEGAL: list[dict[str, Any]] = [
    {"epoch": -1},
    {"epoch": 2**63},
    {"epoch": "1"},
    {"epoch": 1.5},
    {"epoch": None},
    {"sender_id": "no id"},
    {"sender_id": "-first"},
    {"sender_id": "s" * 65},
    {"sender_id": "product\n"},
    {"effect_key": ""},
    {"effect_key": "k" * 256},
    {"effect_key": "a\nb"},
    {"thread_id": "a\0b"},
    {"thread_id": ["t"]},
    {"run_id": None},
    {"name": ""},
    {"name": "n" * (NAME_LIMIT + 1)},
    {"more": 1},
]


@pytest.mark.parametrize("change", ILLEGAL, ids=str)
def test_a_value_that_no_sender_would_make_is_refused_and_named(change: dict[str, Any]) -> None:
    forged = FIELDS | change
    for read in (
        lambda: EffectTicket.from_headers({EFFECT_HEADER: json.dumps(forged)}),
        lambda: EffectTicket.from_field({EFFECT_FIELD: forged}),
    ):
        with pytest.raises(ProtocolError, match=next(iter(change))) as refused:
            read()
        assert refused.value.fault == "field"
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("missing", sorted(FIELDS.keys() - {"input_digest"}))
def test_a_field_that_is_missing_is_named(missing: str) -> None:
    forged = {name: value for name, value in FIELDS.items() if name != missing}
    with pytest.raises(ProtocolError, match=missing):
        EffectTicket.from_field({EFFECT_FIELD: forged})


@pytest.mark.parametrize("field", [None, "x", 1, [], [FIELDS], {}, True])
def test_a_field_that_is_no_ticket_is_refused(field: Any) -> None:
    with pytest.raises(ProtocolError):
        EffectTicket.from_field({EFFECT_FIELD: field})


@pytest.mark.parametrize("value", [" " * TICKET_LIMIT_BYTES + "{}", "é" * TICKET_LIMIT_BYTES])
def test_a_header_that_is_too_long_is_not_read(value: str) -> None:
    for given_ in (value, value.encode()):
        with pytest.raises(ProtocolError) as refused:
            EffectTicket.from_headers({EFFECT_HEADER: given_})
        assert refused.value.fault == "too_large"


DEEP = b"[" * 2_000
LONE = b'{"name": "\\ud800"}'


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_whatever_stands_in_a_header_is_a_ticket_or_a_protocol_error(value: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        EffectTicket.from_headers({EFFECT_HEADER: value})


@pytest.mark.parametrize("value", [DEEP, LONE, b"\xff", "\ud800", "", "null", "NaN"], ids=repr)
def test_what_breaks_parsers_is_a_protocol_error(value: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        EffectTicket.from_headers({EFFECT_HEADER: value})


@pytest.mark.parametrize("letter", ["x", "é", "\N{ROCKET}"])
def test_the_longest_ticket_fits_into_a_header(letter: str) -> None:
    longest = EffectTicket(
        effect_key=letter * 255,
        name=letter * NAME_LIMIT,
        sender_id="s" * 64,
        thread_id=letter * 255,
        run_id=letter * 255,
        epoch=2**63 - 1,
    )
    assert EffectTicket.from_headers(longest.as_headers()) == longest
