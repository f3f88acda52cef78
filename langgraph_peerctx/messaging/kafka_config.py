"""Kafka connection settings and topic names, from the environment."""

from langgraph_peerctx.config import KafkaConfig


def get_kafka_config() -> KafkaConfig:
    """Return the settings as the environment has them now.

    Raises:
        ConfigurationError: If a variable is wrong; it names it.
    """
    return KafkaConfig()


def get_response_topic(requester_id: str) -> str:
    """Return the topic on which a requester reads its answers, by the environment's prefix.

    Raises:
        ConfigurationError: If a variable is wrong.
        ProtocolError: If `requester_id` is no legal id.
    """
    return get_kafka_config().get_response_topic(requester_id)


__all__ = ["KafkaConfig", "get_kafka_config", "get_response_topic"]
