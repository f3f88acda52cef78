"""Merging is pure: the same truth whatever order the answers came in."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from langgraph_peerctx.gathering.merge import Merged, merge
from langgraph_peerctx.protocol.messages import (
    AgentAnswer,
    ContextResponse,
    InDoubtAnswer,
    Interaction,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAILED = "product"


def interaction(
    key: str, agent: str = "marketing", *, at: float = 0, sequence: int | None = None, **more: Any
) -> Interaction:
    fields: dict[str, Any] = {
        "interaction_id": key,
        "thread_id": "t",
        "from_agent": FAILED,
        "to_agent": agent,
        "kind": "message",
        "occurred_at": NOW + timedelta(seconds=at),
        "sequence": sequence,
    }
    return Interaction(**(fields | more))


def response(agent: str, *told: Interaction, **more: Any) -> ContextResponse:
    answer = AgentAnswer(agent_id=agent, status="context", interactions=told, **more)
    return ContextResponse(
        sent_at=NOW,
        correlation_id="c",
        responder_id=f"process-of-{agent}",
        failed_agent_id=FAILED,
        thread_id="t",
        agents=(answer,),
    )


def merged(*responses: ContextResponse, **limits: Any) -> Merged:
    return merge(responses, failed_agent_id=FAILED, thread_id="t", **limits)


def keys(result: Merged) -> list[str]:
    return [fact.interaction.interaction_id for fact in result.facts]


histories = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 9)),
        max_size=8,
        unique_by=lambda row: row[0],
    ),
)


def answers(histories: dict[str, list[tuple[int, int, int]]]) -> list[ContextResponse]:
    """Each agent's own ids, with clocks and sequences that may contradict each other."""
    return [
        response(
            agent,
            *(
                interaction(f"{agent}{number}", agent, at=at, sequence=sequence)
                for number, at, sequence in rows
            ),
        )
        for agent, rows in histories.items()
    ]


@given(histories, st.randoms())
def test_the_order_of_answers_does_not_matter(
    histories: dict[str, list[tuple[int, int, int]]], chance: random.Random
) -> None:
    responses = answers(histories)
    shuffled = list(responses)
    chance.shuffle(shuffled)
    assert merged(*responses) == merged(*shuffled)


@given(histories)
def test_every_interaction_is_told_once_and_none_is_invented(
    histories: dict[str, list[tuple[int, int, int]]],
) -> None:
    result = merged(*answers(histories))
    told = {f"{agent}{row[0]}" for agent, rows in histories.items() for row in rows}
    assert sorted(keys(result)) == sorted(told)


@given(st.lists(st.lists(st.integers(0, 100), max_size=6), min_size=1, max_size=4))
def test_an_agents_own_sequence_is_kept_whatever_its_clock_says(clocks: list[list[int]]) -> None:
    responses = [
        response(
            f"agent{i}",
            *(
                interaction(f"{i}-{n}", f"agent{i}", at=at, sequence=n)
                for n, at in enumerate(times)
            ),
        )
        for i, times in enumerate(clocks)
    ]
    order = keys(merged(*responses))
    for i, times in enumerate(clocks):
        assert [k for k in order if k.startswith(f"{i}-")] == [
            f"{i}-{n}" for n in range(len(times))
        ]


def test_between_agents_the_time_of_occurrence_decides() -> None:
    result = merged(
        response("a", interaction("a1", "a", at=1), interaction("a3", "a", at=3)),
        response("b", interaction("b2", "b", at=2)),
    )
    assert keys(result) == ["a1", "b2", "a3"]


def test_sequences_that_contradict_each_other_end_and_the_earliest_goes_first() -> None:
    one = response("a", interaction("x", "a", at=1, sequence=1), interaction("y", "a", sequence=2))
    other = one.model_copy(
        update={
            "responder_id": "twin",
            "agents": (
                one.agents[0].model_copy(
                    update={
                        "interactions": (
                            interaction("y", "a", sequence=1),
                            interaction("x", "a", at=1, sequence=2),
                            interaction("z", "a", at=9, sequence=3),
                        )
                    }
                ),
            ),
        }
    )
    assert sorted(keys(merged(one, other))) == ["x", "y", "z"]


def test_what_a_peer_tells_of_others_is_left_out_and_counted() -> None:
    result = merged(
        response(
            "a",
            interaction("mine", "a"),
            interaction("of another pair", "b"),
            interaction("of another thread", "a", thread_id="t2"),
        )
    )
    assert keys(result) == ["mine"]
    assert result.misfits == 2


def test_both_tellers_of_one_interaction_are_named() -> None:
    one = response("a", interaction("x", "a"))
    twin = one.model_copy(update={"responder_id": "another-process"})
    result = merged(one, twin)
    assert [fact.told_by for fact in result.facts] == [("a",)]
    assert result.conflicts == ()


def test_the_newest_are_kept_under_a_budget_and_the_cut_is_said() -> None:
    told = [interaction(f"i{n}", at=n, sequence=n) for n in range(10)]
    size = len(told[0].model_dump_json())
    result = merged(response("marketing", *told), max_bytes=3 * size + 1)
    assert keys(result) == ["i7", "i8", "i9"]
    assert result.truncated == ("marketing",)


@given(st.integers(0, 5_000))
def test_a_budget_is_never_exceeded(max_bytes: int) -> None:
    told = [interaction(f"i{n}", at=n, payload={"x": "y" * n}) for n in range(12)]
    result = merged(response("marketing", *told), max_bytes=max_bytes)
    assert sum(len(f.interaction.model_dump_json()) for f in result.facts) <= max_bytes


def test_a_cut_at_the_peer_is_said() -> None:
    assert merged(response("a", truncated=True)).truncated == ("a",)


def test_memory_is_kept_under_its_agent() -> None:
    result = merged(response("a", memory_state={"k": 1}), response("b"))
    assert result.memory == {"a": {"k": 1}}


def test_contradicting_words_on_an_effect_are_no_word() -> None:
    def says(verdict: str, responder: str) -> ContextResponse:
        word = InDoubtAnswer.model_validate(
            {"effect_key": "order-1", "agent_id": "a", "verdict": verdict, "reply": {"n": 1}}
        )
        return response("a").model_copy(update={"responder_id": responder, "in_doubt": (word,)})

    (agreed,) = merged(says("seen", "p"), says("seen", "q")).in_doubt
    assert (agreed.verdict, agreed.reply) == ("seen", {"n": 1})
    for order in (("seen", "not_seen", "seen"), ("not_seen", "seen", "not_seen")):
        (word,) = merged(*(says(v, f"p{n}") for n, v in enumerate(order))).in_doubt
        assert (word.verdict, word.reply) == ("cannot_tell", None)


def test_one_id_told_differently_by_two_agents_is_a_conflict_and_the_first_is_kept() -> None:
    result = merged(
        response("b", interaction("x", "b", payload={"n": 2})),
        response("a", interaction("x", "a", payload={"n": 1})),
    )
    (fact,) = result.facts
    assert (fact.told_by, fact.interaction.payload) == (("a", "b"), {"n": 1})
    (conflict,) = result.conflicts
    assert {agent: v.payload for agent, v in conflict.versions.items()} == {
        "a": {"n": 1},
        "b": {"n": 2},
    }


def test_what_two_processes_tell_differently_of_one_agent_is_a_conflict() -> None:
    told = [
        response("a", interaction("x", "a", payload={"n": n})).model_copy(
            update={"responder_id": process, "incarnation": life}
        )
        for n, (process, life) in enumerate([("one", "1"), ("two", "1"), ("two", "2")])
    ]
    result = merged(*told)
    assert result == merged(*reversed(told))
    (fact,) = result.facts
    assert (fact.told_by, fact.interaction.payload) == (("a",), {"n": 0})
    (conflict,) = result.conflicts
    assert {name: v.payload for name, v in conflict.versions.items()} == {
        "a on one": {"n": 0},
        "a on two": {"n": 1},
        "a on two, 2": {"n": 2},
    }


def test_of_an_effect_that_two_processes_saw_with_two_replies_nobody_can_tell() -> None:
    told = [
        response("a").model_copy(
            update={
                "responder_id": process,
                "in_doubt": (
                    InDoubtAnswer(
                        effect_key="k", agent_id="a", verdict="seen", reply={"by": process}
                    ),
                ),
            }
        )
        for process in ("one", "two")
    ]
    for answers in (told, [*reversed(told)], [*told, told[0]]):
        (word,) = merged(*answers).in_doubt
        assert (word.verdict, word.reply) == ("cannot_tell", None)
