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
        raise ValueError("it should be the name of a topic: letters, digits, dots, dashes and underscores")
    return name


def _broker(address: str) -> str:
    if not re.fullmatch(r"[^\s,]+:\d{1,5}", address):
        raise ValueError("it should be host:port")
    return address


Topic = Annotated[str, AfterValidator(_topic)]
Broker = Annotated[str, AfterValidator(_broker)]


class Tls(Settings):
    """TLS to the brokers. `ca` in place of the system's authorities; `certificate` and `key` where clients show one."""

    ca: Path | None = Field(default=None, examples=["/etc/kafka/ca.pem"])
    """Certificate authorities in place of the system's (PEM)."""

    certificate: Path | None = Field(default=None, examples=["/run/secrets/kafka/tls.crt"])
    """The certificate to show the brokers (PEM)."""

    key: Path | None = Field(default=None, examples=["/run/secrets/kafka/tls.key"])
    """That certificate's key (PEM)."""

    key_password: SecretPlace | None = Field(default=None, examples=[{"file": "/run/secrets/kafka/key-password"}])
    """What the key is encrypted with."""

    verify_hostname: bool = True
    """Whether a broker's certificate must name its host."""


class Sasl(Settings):
    """A user and password. PLAIN sends the password as it is: only over TLS."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(examples=["SCRAM-SHA-512"])
    """How the password is shown."""

    username: Name = Field(examples=["twin"])
    """The user."""

    password: SecretPlace = Field(examples=[{"env": "KAFKA_PASSWORD"}])
    """That user's password."""


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
        raise ValueError("it should be earliest, latest, or a time with its zone, such as 2026-01-31T08:00:00Z")
    return value.timestamp()


class KafkaSettings(Settings):
    """Topics of request records (docs/telemetry.md) or of OpenTelemetry spans, mixed at will.

    Reading begins at `start` where no checkpoint says otherwise; a time (here in unix seconds) is one of Kafka's time
    stamps. The group is only committed to, for those who watch its lag. `buffer_bytes` bounds what is read ahead.
    """

    type: Literal["kafka"] = "kafka"
    """The kind of source."""

    brokers: Annotated[tuple[Broker, ...], Field(min_length=1)] = Field(examples=[["kafka-0:9092", "kafka-1:9092"]])
    """Brokers to begin with, host:port."""

    topics: Annotated[tuple[Topic, ...], Field(min_length=1)] = Field(examples=[["llm-requests"]])
    """Topics of request records or of OpenTelemetry spans, mixed at will."""

    name: Name | None = Field(default=None, examples=["main"])
    """What metrics and the log call the source; its topics unless given."""

    pool: Name | None = Field(default=None, examples=["chat"])
    """The pool of records that name none, as spans do."""

    start: Annotated[Literal["earliest", "latest"] | float, PlainValidator(_start)] = Field(
        default="latest", examples=["2026-01-31T08:00:00Z"]
    )
    """Where reading begins without a checkpoint: earliest, latest, or a time with its zone."""

    group: Name | None = "kavier-twin"
    """The consumer group, only committed to, for those who watch its lag; null for none."""

    tls: Tls | None = Field(default=None, examples=[{"ca": "/etc/kafka/ca.pem"}])
    """TLS to the brokers; {} trusts the system's authorities."""

    sasl: Sasl | None = Field(
        default=None,
        examples=[{"mechanism": "SCRAM-SHA-512", "username": "twin", "password": {"env": "KAFKA_PASSWORD"}}],
    )
    """User and password."""

    dead_letter_topic: Topic | None = Field(default=None, examples=["llm-requests-rejected"])
    """A topic that notes each rejected record: where and why, never its content."""

    buffer_bytes: Annotated[int, Field(ge=2**20)] = 64 * 2**20
    """Read ahead of the twin at most."""

    @model_validator(mode="after")
    def _letters_do_not_come_back(self) -> KafkaSettings:
        if self.dead_letter_topic in self.topics:
            raise ValueError("dead_letter_topic is one of topics: rejected records would be read again and again")
        return self

    def problems(self) -> list[str]:
        missing = super().problems()
        if find_spec("kafka") is None:
            missing.append("type: reading Kafka needs kafka-python; install it with: pip install 'kavier-twin[kafka]'")
        return missing
