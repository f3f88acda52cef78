"""`peerctx agents`: how every process is, from its heartbeats and its leases."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TypeAlias

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from langgraph_peerctx.commands.control import where_none_is
from langgraph_peerctx.commands.naming import is_a_command, looker_id
from langgraph_peerctx.commands.printing import ago, folded, lean_table, print_json, say, whole
from langgraph_peerctx.commands.until_told import run_until_told
from langgraph_peerctx.config import PeerContextSettings
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
OVER_SECONDS = 60.0
"""For so long one who left, or died and holds nothing, is of interest."""
_ID_WIDTH, _WHY_WIDTH = 24, 14
"""In 80 columns an id is rather whole than a sentence on one line."""
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


def show_agents(
    *, watch: bool, as_json: bool, is_wide: bool = False, shows_all: bool = False
) -> None:
    """Print how every process is, once, or again each heartbeat interval until it is ended.

    JSON has everything of everybody.

    Raises:
        BrokerUnavailableError: If there is no broker, or our own heartbeat does not come back.
        StoreError: If the control database is there and cannot be opened.
    """
    settings = PeerContextSettings().model_copy(
        update={
            "mock_mode": "never",
            "sentinel": "off",
            "process_id": looker_id(),
        }
    )
    how = _How(is_wide=is_wide, shows_all=shows_all)
    if watch and sys.stdout.isatty() and not as_json:
        run_until_told(lambda: _watch(settings, how))
        return
    states = asyncio.run(_once(settings))
    if as_json:
        print_json([asdict(state) for state in states])
    else:
        Console().print(how.table(states))


async def _once(settings: PeerContextSettings) -> States:
    async with _looking(settings) as look:
        return await look.settled()


async def _watch(settings: PeerContextSettings, how: "_How") -> None:
    async with _looking(settings) as look:
        with Live(auto_refresh=False) as live:
            while True:
                table = how.table(await look.states(), await look.caption())
                live.update(Fitted(table), refresh=True)
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
            missing.append(f"{self.rows.missing}: leases are not known")
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
    def missing(self) -> str:
        """What is to be said while there is none."""
        return where_none_is(self._settings)

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
                    raise StoreError(await asyncio.to_thread(where_none_is, self._settings))
                self._control = await open_in_thread(ControlDatabase, url, timeout_seconds=limit)
            return self._control


# The table


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How much of it people want to see."""

    is_wide: bool
    shows_all: bool

    def table(self, states: States, caption: str = "") -> RenderableType:
        """Return what is shown: the table, and what it does not show."""
        shown = [one for one in states if self.shows_all or is_of_interest(one)]
        longest = max((len(one.process_id) for one in shown), default=0)
        table = lean_table(*_columns(longest), *(_more_columns() if self.is_wide else ()))
        for one in shown:
            table.add_row(*_cells(one), *(_more_cells(one) if self.is_wide else ()))
        notes = [*_hidden(len(states) - len(shown)), *([caption] if caption else [])]
        return Group(table, *(Text(f"\n{note}", style="dim") for note in notes))


def is_of_interest(one: ProcessState) -> bool:
    """Tell whether people want to see it: not what ended long ago, nor ourselves."""
    if is_a_command(one.process_id):
        return False
    is_over = one.state == "left" or (one.state == "dead" and one.holds == 0)
    silent_seconds = one.last_heartbeat_seconds
    return not (is_over and silent_seconds is not None and silent_seconds > OVER_SECONDS)


def _hidden(count: int) -> list[str]:
    verb = "is" if count == 1 else "are"
    said = f"{count} {verb} hidden: left or dead for a minute, or only looking; --all shows all"
    return [said] if count else []


def _columns(longest_id: int) -> list[Column]:
    return [
        Column("process", overflow="fold", min_width=min(longest_id, _ID_WIDTH)),
        whole("state"),
        folded("agents"),
        whole("runs/\nleases"),
        whole("heard"),
        Column("why", overflow="fold", min_width=_WHY_WIDTH),
    ]


def _cells(one: ProcessState) -> list[Text]:
    heard = one.last_heartbeat_seconds
    return [
        Text(one.process_id),
        Text(one.state, style=_COLOURS[one.state]),
        Text("\n".join(one.agents)),
        Text(f"{one.open_runs}/{'?' if one.holds is None else one.holds}"),
        Text("never" if heard is None else ago(heard)),
        Text(one.why),
    ]


def _more_columns() -> list[Column]:
    return [*(whole(name) for name in ("life", "phi", "lag", "supervises")), folded("sentinel")]


def _more_cells(one: ProcessState) -> list[Text]:
    cells = (
        one.incarnation[:8],
        "?" if one.phi is None else f"{min(one.phi, 999):.1f}",
        ago(one.loop_lag_seconds),
        "yes" if one.supervises else "",
        one.sentinel_id or "",
    )
    return [Text(cell) for cell in cells]


@dataclass(frozen=True, slots=True)
class Fitted:
    """As much of something as the screen has room for, and how much that is not."""

    shown: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Let rich draw it."""
        lines = console.render_lines(self.shown, options.update(height=None), pad=False)
        room = options.size.height - 1
        cut = len(lines) > room
        kept = max(0, room - 2) if cut else len(lines)  # two for what is said of the rest
        for line in lines[:kept]:
            yield from line
            yield Segment.line()
        if cut:
            yield Text(
                f"… {len(lines) - kept} lines more: a higher window, or --once",
                style="bold",
                overflow="fold",
            )
