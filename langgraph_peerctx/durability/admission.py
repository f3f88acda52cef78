"""What of a run is kept, so that another process can go on with it."""

import hashlib
import re
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, TypeAlias, cast
from uuid import UUID

from langchain_core.messages import BaseMessage, RemoveMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Command, Durability
from pydantic import BaseModel

from langgraph_peerctx.durability.fenced_checkpointer import Fence, FencedCheckpointer
from langgraph_peerctx.durability.workflow import Workflow, checkpointer_of
from langgraph_peerctx.errors import ConfigurationError, StoreError
from langgraph_peerctx.persistence.runs import Packed, Run

KEPT = ("tags", "metadata", "recursion_limit", "run_name")
"""What of a config is kept beside its configurable values: callbacks belong to a process."""


STOPS = ("interrupt_before", "interrupt_after")
"""Where a run is to stop, as it was asked to: a recovery must not run past it."""
_STOPS = "stops"
_REDACTED = "redacted:"
"""Before the type of an input that is not stored as it was."""

Redact: TypeAlias = Callable[[Any], Any]


def is_continuation(given: object) -> bool:
    """Tell whether an input goes on with the thread's last run: an answer, or nothing at all."""
    return given is None or isinstance(given, Command)


def fenced(workflow: Workflow, fence: Fence) -> Workflow:
    """Return the workflow with its checkpointer behind this fence, instead of any other."""
    saver = checkpointer_of(workflow)
    if saver is None:
        return workflow
    bare = saver.bare if isinstance(saver, FencedCheckpointer) else saver
    return workflow.copy({"checkpointer": FencedCheckpointer(bare, fence)})


def packed(workflow: Workflow, value: object, *, name: str) -> Packed:
    """Return a value as the workflow's own serializer packs it.

    Raises:
        ConfigurationError: If it cannot.
    """
    try:
        return Packed(*_serializer(workflow).dumps_typed(value))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the {name} cannot be stored, so the run could not be recovered: {error}"[:400]
        ) from error


def packed_input(workflow: Workflow, given: object, redact: Redact | None) -> Packed:
    """Return what is stored of an input; nothing at all is stored as it is.

    Raises:
        ConfigurationError: If it cannot be stored, or `redact` failed.
    """
    if redact is None or given is None:
        return packed(workflow, given, name="input")
    try:
        kept = redact(given)
    except Exception as error:  # noqa: BLE001 - the caller's code, translated
        raise ConfigurationError(
            f"redact raised {type(error).__name__}, so nothing of the input was stored, and "
            "nothing was run"
        ) from None  # its message may hold what was to be hidden
    whole = packed(workflow, given, name="input")
    told = packed(workflow, kept, name="redacted input")
    return whole if told == whole else Packed(kind=f"{_REDACTED}{told.kind}", data=told.data)


def digest_of(given: object) -> str | None:
    """Return 32 digits that are the same in any process for an input that holds the same.

    None if it has no form that stays the same: then nobody knows whether another input equals it.
    """
    try:
        return _hash(given).hex()[:32]
    except Exception:  # noqa: BLE001 - anybody's object may do anything when it is looked at
        return None


def digest_of_input(workflow: Workflow, given: object, stored: Packed) -> str | None:
    """Return the digest of an input; None if it is redacted, or who guesses could find it out.

    Of the input as it was stored, whenever it is asked for: nodes may have changed it since.
    """
    if hides(stored):
        return None
    digest = digest_of(given)
    return digest if _is_still(workflow, given, stored) else _digest_of_stored(workflow, stored)


def digest_of_run(workflow: Workflow, run: Run) -> str | None:
    """Return the digest of a run's first input; None if that was redacted."""
    return None if is_redacted(run) else _digest_of_stored(workflow, run.inputs[0].value)


def _digest_of_stored(workflow: Workflow, stored: Packed) -> str | None:
    try:
        return digest_of(unpacked(workflow, stored, name="input"))
    except StoreError:
        return None


def _is_still(workflow: Workflow, given: object, stored: Packed) -> bool:
    try:
        return packed(workflow, given, name="input") == stored
    except ConfigurationError:
        return False


def hides(stored: Packed) -> bool:
    """Tell whether what is stored of an input is not what it was."""
    return stored.kind.startswith(_REDACTED)


def is_redacted(run: Run, number: int = 0) -> bool:
    """Tell whether what a run was given is not what is stored of it."""
    return hides(run.inputs[number].value)


def unpacked(workflow: Workflow, value: Packed, *, name: str) -> Any:
    """Return what was packed.

    Raises:
        StoreError: If it cannot be read.
    """
    try:
        kind = value.kind.removeprefix(_REDACTED)
        return _serializer(workflow).loads_typed((kind, value.data))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise StoreError(f"the run's {name} cannot be read: {error!r}"[:400]) from error


def packed_config(
    workflow: Workflow, config: RunnableConfig, options: Mapping[str, Any] | None = None
) -> Packed:
    """Return what of a config can be kept; what cannot, is left out.

    Args:
        workflow: The workflow.
        config: The run's.
        options: What else it was run with: where it is to stop is kept, too.
    """
    kept: dict[str, Any] = {name: config[name] for name in KEPT if name in config}  # type: ignore[literal-required]
    configurable = config.get("configurable") or {}
    kept["configurable"] = {
        name: value
        for name, value in configurable.items()
        if not name.startswith("__") and name != "thread_id" and _can_be_kept(workflow, value)
    }
    kept["metadata"] = {
        name: value
        for name, value in (config.get("metadata") or {}).items()
        if _can_be_kept(workflow, value)
    }
    stops = {name: (options or {}).get(name) for name in STOPS}
    kept[_STOPS] = {name: stop for name, stop in stops.items() if stop}
    return packed(workflow, kept, name="config")


def packed_context(workflow: Workflow, context: object) -> Packed | None:
    """Return a context, if it can be kept."""
    if context is None or not _can_be_kept(workflow, context):
        return None
    return packed(workflow, context, name="context")


def config_of(workflow: Workflow, run: Run) -> RunnableConfig:
    """Return what was kept of a run's config."""
    kept = _kept(workflow, run)
    kept.pop(_STOPS, None)
    return cast("RunnableConfig", kept)


def stopping_as(workflow: Workflow, run: Run) -> Workflow:
    """Return the workflow with the breakpoints that a run was begun with."""
    stops = _kept(workflow, run).get(_STOPS)
    if not isinstance(stops, Mapping) or not stops:
        return workflow
    return workflow.copy({f"{name}_nodes": stop for name, stop in stops.items() if name in STOPS})


def _kept(workflow: Workflow, run: Run) -> dict[str, Any]:
    found = None if run.config is None else unpacked(workflow, run.config, name="config")
    return dict(found) if isinstance(found, Mapping) else {}


def context_of(workflow: Workflow, run: Run) -> Any:
    """Return a run's context; None if there was none, or it could not be kept."""
    return None if run.context is None else unpacked(workflow, run.context, name="context")


def input_of(workflow: Workflow, run: Run, number: int = 0) -> Any:
    """Return what a run was given: its input, or a later answer."""
    return unpacked(workflow, run.inputs[number].value, name="input")


def of_admitted_run(config: RunnableConfig, run_id: str) -> RunnableConfig:
    """Return a config whose checkpoints say which run they are of.

    LangGraph tells by it whether an input goes on with the newest checkpoint's run.
    """
    metadata: Mapping[str, Any] = config.get("metadata") or {}
    return {**config, "metadata": {**metadata, "run_id": run_id}}


def is_durable(durability: Durability | None) -> bool:
    """Tell whether a kill loses at most the step under way."""
    return durability in (None, "sync")


def _serializer(workflow: Workflow) -> SerializerProtocol:
    saver = checkpointer_of(workflow)
    return JsonPlusSerializer() if saver is None else saver.serde


def _can_be_kept(workflow: Workflow, value: object) -> bool:
    try:
        _serializer(workflow).dumps_typed(value)
    except (TypeError, ValueError):
        return False
    return True


_TOLD_BY_TEXT: Final = (date, time, timedelta, Decimal, UUID, PurePath)
"""Whose text says all of them, and the same in any process."""
_MADE_UP: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
"""An id as LangGraph gives it, at random and in place, to a message that comes without one."""


def _hash(value: object) -> bytes:
    """Return a hash of what a value holds; parts go in by their hashes, so that none run together.

    Models and dataclasses count by their fields and enums by their values, whatever their class: a
    serializer may give back no more than that.

    Raises:
        TypeError: If it has no form that stays the same.
        RecursionError: If it is nested too deeply.
    """
    if isinstance(value, Enum):
        return _hash(value.value)
    kind, told = _scalar(value) or _whole(value)
    return hashlib.sha256(b"%s:%s" % (kind.encode(), told)).digest()


def _scalar(value: object) -> tuple[str, bytes] | None:
    if value is None or isinstance(value, bool):
        return "constant", str(value).encode()
    if isinstance(value, str):
        return "text", str.encode(value, errors="surrogatepass")
    if isinstance(value, int):
        return "int", int.__format__(value, "x").encode()  # of any length: decimal has a limit
    if isinstance(value, float):
        return "float", float.hex(value).encode()
    if isinstance(value, bytes | bytearray):
        return "bytes", bytes(value)
    kind = next((kind for kind in _TOLD_BY_TEXT if isinstance(value, kind)), None)
    return kind and (kind.__name__, str(value).encode())


def _whole(value: object) -> tuple[str, bytes]:
    named = value if isinstance(value, Mapping) else _fields_of(value)
    if named is not None:
        return "mapping", b"".join(sorted(_hash(key) + _hash(named[key]) for key in named))
    if isinstance(value, AbstractSet):
        return "set", b"".join(sorted(map(_hash, value)))
    if isinstance(value, list | tuple | deque):
        return "list", b"".join(map(_hash, value))
    raise TypeError(f"a {type(value).__name__} has no form that stays the same")


def _fields_of(value: Any) -> Mapping[str, Any] | None:
    """Return what has names of an object; None if it has no such thing."""
    if isinstance(value, BaseModel):
        named = {name: getattr(value, name) for name in type(value).model_fields}
        named |= value.model_extra or {}
        if isinstance(value, BaseMessage) and not isinstance(value, RemoveMessage):
            named["id"] = None if _MADE_UP.fullmatch(value.id or "") else value.id
        return named
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    asdict = getattr(value, "_asdict", None)  # a named tuple's
    return dict(asdict()) if asdict and isinstance(value, tuple) else None
