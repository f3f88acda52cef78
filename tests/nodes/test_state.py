import copy
import operator
from typing import Annotated, Any, TypedDict

from hypothesis import given
from hypothesis import strategies as st
from langgraph.graph import START, StateGraph

from langgraph_peerctx.nodes.state import (
    EVIDENCE_RANKS,
    PeerContextState,
    merge_peer_context,
    rank_of,
)

FACTS = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "source": st.sampled_from([*EVIDENCE_RANKS, "rumour", 7, None]),
            "payload": st.integers(0, 3),
        }
    ),
)
CHANNELS = st.dictionaries(st.sampled_from("abcd"), FACTS, max_size=4)


@given(CHANNELS, CHANNELS)
def test_merging_the_same_facts_again_changes_nothing(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    once = merge_peer_context(left, right)

    assert merge_peer_context(once, right) == once
    assert merge_peer_context(once, left) == once


@given(CHANNELS, CHANNELS)
def test_merging_changes_neither_side(left: dict[str, Any], right: dict[str, Any]) -> None:
    before = copy.deepcopy((left, right))

    merge_peer_context(left, right)

    assert (left, right) == before


@given(CHANNELS, CHANNELS)
def test_a_fact_gives_way_to_better_evidence_only(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    merged = merge_peer_context(left, right)

    assert merged.keys() == left.keys() | right.keys()
    for event_id, fact in merged.items():
        if event_id in left and (
            event_id not in right or rank_of(right[event_id]) <= rank_of(left[event_id])
        ):
            assert fact == left[event_id]
        else:
            assert fact == right[event_id]


@given(CHANNELS, CHANNELS, CHANNELS)
def test_merging_is_associative(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    one = merge_peer_context(merge_peer_context(a, b), c)
    other = merge_peer_context(a, merge_peer_context(b, c))

    assert one == other


def test_nothing_merges_with_nothing() -> None:
    assert merge_peer_context(None, None) == {}


async def test_a_state_that_extends_ours_gathers_facts_from_parallel_nodes() -> None:
    class State(PeerContextState, total=False):
        log: Annotated[list[str], operator.add]

    builder = StateGraph(State)
    for name, source in (("asked", "peer"), ("kept", "own")):
        fact = {"source": source, "told_by": [name]}
        builder.add_node(name, lambda _state, fact=fact: {"peer_context": {"order-1": fact}})
        builder.add_edge(START, name)

    result = await builder.compile().ainvoke({"peer_context": {"order-0": {"source": "peer"}}})

    assert result["peer_context"]["order-1"]["source"] == "own"
    assert result["peer_context"].keys() == {"order-0", "order-1"}


def test_a_state_need_not_extend_ours() -> None:
    class State(TypedDict):
        known: Annotated[dict[str, Any], merge_peer_context]

    builder = StateGraph(State)
    builder.add_node("ask", lambda _state: {"known": {"order-1": {"source": "peer"}}})
    builder.add_edge(START, "ask")

    assert builder.compile().invoke({"known": {}}) == {"known": {"order-1": {"source": "peer"}}}
