"""Kafka clients as the settings ask for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from connectors.dead_letters import letter
from connectors.kafka.settings import KafkaSettings
from connectors.traces.base import Malformed

log = logging.getLogger(__name__)
# The client's own log shows what it sends, a password among it, and tells of one outage in a hundred lines. What an
# operator has to know the source tells.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

ANSWER_MS: Final = 10_000  # that a broker is given
_FETCH_BYTES: Final = 16 * 2**20  # of all partitions together
_PARTITION_FETCH_BYTES: Final = 2**18  # fetched again where a partition was held back; a larger message comes alone

Offsets = Mapping[TopicPartition, int]


def connection(settings: KafkaSettings, api_version: tuple[int, ...] | None) -> dict[str, Any]:
    """What every client needs to reach the brokers. Raises SecretError."""
    tls, sasl = settings.tls, settings.sasl
    options: dict[str, Any] = {
        "bootstrap_servers": list(settings.brokers),
        "client_id": "kavier-twin",
        "security_protocol": f"{'SASL_' if sasl else ''}{'SSL' if tls else 'PLAINTEXT'}",
        "reconnect_backoff_ms": 100,
        "reconnect_backoff_max_ms": 10_000,
        "request_timeout_ms": ANSWER_MS,
        "bootstrap_timeout_ms": ANSWER_MS,
        "api_version": api_version,
    }
    if tls:
        options |= {
            "ssl_cafile": str(tls.ca) if tls.ca else None,
            "ssl_certfile": str(tls.certificate) if tls.certificate else None,
            "ssl_keyfile": str(tls.key) if tls.key else None,
            "ssl_password": tls.key_password.read() if tls.key_password else None,
            "ssl_check_hostname": tls.verify_hostname,
        }
    if sasl:
        options |= {
            "sasl_mechanism": sasl.mechanism,
            "sasl_plain_username": sasl.username,
            "sasl_plain_password": sasl.password.read(),
        }
    return options


def make_consumer(options: Mapping[str, Any], metadata_seconds: float) -> KafkaConsumer:
    """A consumer without a group: partitions are assigned, positions are ours, and an offset that is gone is told.

    Connects. Raises KafkaError, OSError.
    """
    return KafkaConsumer(
        **options,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        allow_auto_create_topics=False,
        isolation_level="read_committed",
        metadata_max_age_ms=int(metadata_seconds * 1000),
        fetch_max_bytes=_FETCH_BYTES,
        max_partition_fetch_bytes=_PARTITION_FETCH_BYTES,
    )


class GroupOffsets:
    """Commits offsets to a group for those who watch its lag. Nothing here relies on them: a failure is only logged.

    It has a client of its own, as a consumer that has a group stops reading while the group's coordinator is away.
    """

    def __init__(self, group: str, options: Mapping[str, Any]) -> None:
        self._group = group
        self._consumer = KafkaConsumer(**options, group_id=group, enable_auto_commit=False)
        self._failed = False

    def commit(self, offsets: Offsets) -> None:
        """Send; returns at once."""
        committed = {partition: OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}
        self._consumer.commit_async(committed, callback=self._answered)

    def close(self) -> None:
        self._consumer.close(autocommit=False, timeout_ms=1_000)

    def _answered(self, _: object, answer: object) -> None:
        failed = isinstance(answer, Exception)
        if failed and not self._failed:
            log.warning("cannot commit offsets to the group %s (%s); its lag is not updated", self._group, answer)
        self._failed = failed


class LetterTopic:
    """A topic of what was rejected, see `letter`; how long it keeps them is the topic's own setting.

    A letter that Kafka does not take is counted in `lost`. After one that could not even be sent, the next ones are
    lost at once for a while, so that reading does not slow down.
    """

    _PAUSE_LETTERS: Final = 1_000

    def __init__(self, topic: str, options: Mapping[str, Any]) -> None:
        self.lost = 0
        self._topic = topic
        self._skip = 0
        self._producer = KafkaProducer(
            **options, acks=1, linger_ms=50, max_block_ms=1_000, allow_auto_create_topics=False
        )

    def write(self, where: Mapping[str, str | int], what: Malformed, length: int) -> None:
        """Send a note."""
        if self._skip:
            self._skip -= 1
            self._lose(None)
            return
        try:
            self._producer.send(self._topic, letter(where, what, length)).add_errback(self._lose)
        except KafkaError as error:
            self._skip = self._PAUSE_LETTERS
            self._lose(error)

    def close(self) -> None:
        self._producer.close(timeout=1.0)

    def _lose(self, error: object) -> None:
        if not self.lost:
            log.warning("cannot write dead letters to topic %s (%s)", self._topic, error)
        self.lost += 1
