"""The `peerctx` command: what can be said to it; what it then does is in `commands`.

Exit codes: 0 all is well; 1 something is wrong, and it says what to do; 2 the command line or a
setting is wrong; and of `peerctx recover` 3, a human must answer first, and 4, somebody else has
the thread.
"""

# Commands import what they need when they are given: a sentinel starts often, and needs little.
# ruff: noqa: PLC0415

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

from langgraph_peerctx.errors import ConfigurationError, PeerContextError, ProtocolError
from langgraph_peerctx.persistence.incidents import IncidentStatus

try:
    import typer
    from rich.console import Console as _  # noqa: F401 - as needed as typer
except ImportError:
    sys.exit("peerctx needs an extra: pip install 'langgraph-peerctx[cli]'")

_EXITS = "Exit codes: 0 well, 1 something is wrong, 2 the command line or a setting is wrong."

app: typer.Typer = typer.Typer(
    help=f"Recover killed LangGraph agents with what their peers remember.\n\n{_EXITS}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
incidents: typer.Typer = typer.Typer(
    help="What failed, how it was recovered, and what waits for a person.", no_args_is_help=True
)
app.add_typer(incidents, name="incidents")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Workflows = Annotated[
    list[str] | None,
    typer.Option(
        "--workflow",
        metavar="NAME=FILE.py:ATTRIBUTE",
        help="A compiled graph with its checkpointer, a SupervisedWorkflow, or what makes one: a "
        "function, or an (async) context manager. NAME is that under which its runs were "
        "admitted. Repeat it.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help='A langgraph.json with "peerctx": {"workflows": {"NAME": "./file.py:attribute"}}; by '
        "default the one in this folder, if no workflow is named.",
    ),
]
IncidentId = Annotated[str, typer.Argument(help="Its id, or a beginning that no other has.")]


def _tell_version(is_asked: bool) -> None:  # noqa: FBT001 - as typer calls it
    if is_asked:
        print(f"peerctx {version('langgraph-peerctx')}")  # noqa: T201 - the output
        raise typer.Exit


@app.callback()
def peerctx(
    *,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version."),
    ] = False,
) -> None:
    """See the app's own help."""


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
    from langgraph_peerctx.commands.topics import show_topics

    show_topics(requester_id or [], create=create, as_json=as_json)


@app.command()
def doctor(*, as_json: AsJson = False) -> None:
    """Look at broker, topics, clocks, databases and sentinel; say what to do about what is wrong.

    Exit codes: 0 nothing is at fault, warnings or not; 1 something is.
    """
    from langgraph_peerctx.commands.doctor import diagnose

    if not diagnose(as_json=as_json):
        raise typer.Exit(1)


@app.command()
def agents(
    *,
    watch: Annotated[
        bool,
        typer.Option("--watch/--once", help="Keep showing it; without a terminal always once."),
    ] = True,
    wide: Annotated[
        bool, typer.Option("--wide", help="Life, phi, loop lag and sentinel, too.")
    ] = False,
    all_: Annotated[
        bool,
        typer.Option("--all", help="Those, too, that have long left or died, and our commands."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how every process is: heartbeats, leases, and why it is taken for what it is.

    "runs" has the open runs that it tells of, and the leases that it holds. JSON has all.

    Exit codes: 0 it was shown; 1 there is no broker, or a database cannot be read.
    """
    from langgraph_peerctx.commands.agents import show_agents

    show_agents(watch=watch, as_json=as_json, is_wide=wide, shows_all=all_)


@app.command()
def supervise(
    *, workflow: Workflows = None, config: Config = None, as_json: AsJsonLines = False
) -> None:
    """Recover lost runs of workflows until SIGTERM or SIGINT; run as many of these as you like.

    Exit codes: 0 it was told to end; 1 it could not begin; 2 a workflow or a setting is wrong.
    """
    from langgraph_peerctx.commands import supervising
    from langgraph_peerctx.workflow_loading import declared

    supervising.supervise(declared(workflow or [], config), as_json=as_json)


@app.command()
def recover(
    agent_id: Annotated[str | None, typer.Argument(help="Whose thread it is.")] = None,
    thread_id: Annotated[str | None, typer.Argument(help="The thread.")] = None,
    *,
    workflow: Workflows = None,
    config: Config = None,
    answer: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="INCIDENT_ID VALUE",
            help="Answer an incident's question instead; the next supervisor goes on with it. "
            "VALUE is JSON, or plain text if it is none.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recover one thread now, or answer the question of a recovery that waits.

    Exit codes: 0 it has been recovered, here or elsewhere, or needs nothing; 3 it waits for a
    human; 4 its owner may be alive, or somebody else is at it; 1 it failed, or needs a person.
    """
    if answer is not None:
        if agent_id is not None:
            raise typer.BadParameter("--answer stands alone: no AGENT_ID, no THREAD_ID")
        from langgraph_peerctx.commands.incidents import answer_incident

        answer_incident(answer[0], _value(answer[1]), as_json=as_json)
        return
    if agent_id is None or thread_id is None:
        raise typer.BadParameter("name AGENT_ID and THREAD_ID, or use --answer")
    from langgraph_peerctx.commands import recovering
    from langgraph_peerctx.workflow_loading import declared

    told = declared(workflow or [], config)
    raise typer.Exit(recovering.recover(told, agent_id, thread_id, as_json=as_json))


@app.command()
def sentinel(
    *,
    idle_seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="End so long after the last process has gone; default: never."),
    ] = None,
    as_json: AsJsonLines = False,
) -> None:
    """Watch this host's processes, and publish a death when it happens, until SIGTERM or SIGINT.

    Exit codes: 0 it was told to end, was idle, or one runs already; 1 or 2 it could not begin.
    """
    from langgraph_peerctx.commands.watching import watch

    watch(idle_seconds, as_json=as_json)


@app.command()
def broker() -> None:
    """Run a broker for development, with the topics that are needed, until SIGTERM or SIGINT.

    It keeps nothing and is not for production. Needs the extra `embedded`.

    Exit codes: 0 it was told to end; 1 it did not start; 2 the extra is missing.
    """
    from langgraph_peerctx.commands.developing import run_broker

    run_broker()


@incidents.command(name="list")
def list_(
    *,
    status: Annotated[IncidentStatus | None, typer.Option(help="Only those.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List incidents, newest first."""
    from langgraph_peerctx.commands.incidents import list_incidents

    list_incidents(status, limit, as_json=as_json)


@incidents.command()
def show(
    incident_id: IncidentId,
    *,
    all_facts: Annotated[
        bool, typer.Option("--all", help="Name each restored fact and its source.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one incident: its times, who answered, effects, steps, result, and what it asks."""
    from langgraph_peerctx.commands.incidents import show_incident

    show_incident(incident_id, as_json=as_json, all_facts=all_facts)


@incidents.command()
def redrive(incident_id: IncidentId, *, as_json: AsJson = False) -> None:
    """Try a dead letter anew, with all its attempts, or an open incident at once."""
    from langgraph_peerctx.commands.incidents import redrive_incident

    redrive_incident(incident_id, as_json=as_json)


def _value(text: str) -> object:
    """Read an answer: JSON, or plain text."""

    def refuse(word: str) -> NoReturn:  # NaN and its like are no JSON
        raise ValueError(word)

    try:
        value: Any = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text
    return value


def main() -> None:
    """Run the command; a wrong setting is said in a sentence, not in a traceback."""
    try:
        app()
    except (ConfigurationError, ProtocolError) as error:  # an illegal id is a wrong command line
        print(f"peerctx: {error}", file=sys.stderr)  # noqa: T201 - the output
        sys.exit(2)
    except PeerContextError as error:
        print(f"peerctx: {error}", file=sys.stderr)  # noqa: T201 - the output
        sys.exit(1)
