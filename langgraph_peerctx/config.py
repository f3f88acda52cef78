"""Every setting of the package, read from the environment, checked once."""

import os
import re
import socket
from ipaddress import ip_address
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.identifiers import Identifier, check_id

MockMode = Literal["auto", "always", "never"]
SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
SentinelMode = Literal["auto", "connect", "off"]
TopicName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,184}$")]
"""Kafka allows 249 characters; a response topic adds a dot and an id of up to 64."""
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]

_PORT_LIMIT = 65_535


class EnvironmentSettings(BaseSettings):
    """Frozen settings whose errors name the environment variable that is wrong."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True
    )

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        unknown = values.keys() - fields
        if unknown:
            raise ConfigurationError(
                f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}; "
                f"it has {', '.join(sorted(fields))}"
            )
        try:
            # By alias only: by name, pydantic-settings would read a foreign SSL_CERT_FILE too.
            super().__init__(**{self.variable_of(name): value for name, value in values.items()})
        except ValidationError as error:
            raise ConfigurationError(_sentence(error)) from None

    @classmethod
    def variable_of(cls, field_name: str) -> str:
        """Return the environment variable behind a field."""
        return str(cls.model_fields[field_name].validation_alias or field_name)


def _sentence(error: ValidationError) -> str:
    """Say what is wrong with which variable; never show a value that may be a secret."""
    parts = []
    for fault in error.errors(include_url=False, include_context=False):
        variable = str(fault["loc"][0]) if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ")
        given = "" if not variable or _is_secret(variable) else f" (got {fault['input']!r:.120})"
        parts.append(f"{variable}: {message}{given}" if variable else message)
    return "; ".join(parts)


def _is_secret(variable: str) -> bool:
    return "PASSWORD" in variable or "URL" in variable


def _servers(text: str) -> str:
    servers = [server.strip() for server in text.split(",")]
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > _PORT_LIMIT:
            raise ValueError("expected host:port[,host:port...], each port from 0 to 65535")
    return ",".join(servers)


def _is_loopback(server: str) -> bool:
    host = server.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class KafkaConfig(EnvironmentSettings):
    """How to reach Kafka, and what the topics are called.

    What is not given by name comes from the environment variable, or is the default.
    """

    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = Field(
        default="localhost:9092", validation_alias="KAFKA_BOOTSTRAP_SERVERS"
    )
    context_request_topic: TopicName = Field(
        default="agent.context.request", validation_alias="KAFKA_CONTEXT_REQUEST_TOPIC"
    )
    context_response_topic_prefix: TopicName = Field(
        default="agent.context.response", validation_alias="KAFKA_CONTEXT_RESPONSE_TOPIC_PREFIX"
    )
    presence_topic: TopicName = Field(
        default="agent.presence", validation_alias="KAFKA_PRESENCE_TOPIC"
    )
    consumer_group_prefix: TopicName = Field(
        default="paas-agent", validation_alias="KAFKA_CONSUMER_GROUP_PREFIX"
    )
    security_protocol: SecurityProtocol = Field(
        default="PLAINTEXT", validation_alias="KAFKA_SECURITY_PROTOCOL"
    )
    sasl_mechanism: SaslMechanism = Field(default="PLAIN", validation_alias="KAFKA_SASL_MECHANISM")
    sasl_username: str | None = Field(default=None, validation_alias="KAFKA_SASL_USERNAME")
    sasl_password: SecretStr | None = Field(default=None, validation_alias="KAFKA_SASL_PASSWORD")
    ssl_ca_file: str | None = Field(default=None, validation_alias="KAFKA_SSL_CA_FILE")
    ssl_cert_file: str | None = Field(default=None, validation_alias="KAFKA_SSL_CERT_FILE")
    ssl_key_file: str | None = Field(default=None, validation_alias="KAFKA_SSL_KEY_FILE")
    ssl_key_password: SecretStr | None = Field(
        default=None, validation_alias="KAFKA_SSL_KEY_PASSWORD"
    )
    allow_insecure: bool = Field(default=False, validation_alias="KAFKA_ALLOW_INSECURE")
    connect_timeout_seconds: Seconds = Field(
        default=5.0, validation_alias="KAFKA_CONNECT_TIMEOUT_SECONDS"
    )
    send_timeout_seconds: Seconds = Field(
        default=5.0, validation_alias="KAFKA_SEND_TIMEOUT_SECONDS"
    )

    @field_validator("ssl_ca_file", "ssl_cert_file", "ssl_key_file")
    @classmethod
    def _readable(cls, path: str | None) -> str | None:
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError("there is no readable file of this name")
        return path

    @model_validator(mode="after")
    def _credentials(self) -> Self:
        if self.security_protocol.startswith("SASL") and (
            not self.sasl_username or self.sasl_password is None
        ):
            raise ValueError(
                f"KAFKA_SECURITY_PROTOCOL={self.security_protocol} needs KAFKA_SASL_USERNAME "
                "and KAFKA_SASL_PASSWORD"
            )
        if (self.ssl_cert_file is None) != (self.ssl_key_file is None):
            raise ValueError("KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE go together")
        return self

    @model_validator(mode="after")
    def _encrypted_beyond_this_host(self) -> Self:
        remote = [s for s in self.bootstrap_servers.split(",") if not _is_loopback(s)]
        if remote and self.security_protocol.endswith("PLAINTEXT") and not self.allow_insecure:
            raise ValueError(
                f"KAFKA_SECURITY_PROTOCOL={self.security_protocol} would send everything in clear "
                f"to {remote[0]}: use SSL or SASL_SSL, or set KAFKA_ALLOW_INSECURE=true "
                "where the network itself is trusted"
            )
        return self

    def get_response_topic(self, requester_id: str) -> str:
        """Return the topic on which a requester reads its answers.

        Raises:
            ProtocolError: If `requester_id` is no legal id.
        """
        return f"{self.context_response_topic_prefix}.{check_id(requester_id, 'requester_id')}"


def default_process_id() -> str:
    """Name this process: host name and pid, made legal; the same for the process's life."""
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()).lstrip("-_")[:48] or "host"
    return f"{host}-{os.getpid()}"


class PeerContextSettings(EnvironmentSettings):
    """Everything that can be set, and `kafka` with it."""

    kafka: KafkaConfig = Field(default_factory=KafkaConfig, validation_alias="PEER_CONTEXT_KAFKA")
    enabled: bool = Field(default=True, validation_alias="PEER_CONTEXT_ENABLED")
    timeout_seconds: Seconds = Field(default=5.0, validation_alias="PEER_CONTEXT_TIMEOUT_SECONDS")
    mock_mode: MockMode = Field(default="auto", validation_alias="PEER_CONTEXT_MOCK_MODE")
    requester_id: Identifier = Field(
        default="reconstructor", validation_alias="PEER_CONTEXT_REQUESTER_ID"
    )
    process_id: Identifier = Field(
        default_factory=default_process_id, validation_alias="PEER_CONTEXT_PROCESS_ID"
    )
    database_url: str = Field(
        default="sqlite:///peer_context.db",
        repr=False,
        validation_alias="PEER_CONTEXT_DATABASE_URL",
    )
    control_database_url: str | None = Field(
        default=None, repr=False, validation_alias="PEER_CONTEXT_CONTROL_DATABASE_URL"
    )
    database_timeout_seconds: Seconds = Field(
        default=5.0, validation_alias="PEER_CONTEXT_DATABASE_TIMEOUT_SECONDS"
    )
    heartbeat_interval_seconds: Seconds = Field(
        default=1.0, validation_alias="PEER_CONTEXT_HEARTBEAT_INTERVAL_SECONDS"
    )
    heartbeat_pause_seconds: Seconds = Field(
        default=3.0, validation_alias="PEER_CONTEXT_HEARTBEAT_PAUSE_SECONDS"
    )
    stuck_seconds: Seconds = Field(default=300.0, validation_alias="PEER_CONTEXT_STUCK_SECONDS")
    sentinel: SentinelMode = Field(default="auto", validation_alias="PEER_CONTEXT_SENTINEL")
    sentinel_directory: str | None = Field(
        default=None, validation_alias="PEER_CONTEXT_SENTINEL_DIRECTORY"
    )
    max_attempts: int = Field(
        default=5, ge=1, le=1_000, validation_alias="PEER_CONTEXT_MAX_ATTEMPTS"
    )
    max_recoveries: int = Field(
        default=8, ge=1, le=1_000, validation_alias="PEER_CONTEXT_MAX_RECOVERIES"
    )
    sweep_seconds: Seconds = Field(default=10.0, validation_alias="PEER_CONTEXT_SWEEP_SECONDS")
    time_window_seconds: Seconds = Field(
        default=3_600.0, validation_alias="PEER_CONTEXT_TIME_WINDOW_SECONDS"
    )
    max_message_bytes: int = Field(
        default=262_144, ge=4_096, le=1_000_000, validation_alias="PEER_CONTEXT_MAX_MESSAGE_BYTES"
    )
    max_interactions: int = Field(
        default=200, ge=1, le=10_000, validation_alias="PEER_CONTEXT_MAX_INTERACTIONS"
    )
    max_responders: int = Field(
        default=256, ge=1, le=10_000, validation_alias="PEER_CONTEXT_MAX_RESPONDERS"
    )
    max_total_bytes: int = Field(
        default=8_388_608, ge=4_096, validation_alias="PEER_CONTEXT_MAX_TOTAL_BYTES"
    )
    inference_tokens: int = Field(
        default=4_000, ge=256, le=10_000_000, validation_alias="PEER_CONTEXT_INFERENCE_TOKENS"
    )
    inference_timeout_seconds: Seconds = Field(
        default=30.0, validation_alias="PEER_CONTEXT_INFERENCE_TIMEOUT_SECONDS"
    )

    @field_validator("database_url", "control_database_url")
    @classmethod
    def _known_database(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"(sqlite|postgresql(\+psycopg)?)://", url):
            raise ValueError("expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
        return url

    @property
    def control_url(self) -> str:
        """The control database's address: by default the event store's."""
        return self.control_database_url or self.database_url

    @property
    def has_shared_control(self) -> bool:
        """Whether agents and recoverers may share it: an agent's own SQLite file nobody does."""
        return self.control_database_url is not None or not self.database_url.startswith("sqlite")

    @property
    def silence_seconds(self) -> float:
        """How long a heartbeat may stay away, interval and pause together."""
        return self.heartbeat_interval_seconds + self.heartbeat_pause_seconds

    @property
    def lease_seconds(self) -> float:
        """How long a lease lives without being renewed: less than twice the acceptable silence.

        A recovery is to begin within that; and an interpreter that is held for one and a half of it
        must not cost its process a thread, so it cannot be much shorter.
        """
        return 2 * self.silence_seconds - self.heartbeat_interval_seconds / 2


__all__ = [
    "EnvironmentSettings",
    "KafkaConfig",
    "MockMode",
    "PeerContextSettings",
    "SaslMechanism",
    "SecurityProtocol",
    "SentinelMode",
    "default_process_id",
]
