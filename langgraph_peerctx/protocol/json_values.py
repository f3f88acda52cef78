"""JSON that every store and every peer takes alike.

SQLite keeps NUL, lone surrogates and NaN inside JSON and PostgreSQL refuses all three; a nesting
of 255 cannot be written into a checkpoint. So values are made plain once, where they enter.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from langgraph_peerctx.errors import ProtocolError

MAX_PAYLOAD_DEPTH = 24
"""Levels of one value, so that a whole message stays under 32; checkpoints fail at 255."""
MAX_INTEGER = 2**63 - 1
MIN_INTEGER = -(2**63)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def plain(value: object, *, name: str = "payload", depth: int = MAX_PAYLOAD_DEPTH) -> JsonValue:
    """Return `value` as JSON that SQLite, PostgreSQL and the wire take alike.

    NUL and lone surrogates become U+FFFD; NaN and infinities become null; integers beyond 64 bits
    become their decimal text; tuples become lists.

    Args:
        value: Anything made of mappings with string keys, lists, tuples and JSON's scalars.
        name: What the value is called in an error.
        depth: How many levels it may have.

    Raises:
        ProtocolError: If it is nested too deeply, or holds something that is no JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, int):
        return int(value) if MIN_INTEGER <= value <= MAX_INTEGER else _decimal(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if depth <= 0:
        raise ProtocolError("too_deep", f"{name} is nested too deeply: flatten it")
    if isinstance(value, Mapping):
        return {
            plain_text(_key(key, name)): plain(item, name=f"{name}.{key}"[:200], depth=depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, name=name, depth=depth - 1) for item in value]
    raise ProtocolError(
        "not_json",
        f"{name} holds a {type(value).__name__}, which is no JSON: "
        "use None, bool, int, float, str, list or dict",
    )


def plain_object(value: Mapping[str, Any], *, name: str = "payload") -> dict[str, JsonValue]:
    """Return a mapping as a plain JSON object; see `plain`."""
    result = plain(value, name=name)
    if not isinstance(result, dict):
        raise ProtocolError("not_an_object", f"{name} must be a mapping of names to JSON values")
    return result


def plain_text(text: str) -> str:
    """Return `text` with NUL and lone surrogates replaced by U+FFFD."""
    if text.isascii():
        return text.replace("\0", _REPLACEMENT)
    # A lone surrogate is what UTF-8 cannot encode; Python's "replace" would write "?".
    cleaned = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return cleaned.replace("\0", _REPLACEMENT)


def _key(key: object, name: str) -> str:
    if isinstance(key, str):
        return key
    raise ProtocolError("not_json", f"{name} has the key {key!r:.80}: JSON keys are strings")


def _decimal(number: int) -> str:
    # str() of an integer refuses more than 4,300 digits; hex does not, and loses nothing.
    try:
        return str(number)
    except ValueError:
        return hex(number)
