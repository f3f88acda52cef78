"""The control database, as the commands open it: never made by looking at it."""

from collections.abc import Iterator
from contextlib import contextmanager

from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.persistence.incidents import ControlDatabase
from langgraph_peerctx.persistence.inspection import describe_database, has_schema


@contextmanager
def control_database(settings: PeerContextSettings) -> Iterator[ControlDatabase]:
    """Open the control database, if there is one.

    Raises:
        ConfigurationError: If there is none yet.
        StoreError: If it cannot be opened.
    """
    timeout_seconds = settings.database_timeout_seconds
    if not has_schema(settings.control_url, timeout_seconds=timeout_seconds):
        raise ConfigurationError(
            f"{where_none_is(settings)}. Set PEER_CONTEXT_CONTROL_DATABASE_URL to the one that the "
            "agents use; see `peerctx doctor`"
        )
    with ControlDatabase(settings.control_url, timeout_seconds=timeout_seconds) as control:
        yield control


def where_none_is(settings: PeerContextSettings) -> str:
    """Say where there is no control database yet, without its password."""
    timeout_seconds = settings.database_timeout_seconds
    found = describe_database(settings.control_url, timeout_seconds=timeout_seconds)
    return f"there is no control database yet: {'; '.join(found.problems) or found.name}"
