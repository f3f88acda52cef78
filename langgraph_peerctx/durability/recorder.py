"""What happens in a run, seen by its callbacks and recorded in the agent's own event store.

Node events are evidence of work, not of commit: the checkpoint decides. What callbacks do not see
is not recorded: nodes answered from a cache, and `update_state`.
"""

import hashlib
import os
import re
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from langgraph.types import Command, Send

from langgraph_peerctx.durability.positions import Execution, Positions
from langgraph_peerctx.durability.record_writer import Fact, RecordWriter, Source
from langgraph_peerctx.durability.recorded_payload import PayloadRules, Redact
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import RECORD_ID_LIMIT, check_id, is_legal_id
from langgraph_peerctx.persistence.event_store import EventStore, get_event_store
from langgraph_peerctx.protocol.json_values import plain_text
from langgraph_peerctx.protocol.looking import TEXT, Snapshot, opened
from langgraph_peerctx.protocol.messages import Interaction

END_DEADLINE_SECONDS: Final = 2.0
"""So long the end of a run waits for the store."""
REMEMBERED_RUNS: Final = 1_000
"""Of so many runs it is known how often each place was executed, to go on counting."""
REMEMBERED_CALLS: Final = 10_000
"""So many calls are known that went on when their run had ended."""
LOOKED_BACK: Final = 5_000
"""So many events of a thread are looked at for a run that another process began."""
LONGEST_PLACE: Final = 200
LONGEST_AGENT_ID: Final = 64

_UNNAMED = "LangGraph"
"""What LangGraph calls a graph that nobody gave a name."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ILLEGAL = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(slots=True, eq=False)
class _Counts:
    """How often each position of a run was executed.

    Attributes:
        is_continued: Whether another process may have executed some of it before.
        before: What it has recorded of that, by agent and place.
    """

    is_continued: bool
    here: Counter[str] = field(default_factory=Counter)
    before: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(slots=True, eq=False, kw_only=True)
class _Place:
    """One execution of a node, or of a whole run.

    Attributes:
        text: The run and the position, as they begin an interaction's id.
        attempt: Which execution there, counted by this recorder.
        overall: The same, with those counted that were recorded before.
    """

    text: str
    agent_id: str
    attempt: int
    counts: _Counts
    overall: int | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class _Frame:
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
    place: _Place
    owner: str
    behind: str | None = None
    agent: str | None = None
    tools: int = 0
    handed_to: set[str] = field(default_factory=set)
    arrivals: list["_HandOff"] = field(default_factory=list)
    told_here: list[Fact] = field(default_factory=list)
    is_local: bool = False
    is_asking: bool = False
    is_hidden: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class _HandOff:
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
class _Run:
    """One invocation of a graph, from its root event to its end."""

    root: UUID
    source: Source
    calls: set[UUID] = field(default_factory=set)
    handing: list[_HandOff] = field(default_factory=list)
    waits: str | None = None


@dataclass(slots=True, eq=False)
class _Call:
    """What a callback's run id stands for.

    Attributes:
        actor: The agent that acts in it.
        named: The `agent_id` in its metadata: what is inside of it has it too.
        tool: Of a tool's call: its name, number and the agent behind it.
    """

    run: _Run
    frame: _Frame
    actor: str
    named: str | None
    tool: tuple[str, int, str | None] | None = None


class InteractionRecorder(GraphCallbackHandler):
    """Records a run in the agent's own event store: `workflow.with_config(callbacks=[recorder])`.

    Recorded are a run's begin and end (`run_begin`, `run_end`), what each node wrote, or that it
    failed or asked a human (`node`, `node_failed`, `asked`), calls of tools (`tool_call`,
    `tool_result`), what goes to and comes from another agent (`message`, `reply`), and hand-offs
    between agents (`handoff`). Another agent stands behind a node or tool whose metadata has an
    `agent_id`, or that `peers` names. Inside of a team's agent, that agent acts.

    Events are stored by a thread of the recorder's own. The end of a run waits for it, 2 seconds at
    most, and so does its loop.

    The id of an interaction is made of the run, the position in it, the attempt and the kind. A
    hand-off is remembered by both agents; a message by the one behind a node only if it is seen
    acting in this process.

    Args:
        agent_id: The agent whose workflow it is.
        store: Where to; it is borrowed. By default the environment's.
        redact: Takes each payload, and returns what of it may be stored. If it raises, nothing is.
        max_payload_bytes: A payload whose JSON is longer is cut; at least 256.
        peers: The agents that stand behind tools or nodes, by the names of these.
        raise_errors: Whether what cannot be stored fails the run. Each node then waits for the
            store.
        batch_seconds: How long an event may wait for others to be stored with it.
        max_queued: So many events wait at most, while they come faster than they are stored. Then
            the oldest of nodes are dropped: see `counters`.
        max_queued_bytes: So many bytes of them.

    Attributes:
        counters: How many events were `stored`, `dropped` for want of room, or `unstorable`, and
            how many `failed_writes` there were.

    Raises:
        ProtocolError: If `agent_id` or the id of a peer is illegal.
        ConfigurationError: If a limit is too small.
    """

    # LangChain would run it in another thread, after the node.
    run_inline = True

    def __init__(
        self,
        agent_id: str,
        *,
        store: EventStore | None = None,
        redact: Redact | None = None,
        max_payload_bytes: int = 16_384,
        peers: Mapping[str, str] | None = None,
        raise_errors: bool = False,
        batch_seconds: float = 0.05,
        max_queued: int = 10_000,
        max_queued_bytes: int = 16 * 2**20,
    ) -> None:
        self.agent_id: str = check_id(agent_id, "agent_id")
        self.counters: Counter[str] = Counter()
        self.raise_error = raise_errors
        self._peers = {name: check_id(who, "peers") for name, who in (peers or {}).items()}
        self._given_store = store
        self._own_store: tuple[int, EventStore] | None = None
        self._rules = PayloadRules(redact, max_payload_bytes)
        # More than is stored: what the hook takes out makes room for what follows it.
        self._copied_bytes = 2 * max_payload_bytes
        self._writer = RecordWriter(
            self._store,
            self._rendered,
            counters=self.counters,
            batch_seconds=_positive(batch_seconds, "batch_seconds"),
            max_facts=int(_positive(max_queued, "max_queued")),
            max_bytes=int(_positive(max_queued_bytes, "max_queued_bytes")),
        )
        self.begin_anew()
        _RECORDERS.add(self)

    def begin_anew(self) -> None:
        """Forget the runs that are under way, as a forked child must: they are its parent's."""
        self._lock = threading.Lock()
        self._positions = Positions()
        self._calls: dict[UUID, _Call] = {}
        self._frames: dict[str, _Frame] = {}
        self._counts: OrderedDict[str, _Counts] = OrderedDict()
        self._abandoned: OrderedDict[UUID | None, None] = OrderedDict()

    def flush(self, timeout_seconds: float = END_DEADLINE_SECONDS) -> bool:
        """Wait until everything that happened is stored; return whether it is.

        Args:
            timeout_seconds: The longest wait. It is over as soon as the store has failed.
        """
        return self._writer.flush(timeout_seconds)

    def close(self) -> None:
        """Store what is left and end the thread; safe to call twice.

        What happens afterwards is recorded, too, and starts it again.
        """
        self._writer.close()

    # Graphs and nodes

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Mapping[str, Any] | Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`."""
        del serialized
        given = metadata or {}
        around = self._calls.get(parent_run_id) if parent_run_id else None
        if around is None:
            if parent_run_id in self._abandoned:
                self._abandon([run_id])
            else:
                self._run_began(run_id, given, inputs)
            return
        execution = self._positions.began(run_id, given)
        if execution is not None:
            self._node_began(run_id, around, given, execution, inputs)
        else:
            call = self._inside(run_id, around, given)
            if _is_graph_in_node(given):
                self._graph_began(call, given, str(kwargs.get("name")))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`.

        Raises:
            StoreError: If errors are raised, and the store failed.
        """
        del kwargs
        call, is_node = self._ended(run_id)
        if call is None:
            return
        if call.run.root == run_id:
            how = "returned" if call.run.waits is None else "waiting"
            self._run_ended(call, {"ended": how, "why": call.run.waits})
        elif is_node:
            self._node_ended(call, outputs)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`.

        Raises:
            StoreError: If errors are raised, and the store failed.
        """
        del kwargs
        call, is_node = self._ended(run_id)
        if call is None:
            return
        if call.run.root == run_id:
            self._run_ended(call, {"ended": _how(error), "error": _told(error)})
            return
        self._abandon([run_id])  # its thread may go on
        if is_node:
            self._node_stopped(call, error)

    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """Take note that a graph waits for a human; see `GraphCallbackHandler`."""
        call = self._calls.get(event.run_id) if event.run_id else None
        if call is not None and call.run.root == event.run_id:
            call.run.waits = event.status

    # Tools

    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`."""
        around = self._calls.get(parent_run_id) if parent_run_id else None
        if around is None:
            return
        given, frame = metadata or {}, around.frame
        name = str((serialized or {}).get("name") or kwargs.get("name"))
        behind = self._peers.get(name) or _own_agent(given, around.named)
        call = self._inside(run_id, around, given)
        with self._lock:
            frame.tools += 1
            number = frame.tools
        call.tool = name, number, behind
        told = {
            "tool": name,
            "tool_call_id": kwargs.get("tool_call_id"),
            "input": input_str if inputs is None else inputs,
        }
        self._put(call, "tool_call", told, call.actor, receiver=behind, number=number)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del kwargs
        call = self._left(run_id)
        if call is None or call.tool is None:
            return
        self._tool_ended(call, {"output": _written(output)})
        for command in _commands(output):
            if command.graph == Command.PARENT:
                self._hand_off(call, command, by=call.tool[0])

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del kwargs
        call = self._left(run_id)
        if call is not None and call.tool is not None and not isinstance(error, GraphBubbleUp):
            self._tool_ended(call, {"error": _told(error)})

    def _tool_ended(self, call: _Call, told: dict[str, Any]) -> None:
        assert call.tool is not None  # noqa: S101 - asked before
        name, number, behind = call.tool
        told = {"tool": name, **told}
        self._put(call, "tool_result", told, call.actor, sender=behind, number=number)

    # What may have graphs or tools inside of it, and is not recorded itself

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`."""
        del serialized, messages
        self._passing(run_id, parent_run_id, kwargs)

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`."""
        del serialized, prompts
        self._passing(run_id, parent_run_id, kwargs)

    def on_retriever_start(
        self,
        serialized: dict[str, Any],
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """See `BaseCallbackHandler`."""
        del serialized, query
        self._passing(run_id, parent_run_id, kwargs)

    def on_llm_end(self, response: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del response, kwargs
        self._left(run_id)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del error, kwargs
        self._left(run_id)

    def on_retriever_end(self, documents: Sequence[Any], *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del documents, kwargs
        self._left(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del error, kwargs
        self._left(run_id)

    # Where we are

    def _run_began(self, root: UUID, given: Mapping[str, Any], inputs: Any) -> None:
        owned = given.get("run_id")
        run_id = _record_id(str(owned or root))
        source = Source(run_id, _record_id(str(given.get("thread_id") or run_id)))
        run = _Run(root, source)
        counts = self._counts_of(run_id, is_continued=owned is not None)
        frame = _Frame(
            namespace="",
            node="",
            position="",
            place=self._place(source, "", self.agent_id, counts),
            owner=self.agent_id,
        )
        self._positions.began(root, given)  # where it is called from inside of a node
        self._calls[root] = call = _Call(run, frame, self.agent_id, given.get("agent_id"))
        run.calls.add(root)
        self._put(call, "run_begin", {"input": _written(inputs)}, self.agent_id)

    def _counts_of(self, run_id: str, *, is_continued: bool) -> _Counts:
        with self._lock:
            counts = self._counts.setdefault(run_id, _Counts(is_continued))
            self._counts.move_to_end(run_id)
            while len(self._counts) > REMEMBERED_RUNS:
                self._counts.popitem(last=False)
            return counts

    def _place(self, source: Source, position: str, agent_id: str, counts: _Counts) -> _Place:
        with self._lock:
            counts.here[position] += 1
            attempt = counts.here[position]
        text = _shortened(f"{source.run_id}:{position}", LONGEST_PLACE)
        return _Place(text=text, agent_id=agent_id, attempt=attempt, counts=counts)

    def _inside(self, run_id: UUID, around: _Call, given: Mapping[str, Any]) -> _Call:
        named = given.get("agent_id", around.named)
        call = _Call(around.run, around.frame, around.actor, named)
        self._calls[run_id] = call
        call.run.calls.add(run_id)
        return call

    def _passing(self, run_id: UUID, parent_run_id: UUID | None, kwargs: Mapping[str, Any]) -> None:
        around = self._calls.get(parent_run_id) if parent_run_id else None
        if around is not None:
            self._inside(run_id, around, kwargs.get("metadata") or {})

    def _left(self, run_id: UUID) -> _Call | None:
        call = self._calls.pop(run_id, None)
        if call is not None:
            call.run.calls.discard(run_id)
        return call

    def _ended(self, run_id: UUID) -> tuple[_Call | None, bool]:
        """Return what has ended, and whether it is a node."""
        call = self._left(run_id)
        namespace = self._positions.ended(run_id)
        if namespace is None or call is None or call.run.root == run_id:
            return call, False
        self._frames.pop(namespace, None)
        for handing in call.frame.arrivals:  # no other agent acted in it
            self._put_hand_off(handing, call.frame.owner)
        return call, not call.frame.is_hidden

    def _run_ended(self, call: _Call, told: dict[str, Any]) -> None:
        run = call.run
        for handing in run.handing:  # to nodes that did not begin any more
            if handing.is_named:
                self._put_hand_off(handing, self._agent_at(handing.node))
        self._abandon(list(run.calls))
        for left in list(run.calls):
            self._left(left)
            if (namespace := self._positions.ended(left)) is not None:
                self._frames.pop(namespace, None)
        self._put(call, "run_end", told, self.agent_id)
        if not self._writer.flush(END_DEADLINE_SECONDS) and self.raise_error:
            self._writer.raise_fault()

    def _abandon(self, calls: Sequence[UUID]) -> None:
        """Take note of what goes on although its run has ended: it begins no run of its own."""
        with self._lock:
            self._abandoned.update(dict.fromkeys(calls))
            while len(self._abandoned) > REMEMBERED_CALLS:
                self._abandoned.popitem(last=False)

    # Nodes

    def _node_began(
        self,
        run_id: UUID,
        around: _Call,
        given: Mapping[str, Any],
        execution: Execution,
        inputs: Any,
    ) -> None:
        call = self._inside(run_id, around, given)
        namespace, node = str(given["langgraph_checkpoint_ns"]), execution.node
        behind = self._peers.get(node) or _own_agent(given, around.named)
        position = self._position(namespace, execution)
        if around.frame.position and _graph_of(namespace) != around.frame.namespace:
            # A graph with a thread of its own, called by a node, begins at the root again.
            position = f"{around.frame.position}/{position}"
        counts = around.frame.place.counts
        frame = _Frame(
            namespace=namespace,
            node=node,
            position=position,
            place=self._place(call.run.source, position, call.actor, counts),
            owner=call.actor,
            behind=behind if behind != call.actor else None,
            is_hidden=node.startswith("__"),
        )
        call.frame = self._frames[namespace] = frame
        if frame.behind is not None:
            told = {"sent": _written(inputs)}
            fact = self._put(call, "message", told, frame.owner, receiver=frame.behind)
            frame.told_here.append(fact)
            call.actor = frame.behind
        if call.run.handing:
            self._arrived(call)

    def _position(self, namespace: str, execution: Execution) -> str:
        try:
            return self._positions.position(namespace)
        except ConfigurationError:  # inside of nodes that were not seen to begin
            return f"?/{execution.place}"

    def _graph_began(self, call: _Call, given: Mapping[str, Any], name: str) -> None:
        """Take note of a graph inside of a node: it may be a team's agent."""
        frame = call.frame
        if frame.behind is not None:
            self._told_locally(frame)
            return
        agent = given.get("lc_agent_name")
        node = str(given["langgraph_node"])
        # Teams name the nodes after the agents in them.
        if agent is None and name == node and name != _UNNAMED:
            agent = node
        if agent is None:
            return
        call.actor = frame.agent = legal_agent_id(str(agent))
        for handing in frame.arrivals:
            self._put_hand_off(handing, call.actor)
        frame.arrivals.clear()

    def _told_locally(self, frame: _Frame) -> None:
        """Let the agent behind a node remember, too: it acts in this process."""
        frame.is_local = True
        for fact in frame.told_here:
            self._writer.put(fact, [str(frame.behind)])
        frame.told_here.clear()

    def _node_ended(self, call: _Call, outputs: Any) -> None:
        self._wrote(call, outputs)
        for command in _commands(outputs):
            self._hand_off(call, command)
        self._see_it_stored()

    def _node_stopped(self, call: _Call, error: BaseException) -> None:
        frame = call.frame
        around = self._around(frame)
        if isinstance(error, ParentCommand):
            command = error.args[0]
            self._wrote(call, command)
            self._hand_off(call, command)
            if around is not None:
                around.handed_to |= frame.handed_to
        elif isinstance(error, GraphInterrupt):
            if not frame.is_asking:
                questions = [getattr(asked, "value", asked) for asked in _interrupts(error)]
                self._put(call, "asked", {"questions": questions}, frame.owner)
            if around is not None:
                around.is_asking = True
        elif not isinstance(error, GraphBubbleUp):
            self._put(call, "node_failed", {"error": _told(error)}, frame.owner)
        self._see_it_stored()

    def _wrote(self, call: _Call, outputs: Any) -> None:
        frame, wrote = call.frame, _written(outputs)
        self._put(call, "node", {"wrote": wrote}, frame.owner)
        if frame.behind is not None:
            fact = self._put(call, "reply", {"received": wrote}, frame.owner, sender=frame.behind)
            if frame.is_local:
                self._writer.put(fact, [frame.behind])

    def _see_it_stored(self) -> None:
        if self.raise_error and not self._writer.flush(END_DEADLINE_SECONDS):
            self._writer.raise_fault()

    def _around(self, frame: _Frame) -> _Frame | None:
        """Return the node whose graph this node is in."""
        return self._frames.get(_graph_of(frame.namespace))

    # Hand-offs

    def _hand_off(self, call: _Call, command: Command[Any], *, by: str | None = None) -> None:
        """Take note of where a node or a tool hands over to, once."""
        frame = call.frame
        from_agent = call.actor if by else frame.agent or call.actor
        namespace = _graph_of(frame.namespace)
        if command.graph == Command.PARENT:
            namespace = _graph_of(namespace)
        for node in _targets(command):
            with self._lock:
                is_known = node in frame.handed_to
                frame.handed_to.add(node)
                number = len(frame.handed_to)
            if is_known:
                continue
            told = {"to_node": node, "by_tool": by, "update": _written(command.update)}
            fact = self._fact(call, "handoff", told, (from_agent, from_agent), number)
            handing = _HandOff(fact=fact, namespace=namespace, node=node, is_named=by is not None)
            with self._lock:
                call.run.handing.append(handing)

    def _arrived(self, call: _Call) -> None:
        """See who was handed over to, now that the node begins."""
        frame, run = call.frame, call.run
        where = _graph_of(frame.namespace)
        with self._lock:  # a node may begin several times at once
            here = [h for h in run.handing if h.node == frame.node and h.namespace == where]
            run.handing = [h for h in run.handing if h not in here]
        for handing in here:
            if frame.behind is not None:
                # Whether it acts in this process, and remembers it, is not known yet.
                if self._put_hand_off(handing, frame.behind, is_local=False):
                    frame.told_here.append(handing.fact)
            elif handing.is_named:
                self._put_hand_off(handing, self._agent_at(frame.node))
            else:
                frame.arrivals.append(handing)

    def _agent_at(self, node: str) -> str:
        return self._peers.get(node) or legal_agent_id(node)

    def _put_hand_off(self, handing: _HandOff, to_agent: str, *, is_local: bool = True) -> bool:
        fact = handing.fact
        if fact.from_agent == to_agent:
            return False
        fact.to_agent = to_agent
        self._writer.put(fact, [fact.from_agent, to_agent] if is_local else [fact.from_agent])
        return True

    # Facts

    def _put(
        self,
        call: _Call,
        kind: str,
        told: Mapping[str, Any],
        keeper: str,
        *,
        sender: str | None = None,
        receiver: str | None = None,
        number: int = 0,
    ) -> Fact:
        """Have an agent remember something; who is not named is that agent itself."""
        parties = sender or keeper, receiver or keeper
        fact = self._fact(call, kind, told, parties, number)
        self._writer.put(fact, [keeper])
        return fact

    def _fact(
        self,
        call: _Call,
        kind: str,
        told: Mapping[str, Any],
        parties: tuple[str, str],
        number: int,
    ) -> Fact:
        frame = call.frame
        copy = Snapshot(self._copied_bytes)
        payload = {"node": frame.node, "position": frame.position} if frame.position else {}
        payload.update(copy.of({key: value for key, value in told.items() if value is not None}))
        return Fact(
            source=call.run.source,
            place=frame.place,
            kind=kind,
            number=number,
            from_agent=parties[0],
            to_agent=parties[1],
            payload=payload,
            is_whole=copy.is_whole,
            size_bytes=copy.size_bytes,
            may_be_dropped=kind == "node",
        )

    # In the writer's thread

    def _store(self) -> EventStore:
        if self._given_store is not None:
            return self._given_store
        if self._own_store is None or self._own_store[0] != os.getpid():
            self._own_store = os.getpid(), get_event_store()
        return self._own_store[1]

    def _rendered(self, store: EventStore, fact: Fact) -> Interaction:
        place: _Place = fact.place
        if place.overall is None:
            place.overall = place.attempt + self._recorded_before(store, fact.source, place)
        kind = f"{fact.kind}.{fact.number}" if fact.number else fact.kind
        payload = {**opened(fact.payload), "attempt": place.overall}
        # Unchecked, for a third of the time: every part of it was made legal where it came from.
        return Interaction.model_construct(
            interaction_id=f"{place.text}:{place.overall}:{kind}",
            thread_id=fact.source.thread_id,
            from_agent=fact.from_agent,
            to_agent=fact.to_agent,
            kind=fact.kind,
            payload=self._rules.stored(payload, is_whole=fact.is_whole),
            occurred_at=fact.occurred_at,
            run_id=fact.source.run_id,
        )

    def _recorded_before(self, store: EventStore, source: Source, place: _Place) -> int:
        """Return how many attempts at a place an earlier process has recorded."""
        counts, agent_id = place.counts, place.agent_id
        if not counts.is_continued:
            return 0
        if agent_id not in counts.before:
            found: dict[str, int] = {}
            events = store.interactions_of(agent_id, thread_id=source.thread_id, limit=LOOKED_BACK)
            for event in events:
                where, _, rest = event.interaction_id.rpartition(":")[0].rpartition(":")
                if event.run_id == source.run_id and rest.isdecimal():
                    found[where] = max(found.get(where, 0), int(rest))
            counts.before[agent_id] = found
        return counts.before[agent_id].get(place.text, 0)


@lru_cache(maxsize=1_000)
def legal_agent_id(name: str) -> str:
    """Return a name as a legal agent id, the same for the same name.

    Spaces become underscores, as teams do it in the names of their hand-off tools. Where more is
    lost than that, a part of the name's hash tells it from others.
    """
    if is_legal_id(name):
        return name
    spaced = re.sub(r"\s+", "_", name.strip())
    if is_legal_id(spaced):
        return spaced
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = _ILLEGAL.sub("_", spaced).lstrip("_-")[: LONGEST_AGENT_ID - len(mark) - 1] or "agent"
    return f"{kept}-{mark}"


def _positive(number: float, name: str) -> float:
    if not number > 0:
        raise ConfigurationError(f"{name}={number}: it must be more than 0")
    return number


def _shortened(text: str, longest: int) -> str:
    """Return a text, with the middle of a long one hashed."""
    if len(text) <= longest:
        return text
    middle = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = (longest - len(middle) - 2) // 2
    return f"{text[:kept]}~{middle}~{text[-kept:]}"


def _record_id(text: str) -> str:
    return _shortened(_CONTROL.sub("_", plain_text(text)), RECORD_ID_LIMIT)


def _is_graph_in_node(given: Mapping[str, Any]) -> bool:
    """Tell whether what begins is a graph that a node calls: it begins at the node's namespace."""
    namespace = given.get("langgraph_checkpoint_ns")
    return bool(namespace) and given.get("checkpoint_ns") == namespace


def _own_agent(given: Mapping[str, Any], inherited: str | None) -> str | None:
    named = given.get("agent_id")
    return None if named is None or named == inherited else legal_agent_id(str(named))


def _graph_of(namespace: str) -> str:
    """Return the namespace of the graph that a node is in: of the node that it is called from."""
    parts = namespace.split("|")[:-1]
    while parts and ":" not in parts[-1]:  # the number of a graph that one node calls repeatedly
        parts.pop()
    return "|".join(parts)


def _commands(outputs: Any) -> Iterator[Command[Any]]:
    for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
        if isinstance(output, Command):
            yield output


def _targets(command: Command[Any]) -> Iterator[str]:
    for target in command.goto if isinstance(command.goto, list | tuple) else [command.goto]:
        node = target.node if isinstance(target, Send) else target
        if isinstance(node, str) and not node.startswith("__"):
            yield node


def _written(value: Any) -> Any:
    """Return what a node or tool gave, with LangGraph's commands as mappings."""
    if isinstance(value, Command):
        parts = {name: getattr(value, name) for name in ("update", "resume", "goto")}
        return {name: _written(v) for name, v in parts.items() if v is not None and v != ()}
    if isinstance(value, Send):
        return {"node": value.node, "arg": value.arg}
    if isinstance(value, list | tuple) and any(isinstance(v, Command | Send) for v in value):
        return [_written(v) for v in value]
    return value


def _interrupts(error: GraphInterrupt) -> Sequence[Any]:
    found = error.args[0] if error.args else ()
    return found if isinstance(found, list | tuple) else [found]


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:TEXT]
    except Exception:  # noqa: BLE001 - anybody's error may do anything when it is looked at
        return type(error).__name__


def _how(error: BaseException) -> str:
    """Say how a run ended that did not return."""
    if isinstance(error, GraphInterrupt):
        return "waiting"
    if isinstance(error, GraphBubbleUp):
        return "handed_over"
    return "raised" if isinstance(error, Exception) else "cancelled"


_RECORDERS: "weakref.WeakSet[InteractionRecorder]" = weakref.WeakSet()


def _begin_anew_in_a_forked_child() -> None:
    for recorder in list(_RECORDERS):
        recorder.begin_anew()


os.register_at_fork(after_in_child=_begin_anew_in_a_forked_child)
