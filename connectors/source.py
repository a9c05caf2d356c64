"""What the twin reads its telemetry from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from kavier_twin.telemetry import TelemetryRecord


@runtime_checkable
class Source(Protocol):
    """A stream of telemetry records that is asked for what has come in. One thread at a time may ask."""

    @property
    def name(self) -> str:
        """What to call the source in logs and metrics."""

    @property
    def last_record_seconds(self) -> float | None:
        """Event time of the newest record handed out, or None before the first."""

    @property
    def exhausted(self) -> bool:
        """Whether no record will ever come again."""

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """At most `max_records` records that are there now. Never waits; an outage is an empty list.

        What came as one piece and cannot be read in parts may be more, and then comes alone.
        """

    def rejected(self) -> Mapping[str, int]:
        """How many pieces of input made no record, by reason."""

    def close(self) -> None:
        """Let go of files and connections. May be called twice; afterwards `poll` gives nothing."""


@runtime_checkable
class LiveSource(Source, Protocol):
    """A source that fetches over the network, and says how it fares."""

    @property
    def trouble(self) -> str:
        """What keeps it from fetching now, in words; empty while all is well."""


@runtime_checkable
class LogSource(LiveSource, Protocol):
    """A source that can be read again from any position kept: a log."""

    @property
    def lag_records(self) -> float:
        """Records in the log that were not handed out yet, as of the last look; NaN before it."""

    def lost(self) -> Mapping[str, int]:
        """Records that were no longer in the log when they were to be read, by reason."""

    def positions(self) -> dict[str, int]:
        """Where the log goes on after what was handed out, in JSON's types: for a checkpoint."""

    def seek(self, positions: Mapping[str, int]) -> None:
        """Begin at these positions. Raises RuntimeError after the first poll, ValueError for what is no position."""
