"""Passwords and certificates, right and wrong, on a real Kafka."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from services.kafka import KafkaServer

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.errors import ConfigurationError
from langgraph_peerctx.messaging.kafka_transport import KafkaTransport
from langgraph_peerctx.messaging.mock_transport import create_transport
from langgraph_peerctx.messaging.transport import TopicSpec

pytestmark = pytest.mark.kafka

PASSWORD = "correct-horse-battery"  # noqa: S105 - made up
LOGIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"


def keystore(authority: trustme.CA, host: str, folder: Path) -> Path:
    """Write key and certificate as Kafka wants them: one PEM file, PKCS 8."""
    certificate = authority.issue_cert(host)
    pem = certificate.private_key_pem.bytes()
    key = serialization.load_pem_private_key(pem, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    file = folder / f"{host}.pem"
    file.write_bytes(key + chain)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "another-ca.pem"))
    return authority


@pytest.fixture(scope="module")
def secured(kafka: KafkaServer, authority: trustme.CA, folder: Path) -> Iterator[KafkaServer]:
    assert kafka.bootstrap_servers
    listeners = {"SASL": "SASL_PLAINTEXT", "TLS": "SSL", "BOTH": "SASL_SSL", "ALIAS": "SSL"}
    properties = {"sasl.enabled.mechanisms": "PLAIN"}
    for name in ("sasl", "both"):
        properties[f"listener.name.{name}.plain.sasl.jaas.config"] = (
            f'{LOGIN} user_agent="{PASSWORD}";'
        )
    for name, host in (("tls", "127.0.0.1"), ("both", "127.0.0.1"), ("alias", "elsewhere.example")):
        properties[f"listener.name.{name}.ssl.keystore.type"] = "PEM"
        properties[f"listener.name.{name}.ssl.keystore.location"] = str(
            keystore(authority, host, folder)
        )
    with KafkaServer(properties, listeners=listeners) as server:
        yield server


def config(server: KafkaServer, listener: str, **settings: Any) -> KafkaConfig:
    protocol = {"SASL": "SASL_PLAINTEXT", "BOTH": "SASL_SSL"}.get(listener, "SSL")
    if listener in {"SASL", "BOTH"}:
        settings = {"sasl_username": "agent", "sasl_password": PASSWORD} | settings
    address = server.address(listener)
    return KafkaConfig(bootstrap_servers=address, security_protocol=protocol, **settings)


@pytest.mark.parametrize("listener", ["SASL", "TLS", "BOTH"])
async def test_the_right_password_and_certificate_are_let_in(
    secured: KafkaServer, folder: Path, listener: str
) -> None:
    trust = {} if listener == "SASL" else {"ssl_ca_file": str(folder / "ca.pem")}
    transport = KafkaTransport(config(secured, listener, **trust))
    await transport.start()
    await transport.ensure_topics([TopicSpec(name=f"test.{listener}")])
    assert await transport.send(f"test.{listener}", b"x") == "acknowledged"
    await transport.close()


@pytest.mark.parametrize(
    ("listener", "wrong", "says"),
    [
        ("SASL", {"sasl_password": "wrong-wrong-wrong"}, "KAFKA_SASL_PASSWORD"),
        ("SASL", {"sasl_username": "nobody"}, "KAFKA_SASL_USERNAME"),
        ("SASL", {"sasl_mechanism": "SCRAM-SHA-256"}, "KAFKA_SASL_MECHANISM"),
        ("TLS", {"ssl_ca_file": "another-ca.pem"}, "KAFKA_SSL_CA_FILE"),
        ("ALIAS", {"ssl_ca_file": "ca.pem"}, "TLS handshake"),
        ("BOTH", {"ssl_ca_file": "ca.pem", "sasl_password": "wrong-wrong-wrong"}, "KAFKA_SASL"),
    ],
    ids=["password", "user", "mechanism", "authority", "host name", "password over TLS"],
)
@pytest.mark.parametrize("mode", ["never", "auto"])
async def test_the_wrong_one_is_refused_quickly_and_never_becomes_mock_mode(
    secured: KafkaServer, folder: Path, listener: str, wrong: dict[str, str], says: str, mode: str
) -> None:
    wrong = {
        name: str(folder / value) if name.endswith("_file") else value
        for name, value in wrong.items()
    }
    settings = PeerContextSettings(kafka=config(secured, listener, **wrong), mock_mode=mode)
    transport = create_transport(settings)
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=says) as caught:
        await transport.start()
    assert time.monotonic() - started < 6
    assert PASSWORD not in str(caught.value)
    assert "wrong-wrong-wrong" not in str(caught.value)
    await transport.close()


def test_a_certificate_that_is_none_is_said(folder: Path) -> None:
    (folder / "junk.pem").write_text("no certificate")
    with pytest.raises(ConfigurationError, match="KAFKA_SSL_CA_FILE"):
        KafkaTransport(
            KafkaConfig(security_protocol="SSL", ssl_ca_file=str(folder / "junk.pem"))
        )._client_options("localhost:9093")
