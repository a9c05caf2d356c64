"""What is known of a fleet beside its requests: real recordings of vLLM, replayed to a mirror.

KV events: the mirrored cache beside the real one every 10 s, at that very moment and within a quarter of a second of
it, and what taking over the real cache does to the hit ratio of the first minute after a start at half time. Metrics
alone: what the mirror makes of scrapes 6 s and 14 s apart, without any request.

    python -m benchmarks.observed DIRECTORY_OF_RECORDINGS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np

from benchmarks.common import report
from connectors.kv_events.wire import decode_batch
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.readings import parse_exposition
from connectors.traces import read_trace
from connectors.traces.recording import read_kv_events, read_metrics
from kavier_twin.mirror.fidelity.cache import TOLERANCE_SECONDS, CacheWatch
from kavier_twin.mirror.fidelity.windows import WindowScore, find_score
from kavier_twin.mirror.from_metrics import MetricsStream, mirror_settings
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import KvEventBatch, RequestFinished, RequestSeen

NAMES = ("chat-400", "shift-300", "ramp-300")


class Recording:
    """One recording's directory; times in seconds since it began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        meta = json.loads((path / "meta.json").read_text())
        self.started = meta["started_unix"]
        engine = {name: value for name, value in meta["engine"].items() if name in EngineSettings.model_fields}
        self.engine = EngineSettings(**engine)
        self.fleet = FleetSettings(engine=self.engine, step_time=StepTime(fixed=0.015))
        self.records = list(read_trace(path).records)

    def batches(self) -> Iterator[KvEventBatch]:
        """As the source of KV events gives them."""
        for row in read_kv_events(self.path):
            batch = decode_batch(msgpack.packb(row["batch"]))
            yield KvEventBatch(
                time_seconds=batch.time_seconds - self.started,
                sequence=row["seq"],
                continues=row["seq"] > 0,
                events=batch.events,
            )

    def events(self, start: float, stop: float) -> list[RequestSeen | RequestFinished]:
        """Of the requests that came between two times."""
        records = [record for record in self.records if start <= record.time_seconds < stop]
        events: list[RequestSeen | RequestFinished] = [record.seen() for record in records]
        events += [finished for record in records if (finished := record.finished()) is not None]
        return sorted(events, key=lambda event: event.time_seconds)


def mirror_beside_events(
    recording: Recording, watch: CacheWatch, start: float = -1.0, stop: float = 1e9
) -> tuple[Mirror, list[float]]:
    """The mirror, and the agreement of the caches at each comparison."""
    mirror, batches, ratios = Mirror(MirrorSettings(), recording.fleet), list(recording.batches())[::-1], {}
    mirror.beside = lambda fleet: watch.follow(fleet, lambda *_: 0)
    for event in recording.events(start, stop):
        while batches and batches[-1].time_seconds <= event.time_seconds:
            watch.take(batches.pop())
        mirror.ingest(event)
        mirror.advance()
        ratios |= {compared.time_seconds: compared.share.ratio for compared in watch.compared.values()}
    return mirror, list(ratios.values())


def agreement(recording: Recording) -> list[dict[str, object]]:
    """At the moment itself and within the tolerance that the exported figure has."""
    rows = []
    for tolerance in (0.0, TOLERANCE_SECONDS):
        ratios = np.array(mirror_beside_events(recording, CacheWatch(tolerance_seconds=tolerance))[1])
        rows.append(
            {
                "recording": recording.path.name,
                "within s": tolerance,
                "comparisons": ratios.size,
                "mean": float(ratios.mean()),
                "lowest": float(ratios.min()),
                "share of 0.99 and more": float((ratios >= 0.99).mean()),
            }
        )
    return rows


def late_start(recording: Recording) -> dict[str, object]:
    """Error of the hit ratio in the first minute, in points of 1."""
    half = recording.records[-1].time_seconds / 2
    errors = [
        _score(mirror_beside_events(recording, CacheWatch(fill=fill), half, half + 60.0)[0], "prefix_cache_hit_ratio")
        for fill in (False, True)
    ]
    return {
        "recording": recording.path.name,
        "observed hit ratio": errors[0].observed,
        "error, cold": errors[0].error,
        "error, filled": errors[1].error,
    }


def _score(mirror: Mirror, kpi: str, statistic: str = "") -> WindowScore:
    found = find_score(mirror.windows.scores(mirror.time_seconds), kpi, statistic)
    assert found is not None
    return found


def metrics_only(recording: Recording, every: int) -> dict[str, object]:
    """Errors of the means over the last five minutes."""
    mirror = Mirror(mirror_settings(MirrorSettings()), recording.fleet)
    stream = MetricsStream("default", recording.engine)
    for at, text in read_metrics(recording.path)[::every]:
        samples = engine_samples(
            parse_exposition(text),
            lambda _: None,
            time_seconds=at - recording.started,
            pool="default",
            namespace="",
            pod="",
        )
        for sample in samples:
            stream.take(sample)
        stream.lead(mirror)
        mirror.advance()
    counters = mirror.counters()
    requests = len(recording.records)
    inside = sum(record.e2e_seconds or 0.0 for record in recording.records)  # running and waiting, by Little's law
    return {
        "recording": recording.path.name,
        "scrapes every s": 2 * every,
        "requests": mirror.finished / requests - 1.0,
        "prompt tokens": counters.query_tokens / sum(record.prompt_tokens for record in recording.records) - 1.0,
        "TTFT": _score(mirror, "ttft_seconds", "mean").error,
        "e2e": _score(mirror, "e2e_seconds", "mean").error,
        "hit ratio (points)": _score(mirror, "prefix_cache_hit_ratio").error,
        "running and waiting": (counters.running_seconds + counters.waiting_seconds) / inside - 1.0,
    }


def main() -> None:
    """All of them on every recording."""
    recordings = [Recording(Path(sys.argv[1]) / name) for name in NAMES]
    report(
        "Mirrored and real KV cache",
        [row for recording in recordings for row in agreement(recording)],
        "Blocks in both per block in either.",
    )
    report(
        "Starting late",
        [late_start(recording) for recording in recordings],
        "Mirrored less observed hit ratio of the minute after half time.",
    )
    report(
        "Metrics alone",
        [metrics_only(recording, every) for recording in recordings for every in (3, 7)],
        "Mirrored over observed, less 1; of the hit ratio the difference. Requests and tokens of the whole recording.",
    )


if __name__ == "__main__":
    main()
