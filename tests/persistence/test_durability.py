"""What was acknowledged survives a killed process; what is sent again counts once."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from persistence.processes import CONTEXT, append_for_ever, order, start

from langgraph_peerctx.persistence.event_store import EventStore

KILLS = 10

FORKED = """
import asyncio, os, sys
from langgraph_peerctx.errors import StoreError
from langgraph_peerctx.persistence.event_store import EventStore, get_event_store

store, shared = EventStore(sys.argv[1]), get_event_store(sys.argv[1])
store.ping()
pid = os.fork()
if pid:
    failed = os.waitpid(pid, 0)[1]
    store.ping()
    assert get_event_store(sys.argv[1]) is shared
    store.close()
    sys.exit(failed != 0)
for refused in (store.ping, shared.ping, lambda: asyncio.run(store.aping())):
    try:
        refused()
    except StoreError as error:
        assert "open a new store in the child" in str(error)
    else:
        sys.exit("it was not refused")
store.close()
mine = get_event_store(sys.argv[1])
assert mine is not shared
mine.ping()
asyncio.run(mine.aping())
"""

UNCLOSED = """
import asyncio, sys
from langgraph_peerctx.persistence.event_store import arecord_interaction, get_event_store

async def main():
    await arecord_interaction(agent_id="a", from_agent="a", to_agent="b", thread_id="t", kind="k")

asyncio.run(main())
assert len(get_event_store().interactions_of("a", thread_id="t")) == 1
"""


def acknowledged_before_kill(url: str, wanted: int) -> int:
    """Kill a process that appends once it has acknowledged so many; how many it had in the end."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = start(append_for_ever, url, sender)
    sender.close()
    told = -1
    with receiver:
        try:
            while told < wanted:
                told = receiver.recv()
            process.kill()
            while True:
                told = receiver.recv()
        except EOFError:
            return told + 1
        finally:
            process.kill()
            process.join()


def test_kill_9_loses_no_acknowledged_event_and_a_retry_counts_once(url: str) -> None:
    chance = random.Random(5)
    EventStore(url).close()
    for _ in range(KILLS):
        acknowledged = acknowledged_before_kill(url, chance.randrange(1, 80))
        with EventStore(url) as store:
            before = store.interactions_of("product", thread_id="t", limit=10_000)
            # Committed and not acknowledged: at most the one that it was about to tell of.
            assert acknowledged <= len(before) <= acknowledged + 1
            numbers = [found.payload["number"] for found in before]
            assert sorted(numbers) == list(range(len(before)))
            again = [order(number) for number in range(acknowledged + 1)]
            assert store.append_many("product", again) == acknowledged + 1 - len(before)
            empty(store)


def empty(store: EventStore) -> None:
    with store._engine.connect() as connection:
        connection.exec_driver_sql("DELETE FROM peerctx_interactions")


def test_many_threads_with_the_same_events_store_each_once(store: EventStore) -> None:
    events = [order(number) for number in range(40)]
    with ThreadPoolExecutor(6) as threads:
        stored = list(threads.map(lambda event: store.append("product", event), events * 6))
    assert len({(found.interaction_id, found.sequence) for found in stored}) == 40
    assert len(store.interactions_of("product", thread_id="t")) == 40


def test_many_threads_with_the_same_batches_store_each_once(store: EventStore) -> None:
    events = [order(number) for number in range(200)]
    with ThreadPoolExecutor(4) as threads:
        new = list(threads.map(lambda _: store.append_many("product", events), range(8)))
    assert sum(new) == 200
    assert len(store.interactions_of("product", thread_id="t", limit=1_000)) == 200


def test_a_forked_child_must_open_a_store_of_its_own(url: str) -> None:
    # psycopg warns of the parent's connection, which a child must leave as it is.
    done = run(FORKED, url, warnings="ignore::ResourceWarning")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_process_may_end_without_closing_and_says_nothing(url: str) -> None:
    done = run(UNCLOSED, url, PEER_CONTEXT_DATABASE_URL=url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def run(script: str, *arguments: str, warnings: str = "default", **variables: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=variables | {"PYTHONWARNINGS": warnings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
