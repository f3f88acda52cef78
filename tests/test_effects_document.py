"""What docs/effects.md shows runs as it stands."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from runtime_threads import no_runtime_left
from typing_extensions import TypedDict

from langgraph_peerctx import EventStore, background

DOCUMENT = Path(__file__).parents[1] / "docs" / "effects.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


class Launch(TypedDict, total=False):
    product: str
    reservation: int


async def test_its_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "always")
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"sqlite:///{tmp_path}/control.db")
    booked: list[Any] = []

    async def send_to_inventory(order: Any, headers: dict[str, str]) -> Any:
        await names["take_order"](order, headers)  # delivered twice
        return await names["take_order"](order, headers)

    with EventStore(f"sqlite:///{tmp_path}/inventory.db") as store:
        names: dict[str, Any] = {
            "Launch": Launch,
            "store": store,
            "send_to_inventory": send_to_inventory,
            "book": lambda _connection, order: booked.append(order),
        }
        exec("\n".join(BLOCKS), names)  # noqa: S102 - our own document
        builder = StateGraph(Launch)
        builder.add_node("reserve", names["reserve"])
        builder.add_edge(START, "reserve")
        builder.add_edge("reserve", END)
        app = names["own_runs"](
            builder.compile(checkpointer=InMemorySaver()), agent_id="product-agent"
        )
        at: Any = {"configurable": {"thread_id": "thread-1"}}
        with no_runtime_left():
            async with asyncio.timeout(30):
                final = await app.ainvoke({"product": "umbrella"}, at)
            background.stop_kept_runtime()
    assert final["reservation"] == 7
    assert booked == [{"product": "umbrella", "count": 10}]
