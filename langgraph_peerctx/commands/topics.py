"""`peerctx topics`: what is needed on the broker, and how to make it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rich.console import Console

from langgraph_peerctx.commands.printing import print_json, table_of
from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.topics import creation_command, topics_for
from langgraph_peerctx.messaging.transport import TopicSpec


def show_topics(requester_ids: Sequence[str], *, create: bool, as_json: bool) -> None:
    """Print the topics that are needed, or make those that are missing.

    Raises:
        BrokerUnavailableError: If they are to be made, and there is no broker.
        ProtocolError: If a requester's id is illegal.
    """
    settings = PeerContextSettings()
    specs = topics_for(
        settings.kafka,
        requester_ids or [settings.requester_id],
        max_message_bytes=settings.max_message_bytes,
    )
    if create:
        asyncio.run(on_broker(settings.kafka, lambda broker: broker.ensure_topics(specs)))
    if as_json:
        print_json([_as_json(spec) for spec in specs])
        return
    console = Console()
    table = table_of("topic", "partitions", "settings")
    table.title = "made" if create else "needed"
    for spec in specs:
        settings_text = "\n".join(f"{name}={value}" for name, value in spec.settings.items())
        table.add_row(spec.name, str(spec.partitions), settings_text)
    console.print(table)
    if not create:
        console.print("\nMake them with `peerctx topics --create`, or with Kafka's own tool:\n")
        for spec in specs:
            console.print(creation_command(spec, settings.kafka.bootstrap_servers), soft_wrap=True)


async def on_broker(config: KafkaConfig, ask: Callable[[KafkaTransport], Awaitable[Any]]) -> Any:
    """Ask the broker something, on a connection of our own."""
    transport = KafkaTransport(config)
    try:
        await transport.start()
        return await ask(transport)
    finally:
        await transport.close()


def _as_json(spec: TopicSpec) -> dict[str, Any]:
    return {"name": spec.name, "partitions": spec.partitions, "settings": dict(spec.settings)}
