"""What a recorder keeps in mind of runs that are under way."""

from collections import Counter
from dataclasses import dataclass, field
from uuid import UUID

from langgraph_peerctx.durability.record_writer import Fact, Source


@dataclass(slots=True, eq=False)
class Counts:
    """How often each position of a run was executed.

    Attributes:
        is_continued: Whether another process may have executed some of it before.
        before: What it has recorded of that, by agent and place.
    """

    is_continued: bool
    here: Counter[str] = field(default_factory=Counter)
    before: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(slots=True, eq=False, kw_only=True)
class Place:
    """One execution of a node, or of a whole run.

    Attributes:
        text: The run and the position, as they begin an interaction's id.
        attempt: Which execution there, counted by this recorder.
        overall: The same, with those counted that were recorded before.
    """

    text: str
    agent_id: str
    attempt: int
    counts: Counts
    overall: int | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Frame:
    """A node that is being executed, or a whole run around its nodes.

    Attributes:
        namespace: The node's; of a run, "".
        owner: The agent whose graph the node is in.
        behind: The other agent that stands behind the node, if one does.
        agent: The last agent that was found to act in it.
        handed_to: The nodes that it has handed over to.
        arrivals: Hand-offs to it, until it is known which agent acts in it.
        told_here: What the agent behind it remembers too, if it turns out to act in this process.
        is_hidden: Whether it is LangGraph's own.
    """

    namespace: str
    node: str
    position: str
    place: Place
    owner: str
    behind: str | None = None
    agent: str | None = None
    tools: int = 0
    handed_to: set[str] = field(default_factory=set)
    arrivals: list["HandOff"] = field(default_factory=list)
    told_here: list[Fact] = field(default_factory=list)
    is_local: bool = False
    is_asking: bool = False
    is_hidden: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class HandOff:
    """One agent hands over to a node; whose node it is, is known when it begins.

    Attributes:
        namespace: Of the graph that the node is in.
        is_named: Whether the node is named after an agent: a tool handed over to it.
    """

    fact: Fact
    namespace: str
    node: str
    is_named: bool


@dataclass(slots=True, eq=False)
class RecordedRun:
    """One invocation of a graph, from its root event to its end."""

    root: UUID
    source: Source
    calls: set[UUID] = field(default_factory=set)
    handing: list[HandOff] = field(default_factory=list)
    waits: str | None = None


@dataclass(slots=True, eq=False)
class Call:
    """What a callback's run id stands for.

    Attributes:
        actor: The agent that acts in it.
        named: The `agent_id` in its metadata: what is inside of it has it too.
        tool: Of a tool's call: its name, number and the agent behind it.
    """

    run: RecordedRun
    frame: Frame
    actor: str
    named: str | None
    tool: tuple[str, int, str | None] | None = None
