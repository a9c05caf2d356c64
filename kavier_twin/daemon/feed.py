"""A source, and the pools that its records go to."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from connectors.source import LogSource, Noting, Source
from kavier_twin.serve.models import SourceState
from kavier_twin.telemetry import RequestSeen, TelemetryRecord

log = logging.getLogger(__name__)

UNNAMED_POOL: Final[str] = RequestSeen.model_fields["pool"].default  # what a record says that names none
UNKNOWN_POOL: Final = "unknown-pool"
_NAMES_LOGGED: Final = 10


@dataclass
class Feed:
    """`pool` gets the records that name none; empty where only one pool is there, or every record names its own.

    `every_seconds` is how often a source speaks that always has something to tell: metrics, not requests. What
    `checks_only` corrects and checks the mirror, which can do without it.
    """

    source: Source
    pool: str = ""
    every_seconds: float | None = None
    checks_only: bool = False
    refused: Counter[str] = field(default_factory=Counter)  # records that no pool takes, by reason
    _unknown: set[str] = field(default_factory=set)

    def poll(self, max_records: int, pools: Collection[str]) -> tuple[list[tuple[str, TelemetryRecord]], bool]:
        """What the source has now, each record with its pool, and whether there may be more at once.

        Records of none of the `pools` are counted and left out.
        """
        alone = next(iter(pools)) if len(pools) == 1 else ""
        found = []
        polled = self.source.poll(max_records)
        for record in polled:
            pool = record.pool
            if pool not in pools and pool == UNNAMED_POOL:
                pool = self.pool or alone
            if pool in pools:
                found.append((pool, record))
            else:
                self._refuse(pool, pools)
        return found, len(polled) >= max_records

    def feeds(self, pool: str) -> bool:
        """Whether records of this pool may come from here."""
        return self.pool in ("", pool)

    @property
    def state(self) -> SourceState:
        """What is shown of it."""
        source = self.source
        from_log = source if isinstance(source, LogSource) else None
        return SourceState(
            source.name,
            source.exhausted,
            {**source.rejected(), **self.refused},
            trouble=source.trouble,
            checks_only=self.checks_only,
            last_record_seconds=math.nan if source.last_record_seconds is None else source.last_record_seconds,
            lag_records=from_log.lag_records if from_log else math.nan,
            lost=dict(from_log.lost()) if from_log else {},
        )

    @property
    def power_notes(self) -> list[str]:
        """Why it reads no GPU's power; empty where it does, or is not asked to."""
        return self.source.power_notes() if isinstance(self.source, Noting) else []

    def _refuse(self, pool: str, pools: Collection[str]) -> None:
        self.refused[UNKNOWN_POOL] += 1
        if pool not in self._unknown and len(self._unknown) < _NAMES_LOGGED:
            self._unknown.add(pool)
            log.warning(
                "source %s: records of pool %r are ignored; configured pools: %s",
                self.source.name,
                pool or UNNAMED_POOL,
                ", ".join(pools),
            )
