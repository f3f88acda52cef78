"""What goes into the store comes out of it, once, in order, and to nobody else."""

import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import TypeAdapter
from sqlalchemy import text

from langgraph_peerctx.errors import ConfigurationError, ProtocolError, StoreError
from langgraph_peerctx.persistence.event_store import EventStore
from langgraph_peerctx.persistence.rows import FIELDS
from langgraph_peerctx.protocol.messages import Interaction

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def made(number: int = 1, **fields: Any) -> Interaction:
    values: dict[str, Any] = {
        "interaction_id": f"i-{number}",
        "thread_id": "t",
        "from_agent": "product",
        "to_agent": "inventory",
        "kind": "order",
        "payload": {"number": number},
        "occurred_at": NOON + timedelta(seconds=number),
    }
    return Interaction(**values | fields)


def ids(found: list[Interaction]) -> list[str]:
    return [interaction.interaction_id for interaction in found]


def test_an_appended_interaction_comes_back_whole_with_its_sequence(store: EventStore) -> None:
    given = made(effect_key="e", run_id="r", checkpoint_id="c")
    stored = store.append("product", given)
    assert stored.sequence is not None
    assert stored == given.model_copy(update={"sequence": stored.sequence})
    assert store.interactions_of("product", thread_id="t") == [stored]


def test_sequences_rise(store: EventStore) -> None:
    first, second = store.append("product", made(2)), store.append("product", made(1))
    assert first.sequence is not None
    assert second.sequence is not None
    assert first.sequence < second.sequence


def test_the_same_id_again_returns_what_was_stored_first(store: EventStore) -> None:
    first = store.append("product", made(payload={"pieces": 1}))
    again = store.append("product", made(payload={"pieces": 2}))
    assert again == first
    assert store.interactions_of("product", thread_id="t") == [first]


def test_both_parties_may_keep_an_interaction_under_one_id(store: EventStore) -> None:
    store.append("product", made())
    store.append("inventory", made())
    assert ids(store.interactions_with("product", "inventory", thread_id="t")) == ["i-1"]
    assert ids(store.interactions_with("inventory", "product", thread_id="t")) == ["i-1"]


def test_many_are_counted_once_each(store: EventStore) -> None:
    store.append("product", made(2))
    assert store.append_many("product", [made(1), made(2), made(3), made(3)]) == 2
    assert store.append_many("product", [made(1), made(2), made(3)]) == 0
    assert store.append_many("product", []) == 0
    assert ids(store.interactions_of("product", thread_id="t")) == ["i-3", "i-2", "i-1"]


def test_of_many_with_a_bad_one_none_is_stored(store: EventStore) -> None:
    strange = made(2, from_agent="marketing")
    with pytest.raises(ProtocolError, match="product is no party"):
        store.append_many("product", [made(1), strange])
    assert store.interactions_of("product", thread_id="t") == []


def test_many_more_than_a_statement_has_room_for_parameters(store: EventStore) -> None:
    assert store.append_many("product", [made(n) for n in range(5_000)]) == 5_000
    assert len(store.interactions_of("product", thread_id="t", limit=10_000)) == 5_000


def test_an_agent_records_only_what_it_took_part_in(store: EventStore) -> None:
    with pytest.raises(ProtocolError, match="records what it took part in"):
        store.append("marketing", made())
    with pytest.raises(ProtocolError, match="no legal id"):
        store.append("no such/agent", made())


def test_a_note_to_oneself_has_oneself_as_counterpart(store: EventStore) -> None:
    store.append("product", made(to_agent="product"))
    assert ids(store.interactions_with("product", "product", thread_id="t")) == ["i-1"]


def test_the_newest_come_first_and_the_limit_cuts_the_oldest(store: EventStore) -> None:
    store.append_many("product", [made(n) for n in (3, 1, 4, 2)])
    found = store.interactions_with("product", "inventory", thread_id="t", limit=3)
    assert ids(found) == ["i-4", "i-3", "i-2"]


def test_of_one_moment_the_last_recorded_comes_first(store: EventStore) -> None:
    store.append_many("product", [made(n, occurred_at=NOON) for n in (3, 1, 2)])
    assert ids(store.interactions_of("product", thread_id="t")) == ["i-2", "i-1", "i-3"]


def test_both_ends_of_a_window_belong_to_it(store: EventStore) -> None:
    store.append_many("product", [made(n) for n in range(5)])
    seconds = [NOON + timedelta(seconds=n) for n in range(5)]
    inside = store.interactions_of("product", thread_id="t", since=seconds[1], until=seconds[3])
    assert ids(inside) == ["i-3", "i-2", "i-1"]
    just_after = seconds[1] + timedelta(microseconds=1)
    assert ids(store.interactions_of("product", thread_id="t", until=just_after)) == ["i-1", "i-0"]


@pytest.mark.parametrize("when", [datetime(1, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)])
def test_the_first_and_the_last_moment_can_be_kept(store: EventStore, when: datetime) -> None:
    store.append("product", made(occurred_at=when))
    (found,) = store.interactions_of("product", thread_id="t", since=when, until=when)
    assert found.occurred_at == when


def test_moments_come_back_in_utc_to_the_microsecond(store: EventStore) -> None:
    there = datetime(2026, 5, 1, 14, 0, 0, 123_457, tzinfo=timezone(timedelta(hours=2)))
    stored = store.append("product", made(occurred_at=there))
    assert stored.occurred_at == there
    assert stored.occurred_at.tzinfo is UTC


def test_another_pair_thread_or_agent_is_not_found(store: EventStore) -> None:
    store.append("product", made(1))
    store.append("product", made(2, thread_id="other"))
    store.append("product", made(3, to_agent="marketing"))
    store.append("inventory", made(4))
    assert ids(store.interactions_with("product", "inventory", thread_id="t")) == ["i-1"]
    assert ids(store.interactions_of("product", thread_id="t")) == ["i-3", "i-1"]
    assert store.interactions_with("inventory", "marketing", thread_id="t") == []


def test_an_effect_is_found_by_its_key(store: EventStore) -> None:
    store.append("product", made(1, effect_key="order-4711"))
    store.append("product", made(2, effect_key="order-4711", thread_id="other"))
    store.append("product", made(3, effect_key="order-4712"))
    store.append("inventory", made(4, effect_key="order-4711"))
    assert ids(store.by_effect_key("product", "order-4711")) == ["i-2", "i-1"]
    assert store.by_effect_key("product", "order") == []


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(store: EventStore, limit: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        store.interactions_of("product", thread_id="t", limit=limit)


def test_a_limit_beyond_the_databases_numbers_is_no_limit(store: EventStore) -> None:
    store.append("product", made())
    assert len(store.interactions_of("product", thread_id="t", limit=10**30)) == 1


def test_a_window_without_time_zone_is_refused(store: EventStore) -> None:
    with pytest.raises(ConfigurationError, match="time zone"):
        store.interactions_of("product", thread_id="t", since=datetime(2026, 5, 1))  # noqa: DTZ001 - the fault


def test_what_is_remembered_of_another_replaces_what_was(store: EventStore) -> None:
    assert store.memory_of("product", "inventory") == {}
    store.remember("product", "inventory", {"stock": 3, "colours": ["red"]})
    store.remember("product", "marketing", {"campaign": "May"})
    store.remember("product", "inventory", {"stock": 2})
    assert store.memory_of("product", "inventory") == {"stock": 2}
    assert store.memory_of("inventory", "product") == {}


def test_a_memory_is_plain_json_between_legal_ids(store: EventStore) -> None:
    with pytest.raises(ProtocolError, match="no JSON"):
        store.remember("product", "inventory", {"when": NOON})
    with pytest.raises(ProtocolError, match="counterpart_id"):
        store.remember("product", "../inventory", {})


@pytest.mark.parametrize(
    "hostile",
    ["a\u0000b", "\ud800", "'; DROP TABLE peerctx_interactions; --", '"', "$.x[*]", "%s {} \\"],
)
def test_hostile_text_is_kept_as_data_alike_in_both_databases(
    store: EventStore, hostile: str
) -> None:
    plain = hostile.replace("\0", "\ufffd").replace("\ud800", "\ufffd")
    stored = store.append("product", made(payload={hostile: [hostile]}))
    assert stored.payload == {plain: [plain]}
    assert store.interactions_of("product", thread_id="t") == [stored]
    store.remember("product", "inventory", {hostile: hostile})
    assert store.memory_of("product", "inventory") == {plain: plain}


@pytest.mark.parametrize("hostile", ["'; --", '"x"', "a' OR '1'='1", "%", "_", "\\", "ünï"])
def test_hostile_ids_of_threads_and_effects_match_only_themselves(
    store: EventStore, hostile: str
) -> None:
    store.append("product", made(1, thread_id="t", effect_key="e"))
    store.append("product", made(2, thread_id=hostile, effect_key=hostile, interaction_id=hostile))
    assert ids(store.interactions_of("product", thread_id=hostile)) == [hostile]
    assert ids(store.by_effect_key("product", hostile)) == [hostile]
    assert store.interactions_with("product", hostile, thread_id="t") == []
    assert store.memory_of(hostile, hostile) == {}


@pytest.mark.parametrize("odd", ["\0", "\ud800", "a\0b"])
def test_asking_for_what_no_database_can_keep_finds_nothing(store: EventStore, odd: str) -> None:
    assert store.interactions_of(odd, thread_id=odd) == []
    assert store.interactions_with(odd, odd, thread_id=odd) == []
    assert store.by_effect_key(odd, odd) == []
    assert store.memory_of(odd, odd) == {}


def test_numbers_beyond_json_are_kept_alike(store: EventStore) -> None:
    payload: dict[str, Any] = {"nan": float("nan"), "big": 2**64, "least": -(2**63), "zero": -0.0}
    given = made().model_copy(update={"payload": payload})
    stored = store.append("product", given)
    assert stored.payload == {"nan": None, "big": str(2**64), "least": -(2**63), "zero": -0.0}


def test_what_comes_out_is_a_full_interaction(store: EventStore) -> None:
    """The quick way in which rows become interactions makes the same as validation."""
    stored = store.append("product", made(effect_key="e"))
    checked = TypeAdapter(Interaction).validate_python(stored.model_dump())
    assert stored == checked
    assert stored.model_fields_set == checked.model_fields_set == set(FIELDS)
    assert stored.model_dump_json() == checked.model_dump_json()
    assert pickle.loads(pickle.dumps(stored)) == checked  # noqa: S301 - our own bytes
    assert stored.model_copy(update={"kind": "reply"}).kind == "reply"
    assert set(Interaction.model_fields) == set(FIELDS)
    with pytest.raises(ValueError, match="frozen"):
        stored.kind = "reply"  # type: ignore[misc]  # the fault


def test_a_row_that_is_no_json_is_a_store_error(store: EventStore) -> None:
    store.append("product", made())
    store.remember("product", "inventory", {})
    with store._engine.connect() as connection:
        connection.execute(text("UPDATE peerctx_interactions SET payload = '{'"))
        connection.execute(text("UPDATE peerctx_memories SET state = '{'"))
    with pytest.raises(StoreError, match="no JSON"):
        store.interactions_of("product", thread_id="t")
    with pytest.raises(StoreError, match="no JSON"):
        store.memory_of("product", "inventory")


def test_a_store_knows_when_it_was_made(url: str) -> None:
    before = datetime.now(UTC)
    with EventStore(url) as store:
        born = store.created_at()
    assert before <= born <= datetime.now(UTC)
    with EventStore(url) as again:
        assert again.created_at() == born


def test_what_was_acknowledged_is_there_after_reopening(url: str) -> None:
    with EventStore(url) as store:
        stored = store.append("product", made())
    with EventStore(url) as again:
        assert again.interactions_of("product", thread_id="t") == [stored]


def test_two_stores_of_one_database_see_each_other(store: EventStore, url: str) -> None:
    with EventStore(url) as other:
        stored = store.append("product", made())
        assert other.append("product", made(payload={})) == stored


async def test_the_async_twins_do_the_same(store: EventStore) -> None:
    stored = await store.aappend("product", made(1, effect_key="e"))
    assert await store.aappend_many("product", [made(1), made(2)]) == 1
    assert ids(await store.ainteractions_with("product", "inventory", thread_id="t")) == [
        "i-2",
        "i-1",
    ]
    assert ids(await store.ainteractions_of("product", thread_id="t", limit=1)) == ["i-2"]
    assert await store.aby_effect_key("product", "e") == [stored]
    await store.aremember("product", "inventory", {"stock": 3})
    assert await store.amemory_of("product", "inventory") == {"stock": 3}
    assert await store.acreated_at() == store.created_at()
    await store.aping()


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.ping(),
        lambda store: store.append("product", made()),
        lambda store: store.append_many("product", [made()]),
        lambda store: store.remember("product", "inventory", {}),
    ],
)
def test_a_closed_store_says_so(store: EventStore, use: Callable[[EventStore], object]) -> None:
    store.close()
    store.close()
    assert store.closed
    with pytest.raises(StoreError, match="is closed"):
        use(store)


async def test_a_closed_stores_twins_say_so(store: EventStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        await store.aping()
