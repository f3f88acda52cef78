"""Ending this process with SIGKILL at a named place of a gather."""

import asyncio
import os
import signal
from typing import Any

from langgraph_peerctx.gathering.gatherer import Wanted
from langgraph_peerctx.gathering.steps import GatherSteps

PLACES = (
    "before position",
    "before request",
    "between request and checkpoint",
    "in the middle of collect",
    "after collect",
)


def die_at(here: str, place: str) -> None:
    if here == place:
        os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str) -> None:
    """Make this process die at a place."""
    position, ask, take = GatherSteps.position, GatherSteps.ask, Wanted.take

    async def deadly_position(self: Any, request: Any) -> Any:
        die_at("before position", place)
        return await position(self, request)

    async def deadly_ask(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        die_at("before request", place)
        asked = await ask(self, request, *arguments, **options)
        if place == "between request and checkpoint":  # when the answer that can come has come
            while not self._open[request.correlation_id].slot.responses:
                await asyncio.sleep(0.01)
            die_at("between request and checkpoint", place)
        return asked

    def deadly_take(self: Any, response: Any) -> None:
        take(self, response)
        if self.expected and len(self.responses) == 1 and self.min_responses is None:
            die_at("in the middle of collect", place)

    GatherSteps.position = deadly_position  # type: ignore[method-assign]
    GatherSteps.ask = deadly_ask  # type: ignore[method-assign,assignment]
    Wanted.take = deadly_take  # type: ignore[method-assign]
