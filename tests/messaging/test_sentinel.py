"""The sentinel: a death is published when it happens, and nothing else is."""

# ruff: noqa: ASYNC222, ASYNC240 - nobody else uses the loop of a test

import asyncio
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBroker, FakeTransport
from messaging.sentinel_children import Child, registered, short_directory, until

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    SentinelRunningError,
)
from langgraph_peerctx.messaging import sentinel as module
from langgraph_peerctx.messaging import sentinel_place
from langgraph_peerctx.messaging.sentinel import Sentinel, serve
from langgraph_peerctx.messaging.sentinel_client import SentinelClient, environment_for
from langgraph_peerctx.messaging.sentinel_place import peer_of, place_of
from langgraph_peerctx.protocol.codec import decode
from langgraph_peerctx.protocol.messages import DeathNotice, Heartbeat

TOPIC = "agent.presence"


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_directory() as folder:
        yield folder


@pytest.fixture
def settings(folder: Path) -> PeerContextSettings:
    return PeerContextSettings(
        process_id="client-1",
        heartbeat_interval_seconds=0.2,
        sentinel="auto",
        sentinel_directory=str(folder),
    )


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker(topics={TOPIC: []})


@pytest.fixture
def transport(broker: FakeBroker) -> FakeTransport:
    return FakeTransport(broker)


@pytest.fixture
async def sentinel(
    settings: PeerContextSettings, transport: FakeTransport
) -> AsyncIterator[Sentinel]:
    async with Sentinel(settings, transport=transport) as sentinel:
        yield sentinel


@pytest.fixture
def path(settings: PeerContextSettings) -> Path:
    return place_of(settings).socket


def notices(broker: FakeBroker) -> list[DeathNotice]:
    read = [decode(record.value) for record in broker.topics[TOPIC]]
    return [notice for notice in read if isinstance(notice, DeathNotice)]


def beats(broker: FakeBroker) -> list[Heartbeat]:
    read = [decode(record.value) for record in broker.topics[TOPIC]]
    return [beat for beat in read if isinstance(beat, Heartbeat)]


async def a_death_is_seen(broker: FakeBroker, path: Path, name: str = "probe") -> None:
    """The sentinel still does its work; whatever came before has been handled."""
    async with registered(path, name) as child:
        assert "sentinel_id" in child.answer
        await child.end()
        await until(lambda: name in [notice.process_id for notice in notices(broker)])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_killed_process_is_published_with_its_incarnation(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1", "life-7") as child:
        assert child.answer == {"sentinel_id": sentinel.sentinel_id}
        assert notices(broker) == []
        await child.end()
        await until(lambda: notices(broker))
    (notice,) = notices(broker)
    assert (notice.process_id, notice.incarnation) == ("worker-1", "life-7")
    assert notice.sentinel_id == sentinel.sentinel_id
    assert abs((datetime.now(UTC) - notice.died_at).total_seconds()) < 10
    assert sentinel.counters == {"registered": 1, "died": 1, "announced": 1}


async def test_a_process_that_exits_without_a_word_is_published(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1") as child:
        await child.do("exit")
        await until(lambda: notices(broker))
    assert sentinel.counters["announced"] == 1


@pytest.mark.parametrize("word", ["leave", "leave in haste"])
async def test_a_process_that_leaves_is_not(
    sentinel: Sentinel, broker: FakeBroker, path: Path, word: str
) -> None:
    async with registered(path, "worker-1") as child:
        await child.do(word)
        await child.process.wait()
    await a_death_is_seen(broker, path)
    assert [notice.process_id for notice in notices(broker)] == ["probe"]
    assert sentinel.counters["left"] == 1


async def test_a_last_word_that_arrives_with_the_death_is_heard_first(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1") as child:
        (watch,) = sentinel._watches.values()
        await child.do("leave in haste")
        # Both are there before the loop looks again, in whatever order it looks.
        assert select.select([watch.descriptor], [], [], 10)[0]
        sentinel._ended_or_not(watch)
    assert sentinel.counters["left"] == 1
    assert notices(broker) == []


async def test_a_connection_that_is_cut_is_no_death_and_the_death_is_seen_all_the_same(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1") as child:
        await child.do("cut")
        assert await child.hear() == "cut"
        await until(lambda: not sentinel._clients)
        await a_death_is_seen(broker, path)
        assert [notice.process_id for notice in notices(broker)] == ["probe"]
        await child.end()
        await until(lambda: len(notices(broker)) == 2)
    assert notices(broker)[1].process_id == "worker-1"


async def test_who_registers_again_is_published_once(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1") as child:
        await child.do("cut")
        assert await child.hear() == "cut"
        await child.do("again")
        assert json.loads(await child.hear()) == {"sentinel_id": sentinel.sentinel_id}
        await child.end()
        await a_death_is_seen(broker, path)
    assert sorted(notice.process_id for notice in notices(broker)) == ["probe", "worker-1"]


async def test_a_process_that_replaces_itself_has_not_ended(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1") as child:
        await child.do("exec")
        assert await child.hear() == "0"
        await a_death_is_seen(broker, path)
        assert [notice.process_id for notice in notices(broker)] == ["probe"]
    assert sentinel.counters["died"] >= 1


async def test_nobody_registers_another_process(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1", pidfd_of=os.getpid()) as child:
        assert child.answer == {"refused": "not its own pidfd"}
    await a_death_is_seen(broker, path)
    assert [notice.process_id for notice in notices(broker)] == ["probe"]
    assert sentinel.counters["refused.not its own pidfd"] == 1


async def test_nobody_takes_the_name_of_a_process_that_is_there(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1") as first, registered(path, "worker-1") as second:
        assert "sentinel_id" in first.answer
        assert second.answer == {"refused": "somebody else is known by this name"}
        await second.end()
        await a_death_is_seen(broker, path)
        assert [notice.process_id for notice in notices(broker)] == ["probe"]
    assert sentinel.counters["registered"] == 2


def said(**changes: Any) -> bytes:
    line = {"process_id": "me", "incarnation": "life", "kind": "pidfd"} | changes
    return json.dumps(line).encode() + b"\n"


GARBAGE: dict[str, tuple[list[bytes], str]] = {
    "no JSON": ([b"hello\n"], "no registration"),
    "nested": ([b"[" * 4_000 + b"\n"], "no registration"),
    "no text": ([b"\xff\xfe\x00\n"], "no registration"),
    "an illegal id": ([said(process_id="../me")], "no registration"),
    "a long id": ([said(incarnation="x" * 256)], "no registration"),
    "something more": ([said(extra=1)], "no registration"),
    "another kind": ([said(kind="file")], "no registration"),
    "a pipe that is none": ([said(kind="pipe")], "no pipe"),
    "oversized": ([b"x" * 4_096], "too long"),
    "oversized in pieces": ([b"x" * 3_000, b"x" * 3_000], "too long"),
    "oversized with an end": ([b"x" * 4_096 + b"\n"], "too long"),
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_is_refused_and_harms_nobody(
    sentinel: Sentinel, broker: FakeBroker, path: Path, what: str
) -> None:
    pieces, why = GARBAGE[what]
    loop = asyncio.get_running_loop()
    before = descriptors()
    async with registered(path, "worker-1") as child:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0)
            await loop.sock_connect(connection, str(path))
            with open("/dev/null") as passed:  # noqa: ASYNC230, PTH123 - a descriptor of a wrong kind
                socket.send_fds(connection, [pieces[0]], [passed.fileno()])
            for piece in pieces[1:]:
                connection.send(piece)
            assert json.loads(await loop.sock_recv(connection, 4_096)) == {"refused": why}
            with suppress(ConnectionResetError):
                assert await loop.sock_recv(connection, 1) == b""
        await child.end()
        await until(lambda: notices(broker))
    assert [notice.process_id for notice in notices(broker)] == ["worker-1"]
    await until(lambda: not sentinel._clients)
    assert descriptors() == before


async def test_more_than_one_descriptor_is_refused_and_all_are_closed(
    sentinel: Sentinel, path: Path
) -> None:
    loop = asyncio.get_running_loop()
    before = descriptors()
    for count, line in ((0, said()), (2, said()), (100, said()), (2, b"no end")):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0)
            await loop.sock_connect(connection, str(path))
            own = os.pidfd_open(os.getpid())
            socket.send_fds(connection, [line], [own] * count)
            os.close(own)
            answer = json.loads(await loop.sock_recv(connection, 4_096))
        assert answer == {"refused": "not one descriptor"}
    await until(lambda: not sentinel._clients)
    assert descriptors() == before


async def test_who_is_too_slow_is_refused(
    settings: PeerContextSettings,
    transport: FakeTransport,
    broker: FakeBroker,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    async with Sentinel(settings, transport=transport) as sentinel:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0)
            with monkeypatch.context() as patch:  # the next one has time
                patch.setattr(module, "HANDSHAKE_SECONDS", 0.2)
                await loop.sock_connect(connection, str(path))
                connection.send(b'{"process_id"')
                await until(lambda: sentinel._clients or sentinel.counters["refused.too slow"])
            await a_death_is_seen(broker, path)
            assert json.loads(await loop.sock_recv(connection, 4_096)) == {"refused": "too slow"}
        assert sentinel.counters["refused.too slow"] == 1


async def test_a_registered_client_that_talks_nonsense_stays_watched(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0)
        await loop.sock_connect(connection, str(path))
        own = os.pidfd_open(os.getpid())
        socket.send_fds(connection, [said()], [own])
        assert b"sentinel_id" in await loop.sock_recv(connection, 4_096)
        socket.send_fds(connection, [b'{"leaving": false}\n'], [own] * 3)
        os.close(own)
        assert json.loads(await loop.sock_recv(connection, 99)) == {"refused": "no last word"}
    assert len(sentinel._watches) == 1
    assert notices(broker) == []


async def test_too_many_are_refused(
    settings: PeerContextSettings, transport: FakeTransport, path: Path
) -> None:
    async with (
        Sentinel(settings, transport=transport, max_clients=2) as sentinel,
        registered(path, "worker-1") as first,
        registered(path, "worker-2"),
        registered(path, "worker-3") as third,
    ):
        assert third.answer == {"refused": "too many clients"}
        await first.do("cut")
        await until(lambda: len(sentinel._clients) == 1)
        async with registered(path, "worker-4") as fourth:
            assert fourth.answer == {"refused": "too many processes"}


async def test_fifty_killed_at_once_are_fifty_notices(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    before = descriptors()
    async with AsyncExitStack() as stack:
        children: list[Child] = [
            await stack.enter_async_context(registered(path, f"worker-{number}"))
            for number in range(50)
        ]
        for child in children:
            child.process.kill()
        await until(lambda: len(notices(broker)) == 50)
    assert {n.process_id for n in notices(broker)} == {f"worker-{n}" for n in range(50)}
    assert sentinel.counters["announced"] == 50
    await until(lambda: descriptors() == before)


async def test_a_broker_that_is_away_gets_the_notice_when_it_is_back(
    sentinel: Sentinel, broker: FakeBroker, transport: FakeTransport, path: Path
) -> None:
    transport.send_fault = BrokerUnavailableError("away")
    async with registered(path, "worker-1") as child:
        await child.end()
        await until(lambda: sentinel.counters["died"])
    await asyncio.sleep(0.3)
    assert notices(broker) == []
    transport.send_fault = None
    await until(lambda: notices(broker))
    assert notices(broker)[0].died_at < notices(broker)[0].sent_at


async def test_a_notice_that_cannot_be_told_for_long_is_lost_and_said_so(
    settings: PeerContextSettings,
    broker: FakeBroker,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    transport = FakeTransport(broker)
    transport.silent = True
    async with (
        Sentinel(settings, transport=transport, announce_seconds=0.2) as sentinel,
        registered(path, "worker-1") as child,
    ):
        await child.end()
        await until(lambda: sentinel.counters["lost"])
    assert "nobody could be told" in caplog.text
    assert notices(broker) == []


async def test_what_is_not_told_when_the_sentinel_ends_is_lost(
    settings: PeerContextSettings, broker: FakeBroker, path: Path
) -> None:
    transport = FakeTransport(broker)
    async with (
        Sentinel(settings, transport=transport) as sentinel,
        registered(path, "worker-1") as child,
    ):
        transport.silent = True
        await child.end()
        await until(lambda: sentinel.counters["died"])
    assert sentinel.counters["lost"] == 1


async def test_it_beats_itself_and_says_when_it_leaves(
    settings: PeerContextSettings, transport: FakeTransport, broker: FakeBroker
) -> None:
    async with Sentinel(settings, transport=transport) as sentinel:
        await until(lambda: len(beats(broker)) > 1)
    assert {beat.process_id for beat in beats(broker)} == {sentinel.sentinel_id}
    assert sentinel.sentinel_id.startswith("sentinel-")
    assert beats(broker)[0].agents == ()
    assert beats(broker)[0].sentinel_id is None
    assert beats(broker)[-1].leaving


async def test_a_pipe_tells_where_there_is_no_pidfd(
    sentinel: Sentinel, broker: FakeBroker, path: Path
) -> None:
    async with registered(path, "worker-1", pipe=True) as child:
        assert child.answer == {"sentinel_id": sentinel.sentinel_id}
        await a_death_is_seen(broker, path)
        assert len(notices(broker)) == 1
        await child.end()
        await until(lambda: len(notices(broker)) == 2)
    async with registered(path, "worker-2", pipe=True) as child:
        await child.do("leave")
        await child.process.wait()
    await a_death_is_seen(broker, path, "probe-2")
    assert [n.process_id for n in notices(broker)] == ["probe", "worker-1", "probe-2"]


async def test_it_ends_some_time_after_its_last_client(
    settings: PeerContextSettings, transport: FakeTransport, path: Path
) -> None:
    loop = asyncio.get_running_loop()
    async with Sentinel(settings, transport=transport, idle_seconds=0.3) as sentinel:
        assert sentinel._idle is not None
        sentinel._idle.cancel()  # however long the client takes to start
        async with registered(path, "worker-1") as child:
            await child.do("cut")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.6):
                    await sentinel.run()
            gone_at = loop.time()
        async with asyncio.timeout(30):
            await sentinel.run()
        assert loop.time() - gone_at > 0.2
    assert not path.exists()


async def test_without_a_client_it_ends_too(
    settings: PeerContextSettings, transport: FakeTransport
) -> None:
    async with Sentinel(settings, transport=transport, idle_seconds=0.05) as sentinel:
        async with asyncio.timeout(30):
            await sentinel.run()


async def test_the_second_one_is_told_that_one_runs_and_harms_nothing(
    sentinel: Sentinel, settings: PeerContextSettings, broker: FakeBroker, path: Path
) -> None:
    with pytest.raises(SentinelRunningError, match="already"):
        await serve(settings, idle_seconds=None)
    await a_death_is_seen(broker, path)
    assert sentinel.counters["announced"] == 1


async def test_another_cluster_has_another_sentinel(
    sentinel: Sentinel, settings: PeerContextSettings, transport: FakeTransport
) -> None:
    other = settings.model_copy(update={"kafka": KafkaConfig(presence_topic="other.presence")})
    async with Sentinel(other, transport=transport) as second:
        assert second.sentinel_id != sentinel.sentinel_id


def test_the_order_of_the_servers_makes_no_other_cluster() -> None:
    first, second = (
        PeerContextSettings(kafka=KafkaConfig(bootstrap_servers=servers))
        for servers in ("localhost:1,localhost:2", "localhost:2, localhost:1")
    )
    assert place_of(first) == place_of(second)


async def test_a_socket_that_somebody_left_is_replaced(
    settings: PeerContextSettings, transport: FakeTransport, broker: FakeBroker, path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with Sentinel(settings, transport=transport):
        await a_death_is_seen(broker, path)
    assert not path.exists()


async def test_it_ends_when_its_socket_is_taken_away(
    settings: PeerContextSettings,
    transport: FakeTransport,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PLACE_SECONDS", 0.05)
    async with Sentinel(settings, transport=transport) as sentinel:
        await asyncio.sleep(0.1)
        path.unlink()
        path.touch()
        async with asyncio.timeout(30):
            await sentinel.run()
    assert path.exists(), "it is not ours to take away"


async def test_a_directory_that_is_not_ours_alone_is_refused(
    folder: Path, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refusal(directory: Path) -> str:
        settings = PeerContextSettings(sentinel_directory=str(directory))
        with pytest.raises(ConfigurationError) as caught:
            await Sentinel(settings, transport=transport).__aenter__()
        return str(caught.value)

    for mode in (0o755, 0o770, 0o701):
        wide = folder / f"{mode:o}"
        wide.mkdir()
        wide.chmod(mode)
        assert f"open to others (mode 0{mode:o})" in await refusal(wide)
    link = folder / "link"
    link.symlink_to(folder)
    assert "is a symbolic link" in await refusal(link)
    file = folder / "file"
    file.touch(0o600)
    assert "cannot be made" in await refusal(file)
    assert "bytes" in await refusal(folder / ("x" * 90))
    monkeypatch.setattr(os, "geteuid", lambda: 4_711)
    assert "not to us" in await refusal(folder)


async def test_a_directory_is_made_for_us_alone(folder: Path, transport: FakeTransport) -> None:
    inner = folder / "a" / "b"
    async with Sentinel(PeerContextSettings(sentinel_directory=str(inner)), transport=transport):
        assert inner.stat().st_mode & 0o777 == 0o700


def test_the_default_directory_is_the_users_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert place_of(PeerContextSettings()).directory == folder / "langgraph-peerctx"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "missing"))
    assert place_of(PeerContextSettings()).directory.name == f"langgraph-peerctx-{os.geteuid()}"


async def test_another_user_is_refused(
    sentinel: Sentinel, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.geteuid()
    monkeypatch.setattr(sentinel_place.os, "geteuid", lambda: uid + 1)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0)
        await loop.sock_connect(connection, str(path))
        assert json.loads(await loop.sock_recv(connection, 99)) == {"refused": "another user"}
    assert sentinel.counters["refused.another user"] == 1


async def test_nothing_is_served_in_mock_mode(settings: PeerContextSettings) -> None:
    with pytest.raises(ConfigurationError, match="MOCK_MODE"):
        Sentinel(settings.model_copy(update={"mock_mode": "always"}))


async def test_nothing_stays_open_after_many_clients(
    settings: PeerContextSettings, transport: FakeTransport, path: Path
) -> None:
    before = descriptors()
    async with Sentinel(settings, transport=transport) as sentinel:
        for number, word in enumerate(["leave", "cut", "exit", "leave in haste"]):
            async with registered(path, f"worker-{number}", pipe=number % 2 == 1) as child:
                await child.do(word)
        async with registered(path, "worker-9"):
            assert sentinel.counters["registered"] == 5
            sentinel.stop()
            await sentinel.run()
    await until(lambda: descriptors() == before)


# The client's side.


class Seen(list[str | None]):
    """What `on_change` was told."""


async def client_for(
    settings: PeerContextSettings, seen: Seen | None = None, **options: Any
) -> SentinelClient:
    client = SentinelClient(
        settings, "life-1", on_change=None if seen is None else seen.append, **options
    )
    await client.start()
    return client


async def test_a_process_is_watched_until_it_leaves(
    sentinel: Sentinel, settings: PeerContextSettings
) -> None:
    seen = Seen()
    client = await client_for(settings, seen)
    await until(lambda: client.sentinel_id)
    assert seen == [sentinel.sentinel_id]
    assert list(sentinel._watches) == [("client-1", "life-1")]
    await client.close()
    await client.close()
    assert sentinel.counters == {"registered": 1, "left": 1}
    assert client.sentinel_id is None


async def test_one_that_leaves_while_it_registers_is_not_watched(
    sentinel: Sentinel, settings: PeerContextSettings
) -> None:
    client = await client_for(settings)
    running = client._running
    assert running is not None
    for _ in range(3):
        await asyncio.sleep(0)
    await client.close()
    await until(lambda: not sentinel._clients)
    assert sentinel._watches == {}


async def test_a_missing_sentinel_is_said_once_and_looked_for_again(
    settings: PeerContextSettings,
    transport: FakeTransport,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = Seen()
    only = settings.model_copy(update={"sentinel": "connect"})
    client = await client_for(only, seen)
    await until(lambda: "silence alone" in caplog.text)
    await asyncio.sleep(0.5)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "deaths on this host are now noticed by silence alone" in warnings[0]
    for _ in range(2):
        async with Sentinel(settings, transport=transport) as sentinel:
            await until(lambda: client.sentinel_id)
        await until(lambda: client.sentinel_id is None)
    await client.close()
    assert seen == [sentinel.sentinel_id, None] * 2
    gone = [r for r in caplog.records if "is gone" in r.getMessage()]
    assert [record.levelno for record in gone] == [logging.WARNING] * 2


async def test_switched_off_it_does_nothing(
    sentinel: Sentinel, settings: PeerContextSettings
) -> None:
    for changes in ({"sentinel": "off"}, {"mock_mode": "always"}):
        client = await client_for(settings.model_copy(update=changes))
        await asyncio.sleep(0.05)
        assert client.sentinel_id is None
        await client.close()
    assert sentinel.counters == {}


async def test_pid_1_starts_none_and_says_why(
    settings: PeerContextSettings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await client_for(settings, pid=1, command=["touch", str(folder / "started")])
    await until(lambda: "PID 1" in caplog.text)
    await client.close()
    assert not (folder / "started").exists()


async def test_a_directory_open_to_others_is_not_trusted_by_a_client(
    sentinel: Sentinel,
    settings: PeerContextSettings,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder.chmod(0o755)
    client = await client_for(settings)
    await until(lambda: "open to others" in caplog.text)
    await client.close()
    assert sentinel.counters == {}


async def test_a_client_says_why_it_is_refused(
    sentinel: Sentinel,
    settings: PeerContextSettings,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with registered(path, "client-1"):
        client = await client_for(settings)
        await until(lambda: "somebody else is known by this name" in caplog.text)
        await client.close()
    assert sentinel.counters["registered"] == 1


async def test_a_client_without_pidfd_passes_a_pipe(
    sentinel: Sentinel, settings: PeerContextSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    before = descriptors()
    client = await client_for(settings)
    await until(lambda: client.sentinel_id)
    (watch,) = sentinel._watches.values()
    assert watch.registration.kind == "pipe"
    await client.close()
    assert sentinel.counters["left"] == 1
    await until(lambda: descriptors() == before)


async def test_a_forked_child_is_not_the_parent(
    sentinel: Sentinel,
    settings: PeerContextSettings,
    broker: FakeBroker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "pidfd_open")  # a pipe is what a child could keep open
    client = await client_for(settings)
    await until(lambda: client.sentinel_id)
    held, pipe = client._ends, os.pipe()
    assert held is not None
    pid = os.fork()
    if pid == 0:
        closed = client.sentinel_id is None and not Path(f"/proc/self/fd/{held._held}").exists()
        os.write(pipe[1], b"closed" if closed else b"open")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(pipe[0], 10) == b"closed"
    for end in pipe:
        os.close(end)
    await asyncio.sleep(0.1)
    assert client.sentinel_id == sentinel.sentinel_id
    assert notices(broker) == []
    await client.close()
    assert sentinel.counters["left"] == 1


# Started on demand.

SERVE = (
    "import asyncio, sys;"
    "from langgraph_peerctx.config import PeerContextSettings;"
    "from langgraph_peerctx.messaging.sentinel import serve;"
    "asyncio.run(serve(PeerContextSettings(), idle_seconds=float(sys.argv[1])))"
)
COMMAND = (sys.executable, "-c", SERVE, "3")
PATIENT = (sys.executable, "-c", SERVE, "6")


@pytest.fixture
def brokerless(settings: PeerContextSettings) -> PeerContextSettings:
    """Nobody is at the other end: a sentinel watches all the same."""
    kafka = KafkaConfig(bootstrap_servers="localhost:1", connect_timeout_seconds=0.5)
    return settings.model_copy(update={"kafka": kafka})


def sentinel_behind(client: SentinelClient) -> int:
    assert client._connection is not None
    pid = peer_of(client._connection).pid
    assert pid
    return pid


async def test_the_first_to_come_starts_one_for_all_and_another_when_it_is_killed(
    brokerless: PeerContextSettings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = folder / "count"
    script = f'echo x >> {count}; exec "$@"'
    command = ["/bin/sh", "-c", script, "sh", *COMMAND]
    names = ["client-1", "client-2", "client-3"]
    clients = [
        await client_for(brokerless.model_copy(update={"process_id": name}), command=command)
        for name in names
    ]
    await until(lambda: all(client.sentinel_id for client in clients), 60)
    assert len({sentinel_behind(client) for client in clients}) == 1
    assert count.read_text() == "x\n"
    assert caplog.records == []

    killed = sentinel_behind(clients[0])
    os.kill(killed, signal.SIGKILL)
    await until(lambda: not any(client.sentinel_id for client in clients))
    await until(lambda: all(client.sentinel_id for client in clients), 60)
    assert killed not in {sentinel_behind(client) for client in clients}
    assert count.read_text() == "x\nx\n"
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len([r for r in warnings if "is gone" in r.getMessage()]) == 3
    last = sentinel_behind(clients[0])
    assert os.getsid(last) != os.getsid(0)
    assert Path(f"/proc/{last}/stat").read_text().split()[3] != str(os.getpid())
    for client in clients:
        await client.close()
    await until(lambda: not Path(f"/proc/{last}").exists())
    assert not place_of(brokerless).socket.exists()


async def test_two_started_at_once_are_one(brokerless: PeerContextSettings) -> None:
    place = place_of(brokerless)
    environment = environment_for(brokerless, place)
    both = [
        await asyncio.create_subprocess_exec(
            *PATIENT, env=environment, stderr=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    await until(place.socket.exists, 60)  # who finds none looks again in up to five seconds
    only = brokerless.model_copy(update={"sentinel": "connect"})
    clients = [
        await client_for(only.model_copy(update={"process_id": name})) for name in ("a-1", "a-2")
    ]
    await until(lambda: all(client.sentinel_id for client in clients), 60)
    assert sentinel_behind(clients[0]) == sentinel_behind(clients[1])
    loser = next(process for process in both if process.pid != sentinel_behind(clients[0]))
    _, told = await loser.communicate()
    assert b"SentinelRunningError" in told
    for client in clients:
        await client.close()
    for process in both:
        await process.communicate()
    assert sorted(process.returncode or 0 for process in both) == [0, 1]


async def test_a_sentinel_that_cannot_be_started_is_said(
    settings: PeerContextSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("langgraph_peerctx.messaging.sentinel_client.START_SECONDS", 0.3)
    client = await client_for(settings, command=["/bin/false"])
    await until(lambda: "silence alone" in caplog.text)
    await client.close()


async def test_sigterm_ends_it_in_good_order(brokerless: PeerContextSettings) -> None:
    place = place_of(brokerless)
    process = await asyncio.create_subprocess_exec(*PATIENT, env=environment_for(brokerless, place))
    await until(place.socket.exists, 60)
    client = await client_for(brokerless.model_copy(update={"sentinel": "connect"}))
    await until(lambda: client.sentinel_id, 30)
    process.terminate()
    assert await process.wait() == 0
    await client.close()
    assert not place.socket.exists()


def test_the_settings_reach_a_started_sentinel_by_its_environment_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "old")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", "postgresql://user:secret@localhost/x")
    ca = folder / "ca.pem"
    ca.touch()
    settings = PeerContextSettings(
        kafka=KafkaConfig(
            bootstrap_servers="localhost:7",
            presence_topic="mine",
            security_protocol="SASL_SSL",
            sasl_mechanism="SCRAM-SHA-512",
            sasl_username="me",
            sasl_password="hush",  # noqa: S106 - no real one
            ssl_ca_file=str(ca),
            allow_insecure=True,
        ),
        sentinel_directory=str(folder),
        heartbeat_interval_seconds=0.25,
        process_id="client-1",
    )
    place = place_of(settings)
    environment = environment_for(settings, place)
    assert "secret" not in " ".join(environment.values())
    assert "PEER_CONTEXT_PROCESS_ID" not in environment
    for name in list(os.environ):
        if name.startswith(("KAFKA_", "PEER_CONTEXT_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith(("KAFKA_", "PEER_CONTEXT_")):
            monkeypatch.setenv(name, value)
    arrived = PeerContextSettings()
    assert arrived.kafka == settings.kafka
    assert place_of(arrived) == place
    assert arrived.heartbeat_interval_seconds == 0.25
    assert arrived.mock_mode == "never"
    client = SentinelClient(settings, "life-1")
    assert "hush" not in " ".join(client._command)
