"""What the commands call themselves where processes are named."""

from langgraph_peerctx.config import default_process_id
from langgraph_peerctx.identifiers import new_id

LOOKER = "peerctx-agents-"
"""How the ids of `peerctx agents` begin: it beats to hear itself, and is nobody's agent."""
DOCTOR = "peerctx-doctor-"
"""How the ids of `peerctx doctor` begin, which says goodbye to hear whether it comes back."""
_LONGEST = 64


def looker_id() -> str:
    """Name a process of its own, whatever the agents of this environment are called."""
    return LOOKER + default_process_id()[-(_LONGEST - len(LOOKER)) :]


def doctor_id() -> str:
    """Name somebody who is not there."""
    return f"{DOCTOR}{new_id()}"[:_LONGEST]


def is_a_command(process_id: str) -> bool:
    """Tell whether it is one of ours that only looks."""
    return process_id.startswith((LOOKER, DOCTOR))
