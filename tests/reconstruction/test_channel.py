import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.channels import DeltaChannel, EphemeralValue, Topic, UntrackedValue
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph

from langgraph_peerctx.nodes.state import merge_peer_context
from langgraph_peerctx.reconstruction.channel import PeerChannel, peer_channel

FACTS = {"order-1": {"source": "peer", "told_by": ["a"]}}
REDUCED = PeerChannel(name="known", shape="mapping", replaces=False)
PLAIN = PeerChannel(name="known", shape="mapping", replaces=True)
ADDED = PeerChannel(name="known", shape="list", replaces=False)


class Facts(TypedDict, total=False):
    order: dict[str, Any]


def add(left: list[Any], right: list[Any]) -> list[Any]:
    return left + right


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (Annotated[dict[str, Any], merge_peer_context], ("mapping", False)),
        (Annotated[Mapping[str, Any], operator.or_], ("mapping", False)),
        (dict[str, Any], ("mapping", True)),
        (dict, ("mapping", True)),
        (Mapping[str, Any], ("mapping", True)),
        (dict[str, Any] | None, ("mapping", True)),
        (NotRequired[dict[str, Any]], ("mapping", True)),
        (Facts, ("mapping", True)),
        (Any, ("mapping", True)),
        (Annotated[dict[str, Any], EphemeralValue], ("mapping", True)),
        (Annotated[dict[str, Any], UntrackedValue], ("mapping", True)),
        (Annotated[list[dict[str, Any]], operator.add], ("list", False)),
        (Annotated[Sequence[Any], add], ("list", False)),
        (Annotated[list[Any], Topic], ("list", False)),
        (list[Any], ("list", True)),
        (str, None),
        (int, None),
        (str | None, None),
    ],
)
def test_a_channel_is_known_by_its_declaration(
    declared: Any, expected: tuple[str, bool] | None
) -> None:
    class Schema(TypedDict):
        known: declared  # type: ignore[valid-type]  # another for each case

    builder = StateGraph(Schema)
    builder.add_node("work", lambda _state: None)
    builder.add_edge(START, "work")

    channel = peer_channel(builder.compile(), "known")

    assert (channel and (channel.shape, channel.replaces)) == expected


def test_channels_of_langgraph_and_of_functional_workflows_are_none_of_ours() -> None:
    @entrypoint()
    async def functional(number: int) -> int:
        return number

    builder = StateGraph(Facts)
    builder.add_node("work", lambda _state: None)
    builder.add_edge(START, "work")

    assert peer_channel(builder.compile(), "branch:to:work") is None
    assert peer_channel(functional, "__end__") is None


def test_a_reducer_is_sent_only_what_it_lacks() -> None:
    assert REDUCED.update({"order-0": {"source": "peer"}}, FACTS) == FACTS
    assert REDUCED.update(FACTS, FACTS) is None
    assert REDUCED.update(None, FACTS) == FACTS
    assert REDUCED.update(None, {}) is None


def test_a_plain_channel_is_sent_its_whole_new_content() -> None:
    assert PLAIN.update({"order-0": {"source": "peer"}}, FACTS) == {
        "order-0": {"source": "peer"},
        **FACTS,
    }
    assert PLAIN.update(FACTS, FACTS) is None


def test_better_evidence_in_the_channel_is_not_replaced() -> None:
    assert PLAIN.update({"order-1": {"source": "own"}}, FACTS) is None


def test_a_list_is_sent_facts_that_name_their_event() -> None:
    known = [{"event_id": "order-0"}, "a note"]

    assert ADDED.update(known, FACTS) == [{"event_id": "order-1", **FACTS["order-1"]}]
    assert ADDED.update([{"event_id": "order-1"}], FACTS) is None
    assert ADDED.replaced(known, FACTS) == [*known, {"event_id": "order-1", **FACTS["order-1"]}]


CHANNELS = st.dictionaries(
    st.sampled_from("abc"), st.fixed_dictionaries({"source": st.sampled_from(["own", "peer"])})
)


@given(CHANNELS, CHANNELS)
def test_what_was_delivered_is_never_sent_again(
    existing: dict[str, Any], facts: dict[str, Any]
) -> None:
    for channel in (REDUCED, PLAIN):
        update = channel.update(existing, facts)
        if isinstance(update, dict):
            after = update if channel.replaces else merge_peer_context(existing, update)
            assert channel.update(after, facts) is None
    first = ADDED.update([], facts)
    assert ADDED.update(first or [], facts) is None


def test_a_delta_channel_takes_facts_as_a_list() -> None:
    class State(TypedDict):
        known: Annotated[list[Any], DeltaChannel(lambda state, writes: [*state, *writes])]

    builder = StateGraph(State)
    builder.add_node("work", lambda _state: None)
    builder.add_edge(START, "work")

    channel = peer_channel(builder.compile(), "known")

    assert channel is not None
    assert (channel.shape, channel.replaces) == ("list", False)
