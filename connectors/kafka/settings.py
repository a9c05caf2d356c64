"""What the settings file says of a Kafka source."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from connectors.secret import Name, SecretPlace, Settings


def _topic(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", name):
        raise ValueError("expected the name of a topic: letters, digits, dots, dashes and underscores")
    return name


def _broker(address: str) -> str:
    if not re.fullmatch(r"[^\s,]+:\d{1,5}", address):
        raise ValueError("expected host:port")
    return address


Topic = Annotated[str, AfterValidator(_topic)]
Broker = Annotated[str, AfterValidator(_broker)]


class Tls(Settings):
    """TLS to the brokers. `ca` in place of the system's authorities; `certificate` and `key` where clients show one."""

    ca: Path | None = Field(default=None, examples=["/etc/kafka/ca.pem"])
    """CA certificates (PEM) that replace the system's."""

    certificate: Path | None = Field(default=None, examples=["/run/secrets/kafka/tls.crt"])
    """Client certificate (PEM)."""

    key: Path | None = Field(default=None, examples=["/run/secrets/kafka/tls.key"])
    """Key of the client certificate (PEM)."""

    key_password: SecretPlace | None = Field(default=None, examples=[{"file": "/run/secrets/kafka/key-password"}])
    """Passphrase of the key."""

    verify_hostname: bool = True
    """Whether the host name in the broker's certificate is checked."""


class Sasl(Settings):
    """A user and password. PLAIN sends the password as it is: only over TLS."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(examples=["SCRAM-SHA-512"])
    """SASL mechanism."""

    username: Name = Field(examples=["twin"])
    """The user."""

    password: SecretPlace = Field(examples=[{"env": "KAFKA_PASSWORD"}])
    """Password."""


def _start(value: object) -> object:
    """A time as unix seconds; the two words as they are."""
    if value in ("earliest", "latest"):
        return value
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("expected earliest, latest, or a time with its zone, such as 2026-01-31T08:00:00Z")
    return value.timestamp()


class KafkaSettings(Settings):
    """Topics of request records (docs/telemetry.md) or of OpenTelemetry spans, mixed at will.

    Reading begins at `start` where no checkpoint says otherwise; a time (here in unix seconds) is one of Kafka's time
    stamps. The group is only committed to, for those who watch its lag. `buffer_bytes` bounds what is read ahead.
    """

    type: Literal["kafka"] = "kafka"
    """Kind of source."""

    brokers: Annotated[tuple[Broker, ...], Field(min_length=1)] = Field(examples=[["kafka-0:9092", "kafka-1:9092"]])
    """Bootstrap brokers, as host:port."""

    topics: Annotated[tuple[Topic, ...], Field(min_length=1)] = Field(examples=[["llm-requests"]])
    """Topics with request records or OpenTelemetry spans. A topic can contain both."""

    name: Name | None = Field(default=None, examples=["main"])
    """Name of the source in metrics and logs. The default is its topics."""

    pool: Name | None = Field(default=None, examples=["chat"])
    """Pool of records that name no pool, such as spans."""

    start: Annotated[Literal["earliest", "latest"] | float, PlainValidator(_start)] = Field(
        default="latest", examples=["2026-01-31T08:00:00Z"]
    )
    """Where reading starts without a checkpoint: earliest, latest, or a time with its zone."""

    group: Name | None = "kavier-twin"
    """Consumer group to which offsets are committed, for lag monitoring only. Null disables commits."""

    tls: Tls | None = Field(default=None, examples=[{"ca": "/etc/kafka/ca.pem"}])
    """TLS to the brokers. {} trusts the system's CA certificates."""

    sasl: Sasl | None = Field(
        default=None,
        examples=[{"mechanism": "SCRAM-SHA-512", "username": "twin", "password": {"env": "KAFKA_PASSWORD"}}],
    )
    """User and password."""

    dead_letter_topic: Topic | None = Field(default=None, examples=["llm-requests-rejected"])
    """Topic for rejected records: their position and the reason, never their content."""

    buffer_bytes: Annotated[int, Field(ge=2**20)] = 64 * 2**20
    """Maximum number of records read ahead."""

    @model_validator(mode="after")
    def _letters_do_not_come_back(self) -> KafkaSettings:
        if self.dead_letter_topic in self.topics:
            raise ValueError("dead_letter_topic is one of topics: rejected records would be read repeatedly")
        return self

    def problems(self) -> list[str]:
        missing = super().problems()
        if find_spec("kafka") is None:
            missing.append("type: reading Kafka needs kafka-python; install it with: pip install 'kavier-twin[kafka]'")
        return missing
