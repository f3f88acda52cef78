"""Which recorder records an agent's owned runs in this process."""

from collections.abc import Iterable

from langchain_core.runnables import RunnableConfig

from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.durability.run_config import with_callback

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
    return config if recorder is None else with_callback(config, recorder)


def recorder_of(agent_id: str) -> InteractionRecorder | None:
    """Return what records an agent's runs: of several, the latest."""
    found = [recorder for recorder in _recorders if recorder.agent_id == agent_id]
    return found[-1] if found else None
