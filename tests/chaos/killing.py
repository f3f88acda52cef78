"""Agents and recoverers that end themselves with SIGKILL at a named place."""

import inspect
from typing import Any

from chaos import scenario
from dying import die_at

from langgraph_peerctx.reconstruction.recovery_graph import RecoverySteps

NODES = (
    "load_checkpoint",
    "position",
    "request_context",
    "collect_context",
    "reconstruct",
    "settle",
    "approve",
    "resume_workflow",
)
INSIDE = "inside the workflow"
AFTER = "after the workflow"
PLACES = (*NODES, INSIDE, AFTER)


def in_its_first_node(_orders: object) -> None:
    """Arm an agent: it dies when its launch's first node has done its work, however fast it is."""
    scenario.in_node = lambda name: die_at(name, "plan")


class Killing:
    """Arms a process to die at a place of its first recovery."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __call__(self, _orders: object) -> None:
        for name in NODES:
            _arm(name, self._place)
        if self._place == INSIDE:
            scenario.in_node = lambda name: die_at(name, "join")


def _arm(name: str, place: str) -> None:
    node = getattr(RecoverySteps, name)

    async def deadly(self: Any, *arguments: Any, **options: Any) -> Any:
        die_at(name, place)
        update = await node(self, *arguments, **options)
        if name == "resume_workflow":
            die_at(AFTER, place)
        return update

    # LangGraph reads a node's parameters from its signature.
    deadly.__signature__ = inspect.signature(node)  # type: ignore[attr-defined]
    setattr(RecoverySteps, name, deadly)
