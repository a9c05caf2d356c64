"""What the settings file says of a Kafka source."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from connectors.secret import Secret, SecretError


def _topic(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", name):
        raise ValueError("it should be the name of a topic: letters, digits, dots, dashes and underscores")
    return name


def _broker(address: str) -> str:
    if not re.fullmatch(r"[^\s,]+:\d{1,5}", address):
        raise ValueError("it should be host:port")
    return address


Model = TypeVar("Model", bound=BaseModel)
Topic = Annotated[str, AfterValidator(_topic)]
Broker = Annotated[str, AfterValidator(_broker)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SecretPlace(_Settings):
    """Where a password lies: an environment variable, or a file. Never the password itself."""

    env: Annotated[str, Field(min_length=1)] | None = Field(default=None, examples=["KAFKA_PASSWORD"])
    """The name of an environment variable."""

    file: Path | None = Field(default=None, examples=["/run/secrets/kafka/password"])
    """A file with nothing but the secret."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SecretPlace:
        if (self.env is None) == (self.file is None):
            raise ValueError("give exactly one of env (an environment variable) and file (a path)")
        return self

    @property
    def secret(self) -> Secret:
        """To be read when it is needed."""
        return Secret(self.env, self.file)


class Tls(_Settings):
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


class Sasl(_Settings):
    """A user and password. PLAIN sends the password as it is: only over TLS."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(examples=["SCRAM-SHA-512"])
    """How the password is shown."""

    username: Annotated[str, Field(min_length=1)] = Field(examples=["twin"])
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


class KafkaSettings(_Settings):
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

    name: Annotated[str, Field(min_length=1)] | None = Field(default=None, examples=["main"])
    """What metrics and the log call the source; its topics unless given."""

    pool: Annotated[str, Field(min_length=1)] | None = Field(default=None, examples=["chat"])
    """The pool of records that name none, as spans do."""

    start: Annotated[Literal["earliest", "latest"] | float, PlainValidator(_start)] = Field(
        default="latest", examples=["2026-01-31T08:00:00Z"]
    )
    """Where reading begins without a checkpoint: earliest, latest, or a time with its zone."""

    group: Annotated[str, Field(min_length=1)] | None = "kavier-twin"
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

    def with_paths_from(self, directory: Path) -> KafkaSettings:
        """With relative paths counted from `directory`."""
        return _with_paths(self, directory)

    def problems(self) -> list[str]:
        """What is missing on this machine, each as `field: what and the way out`."""
        found = []
        if find_spec("kafka") is None:
            found.append("type: reading Kafka needs kafka-python; install it with: pip install 'kavier-twin[kafka]'")
        for field in ("ca", "certificate", "key"):
            path = getattr(self.tls, field, None)
            if path is not None and not path.is_file():
                found.append(f"tls.{field}: {path} is not a file; correct it")
        secrets = {"sasl.password": self.sasl.password} if self.sasl else {}
        if self.tls and self.tls.key_password:
            secrets["tls.key_password"] = self.tls.key_password
        for field, place in secrets.items():
            try:
                place.secret.read()
            except SecretError as error:
                found.append(f"{field}: {error}; set it")
        return found


def _with_paths(model: Model, directory: Path) -> Model:
    changed: dict[str, object] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Path):
            changed[name] = directory / value
        elif isinstance(value, BaseModel):
            changed[name] = _with_paths(value, directory)
    return model.model_copy(update=changed)
