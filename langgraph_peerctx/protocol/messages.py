"""The messages that travel on the topics: frozen, strict, flat JSON.

What a later release will need is here from the start: run, epoch, attempt and in-doubt keys. A
reader of version 1 refuses any other version rather than guess.
"""

from typing import Annotated, ClassVar, Final, Literal, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from langgraph_peerctx.identifiers import Identifier, RecordId, new_id

SCHEMA_VERSION: Final = 1
REQUEST_LIFETIME_SECONDS = 60.0
"""How long a request may be answered, by the broker's time; independent of the gather's window."""

MessageType = Literal["REQUEST_CONTEXT", "PROVIDE_CONTEXT", "HEARTBEAT", "AGENT_DIED"]
AgentStatus = Literal["context", "nothing", "declined", "busy"]
Verdict = Literal["seen", "not_seen", "cannot_tell"]

Json: TypeAlias = dict[str, JsonValue]
Count = Annotated[int, Field(ge=0, lt=2**63)]
ADDRESSEE_LIMIT = 1_000
WINDOW_LIMIT_SECONDS = 366 * 86_400.0
Window = Annotated[float, Field(gt=0, le=WINDOW_LIMIT_SECONDS, allow_inf_nan=False)]


class Frozen(BaseModel):
    """A value that crosses a process boundary."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, extra="forbid")


class Interaction(Frozen):
    """Something that passed between two agents, as one of them recorded it.

    `interaction_id` is the idempotency key: recorded twice by one agent, it counts once.
    `sequence` rises with each interaction that one store accepts; it is no gapless number.
    """

    interaction_id: RecordId
    thread_id: RecordId
    from_agent: Identifier
    to_agent: Identifier
    kind: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$")]
    payload: Json = Field(default_factory=dict)
    occurred_at: AwareDatetime
    sequence: Count | None = None
    effect_key: RecordId | None = None
    run_id: RecordId | None = None
    checkpoint_id: RecordId | None = None


class InDoubtKey(Frozen):
    """An effect of which the asker does not know whether it reached this peer.

    `peer_id` is the one agent that can settle it. `intent_at` is when the dead agent meant to act.
    """

    effect_key: RecordId
    peer_id: Identifier
    epoch: Count
    intent_at: AwareDatetime


class InDoubtAnswer(Frozen):
    """What the named peer says of one in-doubt key; `reply` is what it answered at the time."""

    effect_key: RecordId
    agent_id: Identifier
    verdict: Verdict
    reply: JsonValue = None


class Envelope(Frozen):
    """What every message carries."""

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    message_id: RecordId = Field(default_factory=new_id)
    sent_at: AwareDatetime


class ContextRequest(Envelope):
    """What do you remember of this agent in this thread?

    `message_id` is new at each sending, `correlation_id` stays: answers carry it.
    `addressees` are the processes or agents that are asked; without any, everybody is.
    `response_topic` is accepted because others send it, and never obeyed: the topic follows from
    `requester_id`.
    """

    message_type: Literal["REQUEST_CONTEXT"] = "REQUEST_CONTEXT"
    correlation_id: RecordId
    requester_id: Identifier
    failed_agent_id: Identifier
    thread_id: RecordId
    run_id: RecordId | None = None
    epoch: Count = 0
    attempt: Annotated[int, Field(ge=1, lt=2**31)] = 1
    time_window_seconds: Window
    max_interactions: Annotated[int, Field(ge=1, le=10_000)] = 200
    lifetime_seconds: Annotated[float, Field(gt=0, le=3_600)] = REQUEST_LIFETIME_SECONDS
    in_doubt: Annotated[tuple[InDoubtKey, ...], Field(max_length=1_000)] = ()
    addressees: Annotated[tuple[Identifier, ...], Field(max_length=ADDRESSEE_LIMIT)] = ()
    response_topic: str | None = None


class AgentAnswer(Frozen):
    """What one agent of the answering process remembers. Interactions are newest first."""

    agent_id: Identifier
    status: AgentStatus
    interactions: tuple[Interaction, ...] = ()
    memory_state: Json = Field(default_factory=dict)
    truncated: bool = False
    reason: Annotated[str, Field(max_length=500)] | None = None


class ContextResponse(Envelope):
    """One process's answer: each agent that it hosts, and each in-doubt key it was asked about."""

    message_type: Literal["PROVIDE_CONTEXT"] = "PROVIDE_CONTEXT"
    correlation_id: RecordId
    responder_id: Identifier
    incarnation: RecordId | None = None
    failed_agent_id: Identifier
    thread_id: RecordId
    run_id: RecordId | None = None
    epoch: Count = 0
    attempt: Annotated[int, Field(ge=1, lt=2**31)] = 1
    agents: Annotated[tuple[AgentAnswer, ...], Field(max_length=1_000)]
    in_doubt: Annotated[tuple[InDoubtAnswer, ...], Field(max_length=1_000)] = ()


class Heartbeat(Envelope):
    """One process is alive; `leaving` is its last word. Beats are ordered by `sequence`.

    `supervises` says that it recovers others, `sentinel_id` who would see it die.
    """

    message_type: Literal["HEARTBEAT"] = "HEARTBEAT"
    process_id: Identifier
    incarnation: RecordId
    sequence: Count
    agents: Annotated[tuple[Identifier, ...], Field(max_length=1_000)] = ()
    open_runs: Count = 0
    loop_lag_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    supervises: bool = False
    sentinel_id: Identifier | None = None
    leaving: bool = False


class DeathNotice(Envelope):
    """A process ended without leaving; `sequence` is the last beat that its sentinel knew of."""

    message_type: Literal["AGENT_DIED"] = "AGENT_DIED"
    process_id: Identifier
    incarnation: RecordId
    sentinel_id: Identifier
    sequence: Count = 0
    died_at: AwareDatetime


Message: TypeAlias = ContextRequest | ContextResponse | Heartbeat | DeathNotice
