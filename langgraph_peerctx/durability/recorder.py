"""What happens in a run, seen by its callbacks and recorded in the agent's own event store.

Node events are evidence of work, not of commit: the checkpoint decides. What callbacks do not see
is not recorded: nodes answered from a cache, and `update_state`.
"""

import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from langgraph.types import Command

from langgraph_peerctx.durability.callback_values import (
    commands_in,
    graph_of,
    how_it_ended,
    interrupts_in,
    is_graph_in_node,
    own_agent,
    targets_of,
    told_of,
    written,
)
from langgraph_peerctx.durability.positions import Execution, Positions
from langgraph_peerctx.durability.record_writer import Fact, RecordWriter, Source
from langgraph_peerctx.durability.recorded_ids import legal_agent_id, record_id, shortened
from langgraph_peerctx.durability.recorded_payload import PayloadRules, Redact
from langgraph_peerctx.durability.recorded_run import (
    Call,
    Counts,
    Frame,
    HandOff,
    Place,
    RecordedRun,
)
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import check_id
from langgraph_peerctx.persistence.event_store import EventStore, get_event_store
from langgraph_peerctx.protocol.looking import Snapshot, opened
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

_UNNAMED = "LangGraph"
"""What LangGraph calls a graph that nobody gave a name."""


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
        self._calls: dict[UUID, Call] = {}
        self._frames: dict[str, Frame] = {}
        self._counts: OrderedDict[str, Counts] = OrderedDict()
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
        execution = self._positions.began(run_id, given, parent_run_id)
        if execution is not None:
            self._node_began(run_id, around, given, execution, inputs)
        else:
            call = self._inside(run_id, around, given)
            if is_graph_in_node(given):
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
        call, is_node = self._ended(run_id, has_failed=True)
        if call is None:
            return
        if call.run.root == run_id:
            self._run_ended(call, {"ended": how_it_ended(error), "error": told_of(error)})
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
        behind = self._peers.get(name) or own_agent(given, around.named)
        call = self._inside(run_id, around, given)
        self._positions.passing(run_id, parent_run_id)
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
        self._tool_ended(call, {"output": written(output)})
        for command in commands_in(output):
            if command.graph == Command.PARENT:
                self._hand_off(call, command, by=call.tool[0])

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """See `BaseCallbackHandler`."""
        del kwargs
        call = self._left(run_id)
        if call is not None and call.tool is not None and not isinstance(error, GraphBubbleUp):
            self._tool_ended(call, {"error": told_of(error)})

    def _tool_ended(self, call: Call, told: dict[str, Any]) -> None:
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
        run_id = record_id(str(owned or root))
        source = Source(run_id, record_id(str(given.get("thread_id") or run_id)))
        run = RecordedRun(root, source)
        counts = self._counts_of(run_id, is_continued=owned is not None)
        frame = Frame(
            namespace="",
            node="",
            position="",
            place=self._place(source, "", self.agent_id, counts),
            owner=self.agent_id,
        )
        self._positions.began(root, given)  # where it is called from inside of a node
        self._calls[root] = call = Call(run, frame, self.agent_id, given.get("agent_id"))
        run.calls.add(root)
        self._put(call, "run_begin", {"input": written(inputs)}, self.agent_id)

    def _counts_of(self, run_id: str, *, is_continued: bool) -> Counts:
        with self._lock:
            counts = self._counts.setdefault(run_id, Counts(is_continued))
            self._counts.move_to_end(run_id)
            while len(self._counts) > REMEMBERED_RUNS:
                self._counts.popitem(last=False)
            return counts

    def _place(self, source: Source, position: str, agent_id: str, counts: Counts) -> Place:
        with self._lock:
            counts.here[position] += 1
            attempt = counts.here[position]
        text = shortened(f"{source.run_id}:{position}", LONGEST_PLACE)
        return Place(text=text, agent_id=agent_id, attempt=attempt, counts=counts)

    def _inside(self, run_id: UUID, around: Call, given: Mapping[str, Any]) -> Call:
        named = given.get("agent_id", around.named)
        call = Call(around.run, around.frame, around.actor, named)
        self._calls[run_id] = call
        call.run.calls.add(run_id)
        return call

    def _passing(self, run_id: UUID, parent_run_id: UUID | None, kwargs: Mapping[str, Any]) -> None:
        around = self._calls.get(parent_run_id) if parent_run_id else None
        if around is not None:
            self._inside(run_id, around, kwargs.get("metadata") or {})
            self._positions.passing(run_id, parent_run_id)

    def _left(self, run_id: UUID) -> Call | None:
        self._positions.ended(run_id)
        call = self._calls.pop(run_id, None)
        if call is not None:
            call.run.calls.discard(run_id)
        return call

    def _ended(self, run_id: UUID, *, has_failed: bool = False) -> tuple[Call | None, bool]:
        """Return what has ended, and whether it is a node."""
        namespace = self._positions.ended(run_id, has_failed=has_failed)
        call = self._left(run_id)
        if namespace is None or call is None or call.run.root == run_id:
            return call, False
        self._frames.pop(namespace, None)
        for handing in call.frame.arrivals:  # no other agent acted in it
            self._put_hand_off(handing, call.frame.owner)
        return call, not call.frame.is_hidden

    def _run_ended(self, call: Call, told: dict[str, Any]) -> None:
        run = call.run
        for handing in run.handing:  # to nodes that did not begin any more
            if handing.is_named:
                self._put_hand_off(handing, self._agent_at(handing.node))
        self._abandon(list(run.calls))
        for left in list(run.calls):
            if (namespace := self._positions.ended(left)) is not None:
                self._frames.pop(namespace, None)
            self._left(left)
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
        around: Call,
        given: Mapping[str, Any],
        execution: Execution,
        inputs: Any,
    ) -> None:
        call = self._inside(run_id, around, given)
        namespace, node = str(given["langgraph_checkpoint_ns"]), execution.node
        behind = self._peers.get(node) or own_agent(given, around.named)
        position = execution.position or f"?/{execution.place}"  # in nodes not seen to begin
        if around.frame.position and graph_of(namespace) != around.frame.namespace:
            # A graph with a thread of its own, called by a node, begins at the root again.
            position = f"{around.frame.position}/{position}"
        counts = around.frame.place.counts
        frame = Frame(
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
            told = {"sent": written(inputs)}
            fact = self._put(call, "message", told, frame.owner, receiver=frame.behind)
            frame.told_here.append(fact)
            call.actor = frame.behind
        if call.run.handing:
            self._arrived(call)

    def _graph_began(self, call: Call, given: Mapping[str, Any], name: str) -> None:
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

    def _told_locally(self, frame: Frame) -> None:
        """Let the agent behind a node remember, too: it acts in this process."""
        frame.is_local = True
        for fact in frame.told_here:
            self._writer.put(fact, [str(frame.behind)])
        frame.told_here.clear()

    def _node_ended(self, call: Call, outputs: Any) -> None:
        self._wrote(call, outputs)
        for command in commands_in(outputs):
            self._hand_off(call, command)
        self._see_it_stored()

    def _node_stopped(self, call: Call, error: BaseException) -> None:
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
                questions = [getattr(asked, "value", asked) for asked in interrupts_in(error)]
                self._put(call, "asked", {"questions": questions}, frame.owner)
            if around is not None:
                around.is_asking = True
        elif not isinstance(error, GraphBubbleUp):
            self._put(call, "node_failed", {"error": told_of(error)}, frame.owner)
        self._see_it_stored()

    def _wrote(self, call: Call, outputs: Any) -> None:
        frame, wrote = call.frame, written(outputs)
        self._put(call, "node", {"wrote": wrote}, frame.owner)
        if frame.behind is not None:
            fact = self._put(call, "reply", {"received": wrote}, frame.owner, sender=frame.behind)
            if frame.is_local:
                self._writer.put(fact, [frame.behind])

    def _see_it_stored(self) -> None:
        if self.raise_error and not self._writer.flush(END_DEADLINE_SECONDS):
            self._writer.raise_fault()

    def _around(self, frame: Frame) -> Frame | None:
        """Return the node whose graph this node is in."""
        return self._frames.get(graph_of(frame.namespace))

    # Hand-offs

    def _hand_off(self, call: Call, command: Command[Any], *, by: str | None = None) -> None:
        """Take note of where a node or a tool hands over to, once."""
        frame = call.frame
        from_agent = call.actor if by else frame.agent or call.actor
        namespace = graph_of(frame.namespace)
        if command.graph == Command.PARENT:
            namespace = graph_of(namespace)
        for node in targets_of(command):
            with self._lock:
                is_known = node in frame.handed_to
                frame.handed_to.add(node)
                number = len(frame.handed_to)
            if is_known:
                continue
            told = {"to_node": node, "by_tool": by, "update": written(command.update)}
            fact = self._fact(call, "handoff", told, (from_agent, from_agent), number)
            handing = HandOff(fact=fact, namespace=namespace, node=node, is_named=by is not None)
            with self._lock:
                call.run.handing.append(handing)

    def _arrived(self, call: Call) -> None:
        """See who was handed over to, now that the node begins."""
        frame, run = call.frame, call.run
        where = graph_of(frame.namespace)
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

    def _put_hand_off(self, handing: HandOff, to_agent: str, *, is_local: bool = True) -> bool:
        fact = handing.fact
        if fact.from_agent == to_agent:
            return False
        fact.to_agent = to_agent
        self._writer.put(fact, [fact.from_agent, to_agent] if is_local else [fact.from_agent])
        return True

    # Facts

    def _put(
        self,
        call: Call,
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
        call: Call,
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
        place: Place = fact.place
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

    def _recorded_before(self, store: EventStore, source: Source, place: Place) -> int:
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


def _positive(number: float, name: str) -> float:
    if not number > 0:
        raise ConfigurationError(f"{name}={number}: it must be more than 0")
    return number


_RECORDERS: "weakref.WeakSet[InteractionRecorder]" = weakref.WeakSet()


def _begin_anew_in_a_forked_child() -> None:
    for recorder in list(_RECORDERS):
        recorder.begin_anew()


os.register_at_fork(after_in_child=_begin_anew_in_a_forked_child)
