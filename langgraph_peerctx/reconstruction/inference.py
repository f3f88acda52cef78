"""What a language model may fill in where no evidence has a value; the last resort, and optional.

What peers tell is untrusted, and so is the model that has read it. No marking of the data keeps a
model from obeying what it reads, so nothing rests on that: the model has no tools, and of its
answer nothing is used but values of the gaps that are valid for the workflow's own schema.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.channels import LastValue

from langgraph_peerctx.durability.workflow import Workflow, state_keys
from langgraph_peerctx.nodes.state import EVIDENCE_RANKS, PeerContextState
from langgraph_peerctx.protocol.messages import Json
from langgraph_peerctx.reconstruction.gap_schema import GapSchema
from langgraph_peerctx.reconstruction.model_answer import UnreadableAnswerError, read_answer
from langgraph_peerctx.reconstruction.question import Question, ask, counter_of

InferenceStatus = Literal["off", "nothing_to_infer", "inferred", "failed"]

_OURS: Final = frozenset(PeerContextState.__annotations__)
"""State keys that hold what peers told: never a gap, and no part of the known state."""
_LONGEST_QUOTE: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """What a model inferred.

    Attributes:
        values: Gap -> value, valid for its type; a gap that could not be inferred is missing.
        provenance: One entry for each value, plain JSON; sorted as the values are.
        reasons: What is missing and why; each begins with `llm`, `llm_failed` or `llm_refused_gap`.
        status: `off` without a model; `failed` if it gave no answer that could be used.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    provenance: tuple[Json, ...] = ()
    reasons: tuple[str, ...] = ()
    status: InferenceStatus


class _ModelError(Exception):
    """The model raised something; the message is the name of its class."""


def gaps_of(
    workflow: Workflow, values: Mapping[str, Any], *, but: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the state keys that have no value and may be given one, sorted.

    A value that is None is a value. Only channels that keep their last value count: a reducer
    would mix what is inferred with what comes later. `peer_context` and its report are ours.
    """
    return tuple(
        sorted(
            key
            for key in state_keys(workflow) - values.keys() - _OURS - set(but)
            if type(workflow.channels.get(key)) is LastValue
        )
    )


async def infer(
    llm: BaseChatModel | None,
    workflow: Workflow,
    *,
    gaps: Collection[str],
    state: Mapping[str, Any],
    facts: Mapping[str, Json],
    allowed: Collection[str] | None = None,
    budget_tokens: int = 4_000,
    timeout_seconds: float = 30.0,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Inferred:
    """Ask a model for what no evidence has; never fails because of it, and changes no argument.

    Args:
        llm: Any chat model; without one, nothing is asked. No tools are bound to it.
        workflow: Whose state has the gaps.
        gaps: The state keys to fill. One that has a value, a reducer, or no type with a JSON form
            is refused; see `gaps_of`.
        state: The values as LangGraph restores them.
        facts: Event id -> fact, as in `Reconstruction.peer_context`.
        allowed: The keys that may be inferred at all; None for any.
        budget_tokens: The longest question, in tokens. A second one, asked after an answer that is
            not valid, is longer by at most what was wrong: about 1,000 characters.
        timeout_seconds: For both questions together.
        now: What time it is, for the provenance.
    """
    if llm is None:
        return Inferred(status="off")
    wanted, refused = _wanted(workflow, gaps, state, allowed)
    schema = GapSchema.of(workflow, wanted)
    refused += [
        f"llm_refused_gap: the type of {_quoted(key)} has no JSON form" for key in schema.refused
    ]
    if not schema.keys:
        return Inferred(status="nothing_to_infer", reasons=tuple(refused))
    findings = _Findings(schema=schema, state=state)
    question: Question | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            # In a thread: there may be much to look through, and a model may count slowly.
            question = await asyncio.to_thread(
                _question,
                workflow,
                schema,
                state=state,
                facts=facts,
                budget_tokens=budget_tokens,
                count=counter_of(llm),
            )
            if question is None:
                findings.failure = f"the task alone does not fit into {budget_tokens} tokens"
            else:
                await _question_twice(llm, question, findings)
    except TimeoutError:
        findings.failure = f"no valid answer within {timeout_seconds:g} seconds"
    except _ModelError as error:
        findings.failure = str(error)
    inferred_at = now()
    shown, unfit = (question.shown, question.reasons) if question else ((), ())
    return Inferred(
        values=findings.values,
        provenance=tuple(
            _origin(key, llm, shown=shown, inferred_at=inferred_at) for key in findings.values
        ),
        reasons=(*refused, *unfit, *findings.reasons()),
        status=findings.status,
    )


def _wanted(
    workflow: Workflow,
    gaps: Collection[str],
    state: Mapping[str, Any],
    allowed: Collection[str] | None,
) -> tuple[list[str], list[str]]:
    """Return the gaps that may be filled, and why the others may not."""
    real = gaps_of(workflow, state)
    wanted: list[str] = []
    refused: list[str] = []
    for key in sorted(set(gaps)):
        if key not in real:
            refused.append(f"llm_refused_gap: {_quoted(key)} is no state key that lacks a value")
        elif allowed is not None and key not in allowed:
            refused.append(f"llm_refused_gap: {_quoted(key)} may not be inferred")
        else:
            wanted.append(key)
    return wanted, refused


def _question(
    workflow: Workflow,
    schema: GapSchema,
    *,
    state: Mapping[str, Any],
    facts: Mapping[str, Json],
    budget_tokens: int,
    count: Callable[[str], int],
) -> Question | None:
    return ask(
        schema=schema.json_schema(),
        gaps=schema.keys,
        state={key: value for key, value in state.items() if key not in _OURS},
        facts=facts,
        nodes=[name for name in workflow.nodes if not name.startswith("__")],
        budget_tokens=budget_tokens,
        count=count,
    )


async def _question_twice(llm: BaseChatModel, question: Question, findings: "_Findings") -> None:
    findings.take(await _answer(llm, question))
    if faults := findings.faults():
        findings.take(await _answer(llm, question.repaired(faults)))


async def _answer(llm: BaseChatModel, question: Question) -> AIMessage:
    """Ask once.

    Raises:
        _ModelError: If the model raises anything; its message may hold secrets and is not kept.
    """
    messages = [SystemMessage(question.system), HumanMessage(question.human)]
    try:
        return await llm.ainvoke(messages)
    except Exception as error:  # noqa: BLE001 - anybody's client may raise anything
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # A client that turns a cancellation into an error of its own does not outlive it.
            raise asyncio.CancelledError from None
        raise _ModelError(type(error).__name__) from None


@dataclass(slots=True, kw_only=True)
class _Findings:
    """What the answers brought so far.

    A value that was valid in the first answer stands; the second fills in what is missing.
    """

    schema: GapSchema
    state: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    invalid: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    foreign: set[str] = field(default_factory=set)
    tool_calls: int = 0
    answered: bool = False

    @property
    def status(self) -> InferenceStatus:
        if self.values or (self.answered and not self.invalid and self.failure is None):
            return "inferred"
        return "failed"

    def take(self, message: AIMessage) -> None:
        """Keep what an answer says of the gaps, if it is valid."""
        self.tool_calls += len(message.tool_calls) + len(message.invalid_tool_calls)
        self.failure = None
        try:
            answer = read_answer(message.text)
        except UnreadableAnswerError as error:
            self.failure = str(error)
            return
        self.answered = True
        self.foreign.update(answer.keys() - set(self.schema.keys))
        news = {key: value for key, value in answer.items() if key not in self.values}
        valid, self.invalid = self.schema.validated(news, {**self.state, **self.values})
        self.values = dict(sorted((self.values | valid).items()))

    def faults(self) -> list[str]:
        """Return what the model is to do better."""
        if self.failure is not None:
            return [self.failure]
        return [f"{key}: {fault}" for key, fault in self.invalid.items()]

    def reasons(self) -> Iterable[str]:
        """Yield why something is missing."""
        if self.failure is not None:
            yield f"llm_failed: {self.failure}"
        for key, fault in self.invalid.items():
            yield f"llm_refused_gap: {_quoted(key)}: {_quoted(fault)}"
        if self.answered:
            for key in self.schema.keys:
                if key not in self.values and key not in self.invalid:
                    yield f"llm: {_quoted(key)} cannot be inferred from what is known"
        if self.foreign:
            names = _quoted(", ".join(sorted(self.foreign)))
            yield f"llm_refused_gap: dropped from the answer, for they are no gaps: {names}"
        if self.tool_calls:
            yield f"llm: {self.tool_calls} tool calls were asked for and none was made"


def _origin(key: str, llm: BaseChatModel, *, shown: tuple[str, ...], inferred_at: datetime) -> Json:
    return {
        "fact": f"state.{key}",
        "source": "inference",
        "rank": EVIDENCE_RANKS["inference"],
        "event_id": None,
        "occurred_at": inferred_at.isoformat(),
        "model": type(llm).__name__,
        "based_on": list(shown),
    }


def _quoted(text: str) -> str:
    return repr(text[:_LONGEST_QUOTE])
