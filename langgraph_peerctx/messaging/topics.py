"""The topics that the protocol needs, as they should be, and what is wrong with those there are."""

from collections.abc import Iterable

from langgraph_peerctx.config import KafkaConfig
from langgraph_peerctx.messaging.transport import TopicSpec, TopicState

_MINUTE_MS = 60_000
_RECORD_OVERHEAD_BYTES = 16_384


def topics_for(
    config: KafkaConfig, requester_ids: Iterable[str] = (), *, max_message_bytes: int = 262_144
) -> list[TopicSpec]:
    """Return the request topic, the presence topic, and one response topic a requester.

    Records are stored as they come: a batch of 100 kB compressed can be 100 MB in a reader, before
    any code of ours sees a byte. Times are the broker's, so that no sender can choose them.

    Raises:
        ProtocolError: If a requester id is illegal.
    """
    sizes = {
        "compression.type": "uncompressed",
        "max.message.bytes": str(max_message_bytes + _RECORD_OVERHEAD_BYTES),
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "delete",
    }
    broadcast = sizes | {
        "retention.ms": str(10 * _MINUTE_MS),
        "segment.ms": str(5 * _MINUTE_MS),
    }
    answers = sizes | {"retention.ms": str(60 * _MINUTE_MS), "segment.ms": str(30 * _MINUTE_MS)}
    return [
        TopicSpec(name=config.context_request_topic, settings=broadcast),
        TopicSpec(name=config.presence_topic, settings=broadcast),
        *(
            TopicSpec(name=config.get_response_topic(requester_id), settings=answers)
            for requester_id in requester_ids
        ),
    ]


def faults_of(spec: TopicSpec, state: TopicState) -> list[str]:
    """Return what is wrong with a topic, in words; empty if it is as it should be.

    A broker that tells no settings (the embedded one) is not blamed for them.
    """
    if state.partitions == 0:
        return [f"{spec.name} does not exist"]
    faults = []
    if state.partitions != spec.partitions and state.settings:
        faults.append(f"{spec.name} has {state.partitions} partitions, not {spec.partitions}")
    for name, wanted in spec.settings.items():
        found = state.settings.get(name)
        if found is not None and found != wanted:
            faults.append(f"{spec.name} has {name}={found}, not {wanted}")
    return faults


def creation_command(spec: TopicSpec, bootstrap_servers: str) -> str:
    """Return the command line that makes a topic with Kafka's own tool."""
    settings = " ".join(f"--config {name}={value}" for name, value in spec.settings.items())
    return (
        f"kafka-topics.sh --bootstrap-server {bootstrap_servers} --create --if-not-exists "
        f"--topic {spec.name} --partitions {spec.partitions} {settings}"
    )
