"""What the tap tells of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class TapMetrics:
    """The series of one tap, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kavier_twin_tap_requests",
            "Requests passed on or mirrored, by how they ended.",
            ["outcome"],
            registry=self.registry,
        )
        self.records = Counter(
            "kavier_twin_tap_records",
            "Records handed to Kafka or the file, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self.dropped = Counter(
            "kavier_twin_tap_dropped",
            "Records, or requests that make none, that were given up, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.without_hashes = Counter(
            "kavier_twin_tap_without_hashes",
            "Requests whose record has no block hashes, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.unrecorded = Counter(
            "kavier_twin_tap_unrecorded_requests",
            "Requests that generate and make no record, by path.",
            ["path"],
            registry=self.registry,
        )
        self.buffered = Gauge(
            "kavier_twin_tap_buffered_records",
            "Records that Kafka or the file does not have yet.",
            registry=self.registry,
        )
        self.added = Histogram(
            "kavier_twin_tap_added_seconds",
            "Time that the tap's own code kept a request and the first bytes of its answer.",
            buckets=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0),
            registry=self.registry,
        )
