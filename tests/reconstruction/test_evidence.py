import json
from dataclasses import replace
from typing import Any

from reconstruction.fake_runtime import NOW, context, interaction

from langgraph_peerctx.gathering.peer_context import Conflict, Coverage, Fact
from langgraph_peerctx.protocol.messages import InDoubtAnswer, InDoubtKey, Interaction
from langgraph_peerctx.reconstruction.checkpoint import CheckpointView
from langgraph_peerctx.reconstruction.evidence import Reconstruction, reconstruct
from langgraph_peerctx.reconstruction.sources import EvidenceQuery, OwnHistory

QUERY = EvidenceQuery(agent_id="product-agent", thread_id="thread-1")
HEAD = CheckpointView(
    thread_id="thread-1",
    status="interrupted_work",
    checkpoint_id="head-1",
    created_at=NOW,
    values={"log": ["in"], "note": "n"},
)


def own(*events: Interaction) -> OwnHistory:
    return OwnHistory(events=events)


def provenance(result: Reconstruction) -> list[tuple[Any, Any, Any]]:
    return [(item["fact"], item["source"], item["rank"]) for item in result["provenance"]]


def test_every_restored_fact_says_where_it_comes_from_the_best_evidence_first() -> None:
    result = reconstruct(QUERY, HEAD, own(interaction("own-1")), context(interaction("order-1")))

    assert provenance(result) == [
        ("state.log", "checkpoint", 4),
        ("state.note", "checkpoint", 4),
        ("event.own-1", "own", 3),
        ("event.order-1", "peer", 2),
    ]
    assert all(item["event_id"] and item["occurred_at"] for item in result["provenance"])


def test_a_peer_does_not_replace_the_agents_own_record() -> None:
    mine, theirs = interaction(payload={"count": 1}), interaction(payload={"count": 2})

    result = reconstruct(QUERY, HEAD, own(mine), context(theirs))

    fact: Any = result["peer_context"]["order-1"]
    assert (fact["source"], fact["payload"]) == ("own", {"count": 1})


def test_a_peer_that_contradicts_the_agents_own_record_is_reported() -> None:
    mine, theirs = interaction(payload={"count": 1}), interaction(payload={"count": 2})

    result = reconstruct(QUERY, HEAD, own(mine), context(theirs))

    (conflict,) = result["conflicts"]
    versions: Any = conflict["versions"]
    assert {agent: version["payload"] for agent, version in versions.items()} == {
        "product-agent": {"count": 1},
        "inventory-agent": {"count": 2},
    }


def test_what_only_the_writer_knows_is_no_contradiction() -> None:
    mine = interaction().model_copy(update={"sequence": 1, "checkpoint_id": "c", "run_id": "r"})
    theirs = interaction().model_copy(update={"sequence": 9})

    assert reconstruct(QUERY, HEAD, own(mine), context(theirs))["conflicts"] == []


def test_peers_that_contradict_each_other_are_reported() -> None:
    versions = {"a": interaction(payload={"n": 1}), "b": interaction(payload={"n": 2})}
    conflict = Conflict(interaction_id="order-1", versions=versions)

    result = reconstruct(QUERY, HEAD, own(), context(interaction(), conflicts=(conflict,)))

    assert [item["interaction_id"] for item in result["conflicts"]] == ["order-1"]


def test_the_agents_that_answered_are_named_also_those_that_knew_nothing() -> None:
    told = Fact(interaction=interaction(), told_by=("b", "a"))
    coverage = Coverage(empty=("c",), declined=("d",), busy=("e",), silent=("z",))
    peers = context(facts=(told,), memory={"f": {"mood": "good"}}, coverage=coverage)

    result = reconstruct(QUERY, HEAD, own(), peers)

    assert result["peer_agents_queried"] == ["a", "b", "c", "d", "e", "f"]
    assert "memory:f" in result["peer_context"]


def test_what_settles_an_effect_in_doubt_is_passed_on() -> None:
    answer = InDoubtAnswer(effect_key="k1", agent_id="inventory-agent", verdict="seen")

    result = reconstruct(QUERY, HEAD, own(), context(in_doubt=(answer,)))

    assert [(item["effect_key"], item["verdict"]) for item in result["in_doubt"]] == [
        ("k1", "seen")
    ]


def test_only_the_named_peer_settles_an_effect() -> None:
    keys = tuple(
        InDoubtKey(effect_key=key, peer_id="inventory-agent", epoch=0, intent_at=NOW)
        for key in ("seen", "not-seen", "cannot-tell", "hearsay", "silence")
    )
    answers = tuple(
        InDoubtAnswer(effect_key=key, agent_id=agent, verdict=verdict)
        for key, agent, verdict in (
            ("seen", "inventory-agent", "seen"),
            ("not-seen", "inventory-agent", "not_seen"),
            ("cannot-tell", "inventory-agent", "cannot_tell"),
            ("hearsay", "gossip-agent", "seen"),
        )
    )

    asked = replace(QUERY, in_doubt=keys)
    result = reconstruct(asked, HEAD, own(), context(in_doubt=answers))

    assert result["degraded"]
    assert result["reasons"] == [
        "in_doubt: nobody could tell whether it happened: 'cannot-tell, hearsay, silence'"
    ]


def test_what_is_missing_is_said() -> None:
    lost = CheckpointView(thread_id="thread-1", status="no_checkpoint")
    bare = CheckpointView(thread_id="thread-1", status="no_checkpointer")

    results = [
        reconstruct(QUERY, None, own(), context()),
        reconstruct(QUERY, bare, own(), context()),
        reconstruct(QUERY, lost, own(), context()),
        reconstruct(QUERY, HEAD, OwnHistory(shortfalls=("no_own_events: x",)), context()),
        reconstruct(QUERY, HEAD, own(), context(degraded=("mock_mode: x",))),
        reconstruct(QUERY, HEAD, own(), context()),
    ]

    assert [[reason.split(":")[0] for reason in result["reasons"]] for result in results] == [
        ["no_workflow"],
        ["no_checkpointer"],
        ["no_checkpoint"],
        ["no_own_events"],
        ["mock_mode"],
        [],
    ]
    assert [result["degraded"] for result in results] == [True] * 5 + [False]
    assert [result["checkpoint"] is None for result in results] == [True] * 3 + [False] * 3


def test_peers_that_were_not_asked_have_no_coverage() -> None:
    result = reconstruct(QUERY, HEAD, own(), None)

    assert result["coverage"] is None
    assert not result["peer_context_used"]
    assert not result["degraded"]


def test_all_but_the_state_is_plain_json() -> None:
    result = reconstruct(QUERY, HEAD, own(interaction("own-1")), context(interaction()))

    assert json.loads(json.dumps(result)) == result
