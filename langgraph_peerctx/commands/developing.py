"""`peerctx broker`: a broker for development, as long as it runs."""

import asyncio

from langgraph_peerctx.commands.printing import print_line
from langgraph_peerctx.commands.until_told import run_until_told
from langgraph_peerctx.config import PeerContextSettings
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.messaging.topics import topics_for


def run_broker() -> None:
    """Run the embedded broker with the topics that are needed, until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: If the extra `embedded` is not installed.
        BrokerUnavailableError: If it does not start.
        ProtocolError: If a requester's id is illegal.
    """
    settings = PeerContextSettings()
    specs = topics_for(
        settings.kafka, [settings.requester_id], max_message_bytes=settings.max_message_bytes
    )

    async def work() -> None:
        with EmbeddedBroker([spec.name for spec in specs]) as broker:
            print_line(f"export KAFKA_BOOTSTRAP_SERVERS={_by_address(broker.bootstrap_servers)}")
            print_line(
                "# a broker inside this process, for development and not for production: "
                "all is lost when it ends (SIGTERM or Ctrl-C)"
            )
            await asyncio.Event().wait()

    run_until_told(work)


def _by_address(servers: str) -> str:
    """Name this host as it listens: its name may lead to an address where nobody does."""
    return servers.replace("localhost", "127.0.0.1")
