"""A process of its own that runs one of the workflows, perhaps to its death."""

from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.types import Command
from reconstruction.fake_runtime import FakeRuntime
from reconstruction.workflows import WORKFLOWS, Script

from langgraph_peerctx.reconstruction.reconstructor import recover_and_resume_workflow_async


class WitnessSaver(AsyncSqliteSaver):
    """Says when a checkpoint or a write is in the database."""

    script: Script

    async def aput(self, config: RunnableConfig, *arguments: Any) -> RunnableConfig:
        stored = await super().aput(config, *arguments)
        self.script.stored.release()
        return stored

    async def aput_writes(self, *arguments: Any) -> None:
        await super().aput_writes(*arguments)
        self.script.written.release()


async def main(order: dict[str, Any]) -> None:
    script = Script(
        ledger=Path(order["ledger"]),
        kill_in=order["kill_in"],
        kill_on_visit=order["kill_on_visit"],
        after_writes=order["after_writes"],
        after_checkpoints=order["after_checkpoints"],
    )
    async with WitnessSaver.from_conn_string(order["database"]) as saver:
        saver.script = script
        workflow = WORKFLOWS[order["workflow"]](script, saver)
        if order["recover"]:
            await recover_and_resume_workflow_async(
                workflow=workflow,
                agent_id="product-agent",
                thread_id="thread-1",
                runtime=FakeRuntime(),
            )
            return
        value = order["input"] if order["resume"] is None else Command(resume=order["resume"])
        await workflow.ainvoke(
            value,
            {"configurable": {"thread_id": "thread-1"}},
            durability=order["durability"],
        )
