"""Answering a recovery that waits for a human."""

from functools import partial

from langgraph_peerctx import background
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.persistence.database import open_in_thread
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.reconstruction.human_answers import see_that_it_is_understood


def answer_recovery(
    incident_id: str, answer: object, *, settings: PeerContextSettings | None = None
) -> Incident:
    """Answer what an incident asks; the next supervisor that looks goes on with it.

    Args:
        incident_id: Whose question, or a beginning of its id that no other has.
        answer: Plain JSON; of a recovery that asks whether to resume, true or false.
        settings: By default those the process's runtime runs with, or the environment's.

    Returns:
        The incident, which is open again.

    Raises:
        ConfigurationError: If there is no such incident, it asks nothing, or the answer is none to
            what it asks.
        ProtocolError: If the answer is no plain JSON.
        StoreError: If the control database failed.
    """
    settings = settings or background.settings_in_use() or PeerContextSettings()
    with ControlDatabase(
        settings.control_url, timeout_seconds=settings.database_timeout_seconds
    ) as control:
        found = control.incident(incident_id)
        question = None if found is None else found.question
        see_that_it_is_understood(question, answer)
        return control.answer(incident_id, answer, question=question)


async def aanswer_recovery(
    incident_id: str, answer: object, *, settings: PeerContextSettings | None = None
) -> Incident:
    """Answer what an incident asks, without blocking the loop; see `answer_recovery`."""
    return await open_in_thread(partial(answer_recovery, incident_id, answer, settings=settings))
