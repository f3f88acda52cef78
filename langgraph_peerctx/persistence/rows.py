"""An interaction and its row: made such that SQLite and PostgreSQL keep and return the same."""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.protocol.json_values import plain_object, plain_text
from langgraph_peerctx.protocol.messages import Interaction

FIELDS = (
    "interaction_id",
    "thread_id",
    "from_agent",
    "to_agent",
    "kind",
    "payload",
    "occurred_at",
    "sequence",
    "effect_key",
    "run_id",
    "checkpoint_id",
)
"""What of a row is the interaction's, in the order in which `interactions_in` expects it."""

EARLIEST = -(2**62)
LATEST = 2**62

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_GIVEN = set(FIELDS)

# What `object.__setattr__` looks up by name at each call, for less than half the time.
_fill = BaseModel.__dict__["__dict__"].__set__
_fill_given = BaseModel.__dict__["__pydantic_fields_set__"].__set__
_fill_extra = BaseModel.__dict__["__pydantic_extra__"].__set__
_fill_private = BaseModel.__dict__["__pydantic_private__"].__set__


def row_of(agent_id: str, interaction: Interaction) -> dict[str, Any]:
    """Return the row in which an agent keeps an interaction.

    Raises:
        ProtocolError: If the agent is no party to it, or the payload is no plain JSON.
    """
    return {
        "agent_id": check_id(agent_id, "agent_id"),
        "interaction_id": plain_text(interaction.interaction_id),
        "counterpart_id": _counterpart(agent_id, interaction),
        "thread_id": plain_text(interaction.thread_id),
        "from_agent": interaction.from_agent,
        "to_agent": interaction.to_agent,
        "kind": interaction.kind,
        "payload": json_text(interaction.payload, name="payload"),
        "occurred_at": microseconds(interaction.occurred_at),
        "recorded_at": now(),
        "effect_key": _optional(interaction.effect_key),
        "run_id": _optional(interaction.run_id),
        "checkpoint_id": _optional(interaction.checkpoint_id),
    }


def interactions_in(rows: Sequence[Sequence[Any]]) -> list[Interaction]:
    """Return the interactions in rows of `FIELDS`, in their order.

    Raises:
        ValueError: If a payload is no JSON: somebody else wrote it.
    """
    # One parse for all payloads takes a third of the time of one for each.
    payloads = from_json(f"[{','.join([row[5] for row in rows])}]")
    return [_interaction(row, payload) for row, payload in zip(rows, payloads, strict=True)]


def json_text(value: Mapping[str, Any], *, name: str) -> str:
    """Return a mapping as the JSON text that is kept of it.

    Raises:
        ProtocolError: If it is no plain JSON.
    """
    return to_json(plain_object(value, name=name)).decode()


def now() -> int:
    """Return this moment, in microseconds since 1970 UTC."""
    return time.time_ns() // 1_000


def microseconds(moment: datetime) -> int:
    """Return a moment as microseconds since 1970 UTC.

    Raises:
        ConfigurationError: If it has no time zone.
    """
    if moment.tzinfo is None:
        raise ConfigurationError(f"{moment} has no time zone: give it one, UTC for instance")
    return (moment - _EPOCH) // _MICROSECOND


def moment_at(count: int) -> datetime:
    """Return the moment so many microseconds after 1970 UTC."""
    return _EPOCH + timedelta(microseconds=count)


def stored(row: Mapping[str, Any], sequence: int) -> Interaction:
    """Return the interaction in a row that was just stored under this sequence."""
    values = {**row, "sequence": sequence}
    return interactions_in([[values[field] for field in FIELDS]])[0]


def _interaction(row: Iterable[Any], payload: Any) -> Interaction:
    """Return the interaction in a row, without checking again what was checked when it came in.

    This is `model_construct` without its walk over all fields, written out: on the way of every
    answer, 50 interactions take 90 µs instead of 250.
    """
    (
        interaction_id,
        thread_id,
        from_agent,
        to_agent,
        kind,
        _,
        occurred_at,
        sequence,
        effect_key,
        run_id,
        checkpoint_id,
    ) = row
    interaction = object.__new__(Interaction)
    _fill(
        interaction,
        {
            "interaction_id": interaction_id,
            "thread_id": thread_id,
            "from_agent": from_agent,
            "to_agent": to_agent,
            "kind": kind,
            "payload": payload,
            "occurred_at": _EPOCH + timedelta(0, 0, occurred_at),
            "sequence": sequence,
            "effect_key": effect_key,
            "run_id": run_id,
            "checkpoint_id": checkpoint_id,
        },
    )
    _fill_given(interaction, _GIVEN)
    _fill_extra(interaction, None)
    _fill_private(interaction, None)
    return interaction


def _counterpart(agent_id: str, interaction: Interaction) -> str:
    """Return the other party; of a note to oneself, oneself."""
    sender, receiver = interaction.from_agent, interaction.to_agent
    if agent_id == sender:
        return receiver
    if agent_id == receiver:
        return sender
    raise ProtocolError(
        "field",
        f"{agent_id} is no party to the interaction from {sender} to {receiver}: "
        "an agent records what it took part in",
    )


def _optional(text: str | None) -> str | None:
    return None if text is None else plain_text(text)
