"""`peerctx agents`: how every process is, from its heartbeats and its leases."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TypeAlias

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from langgraph_peerctx.commands.printing import ago, print_json, say, table_of
from langgraph_peerctx.commands.until_told import run_until_told
from langgraph_peerctx.config import PeerContextSettings, default_process_id
from langgraph_peerctx.errors import BrokerUnavailableError, StoreError
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.inspection import has_schema
from langgraph_peerctx.persistence.runs import Holder, LostRun
from langgraph_peerctx.reconstruction.failure_detector import (
    FailureDetector,
    ProcessState,
    State,
)
from langgraph_peerctx.runtime import PeerContextRuntime

POLL_SECONDS = 0.05
_COLOURS: dict[State, str] = {
    "alive": "green",
    "slow": "yellow",
    "suspected": "yellow",
    "unreachable": "magenta",
    "stuck": "red",
    "dead": "red",
    "left": "dim",
}

States: TypeAlias = Sequence[ProcessState]


def show_agents(*, watch: bool, as_json: bool) -> None:
    """Print how every process is, once, or again each heartbeat interval until it is ended.

    Raises:
        BrokerUnavailableError: If there is no broker, or our own heartbeat does not come back.
        StoreError: If the control database is there and cannot be opened.
    """
    settings = PeerContextSettings().model_copy(
        update={
            "mock_mode": "never",
            "sentinel": "off",
            # A process of its own, whatever the agents of this environment are called.
            "process_id": f"peerctx-{default_process_id()}"[:64],
        }
    )
    if watch and sys.stdout.isatty() and not as_json:
        run_until_told(lambda: _watch(settings))
        return
    states = asyncio.run(_once(settings))
    if as_json:
        print_json([asdict(state) for state in states])
    else:
        Console().print(_table(states))


async def _once(settings: PeerContextSettings) -> States:
    async with _looking(settings) as look:
        return await look.settled()


async def _watch(settings: PeerContextSettings) -> None:
    async with _looking(settings) as look:
        with Live(_table(await look.states()), auto_refresh=False) as live:
            while True:
                live.update(_table(await look.states(), await look.caption()), refresh=True)
                await asyncio.sleep(settings.heartbeat_interval_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What looks: a runtime that hosts nobody, and its detector."""

    runtime: PeerContextRuntime
    detector: FailureDetector
    rows: "_Rows"

    async def states(self) -> States:
        """Return how everybody is but ourselves."""
        me = self.runtime.settings.process_id
        return [one for one in await self.detector.states() if one.process_id != me]

    async def settled(self) -> States:
        """Return how everybody is, once nobody is merely suspected; a lease's life at most.

        So long expired leases do not count for a detector that has just begun.
        """
        settings = self.runtime.settings
        deadline = time.monotonic() + settings.lease_seconds + settings.heartbeat_interval_seconds
        told = False
        while True:
            states = await self.states()
            suspected = [one.process_id for one in states if one.state == "suspected"]
            if not suspected or not self.rows.are_there or time.monotonic() > deadline:
                return states
            if not told:
                told = True
                say(
                    f"{', '.join(suspected)} may be dead: waiting up to "
                    f"{settings.lease_seconds:g} s to be sure..."
                )
            await asyncio.sleep(settings.heartbeat_interval_seconds / 2)

    async def caption(self) -> str:
        """Say what the table cannot know now."""
        missing = []
        if not self.runtime.presence.roster.is_warm:
            missing.append("our own heartbeat does not come back: silence proves nothing")
        if not self.rows.are_there:
            missing.append("there is no control database yet: leases are not known")
        return "; ".join(missing)


@asynccontextmanager
async def _looking(settings: PeerContextSettings) -> AsyncIterator[_Look]:
    async with PeerContextRuntime(settings) as runtime:
        rows = _Rows(settings)
        try:
            detector = FailureDetector(
                runtime.presence.roster, rows, settings, is_deaf=lambda: bool(runtime.degraded)
            )
            async with detector:
                await _until_warm(runtime)
                yield _Look(runtime=runtime, detector=detector, rows=rows)
        finally:
            rows.close()


async def _until_warm(runtime: PeerContextRuntime) -> None:
    """Wait until everybody alive has been heard.

    Raises:
        BrokerUnavailableError: If our own heartbeat does not come back.
    """
    settings, roster = runtime.settings, runtime.presence.roster
    longest = settings.kafka.connect_timeout_seconds + 2 * settings.silence_seconds
    say(f"listening to heartbeats for {settings.heartbeat_pause_seconds:g} s...")
    try:
        async with asyncio.timeout(longest):
            while not roster.is_warm:  # noqa: ASYNC110 - a roster becomes warm by time alone
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise BrokerUnavailableError(
            f"our own heartbeat did not come back within {longest:g} s: see `peerctx doctor`"
        ) from None


class _Rows:
    """The control database's rows; it may come into being while we look."""

    def __init__(self, settings: PeerContextSettings) -> None:
        self._settings = settings
        self._opening = asyncio.Lock()
        self._control: ControlDatabase | None = None

    @property
    def are_there(self) -> bool:
        """Whether there is a control database."""
        return self._control is not None

    async def alost_runs(self, dead: Sequence[str] = (), *, limit: int = 1_000) -> list[LostRun]:
        """See `Runs.alost_runs`."""
        return await (await self._opened()).alost_runs(dead, limit=limit)

    async def aholders(self) -> list[Holder]:
        """See `Runs.aholders`."""
        return await (await self._opened()).aholders()

    def close(self) -> None:
        """Close it, if it was opened."""
        if self._control is not None:
            self._control.close()

    async def _opened(self) -> ControlDatabase:
        """Return the control database; looking does not make one.

        Raises:
            StoreError: If it is not there, or cannot be opened.
        """
        async with self._opening:
            if self._control is None:
                url, limit = self._settings.control_url, self._settings.database_timeout_seconds
                if not await asyncio.to_thread(has_schema, url, timeout_seconds=limit):
                    raise StoreError("there is no control database yet")
                self._control = await open_in_thread(ControlDatabase, url, timeout_seconds=limit)
            return self._control


def _table(states: States, caption: str = "") -> Table:
    table = table_of("process", "state", "life", "agents", "heard", "phi", "runs", "leases", "lag")
    for more in ("supervises", "sentinel", "why"):
        table.add_column(more, overflow="fold")
    table.caption = caption or None
    for one in states:
        process, *others = (Text(cell) for cell in _cells(one))
        table.add_row(process, Text(one.state, style=_COLOURS[one.state]), *others)
    return table


def _cells(one: ProcessState) -> list[str]:
    return [
        one.process_id,
        one.incarnation[:8],
        "\n".join(one.agents),
        "never" if one.last_heartbeat_seconds is None else f"{ago(one.last_heartbeat_seconds)} ago",
        "?" if one.phi is None else f"{min(one.phi, 999):.1f}",
        str(one.open_runs),
        "?" if one.holds is None else str(one.holds),
        ago(one.loop_lag_seconds),
        "yes" if one.supervises else "",
        one.sentinel_id or "",
        one.why,
    ]
