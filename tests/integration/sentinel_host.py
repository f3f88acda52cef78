"""A process whose argument is JSON: it serves as the sentinel, or is a client of one.

`serve`: until idle. `client`: heartbeats and a `SentinelClient`; it prints who watches it, or
"nobody", and leaves when its input ends.
"""

import asyncio
import json
import sys

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.presence import Presence
from langgraph_peerctx.messaging.sentinel import serve
from langgraph_peerctx.messaging.sentinel_client import SentinelClient


def settings_for(about: dict[str, str]) -> PeerContextSettings:
    return PeerContextSettings(
        kafka=KafkaConfig(bootstrap_servers=about["address"], presence_topic=about["presence"]),
        mock_mode="never",
        process_id=about["process_id"],
        sentinel=about.get("sentinel", "connect"),  # type: ignore[arg-type]  # checked by pydantic
        sentinel_directory=about["directory"],
        heartbeat_interval_seconds=0.2,
        heartbeat_pause_seconds=2,
    )


async def be_client(about: dict[str, str]) -> None:
    settings = settings_for(about)
    transport = create_transport(settings)
    await transport.start()
    presence = Presence(transport, settings, about["incarnation"], listens=False)
    await presence.start()

    def watched_by(sentinel_id: str | None) -> None:
        presence.standing.sentinel_id = sentinel_id
        presence.beat_now()
        print(sentinel_id or "nobody", flush=True)

    command = [*(sys.executable, "-m", "integration.sentinel_host"), json.dumps({"do": "demand"})]
    client = SentinelClient(settings, about["incarnation"], on_change=watched_by, command=command)
    await client.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await client.close()
    await presence.close()
    await transport.close()


async def main(about: dict[str, str]) -> None:
    if about["do"] == "client":
        await be_client(about)
    elif about["do"] == "demand":  # started by a client: everything is in the environment
        await serve(PeerContextSettings(), idle_seconds=1)
    else:
        await serve(settings_for(about), idle_seconds=None)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
