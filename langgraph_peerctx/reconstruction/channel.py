"""How what peers know is put into one channel of a workflow, and never twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from langgraph.channels import AnyValue, EphemeralValue, LastValue, UntrackedValue
from langgraph.channels.base import BaseChannel

from langgraph_peerctx.durability.workflow import Workflow, state_keys
from langgraph_peerctx.nodes.state import merge_peer_context
from langgraph_peerctx.protocol.messages import Json

Shape = Literal["mapping", "list"]

_REPLACING = (LastValue, AnyValue, EphemeralValue, UntrackedValue)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerChannel:
    """A channel that can take facts.

    Attributes:
        shape: `mapping`: event id -> fact. `list`: facts, each with its `event_id`.
        replaces: Whether a write replaces what is there; else a reducer joins the two.
    """

    name: str
    shape: Shape
    replaces: bool

    def update(self, existing: object, facts: Mapping[str, Any]) -> Json | list[Json] | None:
        """Return what to write so that `facts` are in the channel, or None if they are already.

        What is in the channel stays, unless a fact is better evidence of the same event.
        """
        if self.shape == "list":
            return self._list_update(existing, facts)
        known = existing if isinstance(existing, Mapping) else {}
        merged = merge_peer_context(known, facts)
        news = {key: fact for key, fact in merged.items() if known.get(key) != fact}
        if not news:
            return None
        return merged if self.replaces else news

    def replaced(self, existing: object, facts: Mapping[str, Any]) -> Json | list[Json] | None:
        """Return the whole content that a fresh channel is to have; None if facts add nothing."""
        return replace(self, replaces=True).update(existing, facts)

    def _list_update(self, existing: object, facts: Mapping[str, Any]) -> list[Json] | None:
        known = list(existing) if isinstance(existing, Sequence) else []
        ids = {fact.get("event_id") for fact in known if isinstance(fact, Mapping)}
        news = [{"event_id": key, **fact} for key, fact in facts.items() if key not in ids]
        if not news:
            return None
        return [*known, *news] if self.replaces else news


def peer_channel(workflow: Workflow, name: str) -> PeerChannel | None:
    """Return the workflow's channel of this name, or None if it has none that can take facts."""
    channel = workflow.channels.get(name) if name in state_keys(workflow) else None
    if not isinstance(channel, BaseChannel):
        return None
    shape = _shape_of(channel.ValueType)
    if shape is None:
        return None
    return PeerChannel(name=name, shape=shape, replaces=isinstance(channel, _REPLACING))


def _shape_of(annotation: Any) -> Shape | None:
    """Return what a channel of this declared type holds, or None if it cannot hold facts."""
    origin = get_origin(annotation)
    if origin in (Annotated, Required, NotRequired):
        return _shape_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        shapes: list[Shape | None] = [_shape_of(member) for member in get_args(annotation)]
        return next((shape for shape in shapes if shape is not None), None)
    declared = origin or annotation
    if declared in (Any, object):
        return "mapping"
    if not isinstance(declared, type) or issubclass(declared, str | bytes):
        return None
    if issubclass(declared, Mapping):
        return "mapping"
    return "list" if issubclass(declared, Sequence) else None
