"""Nobody has to watch: every supervisor sees deaths itself, and one of them recovers.

There is no leader. A stable hash of thread and supervisor orders them; the first claims at once,
the others a little later each, if it is still there to be claimed.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias
from weakref import WeakKeyDictionary

from langgraph_peerctx import background
from langgraph_peerctx.background import BackgroundRuntime
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.durability.workflow import Workflow
from langgraph_peerctx.errors import ConfigurationError, StoreError
from langgraph_peerctx.gathering.gatherer import OnAnswer
from langgraph_peerctx.persistence.runs import LostRun
from langgraph_peerctx.reconstruction.failure_detector import (
    AgentFailure,
    FailureDetector,
    ProcessState,
)
from langgraph_peerctx.reconstruction.incident import OnStep, tell
from langgraph_peerctx.reconstruction.recoverer import Recoverer, SupervisedWorkflow
from langgraph_peerctx.reconstruction.report import noticed
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.runtime import PeerContextRuntime

_logger = logging.getLogger(__name__)

STEP_SECONDS = 0.3
"""How much later the next supervisor in line claims."""
LONGEST_LINE = 10
"""Beyond so many steps nobody waits longer."""

OnFailure: TypeAlias = Callable[[AgentFailure], None]
OnRecovery: TypeAlias = Callable[[AgentFailure, RecoveryResult], None]


class RecoverySupervisor:
    """Notices lost runs of the workflows it knows, and recovers them; an async context manager.

    Workflows run on the loop that enters it; heartbeats, leases and detection are the process's
    runtime's, on a thread of its own. Any number of processes may have one.

    Args:
        workflows: By the names under which their runs were admitted.
        settings: For the runtime, if it does not run yet; by default from the environment.
        on_failure: Is told of each lost run that is seen, on the entering loop.
        on_recovery: Is told how each recovery that was made here ended, on the entering loop.
        on_step: Is told of each step of a recovery when it has ended.
        on_answer: Is told of each peer's answer when it arrives.

    Raises:
        ConfigurationError: If there is no workflow, or one that is not compiled.

    Raises, when it is entered:
        ConfigurationError: If there is no control database that agents and recoverers share.
        StoreError: If it cannot be opened.
        BrokerUnavailableError: If there is no broker, and mock mode is `never`.
    """

    def __init__(
        self,
        workflows: Mapping[str, SupervisedWorkflow | Workflow],
        *,
        settings: PeerContextSettings | None = None,
        on_failure: OnFailure | None = None,
        on_recovery: OnRecovery | None = None,
        on_step: OnStep | None = None,
        on_answer: OnAnswer | None = None,
    ) -> None:
        self.workflows: dict[str, SupervisedWorkflow] = {
            name: (
                given
                if isinstance(given, SupervisedWorkflow)
                else SupervisedWorkflow(workflow=given)
            )
            for name, given in workflows.items()
        }
        if not self.workflows:
            raise ConfigurationError("a supervisor needs workflows to recover: name at least one")
        self._settings = settings
        self._on_failure = on_failure
        self._on_recovery = on_recovery
        self._on_step = on_step
        self._on_answer = on_answer
        self._flights: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._unknown: set[str] = set()
        self._stack = AsyncExitStack()
        self._running: _Running | None = None
        self.counters: Counter[str] = Counter()

    @property
    def recoveries(self) -> tuple[tuple[str, str], ...]:
        """Agent and thread of each recovery that is under way here, or waits for its turn."""
        return tuple(sorted(self._flights))

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            settings = self._settings or background.settings_in_use() or PeerContextSettings()
            see_that_it_is_shared(settings)
            lease = background.lease(self._settings)
            stack.push_async_callback(lease.arelease)
            runtime = await lease.aruntime()
            ownership = await runtime.own()
            self._running = _Running(
                loop=asyncio.get_running_loop(),
                runtime=runtime,
                recoverer=Recoverer(
                    runtime, ownership, on_step=self._on_step, on_answer=self._on_answer
                ),
                places=asyncio.Semaphore(settings.max_recoveries),
            )
            stack.push_async_callback(self._land)
            watching = await runtime.acall(partial(_watch, self._take_from_elsewhere))
            stack.push_async_callback(runtime.acall, partial(_unwatch, watching))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()
        self._running = None

    async def recover(self, agent_id: str, thread_id: str) -> RecoveryResult:
        """Recover a thread now, if it needs it and nobody else is at it.

        Raises:
            ConfigurationError: If it does not run, or does not know the workflow.
            StoreError: If the control database failed.
        """
        running = self._started()
        control = (await running.runtime.own()).control
        run = await control.anewest_run(agent_id, thread_id)
        name = "" if run is None else run.workflow or ""
        if run is not None and name not in self.workflows:
            raise ConfigurationError(
                f"the run is of workflow {name!r}, and this supervisor knows "
                f"{', '.join(sorted(self.workflows)) or 'none'}"
            )
        supervised = self.workflows.get(name) or next(iter(self.workflows.values()))
        return await running.recoverer.recover_thread(agent_id, thread_id, supervised)

    async def states(self) -> list[ProcessState]:
        """Return how every process is that is known of; see `FailureDetector.states`.

        Raises:
            ConfigurationError: If it does not run.
        """
        return await self._started().runtime.acall(_states)

    def _started(self) -> "_Running":
        if self._running is None:
            raise ConfigurationError("this supervisor is not started: use it in an `async with`")
        return self._running

    def _take_from_elsewhere(self, failure: AgentFailure) -> None:
        """Take a failure over from the runtime's thread."""
        running = self._running
        if running is not None and not running.loop.is_closed():
            running.loop.call_soon_threadsafe(self._take, failure)

    def _take(self, failure: AgentFailure) -> None:
        """Begin a recovery, one a thread at a time."""
        key = failure.agent_id, failure.thread_id
        if key in self._flights or self._running is None:
            return
        self.counters[f"seen.{failure.why}"] += 1
        flight = asyncio.create_task(
            self._fly(failure, self._running), name=f"peerctx-recover-{key[1]:.80}"
        )
        self._flights[key] = flight
        flight.add_done_callback(lambda _: self._flights.pop(key, None))
        if self._on_failure is not None:
            tell(self._on_failure, failure)

    async def _fly(self, failure: AgentFailure, running: "_Running") -> None:
        try:
            result = await self._recover(failure, running)
        except StoreError as error:
            self.counters["store"] += 1
            _logger.warning("%s cannot be recovered now: %s", failure.thread_id, error)
        except Exception:  # a service loop logs and goes on
            self.counters["error"] += 1
            _logger.exception("the recovery of %s failed", failure.thread_id)
        else:
            if result is None:
                self.counters["elsewhere"] += 1
                return
            self.counters[result["status"]] += 1
            _logger.info("%s of %s: %s", failure.thread_id, failure.agent_id, result["status"])
            if self._on_recovery is not None:
                tell(self._on_recovery, failure, result)

    async def _recover(self, failure: AgentFailure, running: "_Running") -> RecoveryResult | None:
        runtime, supervised = running.runtime, self.workflows.get(failure.workflow or "")
        if supervised is None:
            await self._note(runtime, failure)
            return None
        async with running.places:
            line = await runtime.acall(_supervisors)
            me = runtime.settings.process_id
            await asyncio.sleep(STEP_SECONDS * place_in_line(failure.thread_id, me, line))
            lost = LostRun(
                agent_id=failure.agent_id,
                thread_id=failure.thread_id,
                run_id=failure.run_id,
                workflow=failure.workflow,
                epoch=failure.epoch,
                owner_id=failure.process_id,
                owner_incarnation=failure.incarnation,
                seconds_left=0.0,
            )
            died = failure.why == "died"
            return await running.recoverer.recover(
                lost, supervised, died=died, noticed=noticed(failure)
            )

    async def _note(self, runtime: BackgroundRuntime, failure: AgentFailure) -> None:
        """Let people see a run that nobody here can recover; another supervisor may."""
        name = failure.workflow or ""
        if name not in self._unknown:
            self._unknown.add(name)
            _logger.warning("runs of workflow %r are lost, and this supervisor lacks it", name)
        await asyncio.sleep(STEP_SECONDS * LONGEST_LINE)
        control = (await runtime.own()).control
        lost = await control.aopen_run(failure.agent_id, failure.thread_id)
        if lost is not None and lost.epoch == failure.epoch:
            said = {"status": "unknown_workflow", "reasons": [f"nobody supervises {name!r:.80}"]}
            again = runtime.settings.sweep_seconds
            await control.in_thread(partial(control.note, lost, said, again_seconds=again))

    async def _land(self) -> None:
        """End what is under way; it is handed over."""
        self._running = None
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        if flights:
            await asyncio.wait(flights)


def place_in_line(thread_id: str, me: str, supervisors: Collection[str]) -> int:
    """Return how many supervisors come before us for this thread; pure, the same everywhere."""
    others = {*supervisors, me}

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{thread_id}\n{name}".encode()).digest()

    return min(LONGEST_LINE, sorted(others, key=rank).index(me))


def see_that_it_is_shared(settings: PeerContextSettings) -> None:
    """See that agents and recoverers can share a control database.

    Raises:
        ConfigurationError: If it is the agent's own SQLite file.
    """
    if not settings.has_shared_control:
        raise ConfigurationError(
            "automatic recovery is off: set PEER_CONTEXT_CONTROL_DATABASE_URL to a database that "
            "agents and recoverers share, one SQLite file on one host or PostgreSQL for several"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """What a supervisor has while it runs."""

    loop: asyncio.AbstractEventLoop
    runtime: BackgroundRuntime
    recoverer: Recoverer
    places: asyncio.Semaphore


@dataclass(slots=True)
class _Detection:
    """The one detector of a runtime, and how many supervisors use it."""

    detector: FailureDetector
    users: int = 0


_detections: WeakKeyDictionary[PeerContextRuntime, _Detection] = WeakKeyDictionary()
"""Each is used on its runtime's loop alone."""


async def _watch(take: OnFailure, runtime: PeerContextRuntime) -> Callable[[], None]:
    """Detect, from now on; return what ends telling."""
    control = (await runtime.own()).control
    detection = _detections.get(runtime)
    if detection is None:
        detector = FailureDetector(
            runtime.presence.roster,
            control,
            runtime.settings,
            is_deaf=lambda: bool(runtime.degraded),
        )
        detection = _detections[runtime] = _Detection(detector)
        await detector.__aenter__()
    detection.users += 1
    runtime.presence.standing.supervises = True
    runtime.presence.beat_now()
    return detection.detector.on_failure(take)


async def _unwatch(stop: Callable[[], None], runtime: PeerContextRuntime) -> None:
    """End what `_watch` began."""
    stop()
    detection = _detections[runtime]
    detection.users -= 1
    if detection.users == 0:
        del _detections[runtime]
        runtime.presence.standing.supervises = False
        runtime.presence.beat_now()
        await detection.detector.close()


async def _states(runtime: PeerContextRuntime) -> list[ProcessState]:
    return await _detections[runtime].detector.states()


async def _supervisors(runtime: PeerContextRuntime) -> list[str]:
    present = runtime.presence.roster.present()
    return [member.beat.process_id for member in present if member.beat.supervises]
