"""Messages to bytes and back, within limits.

For any bytes whatever, `decode` returns a message or raises `ProtocolError`, in time linear in
their length. What the parsers would let through (UTF-16, NaN, duplicate keys, deep nesting, NUL,
lone surrogates) is refused before a model sees it.
"""

import json
import re
from collections import Counter
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from langgraph_peerctx.errors import ProtocolError, ProtocolFault
from langgraph_peerctx.protocol.json_values import MAX_DEPTH, MAX_INTEGER, MIN_INTEGER
from langgraph_peerctx.protocol.messages import (
    SCHEMA_VERSION,
    ContextRequest,
    ContextResponse,
    DeathNotice,
    Heartbeat,
    Message,
)

MAX_MESSAGE_BYTES = 262_144

_MODELS: dict[str, TypeAdapter[Message]] = {
    "REQUEST_CONTEXT": TypeAdapter(ContextRequest),
    "PROVIDE_CONTEXT": TypeAdapter(ContextResponse),
    "HEARTBEAT": TypeAdapter(Heartbeat),
    "AGENT_DIED": TypeAdapter(DeathNotice),
}
MESSAGE_TYPES = frozenset(_MODELS)

# Strings are matched whole, so that brackets in them do not count; possessive, and content with an
# unterminated one, so that the scan is linear for any bytes.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_NUL_OR_SURROGATE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_MAX_DIGITS = 20


def encode(message: Message, *, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """Return a message as UTF-8 JSON.

    Raises:
        ProtocolError: If it is larger than `max_bytes`, or would not be read back.
    """
    data = message.model_dump_json().encode()
    if len(data) > max_bytes:
        _refuse("too_large", f"the message has {len(data)} bytes, {max_bytes} are allowed")
    check_depth(data)
    return data


def decode(value: bytes | None, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Return the message in a record's value.

    Args:
        value: The raw bytes, or None for a tombstone.
        max_bytes: The longest value that is looked at.

    Raises:
        ProtocolError: If it is none, for whatever reason; nothing else is ever raised.
    """
    document = parse_object(value, max_bytes=max_bytes)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        _refuse(
            "version",
            f"schema_version is {version!r:.40}, this release reads {SCHEMA_VERSION}: "
            "run the same release everywhere",
        )
    message_type = document.get("message_type")
    adapter = _MODELS.get(message_type) if isinstance(message_type, str) else None
    if adapter is None:
        _refuse("message_type", f"message_type {message_type!r:.80} is unknown")
    try:
        return adapter.validate_json(value or b"", strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(step) for step in fault["loc"])[:200]
        raise ProtocolError("field", f"{message_type}.{path}: {fault['msg'][:200]}") from None


def parse_object(value: bytes | None, *, max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Any]:
    """Return the JSON object in `value`, refused where parsers differ about its meaning.

    Raises:
        ProtocolError: If there is none.
    """
    if not value:
        _refuse("empty", "the value is empty")
    if len(value) > max_bytes:
        _refuse("too_large", f"the value has {len(value)} bytes, {max_bytes} are allowed")
    try:
        text = value.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise ProtocolError("not_utf8", f"no UTF-8 at byte {error.start}") from None
    check_depth(value)
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ProtocolError("not_json", f"no JSON: {error}"[:200]) from None
    if not isinstance(document, dict):
        _refuse("not_an_object", f"expected a JSON object, got a {type(document).__name__}")
    if b"\0" in value or _NUL_OR_SURROGATE.search(value):
        _check_texts(document)
    return document


def check_depth(data: bytes) -> None:
    """Refuse JSON of more than `MAX_DEPTH` levels, without parsing it.

    Raises:
        ProtocolError: If it is nested too deeply.
    """
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                _refuse("too_deep", f"nested more than {MAX_DEPTH} levels deep")
        elif first in b"]}":
            depth -= 1


def _refuse(fault: ProtocolFault, detail: str) -> NoReturn:
    raise ProtocolError(fault, detail)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        _refuse("duplicate_key", f"the key {twice!r:.80} stands twice")
    return document


def _integer(digits: str) -> int:
    if digits == "-0" or len(digits) > _MAX_DIGITS:
        _refuse("bad_number", f"{digits[:40]} is no 64-bit integer")
    number = int(digits)
    if not MIN_INTEGER <= number <= MAX_INTEGER:
        _refuse("bad_number", f"{digits} is no 64-bit integer")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        _refuse("bad_number", f"{digits[:40]} is too large for a number")
    return number


def _constant(name: str) -> NoReturn:
    _refuse("bad_number", f"{name} is no JSON number")


def _check_texts(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            _refuse("bad_text", "a text holds a lone surrogate")
        if "\0" in value:
            _refuse("bad_text", "a text holds NUL")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key)
            _check_texts(item)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
