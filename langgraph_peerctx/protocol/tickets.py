"""What travels to a peer with a side effect, so that it can tell a first call from a repeated one.

As a header: `peerctx-effect`, its value one line of ASCII JSON (HTTP, gRPC, Kafka). Or as a field
of a JSON body: `peerctx_effect`, its value the same object.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import Field, ValidationError

from langgraph_peerctx.errors import ProtocolError
from langgraph_peerctx.identifiers import Identifier, RecordId
from langgraph_peerctx.protocol.messages import Count, Frozen, Json

EFFECT_HEADER: Final = "peerctx-effect"
EFFECT_FIELD: Final = "peerctx_effect"
NAME_LIMIT = 200
TICKET_LIMIT_BYTES = 16_384
"""Long ids outside of ASCII are escaped: six bytes a character, or twelve."""


class EffectTicket(Frozen):
    """Names one side effect for good: the same again whenever it is repeated.

    Attributes:
        effect_key: What the peer keeps it under; unique among all effects of the sender.
        name: The key that the sender's code uses.
        sender_id: The agent that acts.
        thread_id: In which thread.
        run_id: In which run; of an effect of the whole thread, the thread's id.
        input_digest: Of what the run was given; None if that is not known. It tells the runs of
            one thread apart where the sender has lost its own record of them.
        epoch: Under which epoch: it rises each time that somebody takes the thread over.
    """

    effect_key: RecordId
    name: Annotated[str, Field(min_length=1, max_length=NAME_LIMIT)]
    sender_id: Identifier
    thread_id: RecordId
    run_id: RecordId
    input_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    epoch: Count

    def as_headers(self) -> dict[str, str]:
        """Return the ticket as a header: one name, one line of ASCII."""
        return {EFFECT_HEADER: json.dumps(self.model_dump(mode="json"))}

    def as_field(self) -> Json:
        """Return the ticket as a field of a JSON object."""
        return {EFFECT_FIELD: self.model_dump(mode="json")}

    @classmethod
    def from_headers(cls, headers: Mapping[str, str | bytes]) -> Self:
        """Read the ticket that came in headers, whatever the case of their names.

        Raises:
            ProtocolError: If there is none, or it is none that a sender would make.
        """
        found = [value for name, value in headers.items() if name.lower() == EFFECT_HEADER]
        if not found:
            raise ProtocolError("field", f"no header {EFFECT_HEADER}: the call names no effect")
        text = found[0]
        value = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        if len(value) > TICKET_LIMIT_BYTES:
            raise ProtocolError("too_large", f"{EFFECT_HEADER} is over {TICKET_LIMIT_BYTES} bytes")
        try:
            return cls.model_validate_json(value)
        except ValidationError as error:
            raise _illegal(error) from None

    @classmethod
    def from_field(cls, body: Mapping[str, Any]) -> Self:
        """Read the ticket that came as a field of a JSON object.

        Raises:
            ProtocolError: If there is none, or it is none that a sender would make.
        """
        if EFFECT_FIELD not in body:
            raise ProtocolError("field", f"no field {EFFECT_FIELD}: the call names no effect")
        try:
            return cls.model_validate(body[EFFECT_FIELD])
        except ValidationError as error:
            raise _illegal(error) from None


def _illegal(error: ValidationError) -> ProtocolError:
    fault = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(step) for step in fault["loc"])
    return ProtocolError("field", f"{EFFECT_HEADER}: {path}: {fault['msg']}"[:300])
