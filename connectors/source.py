"""What the twin reads its telemetry from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

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

    @property
    def trouble(self) -> str:
        """What keeps the source from reading now, in words; empty while nothing does."""

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """At most `max_records` records that are there now. Never waits; an outage is an empty list.

        What came as one piece and cannot be read in parts may be more, and then comes alone.
        """

    def rejected(self) -> Mapping[str, int]:
        """How many pieces of input made no record, by reason."""

    def close(self) -> None:
        """Let go of files and connections. May be called twice; afterwards `poll` gives nothing."""


@runtime_checkable
class Noting(Protocol):
    """A source that reads something beside what it is there for, and says why where it cannot."""

    def power_notes(self) -> list[str]:
        """Why no GPU's power is read, a line each; empty where it is, or is not asked for."""


@runtime_checkable
class Seekable(Protocol):
    """A source that can go on where it stood: what a checkpoint needs."""

    def positions(self) -> dict[str, Any]:
        """Where it stands after the records handed out so far, as JSON types."""

    def seek(self, positions: dict[str, Any]) -> None:
        """Go on after the records that had been handed out when `positions` was taken. Before the first poll.

        Where that place is gone the source says so in the log and goes on at the nearest one there is.
        """


@runtime_checkable
class LogSource(Seekable, Protocol):
    """A source that can be read again from any position kept: a log."""

    @property
    def lag_records(self) -> float:
        """Records in the log that were not handed out yet, as of the last look; NaN before it."""

    def lost(self) -> Mapping[str, int]:
        """Records that were no longer in the log when they were to be read, by reason."""
