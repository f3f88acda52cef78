"""What a gather tells LangGraph's custom stream while it runs."""

import logging
from collections.abc import Callable, Collection
from contextvars import copy_context
from typing import Any

from langgraph.config import get_stream_writer

from langgraph_peerctx.gathering.peer_context import PeerContext
from langgraph_peerctx.protocol.messages import ContextResponse

_logger = logging.getLogger(__name__)

KEY = "peer_context"
"""Each event is `{"peer_context": {"event": ..., ...}}`."""


class Progress:
    """Writes events to a stream; from any thread, and never the reason for a failure.

    Events, in order: `asking` (whom it is about, who is expected), `request_sent`, an `answer` a
    peer process, `coverage`.
    """

    def __init__(self, write: Callable[[Any], None]) -> None:
        self._write = write
        self._context = copy_context()  # LangGraph's writer looks up the node's config in it

    def asking(self, failed_agent_id: str, thread_id: str, expect: Collection[str]) -> None:
        """Say what is asked."""
        self._tell(
            "asking", failed_agent_id=failed_agent_id, thread_id=thread_id, expect=list(expect)
        )

    def sent(self) -> None:
        """Say that the broker has the question."""
        self._tell("request_sent")

    def answer(self, response: ContextResponse) -> None:
        """Say who answered."""
        self._tell(
            "answer",
            responder_id=response.responder_id,
            agents={answer.agent_id: answer.status for answer in response.agents},
            interactions=sum(len(answer.interactions) for answer in response.agents),
        )

    def covered(self, context: PeerContext) -> None:
        """Say how much of the truth came home."""
        self._tell("coverage", **context.as_report())

    def _tell(self, event: str, **values: Any) -> None:
        try:
            # A copy each time: no context may be entered by two threads at once.
            self._context.copy().run(self._write, {KEY: {"event": event, **values}})
        except Exception:  # whoever read the stream may have gone
            _logger.debug("an event could not be written to the stream", exc_info=True)


def progress_here() -> Progress:
    """Return what writes to the stream of the node that runs here; outside a graph, to nobody."""
    try:
        return Progress(get_stream_writer())
    except RuntimeError:
        return Progress(lambda _event: None)
