"""`kavier-twin replay`: a recording played as if it were a fleet, for those who have none at hand."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from connectors.prometheus.names import CACHE_CONFIG, COUNTERS, GAUGES
from connectors.traces import Trace
from kavier_twin.commands.process import StopSignals
from kavier_twin.errors import UserError, set_up_logging
from kavier_twin.recordings.recording import read_recording, recorded_engine
from kavier_twin.recordings.replay_source import ReplaySource
from kavier_twin.simulation.settings import EngineSettings
from kavier_twin.telemetry import EngineSample, TelemetryRecord

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.05
PAUSE_SECONDS: Final = 10.0  # between two rounds
_HASHES: Final = 2**64
_ODD: Final = 0x9E3779B97F4A7C15  # the golden ratio's bits: its multiples are far apart

Send = Callable[[TelemetryRecord], None]


_EXAMPLES = """examples:
  kavier-twin replay --kafka kafka:9092
  kavier-twin replay --kafka kafka:9092 --topic llm-requests --pool chat --metrics-port 8000
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "replay",
        help="play a recording into Kafka as if it were a fleet",
        description="Play a recording of a real vLLM in real time, in a loop: send its requests to a Kafka topic and "
        "serve its metrics as a vLLM server would.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kafka", required=True, metavar="HOST:PORT", help="address of a broker (needs the extra kafka)"
    )
    parser.add_argument("--topic", default="llm-requests", help="topic (default llm-requests)")
    parser.add_argument("--pool", default="default", help="pool named in the records (default: default)")
    parser.add_argument("--pod", default="vllm-0", help="pod named in the records (default vllm-0)")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="port for vLLM's metrics")
    parser.add_argument("--once", action="store_true", help="stop at the end of the recording")
    parser.add_argument("--recording", type=Path, metavar="DIR", help="recording to play (requests.jsonl, meta.json)")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if find_spec("kafka") is None:
        raise UserError("replay needs kafka-python; install it with: pip install 'kavier-twin[kafka]'")
    if args.metrics_port is not None and not 0 < args.metrics_port <= 65535:
        raise UserError(f"--metrics-port {args.metrics_port}: expected 1 to 65535")
    set_up_logging("info")
    trace, samples = read_recording(args.recording)
    fleet = RecordedFleet(trace, samples, args.pool, args.pod)
    if args.metrics_port is not None:
        registry = CollectorRegistry()
        registry.register(EnginePage(fleet, recorded_engine(trace)))
        try:
            start_http_server(args.metrics_port, registry=registry)
        except OSError as error:
            raise UserError(f"--metrics-port {args.metrics_port}: {error.strerror}; choose another") from None
    with StopSignals() as signals, _Topic(args.kafka, args.topic) as topic:

        def stopped() -> bool:
            return signals.received is not None

        while not stopped():
            log.info("round %d: %d requests into %s", fleet.rounds + 1, len(trace.records), args.topic)
            fleet.play(topic.send, stopped)
            if args.once:
                break
            _sleep(PAUSE_SECONDS, stopped)
        return signals.exit_status


class RecordedFleet:
    """Plays a recording in rounds, each as of now.

    Each round has content and requests of its own, so that none finds in a cache what the last one left there: as in
    the recording, which began with an empty cache.
    """

    def __init__(self, trace: Trace, samples: list[EngineSample], pool: str, pod: str) -> None:
        self.rounds = 0
        self.sample: EngineSample | None = None
        self.counted: dict[str, float] = {}  # by all rounds before this one
        self._trace = trace
        self._samples = samples
        self._pool = pool
        self._pod = pod

    def play(self, send: Send, stopped: Callable[[], bool]) -> None:
        """One round: hands out each record when its time comes, until the end or `stopped`."""
        if self.sample is not None:
            self.counted = {name: self.count(name) for name in COUNTERS}
        source = ReplaySource(self._trace.records, self._samples)
        source.start()
        shift = time.time() - source.start_seconds
        while not stopped() and not source.exhausted:
            for record in source.poll(500):
                if isinstance(record, EngineSample):
                    self.sample = record
                else:
                    send(self._as_of_now(record, shift))
            time.sleep(POLL_SECONDS)
        self.rounds += 1

    def count(self, counter: str) -> float:
        """A counter of the engine, over all rounds."""
        return self.counted.get(counter, 0.0) + float(getattr(self.sample, counter, None) or 0.0)

    def _as_of_now(self, record: Any, shift: float) -> TelemetryRecord:
        mark = self.rounds * _ODD % _HASHES
        changed: dict[str, Any] = {
            "id": f"{record.id}-{self.rounds}",
            "time_seconds": record.time_seconds + shift,
            "pool": self._pool,
            "block_hashes": tuple(value ^ mark for value in record.block_hashes),
        }
        if record.kind == "request_seen":
            changed["pod"] = self._pod
            changed["session"] = record.session and f"{record.session}-{self.rounds}"
        moved: TelemetryRecord = record.model_copy(update=changed)
        return moved


class EnginePage(Collector):
    """What vLLM's `/metrics` would say now, as far as the recording's samples tell."""

    def __init__(self, fleet: RecordedFleet, engine: EngineSettings) -> None:
        self._fleet = fleet
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """As vLLM names it."""
        sample = self._fleet.sample
        labels = {"engine": "0", "model_name": "recorded"}
        config = InfoMetricFamily(CACHE_CONFIG.removesuffix("_info"), "The cache's settings.")
        told = {name: str(getattr(self._engine, name)) for name in ("num_gpu_blocks", "block_size")}
        config.add_metric([], {"engine": "0", **told})
        yield config
        if sample is None:
            return
        for field, names in GAUGES.items():
            gauge = GaugeMetricFamily(names[0], f"Recorded {field}.", labels=list(labels))
            gauge.add_metric(list(labels.values()), getattr(sample, field) or 0.0)
            yield gauge
        for field, names in COUNTERS.items():
            if getattr(sample, field) is None:
                continue
            counter = CounterMetricFamily(names[0], f"Recorded {field}.", labels=list(labels))
            counter.add_metric(list(labels.values()), self._fleet.count(field))
            yield counter


class _Topic:
    """Where records go, keyed by request so that its arrival comes before its end."""

    def __init__(self, broker: str, topic: str) -> None:
        from kafka import KafkaProducer  # an extra
        from kafka.errors import KafkaError

        logging.getLogger("kafka").setLevel(logging.CRITICAL)
        self._topic = topic
        try:
            self._producer = KafkaProducer(bootstrap_servers=broker, linger_ms=20, max_block_ms=30_000)
            self._producer.partitions_for(topic)
        except (KafkaError, ValueError) as error:
            raise UserError(
                f"--kafka {broker}: topic {topic} cannot be written ({type(error).__name__}); give a broker's "
                "host:port, and create the topic where the broker does not"
            ) from None

    def __enter__(self) -> _Topic:
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.flush(timeout=10)
        self._producer.close(timeout=10)

    def send(self, record: TelemetryRecord) -> None:
        """Put a record into the topic."""
        at = int(record.time_seconds * 1000)
        value = record.model_dump_json(exclude_none=True).encode()
        self._producer.send(self._topic, value, str(getattr(record, "id", "")).encode(), timestamp_ms=at)


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopped():
        time.sleep(POLL_SECONDS)
