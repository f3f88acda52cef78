"""`peerctx doctor`: what is well, what is not, and what to do about it."""

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console
from rich.text import Text

from langgraph_peerctx.commands.naming import doctor_id
from langgraph_peerctx.commands.printing import print_json, table_of
from langgraph_peerctx.commands.topics import on_broker
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, PeerContextError
from langgraph_peerctx.identifiers import new_id
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.presence import LOOK_BACK_RECORDS
from langgraph_peerctx.messaging.producer import publish
from langgraph_peerctx.messaging.roster import Roster
from langgraph_peerctx.messaging.sentinel_place import SentinelPlace, place_of
from langgraph_peerctx.messaging.topics import faults_of, topics_for
from langgraph_peerctx.messaging.transport import From, Record, TopicSpec
from langgraph_peerctx.persistence.inspection import (
    CONTROL_NEEDS,
    EVENT_STORE_NEEDS,
    DatabaseState,
    Need,
    describe_database,
)
from langgraph_peerctx.persistence.migrations import HEAD
from langgraph_peerctx.protocol.messages import Heartbeat

Health = Literal["ok", "warning", "fault"]
MARKS: dict[Health, str] = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]warning[/]",
    "fault": "[red]fault[/]",
}
DATABASE_TIMEOUT_SECONDS = 4.0
ROUND_TRIP_SECONDS = 5.0
"""How long one record may take to the broker and back."""
CLOCK_SECONDS = 5.0
"""From here on clocks that disagree are worth a warning; no lease and no verdict depends on it."""
_CLOCK_REMEDY = "synchronise the clocks (NTP): only times in reports are wrong meanwhile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at, how it is, and what to do where it is not well."""

    name: str
    state: Health
    detail: str
    remedy: str = ""


def diagnose(*, as_json: bool) -> bool:
    """Print what a doctor finds; tell whether nothing is at fault."""
    findings = asyncio.run(examine(PeerContextSettings()))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    return all(finding.state != "fault" for finding in findings)


async def examine(settings: PeerContextSettings) -> list[Finding]:
    """Return what a doctor finds; it ends within the connect and database deadlines."""
    broker, store, control = await asyncio.gather(
        _broker(settings),
        _described(settings.database_url, EVENT_STORE_NEEDS),
        _described(settings.control_url, CONTROL_NEEDS),
    )
    reachable = broker[0].state == "ok"
    return [
        *broker,
        _mock_mode(settings, reachable=reachable),
        *_database("event store", store, "PEER_CONTEXT_DATABASE_URL"),
        *_database("control database", control, "PEER_CONTEXT_CONTROL_DATABASE_URL"),
        _recovery(settings, hears=reachable and settings.mock_mode != "always"),
        *_work(control),
        await asyncio.to_thread(_sentinel, settings),
    ]


# The broker


async def _broker(settings: PeerContextSettings) -> list[Finding]:
    specs = topics_for(
        settings.kafka, [settings.requester_id], max_message_bytes=settings.max_message_bytes
    )
    names = [spec.name for spec in specs]

    async def ask(broker: KafkaTransport) -> list[Finding]:
        states = await broker.describe_topics(names)
        found = []
        for spec in specs:
            faults, missing = faults_of(spec, states[spec.name]), not states[spec.name].partitions
            found.append(_topic(spec, faults, missing=missing))
        is_well = all(finding.state == "ok" for finding in found)
        return [*found, *(await _round_trip(broker, settings) if is_well else [])]

    try:
        found: list[Finding] = await on_broker(settings.kafka, ask)
    except PeerContextError as error:
        remedy = "start it, or see KAFKA_BOOTSTRAP_SERVERS and the KAFKA_* security settings"
        return [Finding(name="broker", state="fault", detail=str(error), remedy=remedy)]
    address, protocol = settings.kafka.bootstrap_servers, settings.kafka.security_protocol
    return [Finding(name="broker", state="ok", detail=f"{address} answers ({protocol})"), *found]


def _topic(spec: TopicSpec, faults: Sequence[str], *, missing: bool) -> Finding:
    remedy = (
        "peerctx topics --create"
        if missing
        else f"change it with kafka-configs.sh --entity-type topics --entity-name {spec.name} "
        "--alter"
    )
    return Finding(
        name=f"topic {spec.name}",
        state=("fault" if missing else "warning") if faults else "ok",
        detail="; ".join(faults) or "there, with the right settings",
        remedy=remedy if faults else "",
    )


async def _round_trip(broker: KafkaTransport, settings: PeerContextSettings) -> list[Finding]:
    """Send one record to the presence topic and read it back: a goodbye, which changes nothing.

    Whoever is there has been read before it.
    """
    ours, came = new_id(), asyncio.Event()
    stored_ms = 0
    roster = Roster(
        incarnation=ours,
        interval_seconds=settings.heartbeat_interval_seconds,
        pause_seconds=settings.heartbeat_pause_seconds,
    )

    def take(record: Record) -> None:
        nonlocal stored_ms
        roster.take(record)
        if record.value is not None and ours.encode() in record.value:
            stored_ms = record.timestamp_ms
            came.set()

    goodbye = Heartbeat(
        sent_at=datetime.now(UTC),
        process_id=doctor_id(),
        incarnation=ours,
        sequence=1,
        leaving=True,
    )
    topic, limit = settings.kafka.presence_topic, settings.max_message_bytes
    subscription = await broker.subscribe([topic], take, start=From(back=LOOK_BACK_RECORDS))
    try:
        async with asyncio.timeout(ROUND_TRIP_SECONDS):
            await subscription.positioned()
            sent = time.time()
            await publish(broker, topic, goodbye, max_bytes=limit)
            middle = (sent + time.time()) / 2
            await came.wait()
    except (PeerContextError, TimeoutError) as error:
        detail = f"a record sent to {topic} did not come back: {error or 'in time'}"
        remedy = "see whether this user may write and read the topics"
        return [Finding(name="round trip", state="warning", detail=detail, remedy=remedy)]
    finally:
        await subscription.close()
    there = sorted(m.beat.process_id for m in roster.present() if m.beat.supervises)
    return [_clock("broker's clock", stored_ms / 1_000 - middle), _supervisors(settings, there)]


def _supervisors(settings: PeerContextSettings, there: Sequence[str]) -> Finding:
    """Say who recovers lost runs, by their heartbeats."""
    if there or not settings.has_shared_control:
        detail = f"{len(there)}: {', '.join(there)}" if there else "none"
        return Finding(name="supervisors", state="ok", detail=detail)
    return Finding(
        name="supervisors",
        state="warning",
        detail="nobody's heartbeat says that it supervises: lost runs wait",
        remedy="run `peerctx supervise` on two hosts, or peer_context_lifespan(workflow=...)",
    )


def _clock(name: str, ahead_seconds: float) -> Finding:
    is_off = abs(ahead_seconds) > CLOCK_SECONDS
    return Finding(
        name=name,
        state="warning" if is_off else "ok",
        detail=f"{ahead_seconds:+.1f} s from ours",
        remedy=_CLOCK_REMEDY if is_off else "",
    )


def _mock_mode(settings: PeerContextSettings, *, reachable: bool) -> Finding:
    mode = settings.mock_mode
    if mode == "always":
        detail = "always on: nothing is sent, no peer is ever asked"
        remedy = "unset PEER_CONTEXT_MOCK_MODE"
        return Finding(name="mock mode", state="warning", detail=detail, remedy=remedy)
    if mode == "never":
        return Finding(name="mock mode", state="ok", detail="never: a missing broker is an error")
    if reachable:
        detail = "auto, and off now; a broker that vanishes would turn it on"
        remedy = "in production set PEER_CONTEXT_MOCK_MODE=never"
        return Finding(name="mock mode", state="ok", detail=detail, remedy=remedy)
    detail = "auto, and on now: recoveries would go without peers, and say so"
    remedy = "bring the broker back; in production set PEER_CONTEXT_MOCK_MODE=never"
    return Finding(name="mock mode", state="warning", detail=detail, remedy=remedy)


# The databases


async def _described(url: str, needs: Sequence[Need]) -> DatabaseState | None:
    """Look at one database in a thread: a server that does not answer must not hold the rest."""
    try:
        async with asyncio.timeout(2 * DATABASE_TIMEOUT_SECONDS):
            return await asyncio.to_thread(
                describe_database, url, timeout_seconds=DATABASE_TIMEOUT_SECONDS, needs=needs
            )
    except TimeoutError:
        return None


def _database(name: str, state: DatabaseState | None, variable: str) -> list[Finding]:
    if state is None:
        remedy = f"see whether the server runs, or {variable}"
        return [Finding(name=name, state="fault", detail="it does not answer", remedy=remedy)]
    if state.problems:
        return [
            Finding(name=name, state="fault", detail=problem, remedy=f"see {variable}")
            for problem in state.problems
        ]
    if not state.exists or state.schema_version is None:
        detail = f"{state.name} is not there yet: it is made when first used"
        return [Finding(name=name, state="ok", detail=detail)]
    clock = state.clock_ahead_seconds
    return [
        _schema(name, state),
        *([] if clock is None else [_clock(f"{name}'s clock", clock)]),
    ]


def _schema(name: str, state: DatabaseState) -> Finding:
    detail = f"{state.name}: schema {state.schema_version}"
    if state.at_head:
        return Finding(name=name, state="ok", detail=detail)
    return Finding(
        name=name,
        state="warning",
        detail=f"{detail} is upgraded to {HEAD} when first opened",
        remedy="processes of an older release cannot use it from then on: install this one there",
    )


def _recovery(settings: PeerContextSettings, *, hears: bool) -> Finding:
    if not settings.has_shared_control:
        return Finding(
            name="recovery",
            state="warning",
            detail="automatic recovery is off: no control database is shared",
            remedy="set PEER_CONTEXT_CONTROL_DATABASE_URL to one SQLite file on one host, or to "
            "PostgreSQL for several",
        )
    if not hears:
        return Finding(
            name="recovery",
            state="warning",
            detail="no death can be noticed without a broker",
            remedy="bring the broker back and leave mock mode; `peerctx recover` works by hand",
        )
    return Finding(
        name="recovery", state="ok", detail="agents and supervisors share a control database"
    )


def _work(control: DatabaseState | None) -> list[Finding]:
    """Say what is open, and what waits for a person."""
    if control is None or not control.at_head:
        return []
    open_runs, incidents = control.open_runs, control.incidents
    found = [Finding(name="open runs", state="ok", detail=str(open_runs))]
    counted = ", ".join(f"{count} {status}" for status, count in sorted(incidents.items()))
    waits = [status for status in ("dead_letter", "waiting_for_human") if incidents.get(status)]
    remedies = [f"peerctx incidents list --status {status}" for status in waits]
    if control.unsupervised:
        counted += f"; of {control.unsupervised} nobody supervises the workflow"
        remedies.append("peerctx supervise with that workflow: peerctx incidents list says which")
    return [
        *found,
        Finding(
            name="incidents",
            state="warning" if remedies else "ok",
            detail=counted or "none",
            remedy="; ".join(remedies),
        ),
    ]


# The sentinel


def _sentinel(settings: PeerContextSettings) -> Finding:
    mode = settings.sentinel
    if mode == "off":
        detail = "off: deaths are noticed by silence alone"
        return Finding(name="sentinel", state="ok", detail=detail)
    place = place_of(settings)
    try:
        runs = _listens(place)
    except (ConfigurationError, OSError) as error:
        remedy = "see PEER_CONTEXT_SENTINEL_DIRECTORY"
        return Finding(name="sentinel", state="fault", detail=str(error), remedy=remedy)
    if runs:
        return Finding(name="sentinel", state="ok", detail=f"{place.sentinel_id} runs")
    if mode == "auto":
        detail = "none runs for this host and cluster: it is started on demand"
        return Finding(name="sentinel", state="ok", detail=detail)
    return Finding(
        name="sentinel",
        state="warning",
        detail=f"none listens at {place.socket}: deaths are noticed by silence alone",
        remedy="run `peerctx sentinel` as a service of this host",
    )


def _listens(place: SentinelPlace) -> bool:
    """Tell whether somebody listens there; a connection that says nothing is no registration."""
    try:
        place.check()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(place.socket))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _show(findings: Sequence[Finding]) -> None:
    table = table_of("what", "how it is", "what was found, and what to do")
    for finding in findings:
        # What was found is no markup, whatever brackets are in it.
        said = Text("\n→ ".join(text for text in (finding.detail, finding.remedy) if text))
        table.add_row(finding.name, MARKS[finding.state], said)
    Console().print(table)
