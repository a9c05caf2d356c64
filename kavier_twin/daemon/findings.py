"""What `kavier-twin doctor` finds out: each source of a settings file, read for a while as the daemon would read it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from connectors.kafka.settings import KafkaSettings
from connectors.prometheus.api import PrometheusApi, matchers
from connectors.prometheus.http import FetchError, HttpClient
from connectors.prometheus.names import running_selector
from connectors.settings import KvEvents, LiveSource, MetricsSource, Prometheus, TraceFile
from connectors.source import Noting, Source
from connectors.traces import TraceError
from kavier_twin.daemon.config import AnySource, Settings
from kavier_twin.daemon.daemon import open_source
from kavier_twin.daemon.engine_notes import EngineNotes
from kavier_twin.daemon.engine_settings import capacity_notes, contradictions
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.warm_up import cannot_keep
from kavier_twin.serve.models import SourceState
from kavier_twin.telemetry import EngineSample, GpuSample, TelemetryRecord

_POLL_SECONDS: Final = 0.1
_SETTLE_SECONDS: Final = 2.0  # after the first records, for those of the other engines
_SKEW_SECONDS: Final = 5.0
_OLD_SECONDS: Final = 60.0
_SHOWN: Final = 4

Severity = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One row of the table. `fix` is empty where nothing is wrong."""

    severity: Severity
    where: str
    what: str
    fix: str = ""


def examine(settings: Settings, seconds: float) -> Iterator[Finding]:
    """Look at the machine, then at each source in turn for at most `seconds`, which end sooner where records come.

    The settings have been read, so that files, secrets and directories that they name are there.
    """
    why = cannot_keep()
    yield Finding("warning", "kernels", *_split(why)) if why else Finding("ok", "kernels", "the cache can be written")
    for number, entry in enumerate(settings.sources):
        yield from _of_source(f"sources.{number} ({entry.type})", entry, settings, seconds)


def _of_source(where: str, entry: AnySource, settings: Settings, seconds: float) -> Iterator[Finding]:
    if isinstance(entry, KafkaSettings):  # an examination leaves no trace in Kafka
        entry = entry.model_copy(update={"group": None, "dead_letter_topic": None})
    try:
        source = open_source(entry, settings, None, 0.0)
    except TraceError as error:
        yield Finding("error", where, *_split(str(error)))
        return
    feed = Feed(source, entry.pool or "", entry.interval_seconds if isinstance(entry, MetricsSource) else None)
    pools = [entry.pool] if entry.pool else list(settings.by_pool)
    try:
        records = _read(feed, pools, seconds)
        yield from _of_reach(where, entry, feed.state, records, seconds)
        yield from _of_clock(where, source, records)
        yield from _of_rejects(where, feed.state)
        samples = [record for record in records if isinstance(record, EngineSample)]
        if samples:
            yield from _of_engines(where, entry, settings, pools[0], source, samples)
        if isinstance(source, Noting) and samples:
            yield from (Finding("warning", where, *_split(note)) for note in source.power_notes())
        if isinstance(entry, Prometheus):
            yield from _of_labels(where, entry)
    finally:
        source.close()


def _read(feed: Feed, pools: Sequence[str], seconds: float) -> list[TelemetryRecord]:
    """What comes until a while after the first records, a trouble, or the end."""
    found: list[TelemetryRecord] = []
    ends_by = time.monotonic() + seconds
    settled = False
    while time.monotonic() < ends_by and not feed.source.exhausted:
        found += [record for _, record in feed.poll(10_000, pools)[0]]
        if feed.source.trouble and not found:
            break
        if found and not settled:
            ends_by, settled = min(ends_by, time.monotonic() + _SETTLE_SECONDS), True
        time.sleep(_POLL_SECONDS)
    return found


def _of_reach(
    where: str, entry: AnySource, state: SourceState, records: Sequence[TelemetryRecord], seconds: float
) -> Iterator[Finding]:
    if isinstance(entry, TraceFile) and not entry.path.exists():
        yield Finding(
            "warning", where, f"{entry.path} does not exist yet", "fine if it is still to be written; or correct path"
        )
    elif state.trouble:
        yield Finding("error", where, *_split(state.trouble))
    elif records:
        counts = {kind: sum(record.kind == kind for record in records) for kind in sorted({r.kind for r in records})}
        yield Finding("ok", where, "gives " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    elif isinstance(entry, MetricsSource):
        yield Finding(
            "error",
            where,
            f"no sample of an engine within {seconds:g} s",
            "check that the engines are scraped, and that engines selects them; --seconds waits longer",
        )
    elif isinstance(entry, KvEvents):
        yield Finding(
            "warning",
            where,
            f"no event within {seconds:g} s",
            "fine while the engine is idle; otherwise start vLLM with enable_kv_cache_events and check the endpoint",
        )
    else:
        yield Finding(
            "warning",
            where,
            f"no new record within {seconds:g} s",
            "fine while nobody sends requests; otherwise check what writes them, and the topic or path",
        )


def _of_clock(where: str, source: Source, records: Sequence[TelemetryRecord]) -> Iterator[Finding]:
    skew = float(getattr(source, "clock_skew_seconds", 0.0))
    if abs(skew) > _SKEW_SECONDS:
        yield Finding(
            "warning", where, f"its clock and this machine's differ by {skew:+.0f} s", "synchronise both clocks (NTP)"
        )
    newest = max((r.time_seconds for r in records if isinstance(r, EngineSample | GpuSample)), default=math.inf)
    age = time.time() + skew - newest
    if age > _OLD_SECONDS:
        yield Finding(
            "warning", where, f"the newest sample is {age:.0f} s old", "check that the engines are still scraped"
        )


def _of_rejects(where: str, state: SourceState) -> Iterator[Finding]:
    rejected = {reason: count for reason, count in state.rejected.items() if not state.trouble}
    if rejected:
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items()))
        yield Finding("warning", where, f"rejected input: {told}", "docs/telemetry.md says what each reason means")


def _of_engines(
    where: str, entry: AnySource, settings: Settings, pool: str, source: Source, samples: Sequence[EngineSample]
) -> Iterator[Finding]:
    alone = all(isinstance(one, LiveSource) for one in settings.sources if one.pool in (None, pool))
    fleet = settings.by_pool[pool].fleet.settings()
    notes = EngineNotes(pool, alone=alone, host_tier=fleet.engine.host_tier is not None)
    for sample in samples:
        notes.take(sample)
    engines = notes.engines()
    versions = sorted({engine.vllm_version for engine in engines} - {""})
    names = _some(sorted(f"{engine.pod}/{engine.engine}" for engine in engines))
    yield Finding("ok", where, f"{len(engines)} engines: {names}; vLLM {_some(versions) or 'of unknown version'}")
    if len(versions) > 1:
        yield Finding("warning", where, f"engines run vLLM {_some(versions)}", "give each version a pool of its own")
    if isinstance(entry, MetricsSource) and len(engines) != fleet.replicas:
        yield Finding(
            "warning",
            where,
            f"{len(engines)} engines are found and fleet.replicas is {fleet.replicas}",
            "correct fleet.replicas, or engines if they select too few or too many",
        )
    for line in (*contradictions([source]), *capacity_notes([source])):
        yield Finding("warning", where, line, "correct fleet.engine, or leave the setting out to take the engines'")
    for note in notes.notes():
        yield Finding("warning", where, *_split(note, ". "))


def _of_labels(where: str, entry: Prometheus) -> Iterator[Finding]:
    """Labels that a Prometheus set or kept, under which engines are easily mixed up."""
    http = HttpClient(entry.access())
    try:
        api = PrometheusApi(entry.url, http, entry.timeout_seconds)
        found = api.instant(running_selector(matchers(entry.engines), entry.metric_prefix))
    except FetchError:
        return  # told already
    finally:
        http.close()
    labels = [series.labels for series in found]
    exported = sorted({name for one in labels for name in one if name.startswith("exported_")})
    if exported:
        yield Finding(
            "warning",
            where,
            f"the engines' series have {_some(exported)}: this Prometheus scrapes another one, or renamed their labels",
            "set honor_labels: true on that scrape job, so that instance and job are the engines'",
        )
    if labels and not any("pod" in name for one in labels for name in one):
        yield Finding(
            "warning",
            where,
            "the engines' series have no pod label, so engines are called by their addresses",
            "add the pod by relabelling, if request records name pods",
        )


def _split(text: str, at: str = "; ") -> tuple[str, str]:
    """A sentence of what is wrong, and the one behind it of what to do."""
    what, _, fix = text.partition(at)
    return what, fix


def _some(values: Iterable[str]) -> str:
    listed = list(values)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
