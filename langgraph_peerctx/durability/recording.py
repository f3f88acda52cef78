"""Which recorder records an agent's owned runs in this process."""

from collections.abc import Iterable

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs

from langgraph_peerctx.durability.recorder import InteractionRecorder

_recorders: list[InteractionRecorder] = []


def record_with(recorders: Iterable[InteractionRecorder]) -> None:
    """Record the owned runs of these recorders' agents, until `stop_recording_with`."""
    _recorders.extend(recorders)


def stop_recording_with(recorders: Iterable[InteractionRecorder]) -> None:
    """End what `record_with` began."""
    for recorder in recorders:
        _recorders.remove(recorder)


def recorded(config: RunnableConfig, recorder: InteractionRecorder | None) -> RunnableConfig:
    """Return a config with which a run is recorded; once, if it is already."""
    if recorder is None:
        return config
    callbacks = config.get("callbacks") or []
    present = callbacks if isinstance(callbacks, list) else callbacks.handlers
    if recorder in present:
        return config
    return merge_configs(config, {"callbacks": [recorder]})


def recorder_of(agent_id: str) -> InteractionRecorder | None:
    """Return what records an agent's runs: of several, the latest."""
    found = [recorder for recorder in _recorders if recorder.agent_id == agent_id]
    return found[-1] if found else None
