"""`peerctx sentinel`: this host's, in the foreground."""

import asyncio

from langgraph_peerctx.commands.printing import event, print_line
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import SentinelRunningError
from langgraph_peerctx.messaging.sentinel import serve
from langgraph_peerctx.messaging.sentinel_place import place_of


def watch(idle_seconds: float | None, *, as_json: bool) -> None:
    """Be this host's sentinel until SIGTERM or SIGINT, or until idle; one that runs is enough.

    Raises:
        ConfigurationError: If its directory is not ours alone, or the broker refuses us.
    """
    settings = PeerContextSettings()
    sentinel_id, ended = place_of(settings).sentinel_id, "ended"
    try:
        asyncio.run(serve(settings, idle_seconds=idle_seconds))
    except SentinelRunningError as error:
        ended = "running_already"
        if not as_json:
            print_line(str(error))
    if as_json:
        event(ended, sentinel_id=sentinel_id)
