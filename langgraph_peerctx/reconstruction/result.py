"""What a recovery tells its caller."""

from typing import Any, TypedDict

from langgraph_peerctx.reconstruction.incident import IncidentRecord
from langgraph_peerctx.reconstruction.resume import RecoveryStatus


class RecoveryResult(TypedDict):
    """How a recovery ended.

    Attributes:
        recovered: Whether the workflow was run and did not fail.
        status: `resumed` and `restarted` (from `initial_state`) ended; `already_finished`,
            `nothing_to_recover` and `needs_context` were not run; `waiting_for_human` is it now,
            whether it was run (`recovered`) or not; `not_approved` was not run because a human
            said no; `in_doubt` waits until somebody tells whether an effect has happened;
            `failed` raised again. Nothing was run where it is `unreachable` (its process
            holds its lease), `recovering_elsewhere`, `recovered_elsewhere` or a `dead_letter`.
        peer_context_used: Whether what peers know has reached the workflow's state.
        degraded: Whether the recovery had to do without something that it should have had.
        reasons: What that was, and why the status is what it is; each begins with a word and a
            colon, as `no_channel: ...`.
        final_state: What the workflow returns, as it stands now.
        incident: The record of this recovery, plain JSON.
    """

    recovered: bool
    status: RecoveryStatus
    peer_context_used: bool
    degraded: bool
    reasons: list[str]
    final_state: Any
    incident: IncidentRecord
