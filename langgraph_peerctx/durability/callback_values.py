"""What LangGraph gives to callbacks, read; pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langgraph.errors import GraphBubbleUp, GraphInterrupt
from langgraph.types import Command, Send

from langgraph_peerctx.durability.recorded_ids import legal_agent_id
from langgraph_peerctx.protocol.looking import TEXT


def is_graph_in_node(given: Mapping[str, Any]) -> bool:
    """Tell whether what begins is a graph that a node calls: it begins at the node's namespace."""
    namespace = given.get("langgraph_checkpoint_ns")
    return bool(namespace) and given.get("checkpoint_ns") == namespace


def own_agent(given: Mapping[str, Any], inherited: str | None) -> str | None:
    """Return the agent that metadata name, where what is around them does not."""
    named = given.get("agent_id")
    return None if named is None or named == inherited else legal_agent_id(str(named))


def graph_of(namespace: str) -> str:
    """Return the namespace of the graph that a node is in: of the node that it is called from."""
    parts = namespace.split("|")[:-1]
    while parts and ":" not in parts[-1]:  # the number of a graph that one node calls repeatedly
        parts.pop()
    return "|".join(parts)


def commands_in(outputs: Any) -> Iterator[Command[Any]]:
    """Return the commands among what a node or tool gave."""
    for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
        if isinstance(output, Command):
            yield output


def targets_of(command: Command[Any]) -> Iterator[str]:
    """Return the nodes that a command goes to."""
    for target in command.goto if isinstance(command.goto, list | tuple) else [command.goto]:
        node = target.node if isinstance(target, Send) else target
        if isinstance(node, str) and not node.startswith("__"):
            yield node


def written(value: Any) -> Any:
    """Return what a node or tool gave, with LangGraph's commands as mappings."""
    if isinstance(value, Command):
        parts = {name: getattr(value, name) for name in ("update", "resume", "goto")}
        return {name: written(v) for name, v in parts.items() if v is not None and v != ()}
    if isinstance(value, Send):
        return {"node": value.node, "arg": value.arg}
    if isinstance(value, list | tuple) and any(isinstance(v, Command | Send) for v in value):
        return [written(v) for v in value]
    return value


def interrupts_in(error: GraphInterrupt) -> Sequence[Any]:
    """Return the questions with which a node stopped."""
    found = error.args[0] if error.args else ()
    return found if isinstance(found, list | tuple) else [found]


def told_of(error: BaseException) -> str:
    """Return what an error says, in a line that is not long."""
    try:
        return f"{type(error).__name__}: {error}"[:TEXT]
    except Exception:  # noqa: BLE001 - anybody's error may do anything when it is looked at
        return type(error).__name__


def how_it_ended(error: BaseException) -> str:
    """Say how a run ended that did not return."""
    if isinstance(error, GraphInterrupt):
        return "waiting"
    if isinstance(error, GraphBubbleUp):
        return "handed_over"
    return "raised" if isinstance(error, Exception) else "cancelled"
