"""Being there: our heartbeats out, everybody's in."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import PeerContextError
from langgraph_peerctx.messaging.producer import publish
from langgraph_peerctx.messaging.roster import Roster
from langgraph_peerctx.messaging.transport import From, Subscription, Transport
from langgraph_peerctx.protocol.messages import Heartbeat

_logger = logging.getLogger(__name__)

LOOK_BACK_RECORDS = 10_000
"""Two pauses and intervals of a thousand processes; the broker's clock says what is too old."""
LEAVE_SECONDS = 1.0
"""The longest that leaving waits for the broker."""


@dataclass(slots=True, kw_only=True)
class Standing:
    """What a process says of itself with each heartbeat; whoever knows better puts it in.

    Attributes:
        agents: Tells which agents it hosts.
        open_runs: Tells how many runs are open.
        loop_lag_seconds: Tells how long the agents' loop has not answered.
        supervises: Whether it recovers others.
        sentinel_id: Who would see it die, if anybody.
    """

    agents: Callable[[], Sequence[str]] = tuple
    open_runs: Callable[[], int] = int
    loop_lag_seconds: Callable[[], float] = float
    supervises: bool = False
    sentinel_id: str | None = None


class Presence:
    """One process's heartbeats, one each interval, and the roster of all; on the transport's loop.

    Args:
        transport: Borrowed, started.
        settings: Process id, topic, interval and pause.
        incarnation: This life of the process.
        standing: What it says of itself; it may change while it beats.
        listens: Whether to keep the roster; who only answers needs none, and it costs reading all.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        transport: Transport,
        settings: PeerContextSettings,
        incarnation: str,
        *,
        standing: Standing | None = None,
        listens: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._settings = settings
        self.standing: Standing = standing or Standing()
        self._listens = listens
        self._sequence = 0
        self._subscription: Subscription | None = None
        self._beating: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.roster: Roster = Roster(
            incarnation=incarnation,
            interval_seconds=settings.heartbeat_interval_seconds,
            pause_seconds=settings.heartbeat_pause_seconds,
            clock=clock,
        )

    async def start(self) -> None:
        """Begin to listen and to beat; waits for nothing. The topic should be there."""
        if self._listens:
            self._subscription = await self._transport.subscribe(
                [self._settings.kafka.presence_topic],
                self.roster.take,
                start=From(back=LOOK_BACK_RECORDS),
            )
        self._beating = asyncio.create_task(self._beat_on(), name="peerctx-heartbeat")

    async def close(self) -> None:
        """Say that we leave, within a second, and stop. Safe to call twice."""
        beating, self._beating = self._beating, None
        if beating is None:
            return
        beating.cancel()
        await asyncio.wait({beating})
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._beat(leaving=True)
        except (PeerContextError, TimeoutError) as error:
            _logger.info("nobody could be told that we leave: %s", error)
        finally:
            if self._subscription is not None:
                await self._subscription.close()

    def speak_for(self, agents: Callable[[], Sequence[str]]) -> None:
        """Say from now on that the process hosts these agents, beginning at once."""
        self.standing.agents = agents
        self.beat_now()

    def watched_by(self, sentinel_id: str | None) -> None:
        """Say from now on who would see the process die, beginning at once."""
        self.standing.sentinel_id = sentinel_id
        self.beat_now()

    def beat_now(self) -> None:
        """Beat at once: something changed that others should know."""
        self._changed.set()

    async def _beat_on(self) -> None:
        failing = False
        await self._until_heard_from_now_on()
        while True:
            self._changed.clear()
            started = time.monotonic()
            try:
                await self._beat()
                failing = False
            except PeerContextError as error:
                if not failing:
                    _logger.warning("nobody hears that we are there: %s", error)
                failing = True
            except Exception:  # a service loop logs and goes on
                _logger.exception("a heartbeat failed")
            left = self._settings.heartbeat_interval_seconds - (time.monotonic() - started)
            try:
                async with asyncio.timeout(max(0.0, left)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _until_heard_from_now_on(self) -> None:
        """Wait until our first beat will come back; where that takes long, others hear it first."""
        if self._subscription is None:
            return
        try:
            async with asyncio.timeout(self._settings.heartbeat_interval_seconds):
                await self._subscription.positioned()
        except TimeoutError:
            _logger.info("the presence topic cannot be read yet: %s", self._subscription.lost)

    def _said(self) -> dict[str, Any]:
        said = self.standing
        return {
            "agents": tuple(said.agents())[:1_000],
            "open_runs": said.open_runs(),
            "loop_lag_seconds": max(0.0, said.loop_lag_seconds()),
            "supervises": said.supervises,
            "sentinel_id": said.sentinel_id,
        }

    async def _beat(self, *, leaving: bool = False) -> None:
        self._sequence += 1
        await publish(
            self._transport,
            self._settings.kafka.presence_topic,
            Heartbeat(
                sent_at=datetime.now(UTC),
                process_id=self._settings.process_id,
                incarnation=self.roster.incarnation,
                sequence=self._sequence,
                # A last word says no more: what it would ask may be gone already.
                leaving=leaving,
                **({} if leaving else self._said()),
            ),
            max_bytes=self._settings.max_message_bytes,
        )
