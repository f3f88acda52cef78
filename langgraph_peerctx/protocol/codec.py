"""Messages to bytes and back, within limits.

For any bytes whatever, `decode` returns a message or raises `ProtocolError`, in time linear in
their length. pydantic's parser refuses what is no UTF-8 JSON, lone surrogates, and more than 200
levels; what it would let through (NUL, NaN and infinities, integers beyond 64 bits, values too deep
for a checkpoint) is refused here. Of a key that stands twice, the last counts.
"""

import math
import re
from collections.abc import Iterator
from typing import Annotated, NoReturn

from pydantic import Field, JsonValue, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from langgraph_peerctx.errors import ProtocolError, ProtocolFault
from langgraph_peerctx.protocol.json_values import (
    MAX_INTEGER,
    MAX_PAYLOAD_DEPTH,
    MIN_INTEGER,
)
from langgraph_peerctx.protocol.messages import (
    ContextRequest,
    ContextResponse,
    DeathNotice,
    Heartbeat,
    Message,
)

MAX_MESSAGE_BYTES = 262_144
MESSAGE_TYPES = frozenset({"REQUEST_CONTEXT", "PROVIDE_CONTEXT", "HEARTBEAT", "AGENT_DIED"})

_MESSAGE: TypeAdapter[Message] = TypeAdapter(
    Annotated[
        ContextRequest | ContextResponse | Heartbeat | DeathNotice,
        Field(discriminator="message_type"),
    ]
)
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def encode(message: Message, *, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """Return a message as UTF-8 JSON.

    Raises:
        ProtocolError: If it is larger than `max_bytes`, or would not be read back.
    """
    try:
        data = message.model_dump_json().encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError("not_json", f"the message is no JSON: {error}"[:200]) from None
    if len(data) > max_bytes:
        _refuse("too_large", f"the message has {len(data)} bytes, {max_bytes} are allowed")
    _check_free_values(message)
    return data


def decode(value: bytes | None, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Return the message in a record's value.

    Args:
        value: The raw bytes, or None for a tombstone.
        max_bytes: The longest value that is looked at.

    Raises:
        ProtocolError: If it is none, for whatever reason; nothing else is ever raised.
    """
    if not value:
        _refuse("empty", "the value is empty")
    if len(value) > max_bytes:
        _refuse("too_large", f"the value has {len(value)} bytes, {max_bytes} are allowed")
    try:
        value.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise ProtocolError("not_utf8", f"no UTF-8 at byte {error.start}") from None
    if rb"\u0000" in value and _ESCAPED_NUL.search(value):
        _refuse("bad_text", "a text holds NUL")
    try:
        message = _MESSAGE.validate_json(value, strict=True)
    except ValidationError as error:
        raise _translated(error) from None
    if "schema_version" not in message.model_fields_set:
        _refuse("version", "schema_version is missing: run the same release everywhere")
    _check_free_values(message)
    return message


def _check_free_values(message: Message) -> None:
    """Refuse what a store or a checkpoint would not take, where a message holds any JSON."""
    for value in _free_values(message):
        _check(value, MAX_PAYLOAD_DEPTH)


def _free_values(message: Message) -> Iterator[JsonValue]:
    if isinstance(message, ContextResponse):
        for answer in message.agents:
            yield answer.memory_state
            for interaction in answer.interactions:
                yield interaction.payload
        for settled in message.in_doubt:
            yield settled.reply


def _check(value: JsonValue, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth <= 0:
            _refuse("too_deep", f"a value is nested more than {MAX_PAYLOAD_DEPTH} levels deep")
        for item in value.values() if isinstance(value, dict) else value:
            if not isinstance(item, str):
                _check(item, depth - 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            _refuse("bad_number", "NaN and infinities are no JSON numbers")
    elif isinstance(value, int) and not MIN_INTEGER <= value <= MAX_INTEGER:
        _refuse("bad_number", "an integer has more than 64 bits")


def _translated(error: ValidationError) -> ProtocolError:
    """Say in a word why a message is refused, and in a sentence where."""
    faults = error.errors(include_url=False, include_input=False)
    versions = [fault for fault in faults if fault["loc"][-1:] == ("schema_version",)]
    fault = versions[0] if versions else faults[0]
    path = ".".join(str(step) for step in fault["loc"])
    detail = f"{path}: {fault['msg']}" if path else fault["msg"]
    if versions:
        detail = f"this release reads schema_version 1 ({detail}): run the same release everywhere"
    return ProtocolError(_fault_of(fault), detail[:400])


def _fault_of(fault: ErrorDetails) -> ProtocolFault:
    kind, said = fault["type"], fault["msg"]
    if kind == "json_invalid":
        if "recursion" in said:
            return "too_deep"
        return "bad_text" if "surrogate" in said or "escape" in said else "not_json"
    if kind.startswith("union_tag"):
        return "message_type"
    if not fault["loc"]:
        return "not_an_object"
    if fault["loc"][-1] == "schema_version":
        return "version"
    return "bad_number" if kind in _NUMBER_FAULTS else "field"


_NUMBER_FAULTS = {"finite_number", "int_parsing_size", "int_from_float"}


def _refuse(fault: ProtocolFault, detail: str) -> NoReturn:
    raise ProtocolError(fault, detail)
