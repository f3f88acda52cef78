"""Reading a node's input, whatever kind of state it is, with errors that name the key."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.errors import ConfigurationError


def value_in(state: object, key: str) -> Any:
    """Return what a state has under a key: a mapping, a model or a dataclass; None if nothing."""
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)


def text_in(state: object, key: str, meaning: str) -> str:
    """Return a text of the state.

    Raises:
        ConfigurationError: If it is not there, or no text.
    """
    value = value_in(state, key)
    if isinstance(value, str) and value:
        return value
    said = f"it is {value!r:.80}" if value is not None else "the state has no such key"
    raise ConfigurationError(f"state[{key!r}] should name {meaning}: {said}")


def texts_in(state: object, key: str) -> tuple[str, ...]:
    """Return a list of texts in the state; empty if it says nothing.

    Raises:
        ConfigurationError: If it is something else.
    """
    value = value_in(state, key)
    if value is None:
        return ()
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if is_list and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise ConfigurationError(f"state[{key!r}]={value!r:.80} should be a list of names")


def seconds_in(state: object, key: str) -> float | None:
    """Return a number of seconds of the state, or None if it says nothing.

    Raises:
        ConfigurationError: If it is no positive number.
    """
    value = value_in(state, key)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ConfigurationError(f"state[{key!r}]={value!r:.80} should be a positive number of seconds")


def count_in(state: object, key: str) -> int | None:
    """Return a count of the state, or None if it says nothing.

    Raises:
        ConfigurationError: If it is no whole number from 0 on.
    """
    value = value_in(state, key)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigurationError(f"state[{key!r}]={value!r:.80} should be a whole number from 0 on")


def thread_in(state: object, key: str, config: RunnableConfig) -> str:
    """Return the thread that a state names, or the one that the graph runs on.

    Raises:
        ConfigurationError: If neither does.
    """
    if value_in(state, key) is not None:
        return text_in(state, key, "the thread")
    own = config.get("configurable", {}).get("thread_id")
    if own is not None:
        return str(own)
    raise ConfigurationError(
        f"which thread is it about? Put it into state[{key!r}], or run the graph with a thread_id"
    )
