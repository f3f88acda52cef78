"""The `peerctx` command: what an operator asks, and what to do about the answer.

Exit codes: 0 all is well; 1 something is wrong, and it says what to do; 2 the command line or a
setting is wrong.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, PeerContextError
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import creation_command, faults_of, topics_for
from langgraph_peerctx.messaging.transport import TopicSpec
from langgraph_peerctx.persistence.inspection import describe_database

try:
    import typer
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text
except ImportError:
    sys.exit("peerctx needs an extra: pip install 'langgraph-peerctx[cli]'")

State = Literal["ok", "warning", "fault"]
MARKS: dict[State, str] = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]warning[/]",
    "fault": "[red]fault[/]",
}
DATABASE_TIMEOUT_SECONDS = 4.0

app: typer.Typer = typer.Typer(
    help="Recover killed LangGraph agents with what their peers remember.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at, how it is, and what to do where it is not well."""

    name: str
    state: State
    detail: str
    remedy: str = ""


@app.command()
def topics(
    *,
    create: Annotated[
        bool, typer.Option("--create", help="Make those that are missing on the broker.")
    ] = False,
    requester_id: Annotated[
        list[str] | None,
        typer.Option(help="A requesting service; by default PEER_CONTEXT_REQUESTER_ID. Repeat it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the topics that are needed and how to make them, or make them."""
    settings = PeerContextSettings()
    specs = topics_for(
        settings.kafka,
        requester_id or [settings.requester_id],
        max_message_bytes=settings.max_message_bytes,
    )
    if create:
        asyncio.run(_on_broker(settings.kafka, lambda broker: broker.ensure_topics(specs)))
    if as_json:
        print(json.dumps([_spec_as_json(spec) for spec in specs], indent=2))  # noqa: T201 - the output
        return
    console = Console()
    table = _table("topic", "partitions", "settings")
    table.title = "made" if create else "needed"
    for spec in specs:
        settings_text = "\n".join(f"{name}={value}" for name, value in spec.settings.items())
        table.add_row(spec.name, str(spec.partitions), settings_text)
    console.print(table)
    if not create:
        console.print("\nMake them with `peerctx topics --create`, or with Kafka's own tool:\n")
        for spec in specs:
            console.print(creation_command(spec, settings.kafka.bootstrap_servers), soft_wrap=True)


@app.command()
def doctor(*, as_json: AsJson = False) -> None:
    """Look at broker, topics and databases, and say what to do about what is wrong."""
    settings = PeerContextSettings()
    findings = asyncio.run(examine(settings))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))  # noqa: T201 - the output
    else:
        _show(findings)
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)


async def examine(settings: PeerContextSettings) -> list[Finding]:
    """Return what a doctor finds; it ends within the connect and database deadlines."""
    broker, *databases = await asyncio.gather(
        _broker(settings),
        _database("event store", settings.database_url, "PEER_CONTEXT_DATABASE_URL"),
        _database("control database", settings.control_url, "PEER_CONTEXT_CONTROL_DATABASE_URL"),
    )
    reachable = broker[0].state == "ok"
    mock_mode = _mock_mode(settings, reachable=reachable)
    return [*broker, mock_mode, *(finding for found in databases for finding in found)]


async def _broker(settings: PeerContextSettings) -> list[Finding]:
    specs = topics_for(
        settings.kafka, [settings.requester_id], max_message_bytes=settings.max_message_bytes
    )
    names = [spec.name for spec in specs]
    try:
        states = await _on_broker(settings.kafka, lambda broker: broker.describe_topics(names))
    except PeerContextError as error:
        remedy = "start it, or see KAFKA_BOOTSTRAP_SERVERS and the KAFKA_* security settings"
        return [Finding(name="broker", state="fault", detail=str(error), remedy=remedy)]
    address, protocol = settings.kafka.bootstrap_servers, settings.kafka.security_protocol
    found = [Finding(name="broker", state="ok", detail=f"{address} answers ({protocol})")]
    for spec in specs:
        faults = faults_of(spec, states[spec.name])
        missing = states[spec.name].partitions == 0
        found.append(
            Finding(
                name=f"topic {spec.name}",
                state=("fault" if missing else "warning") if faults else "ok",
                detail="; ".join(faults) or "there, with the right settings",
                remedy=_topic_remedy(spec, missing=missing) if faults else "",
            )
        )
    return found


def _topic_remedy(spec: TopicSpec, *, missing: bool) -> str:
    if missing:
        return "peerctx topics --create"
    return f"change it with kafka-configs.sh --entity-type topics --entity-name {spec.name} --alter"


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


async def _database(name: str, url: str, variable: str) -> list[Finding]:
    """Look at one database in a thread: a server that does not answer must not hold the rest."""
    try:
        async with asyncio.timeout(2 * DATABASE_TIMEOUT_SECONDS):
            state = await asyncio.to_thread(
                describe_database, url, timeout_seconds=DATABASE_TIMEOUT_SECONDS
            )
    except TimeoutError:
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
    detail = f"{state.name}: schema {state.schema_version}"
    return [Finding(name=name, state="ok", detail=detail)]


async def _on_broker(config: KafkaConfig, ask: Callable[[KafkaTransport], Awaitable[Any]]) -> Any:
    transport = KafkaTransport(config)
    try:
        await transport.start()
        return await ask(transport)
    finally:
        await transport.close()


def _spec_as_json(spec: TopicSpec) -> dict[str, Any]:
    return {"name": spec.name, "partitions": spec.partitions, "settings": dict(spec.settings)}


def _show(findings: list[Finding]) -> None:
    console = Console()
    table = _table("what", "how it is", "what was found, and what to do")
    for finding in findings:
        # What was found is no markup, whatever brackets are in it.
        said = Text("\n→ ".join(text for text in (finding.detail, finding.remedy) if text))
        table.add_row(finding.name, MARKS[finding.state], said)
    console.print(table)


def _table(*names: str) -> Table:
    """Return a table that cuts nothing off: the end of a variable's name is what one needs."""
    return Table(*(Column(name, overflow="fold") for name in names))


def main() -> None:
    """Run the command; a wrong setting is said in a sentence, not in a traceback."""
    try:
        app()
    except ConfigurationError as error:
        print(f"peerctx: {error}", file=sys.stderr)  # noqa: T201 - the output
        sys.exit(2)
    except PeerContextError as error:
        print(f"peerctx: {error}", file=sys.stderr)  # noqa: T201 - the output
        sys.exit(1)
