"""Every error that the package raises.

Each one says what was wrong and what to do about it. All of them can be pickled, so that they
cross a process boundary whole.

    PeerContextError
    ├── ConfigurationError            a setting or an argument is wrong
    ├── ProtocolError                 bytes or fields that are no valid message
    ├── BrokerUnavailableError        no broker, or it did not answer in time
    │   ├── RecordRefusedError        the broker is there, and refuses this record
    │   │   └── UnknownTopicError     its topic does not exist
    │   └── SendOutcomeUnknownError   gave up waiting: the record may still arrive
    ├── StoreError                    a database refused, or is not there
    │   ├── CheckpointerError         a fenced checkpointer, or the leases behind it, failed
    │   └── StoreBusyError            it is there, and did not answer in time: try again
    ├── SentinelRunningError          another sentinel serves this host and cluster already
    ├── TooFewResponsesError          fewer peers answered than the caller needs
    └── RecoveryError                 a workflow cannot be recovered
        ├── UnknownChannelError       an update names a channel that the workflow lacks
        ├── StaleOwnerError           another owner has taken this thread over
        ├── ThreadBusyError           another owner is at work, or an earlier run has not ended
        └── InDoubtError              nobody can tell whether an effect happened
"""

from typing import Literal

ProtocolFault = Literal[
    "empty",
    "too_large",
    "not_utf8",
    "not_json",
    "too_deep",
    "bad_number",
    "bad_text",
    "not_an_object",
    "version",
    "message_type",
    "field",
    "id",
]


class PeerContextError(Exception):
    """The root of the tree: catch it to catch everything that this package raises."""


class ConfigurationError(PeerContextError):
    """A setting or an argument is wrong; the message names it and says what is allowed."""


class ProtocolError(PeerContextError):
    """Bytes or fields that are no valid message.

    Attributes:
        fault: Why, as one of a closed set of words: what rejected records are counted by.
    """

    def __init__(self, fault: ProtocolFault, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault: ProtocolFault = fault
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.detail} ({self.fault})"


class BrokerUnavailableError(PeerContextError):
    """There is no broker, it refused us, or it did not answer before the deadline."""


class RecordRefusedError(BrokerUnavailableError):
    """The broker is there and refused one record: it is too large, or we may not write it."""


class UnknownTopicError(RecordRefusedError):
    """The broker is there and a topic is not; nothing was sent, and none is made by sending."""


class SendOutcomeUnknownError(BrokerUnavailableError):
    """The broker did not confirm a record in time; it may still be delivered later."""


class StoreError(PeerContextError):
    """A database refused, is damaged, or is not there."""


class StoreBusyError(StoreError):
    """A database is there and did not answer in time; nothing was written, try again."""


class SentinelRunningError(PeerContextError):
    """Another sentinel serves this host and cluster already: there is nothing to do."""


class CheckpointerError(StoreError):
    """What keeps a run's checkpoints, or its leases, failed: the run did not fail by itself."""


class TooFewResponsesError(PeerContextError):
    """Fewer peers answered within the window than the caller asked for.

    Attributes:
        answered: How many answered.
        needed: How many were needed.
    """

    def __init__(self, answered: int, needed: int) -> None:
        super().__init__(answered, needed)
        self.answered = answered
        self.needed = needed

    def __str__(self) -> str:
        return (
            f"{self.answered} of at least {self.needed} peers answered in time: "
            "wait longer (timeout_seconds), ask for fewer (min_responses), "
            "or see with `peerctx doctor` whether the broker is well"
        )


class RecoveryError(PeerContextError):
    """A workflow cannot be recovered as asked."""


class UnknownChannelError(RecoveryError):
    """An update names a channel that the workflow's schema lacks: LangGraph would drop it."""


class StaleOwnerError(RecoveryError):
    """Another owner has taken this thread over; this one may no longer write."""

    is_stale_write_owner_error = True


class ThreadBusyError(RecoveryError):
    """A thread has an owner that is at work, or a run that has not ended; nothing was begun."""


class InDoubtError(RecoveryError):
    """Nobody can tell whether an effect happened before the crash.

    Attributes:
        is_final: Whether the caller wants to fail then; otherwise the run is handed over, and goes
            on when its peer, or a human, has told.
    """

    def __init__(self, question: str, is_final: bool = False) -> None:  # noqa: FBT001, FBT002 - pickled by position
        super().__init__(question, is_final)
        self.question = question
        self.is_final = is_final

    def __str__(self) -> str:
        return self.question
