"""A process that hosts one agent through a lifespan, and does what its argument says.

`answer`: answers. `mute`: is there, and does not answer. `block`: is there, and its own loop hangs.
"""

import asyncio
import json
import sys
import time
from typing import Any

from langgraph_peerctx import ContextRequestHandler, background, get_event_store
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings


class Mute(ContextRequestHandler):
    def answer(self, request: Any) -> Any:
        time.sleep(60)
        return super().answer(request)


async def main(how: str, name: str, address: str, presence: str, store: str) -> None:
    settings = PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers=address, presence_topic=presence),
        mock_mode="never",
        process_id=f"process-{name}",
        database_url=store,
        heartbeat_interval_seconds=0.2,
        heartbeat_pause_seconds=2,
    )
    kind = Mute if how == "mute" else ContextRequestHandler
    handler = kind(name, store=get_event_store(store))
    lease = background.lease(settings)
    runtime = await lease.aruntime()
    await runtime.host(handler)
    print("ready", flush=True)
    if how == "block":
        time.sleep(60)  # noqa: ASYNC251 - the agent's loop hangs, its runtime's does not
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*json.loads(sys.argv[1])))
