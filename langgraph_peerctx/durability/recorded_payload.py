"""What of a payload is stored: redacted, plain, and no larger than allowed."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import to_json

from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.protocol.json_values import plain_object
from langgraph_peerctx.protocol.messages import Json

Redact = Callable[[Json], Json]
"""Takes a payload, and returns what of it may be stored."""

LEAST_PAYLOAD_BYTES = 256


class PayloadRules:
    """How payloads are made fit to be stored.

    Args:
        redact: Applied to each payload; by default nothing is taken out.
        max_bytes: The longest JSON text; what is longer is cut.

    Raises:
        ConfigurationError: If `max_bytes` is less than `LEAST_PAYLOAD_BYTES`.
    """

    def __init__(self, redact: Redact | None, max_bytes: int) -> None:
        if max_bytes < LEAST_PAYLOAD_BYTES:
            raise ConfigurationError(
                f"max_payload_bytes={max_bytes}: allow at least {LEAST_PAYLOAD_BYTES}"
            )
        self._redact = redact
        self._max_bytes = max_bytes

    def stored(self, payload: Mapping[str, Any], *, is_whole: bool = True) -> Json:
        """Return what is stored of a payload; never raises, and stores nothing unredacted.

        Args:
            payload: What was copied of it; the redact hook may change it.
            is_whole: Whether that is all.
        """
        try:
            return self._cut(self._redacted(payload), is_whole=is_whole)
        except ProtocolError:
            return {"cut": "the payload is no JSON", "bytes": 0}

    def _redacted(self, payload: Mapping[str, Any]) -> Json:
        if self._redact is None:
            return dict(payload)  # the store makes it plain
        try:
            # Plain before, so that the hook sees JSON; plain after, as it may return anything.
            found: object = self._redact(plain_object(payload))
        except BaseException as error:  # noqa: BLE001 - the caller's own code, in our thread
            return {"redacted": f"the redact hook raised {type(error).__name__}"}
        if not isinstance(found, dict):
            return {"redacted": f"the redact hook returned a {type(found).__name__}, not a dict"}
        try:
            return plain_object(found)
        except ProtocolError:
            return {"redacted": "the redact hook returned something that is no JSON"}

    def _cut(self, payload: Json, *, is_whole: bool) -> Json:
        try:
            text = to_json(payload)
        except ValueError:  # a lone surrogate
            payload = plain_object(payload)
            text = to_json(payload)
        if is_whole and len(text) <= self._max_bytes:
            return payload
        cut: Json = {"cut": "", "bytes": len(text)}
        if not is_whole:
            cut["at_least"] = True  # the rest was not even copied
        room = self._max_bytes - len(to_json(cut))
        beginning = text[:room].decode(errors="ignore")
        while (size := len(to_json(beginning)) - 2) > room:  # quotes are escaped once more
            beginning = beginning[: len(beginning) * room // size]
        cut["cut"] = beginning
        return cut
