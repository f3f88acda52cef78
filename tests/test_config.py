"""Every setting: its variable, its default, and what a wrong value is told."""

from typing import Any

import pytest
from pydantic import SecretStr

from langgraph_peerctx.config import EnvironmentSettings, KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError, ProtocolError
from langgraph_peerctx.messaging.kafka_config import get_kafka_config, get_response_topic

DEFAULTS: dict[str, tuple[type[EnvironmentSettings], str, Any]] = {
    "KAFKA_BOOTSTRAP_SERVERS": (KafkaConfig, "bootstrap_servers", "localhost:9092"),
    "KAFKA_CONTEXT_REQUEST_TOPIC": (
        KafkaConfig,
        "context_request_topic",
        "agent.context.request",
    ),
    "KAFKA_CONTEXT_RESPONSE_TOPIC_PREFIX": (
        KafkaConfig,
        "context_response_topic_prefix",
        "agent.context.response",
    ),
    "KAFKA_CONSUMER_GROUP_PREFIX": (KafkaConfig, "consumer_group_prefix", "paas-agent"),
    "PEER_CONTEXT_ENABLED": (PeerContextSettings, "enabled", True),
    "PEER_CONTEXT_TIMEOUT_SECONDS": (PeerContextSettings, "timeout_seconds", 5.0),
    "PEER_CONTEXT_MOCK_MODE": (PeerContextSettings, "mock_mode", "auto"),
    "PEER_CONTEXT_INFERENCE_TOKENS": (PeerContextSettings, "inference_tokens", 4_000),
    "PEER_CONTEXT_INFERENCE_TIMEOUT_SECONDS": (
        PeerContextSettings,
        "inference_timeout_seconds",
        30.0,
    ),
}
WRONG = {
    "KAFKA_BOOTSTRAP_SERVERS": ["", "localhost", "localhost:x", "a:1,,b:2", ":9092", "h:99999"],
    "KAFKA_CONTEXT_REQUEST_TOPIC": ["a b", "x" * 300, "a/b"],
    "KAFKA_CONTEXT_RESPONSE_TOPIC_PREFIX": ["a\nb"],
    "KAFKA_SECURITY_PROTOCOL": ["ssl", "TLS"],
    "KAFKA_SASL_MECHANISM": ["GSSAPI"],
    "KAFKA_SSL_CA_FILE": ["/nowhere/ca.pem"],
    "KAFKA_ALLOW_INSECURE": ["perhaps"],
    "KAFKA_CONNECT_TIMEOUT_SECONDS": ["0", "-1", "soon", "nan", "inf"],
    "KAFKA_SEND_TIMEOUT_SECONDS": ["0"],
    "PEER_CONTEXT_ENABLED": ["perhaps"],
    "PEER_CONTEXT_TIMEOUT_SECONDS": ["0", "-5", "x", "inf"],
    "PEER_CONTEXT_MOCK_MODE": ["sometimes"],
    "PEER_CONTEXT_REQUESTER_ID": ["../x", "a.b", "x" * 65, "\N{CYRILLIC SMALL LETTER A}"],
    "PEER_CONTEXT_PROCESS_ID": ["a b"],
    "PEER_CONTEXT_DATABASE_URL": ["mysql://x/y", "events.db"],
    "PEER_CONTEXT_CONTROL_DATABASE_URL": ["mysql://x/y"],
    "PEER_CONTEXT_MAX_MESSAGE_BYTES": ["10", "99999999"],
    "PEER_CONTEXT_MAX_INTERACTIONS": ["0"],
    "PEER_CONTEXT_MAX_RESPONDERS": ["0"],
    "PEER_CONTEXT_INFERENCE_TOKENS": ["0", "255", "many", "99999999"],
    "PEER_CONTEXT_INFERENCE_TIMEOUT_SECONDS": ["0", "-1", "nan", "inf"],
}


def settings_of(variable: str) -> type[EnvironmentSettings]:
    return KafkaConfig if variable.startswith("KAFKA_") else PeerContextSettings


@pytest.mark.parametrize("variable", DEFAULTS)
def test_each_variable_of_the_document_has_its_default(variable: str) -> None:
    settings, field, default = DEFAULTS[variable]
    assert getattr(settings(), field) == default
    assert settings.variable_of(field) == variable


@pytest.mark.parametrize(
    ("variable", "value"),
    [(variable, value) for variable, values in WRONG.items() for value in values if value],
)
def test_a_wrong_value_is_refused_and_its_variable_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable):
        settings_of(variable)()


def test_what_is_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1, localhost:2")
    monkeypatch.setenv("PEER_CONTEXT_ENABLED", "false")
    monkeypatch.setenv("PEER_CONTEXT_TIMEOUT_SECONDS", "2.5")
    settings = PeerContextSettings()
    assert settings.kafka.bootstrap_servers == "127.0.0.1:1,localhost:2"
    assert settings.enabled is False
    assert settings.timeout_seconds == 2.5


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "")
    assert KafkaConfig().bootstrap_servers == "localhost:9092"


def test_foreign_variables_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    monkeypatch.setenv("TIMEOUT_SECONDS", "-1")
    monkeypatch.setenv("BOOTSTRAP_SERVERS", "nonsense")
    assert PeerContextSettings().kafka.ssl_cert_file is None


def test_what_is_given_by_name_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_CONTEXT_MOCK_MODE", "always")
    assert PeerContextSettings(mock_mode="never").mock_mode == "never"


def test_a_setting_that_does_not_exist_is_refused_and_the_others_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"no setting bootstrap.*it has allow_insecure"):
        KafkaConfig(bootstrap="x")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        KafkaConfig().bootstrap_servers = "x:1"


def test_credentials_are_asked_for_where_sasl_needs_them() -> None:
    with pytest.raises(ConfigurationError, match="KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"):
        KafkaConfig(security_protocol="SASL_SSL", sasl_username="me")


def test_certificate_and_key_go_together() -> None:
    with pytest.raises(ConfigurationError, match="KAFKA_SSL_KEY_FILE"):
        KafkaConfig(ssl_cert_file=__file__)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SASL_PLAINTEXT"])
def test_nothing_leaves_this_host_in_clear_unless_that_is_allowed(protocol: str) -> None:
    credentials = {"sasl_username": "me", "sasl_password": "secret"}
    remote = {"bootstrap_servers": "127.0.0.1:1,kafka.example:9092", "security_protocol": protocol}
    with pytest.raises(ConfigurationError, match="KAFKA_ALLOW_INSECURE"):
        KafkaConfig(**remote, **credentials)
    assert KafkaConfig(**remote, **credentials, allow_insecure=True)


@pytest.mark.parametrize("server", ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1"])
def test_this_host_needs_no_encryption(server: str) -> None:
    assert KafkaConfig(bootstrap_servers=server).bootstrap_servers == server


def test_secrets_are_in_no_error_and_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2-hunter2"  # noqa: S105 - made up
    settings = PeerContextSettings(
        kafka=KafkaConfig(sasl_password=SecretStr(secret)),
        database_url=f"postgresql://me:{secret}@localhost/x",
        control_database_url=f"postgresql://me:{secret}@localhost/x",
    )
    assert secret not in repr(settings) + str(settings)
    monkeypatch.setenv("PEER_CONTEXT_DATABASE_URL", f"mysql://me:{secret}@localhost/x")
    with pytest.raises(ConfigurationError) as caught:
        PeerContextSettings()
    assert secret not in str(caught.value)


def test_the_control_database_is_the_event_stores_by_default() -> None:
    assert PeerContextSettings().control_url == "sqlite:///peer_context.db"
    other = PeerContextSettings(control_database_url="postgresql://localhost/control")
    assert other.control_url == "postgresql://localhost/control"


def test_a_response_topic_is_the_prefix_and_a_legal_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_response_topic("reconstructor-1") == "agent.context.response.reconstructor-1"
    monkeypatch.setenv("KAFKA_CONTEXT_RESPONSE_TOPIC_PREFIX", "team.answers")
    assert get_kafka_config().get_response_topic("r") == "team.answers.r"
    for illegal in ("../x", "a.b", "", "x" * 65, "a\n"):
        with pytest.raises(ProtocolError, match="requester_id"):
            get_response_topic(illegal)
