"""What arrived under a key is told from what did not, and what is denied never arrives."""

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from services.postgres import PostgresServer
from sqlalchemy import text

from langgraph_peerctx.errors import ProtocolError, StaleOwnerError, StoreBusyError, StoreError
from langgraph_peerctx.persistence import postgresql
from langgraph_peerctx.persistence.event_store import EventStore, record_interaction
from langgraph_peerctx.persistence.receipts import REPLY_LIMIT_BYTES, Begun, SettledKey
from langgraph_peerctx.protocol.tickets import EffectTicket

ROUNDS = 150


@pytest.fixture(autouse=True)
def _a_transaction_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is; a server that ends who says nothing is tested elsewhere."""
    monkeypatch.setattr(postgresql, "IDLE_MILLISECONDS", 60_000)


@pytest.fixture
def declared(store: EventStore) -> EventStore:
    store.declare_receiver("inventory")
    return store


def ticket(key: str = "k", epoch: int = 1, **changes: Any) -> EffectTicket:
    fields = {"name": "reserve", "sender_id": "product", "thread_id": "t", "run_id": "r"}
    return EffectTicket(effect_key=key, epoch=epoch, **(fields | changes))


def receive(store: EventStore, given_: EffectTicket, reply: Any = None) -> Begun:
    """Receive, and do it if it is the first time."""
    begun = store.begin_receipt("inventory", given_)
    if begun.arrival == "first":
        store.finish_receipt("inventory", given_, reply)
    return begun


def settle(store: EventStore, key: str = "k", epoch: int = 2, **changes: Any) -> SettledKey:
    fields = {"agent_id": "inventory", "sender_id": "product", "thread_id": "t"}
    fields |= {"intent_at": datetime.now(UTC)} | changes
    return store.settle_key(effect_key=key, epoch=epoch, **fields)


def rows(store: EventStore, table: str) -> list[Any]:
    with store._engine.connect() as connection:
        return list(connection.execute(text(f"SELECT * FROM {table}")).mappings())  # noqa: S608 - our own name


def remember(store: EventStore, agent: str = "inventory", **changes: Any) -> None:
    fields = {"from_agent": "product", "to_agent": "inventory", "thread_id": "t", "kind": "order"}
    record_interaction(agent_id=agent, store=store, **(fields | {"effect_key": "k"} | changes))


# Receiving.


def test_an_effect_is_first_once_and_then_repeated_with_its_reply(store: EventStore) -> None:
    assert receive(store, ticket(), {"reserved": 10}) == Begun("first")
    assert receive(store, ticket()) == Begun("repeated", {"reserved": 10})
    assert receive(store, ticket(epoch=3)) == Begun("repeated", {"reserved": 10})
    assert receive(store, ticket("k2", epoch=3)) == Begun("first")


@pytest.mark.parametrize("reply", [None, False, 0, "", [], {"a": [1.5, None, "é\0"]}])
def test_a_reply_is_kept_as_plain_json(store: EventStore, reply: Any) -> None:
    receive(store, ticket(), reply)
    expected = {"a": [1.5, None, "é\N{REPLACEMENT CHARACTER}"]} if reply else reply
    assert receive(store, ticket()) == Begun("repeated", expected)
    assert settle(store) == SettledKey("seen", expected)


def test_what_began_and_did_not_end_is_open(store: EventStore) -> None:
    assert store.begin_receipt("inventory", ticket()) == Begun("first")
    assert store.begin_receipt("inventory", ticket()) == Begun("open")
    assert store.finish_receipt("inventory", ticket(), "one") == "one"
    assert store.finish_receipt("inventory", ticket(), "two") == "one", "who ends first is kept"
    assert store.begin_receipt("inventory", ticket()) == Begun("repeated", "one")
    assert len(store.interactions_of("inventory", thread_id="t")) == 1


def test_a_done_effect_is_remembered_as_an_interaction(store: EventStore) -> None:
    store.begin_receipt("inventory", ticket())
    assert store.interactions_of("inventory", thread_id="t") == []
    store.finish_receipt("inventory", ticket(), {"reserved": 10})
    (told,) = store.interactions_with("inventory", "product", thread_id="t")
    assert (told.kind, told.from_agent, told.to_agent) == ("effect", "product", "inventory")
    assert (told.interaction_id, told.effect_key, told.run_id) == ("effect:product:k", "k", "r")
    assert told.payload == {
        "name": "reserve",
        "epoch": 1,
        "input_digest": None,
        "reply": {"reserved": 10},
    }


def test_the_longest_ids_and_names_are_taken(store: EventStore) -> None:
    long = {"thread_id": "é" * 255, "run_id": "ü" * 255, "name": "ß" * 200, "sender_id": "s" * 64}
    keys = ["\N{SNOWMAN}" * 254 + end for end in "ab"]
    for key in keys:
        assert receive(store, ticket(key, **long)).arrival == "first"
        assert receive(store, ticket(key, **long)).arrival == "repeated"
    told = store.interactions_of("inventory", thread_id="é" * 255)
    assert [i.effect_key for i in told] == [*reversed(keys)]
    assert all(len(i.interaction_id) < 255 for i in told)


def test_two_senders_may_have_the_same_key(store: EventStore) -> None:
    for sender in ("product", "marketing"):
        assert receive(store, ticket(sender_id=sender), sender).arrival == "first"
    assert receive(store, ticket()).reply == "product"
    assert len(store.interactions_of("inventory", thread_id="t")) == 2


def test_two_agents_of_one_store_receive_each_for_itself(store: EventStore) -> None:
    receive(store, ticket())
    assert store.begin_receipt("shipping", ticket()).arrival == "first"


def test_a_superseded_owner_is_refused_whatever_it_sends(store: EventStore) -> None:
    receive(store, ticket("old", epoch=1))
    receive(store, ticket("new", epoch=2))
    for key in ("old", "new", "unknown"):
        with pytest.raises(StaleOwnerError, match=r"inventory refuses 'reserve' of product") as no:
            receive(store, ticket(key, epoch=1))
        said = str(no.value)
        assert repr(key) in said
        assert "epoch 1" in said
        assert "epoch 2" in said
        assert "do not repeat it" in said
    assert len(rows(store, "peerctx_receipts")) == 2, "a refused effect leaves nothing"
    assert receive(store, ticket("unknown", epoch=1, thread_id="another")).arrival == "first"
    assert receive(store, ticket("unknown", epoch=1, sender_id="another")).arrival == "first"


@pytest.mark.parametrize("ends", [True, False])
def test_a_repetition_by_a_new_owner_supersedes_the_old_one(store: EventStore, ends: bool) -> None:  # noqa: FBT001 - a case
    store.begin_receipt("inventory", ticket("a", epoch=1))
    if ends:
        store.finish_receipt("inventory", ticket("a", epoch=1), "x")
    assert receive(store, ticket("a", epoch=2)).arrival == ("repeated" if ends else "open")
    with pytest.raises(StaleOwnerError):
        receive(store, ticket("b", epoch=1))


@pytest.mark.parametrize("change", [{"thread_id": "another"}, {"run_id": "another"}])
def test_a_key_that_comes_with_another_thread_or_run_is_an_error(
    store: EventStore, change: dict[str, str]
) -> None:
    receive(store, ticket())
    with pytest.raises(ProtocolError, match=r"'another': give each effect its own key"):
        receive(store, ticket(**change))


def test_an_agent_receives_nothing_of_its_own(store: EventStore) -> None:
    with pytest.raises(ProtocolError, match="sender_id is inventory itself"):
        receive(store, ticket(sender_id="inventory"))


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else "x"


@pytest.mark.parametrize(
    ("reply", "fault"),
    [(deep(24), "too_deep"), (object(), "not_json"), ("x" * REPLY_LIMIT_BYTES, "too_large")],
)
def test_what_cannot_be_told_later_is_no_reply(store: EventStore, reply: Any, fault: str) -> None:
    store.begin_receipt("inventory", ticket())
    with pytest.raises(ProtocolError) as refused:
        store.finish_receipt("inventory", ticket(), reply)
    assert refused.value.fault == fault
    assert store.finish_receipt("inventory", ticket(), deep(23)) == deep(23)


# Declaring.


def test_a_receiver_is_declared_once_and_for_all(store: EventStore, url: str) -> None:
    assert store.receiver_since("inventory") is None
    before = datetime.now(UTC)
    since = store.declare_receiver("inventory")
    assert before <= since <= datetime.now(UTC)
    with EventStore(url) as another:
        assert another.declare_receiver("inventory") == since
        assert another.receiver_since("inventory") == since
        assert another.receiver_since("shipping") is None
    with pytest.raises(ProtocolError, match="agent_id"):
        store.declare_receiver("no id")


# Settling.


def test_a_done_receipt_is_seen_and_an_open_one_cannot_be_told(declared: EventStore) -> None:
    store = declared
    store.begin_receipt("inventory", ticket())
    assert settle(store) == SettledKey("cannot_tell")
    store.finish_receipt("inventory", ticket(), {"reserved": 10})
    assert settle(store) == SettledKey("seen", {"reserved": 10})
    assert settle(store, epoch=0) == SettledKey("seen", {"reserved": 10})
    assert rows(store, "peerctx_barred_keys") == []


def test_what_did_not_arrive_is_denied_and_never_arrives_from_an_older_owner(
    declared: EventStore, url: str
) -> None:
    assert settle(declared, epoch=3) == SettledKey("not_seen")
    with EventStore(url) as another_process:
        for epoch in (0, 1, 2):
            with pytest.raises(StaleOwnerError, match=r"epoch 3 its thread has another owner"):
                receive(another_process, ticket(epoch=epoch))
        assert rows(declared, "peerctx_receipts") == []
        assert receive(another_process, ticket("another", epoch=2)).arrival == "first"
        assert receive(another_process, ticket(epoch=3), "done").arrival == "first"
    assert settle(declared, epoch=4) == SettledKey("seen", "done")


def test_a_bar_is_raised_and_never_lowered(declared: EventStore) -> None:
    for asked, stands in ((2, 2), (5, 5), (3, 5), (5, 5)):
        verdict = "not_seen" if asked == stands else "cannot_tell"
        assert settle(declared, epoch=asked).verdict == verdict
        (bar,) = rows(declared, "peerctx_barred_keys")
        assert bar["below_epoch"] == stands
    with pytest.raises(StaleOwnerError):
        receive(declared, ticket(epoch=4))


def test_an_asker_whose_own_ticket_would_be_refused_is_denied_nothing(
    declared: EventStore,
) -> None:
    assert settle(declared, epoch=5) == SettledKey("not_seen")
    receive(declared, ticket("another", epoch=4))
    for key, epoch in (("k", 2), ("k", 4), ("of its thread", 3)):
        assert settle(declared, key, epoch) == SettledKey("cannot_tell")
        with pytest.raises(StaleOwnerError):
            receive(declared, ticket(key, epoch))
    assert settle(declared, epoch=5) == SettledKey("not_seen")
    assert receive(declared, ticket(epoch=5)).arrival == "first"


def test_who_never_declared_denies_nothing_and_bars_nothing(store: EventStore) -> None:
    store.declare_receiver("shipping")
    assert settle(store) == SettledKey("cannot_tell")
    assert rows(store, "peerctx_barred_keys") == []
    assert receive(store, ticket()).arrival == "first"


def test_an_asker_without_an_epoch_is_denied_nothing(declared: EventStore) -> None:
    assert settle(declared, epoch=0) == SettledKey("cannot_tell")
    assert rows(declared, "peerctx_barred_keys") == []


def test_of_what_was_meant_before_it_was_declared_an_agent_cannot_tell(store: EventStore) -> None:
    since = store.declare_receiver("inventory")
    assert store.created_at() < since
    earlier = since - timedelta(microseconds=1)
    assert settle(store, intent_at=earlier) == SettledKey("cannot_tell")
    assert settle(store, intent_at=since) == SettledKey("not_seen")


def test_of_what_was_meant_before_it_was_made_a_store_cannot_tell(declared: EventStore) -> None:
    """A store that was restored or copied may have a declaration that is older than itself."""
    made = declared.created_at()
    with declared._engine.connect() as connection:
        connection.execute(text("UPDATE peerctx_receivers SET since = 0"))
    earlier = made - timedelta(microseconds=1)
    assert settle(declared, intent_at=earlier) == SettledKey("cannot_tell")
    assert settle(declared, intent_at=made) == SettledKey("not_seen")


def test_what_was_recorded_under_the_key_is_seen_with_its_reply(store: EventStore) -> None:
    remember(store)
    assert settle(store) == SettledKey("seen")
    for number in (1, 2):
        reply = {"from_agent": "inventory", "to_agent": "product", "payload": {"n": number}}
        remember(store, **reply)
    assert settle(store) == SettledKey("seen", {"n": 2}), "the last that was replied"
    store.declare_receiver("inventory")
    assert settle(store) == SettledKey("seen", {"n": 2})


@pytest.mark.parametrize(
    "change",
    [
        {"thread_id": "another"},
        {"from_agent": "inventory", "to_agent": "product"},
    ],
    ids=["another thread", "a reply alone"],
)
def test_what_proves_nothing_and_cannot_be_denied_is_not_told(
    declared: EventStore, change: dict[str, str]
) -> None:
    remember(declared, **change)
    assert settle(declared) == SettledKey("cannot_tell")
    assert rows(declared, "peerctx_barred_keys") == []


def test_of_a_receipt_in_another_thread_nothing_is_told(declared: EventStore) -> None:
    receive(declared, ticket(), "secret")
    assert settle(declared, thread_id="another") == SettledKey("cannot_tell")


def test_what_others_sent_or_received_settles_nothing(declared: EventStore) -> None:
    remember(declared, from_agent="intruder")
    remember(declared, agent="shipping", to_agent="shipping")
    receive(declared, ticket(sender_id="intruder", thread_id="t2"))
    declared.begin_receipt("shipping", ticket())
    assert settle(declared) == SettledKey("not_seen")


def test_who_can_deny_nothing_answers_while_others_write(url: str) -> None:
    with EventStore(url, timeout_seconds=1.5) as store, EventStore(url) as another:
        remember(store)
        with another._engine.begin() as connection:
            begin = "BEGIN IMMEDIATE" if another._is_sqlite else "BEGIN"
            connection.exec_driver_sql(begin)
            connection.execute(text("UPDATE peerctx_stores SET created_at = created_at"))
            assert settle(store) == SettledKey("seen")


def test_a_row_that_is_no_json_is_said(store: EventStore) -> None:
    receive(store, ticket(), "x")
    with store._engine.connect() as connection:
        connection.execute(text("UPDATE peerctx_receipts SET reply = '{'"))
    with pytest.raises(StoreError, match="holds a row that is no JSON"):
        settle(store)


# At the same time.


@pytest.fixture
def another(url: str) -> Iterator[EventStore]:
    """The same database, as another process of the peer has it open."""
    with EventStore(url) as opened:
        yield opened


def test_who_settles_waits_for_who_is_receiving(declared: EventStore, another: EventStore) -> None:
    with ThreadPoolExecutor(1) as threads:
        for key, is_done, verdict in (("a", True, "seen"), ("b", False, "not_seen")):
            joint = declared.open_receipt("inventory", ticket(key))
            settling = threads.submit(settle, another, key)
            wait([settling], timeout=0.3)
            assert not settling.done()
            if is_done:
                declared.close_receipt(joint, "inventory", ticket(key), "reply")
            else:
                joint.connection.rollback()
                joint.open.close()
            assert settling.result(30).verdict == verdict


@pytest.mark.postgres
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_servers_default_isolation_hides_nothing(
    postgres_server: PostgresServer, postgres_url: str, isolation: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    postgres_server.execute(
        f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'"
    )
    with EventStore(postgres_url) as store, EventStore(postgres_url) as another:
        store.declare_receiver("inventory")
        test_who_settles_waits_for_who_is_receiving(store, another)


def test_a_receipt_that_takes_too_long_makes_settling_busy_and_bars_nothing(url: str) -> None:
    with EventStore(url) as store, EventStore(url, timeout_seconds=0.3) as another:
        store.declare_receiver("inventory")
        joint = store.open_receipt("inventory", ticket())
        with pytest.raises(StoreBusyError, match="try again"):
            settle(another)
        store.close_receipt(joint, "inventory", ticket(), None)
        assert rows(store, "peerctx_barred_keys") == []


def test_to_receive_and_to_deny_exclude_each_other(
    declared: EventStore, another: EventStore
) -> None:
    """Never is anything denied that an older owner gets done."""
    chance = random.Random(7)
    together = threading.Barrier(2)
    outcomes: list[tuple[str, str]] = []

    def receives(key: str, pause: float) -> str:
        together.wait(30)
        time.sleep(pause)
        try:
            return receive(declared, ticket(key, epoch=1)).arrival
        except StaleOwnerError:
            return "refused"

    def settles(key: str, pause: float) -> str:
        together.wait(30)
        time.sleep(pause)
        return settle(another, key).verdict

    with ThreadPoolExecutor(2) as threads:
        for number in range(ROUNDS):
            key = f"k{number}"
            pauses = [chance.random() * 0.002, chance.random() * 0.002]
            if number % 10 == 0:  # whatever the machine does: now one comes first, now the other
                pauses[number // 10 % 2] += 0.05
            arrived = threads.submit(receives, key, pauses[0])
            said = threads.submit(settles, key, pauses[1])
            outcomes.append((arrived.result(60), said.result(60)))
            if outcomes[-1][0] == "refused":
                assert outcomes[-1][1] == "not_seen"
    assert ("first", "not_seen") not in outcomes
    assert {arrived for arrived, _ in outcomes} == {"first", "refused"}, "both came first at times"


def test_of_many_that_bring_the_same_effect_one_is_first(
    store: EventStore, another: EventStore
) -> None:
    def bring(number: int) -> str:
        joint_store = (store, another)[number % 2]
        joint = joint_store.open_receipt("inventory", ticket(f"k{number % 10}"))
        joint_store.close_receipt(joint, "inventory", ticket(f"k{number % 10}"), number)
        return joint.begun.arrival

    with ThreadPoolExecutor(6) as threads:
        arrivals = list(threads.map(bring, range(60)))
    assert sorted(arrivals) == ["first"] * 10 + ["repeated"] * 50


_KEYS = st.sampled_from("ab")
_EPOCHS = st.integers(0, 3)
_STEPS = st.one_of(
    st.tuples(st.sampled_from(["receive", "begin", "fail", "settle"]), _KEYS, _EPOCHS)
)


@given(st.lists(_STEPS, max_size=14))
@settings(max_examples=60)
def test_whatever_happens_a_key_is_first_once_and_what_is_denied_never_arrives(
    steps: list[tuple[str, str, int]],
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        EventStore(f"sqlite:///{Path(folder)}/events.db") as store,
    ):
        store.declare_receiver("inventory")
        begun: dict[str, str] = {}
        barred: dict[str, int] = {}
        newest = 0
        for step, key, epoch in steps:
            if step == "settle":
                verdict, reply = settle(store, key, epoch)
                would_be_taken = epoch >= max(newest, barred.get(key, 0), 1)
                unheard = "not_seen" if would_be_taken else "cannot_tell"
                assert verdict == {"done": "seen", "open": "cannot_tell"}.get(
                    begun.get(key, ""), unheard
                )
                assert reply == (key if verdict == "seen" else None)
                if verdict == "not_seen":
                    barred[key] = max(epoch, barred.get(key, 0))
                continue
            try:
                joint = store.open_receipt("inventory", ticket(key, epoch))
            except StaleOwnerError:
                assert epoch < max(newest, barred.get(key, 0))
                continue
            assert epoch >= max(newest, barred.get(key, 0))
            arrival = joint.begun.arrival
            assert arrival == {"done": "repeated", "open": "open"}.get(begun.get(key, ""), "first")
            if step == "fail":
                joint.connection.rollback()
                joint.open.close()
                continue
            newest = epoch
            if step == "begin":
                joint.open.close()
                begun.setdefault(key, "open")
            else:
                assert store.close_receipt(joint, "inventory", ticket(key, epoch), key) == key
                begun[key] = "done"


def test_an_order_that_was_recorded_and_not_done_has_not_arrived(declared: EventStore) -> None:
    """Its agent recorded the letter, and died before the receipt was committed."""
    before = datetime.now(UTC) - timedelta(seconds=60)
    remember(declared)
    assert settle(declared) == ("not_seen", None)
    assert settle(declared, intent_at=before) == ("seen", None)
