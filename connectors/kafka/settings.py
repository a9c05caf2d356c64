"""What the settings file says of a Kafka source."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from connectors.secret import Secret, SecretError

Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SecretPlace(_Settings):
    """Where a password lies: an environment variable, or a file. Never the password itself."""

    env: Annotated[str, Field(min_length=1)] | None = None
    file: Path | None = None

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

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    key_password: SecretPlace | None = None
    verify_hostname: bool = True


class Sasl(_Settings):
    """A user and password. PLAIN sends the password as it is: only over TLS."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
    username: Annotated[str, Field(min_length=1)]
    password: SecretPlace


class KafkaSettings(_Settings):
    """Topics of request records (docs/telemetry.md) or of OpenTelemetry spans, mixed at will.

    Reading begins at `start` where no checkpoint says otherwise: a time is that of Kafka's time stamps. The group is
    only committed to, for those who watch its lag. `buffer_bytes` bounds what is read ahead of the twin.
    """

    type: Literal["kafka"] = "kafka"
    brokers: Annotated[tuple[Annotated[str, Field(pattern=r"^[^\s,]+:\d{1,5}$")], ...], Field(min_length=1)]
    topics: Annotated[tuple[Topic, ...], Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] | None = None
    start: Literal["earliest", "latest"] | AwareDatetime = "latest"
    group: Annotated[str, Field(min_length=1)] | None = "kavier-twin"
    tls: Tls | None = None
    sasl: Sasl | None = None
    dead_letter_topic: Topic | None = None
    buffer_bytes: Annotated[int, Field(ge=2**20)] = 64 * 2**20

    @model_validator(mode="after")
    def _letters_do_not_come_back(self) -> KafkaSettings:
        if self.dead_letter_topic in self.topics:
            raise ValueError("dead_letter_topic is one of topics: rejected records would be read again and again")
        return self

    @property
    def start_at(self) -> Literal["earliest", "latest"] | float:
        """Where to begin; a time as unix seconds."""
        return self.start.astimezone(UTC).timestamp() if isinstance(self.start, datetime) else self.start

    def under(self, directory: Path) -> KafkaSettings:
        """With relative paths counted from `directory`."""
        found: KafkaSettings = _with_paths(self, directory)
        return found

    def problems(self) -> list[str]:
        """What is missing on this machine, each as `field: what and the way out`."""
        found = []
        if find_spec("kafka") is None:
            found.append("type: reading Kafka needs kafka-python; install it with: pip install 'kavier-twin[kafka]'")
        for field in ("ca", "certificate", "key"):
            path = getattr(self.tls, field, None)
            if path is not None and not path.is_file():
                found.append(f"tls.{field}: {path} is not a file; correct it")
        secrets = {
            "tls.key_password": self.tls and self.tls.key_password,
            "sasl.password": self.sasl and self.sasl.password,
        }
        for field, place in secrets.items():
            try:
                if place:
                    place.secret.read()
            except SecretError as error:
                found.append(f"{field}: {error}; set it")
        return found


def _with_paths(model: Any, directory: Path) -> Any:
    changed = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Path):
            changed[name] = directory / value
        elif isinstance(value, BaseModel):
            changed[name] = _with_paths(value, directory)
    return model.model_copy(update=changed)
