"""From the mirror and the forecaster to what is shown of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from kavier_twin.forecast.policy_set import PolicyInForce
from kavier_twin.forecast.result import Forecast, Row, Verdict
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror.fidelity.cache import CacheWatch
from kavier_twin.mirror.fidelity.power import PowerWatch
from kavier_twin.mirror.fidelity.requests import Score
from kavier_twin.mirror.fidelity.windows import Stretch
from kavier_twin.mirror.mirror import Mirror
from kavier_twin.serve.view import (
    Beside,
    Best,
    CacheBeside,
    CalibrationState,
    History,
    Horizon,
    KpiTrust,
    Outlook,
    PolicyOutlook,
    PowerBeside,
    Predicted,
    SloLine,
    TwinView,
    WindowError,
)
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, LATENCIES, STATISTICS, share

CHARTED: Final = tuple(STATISTICS[kpi.metric] for kpi in KPIS.values() if kpi.charted)
STREAM_RESULTS: Final = ("accepted", "duplicate", "late", "future_time")


def beside(mirror: Mirror, reported: tuple[float, float, float]) -> tuple[Beside, ...]:
    """Mirror beside reality. `reported`: running, waiting and KV usage as the engines say; NaN where they do not."""
    scores = mirror.fidelity.scores()
    entries: list[Beside] = []
    for kpi in LATENCIES:
        score = scores.get(kpi)
        if score is not None:
            entries.append(_of_score(kpi, "mean", score, score.error_ratio))
            entries += [_of_percentile(mirror, kpi, statistic) for statistic in KPIS[kpi].statistics]
    if "hit_ratio" in scores:
        score = scores["hit_ratio"]
        entries.append(_of_score("prefix_cache_hit_ratio", "", score, score.error_ratio))
    if math.isfinite(mirror.time_seconds):
        for kpi, mirrored, observed in zip(GAUGES, mirror.load(), reported, strict=True):
            entries.append(Beside(kpi, "", float(mirrored), observed, mirrored - observed))
    return tuple(entries)


def history(course: Sequence[Stretch]) -> History:
    """The last hour of what is charted; what nobody reports is left out."""
    unknown = (math.nan, math.nan)
    told = [key for key in CHARTED if any(key in stretch.values for stretch in course)]
    return History(
        tuple(stretch.until_seconds for stretch in course),
        {key: tuple(stretch.values.get(key, unknown) for stretch in course) for key in told},
    )


def caches(watch: CacheWatch) -> tuple[CacheBeside, ...]:
    """Real KV caches beside mirrored ones, as of the last comparison."""
    entries = []
    for engine in sorted(watch.engines):
        share = watch.share(engine)
        ratio = math.nan if share is None else share.ratio
        entries.append(CacheBeside(*engine, ratio, *(share or (0, 0, 0)), filled=watch.filled.get(engine)))
    return tuple(entries)


def power(watch: PowerWatch, mirror: Mirror) -> PowerBeside | None:
    """Watts of a GPU, mirrored beside observed."""
    footprint = mirror.fleet.settings.footprint
    if footprint is None:
        return None
    model = footprint.power
    return PowerBeside(*watch.means(), model.idle_watts, model.compute_watts, model.memory_watts, watch.calibrations)


def records(mirror: Mirror, rejected: int) -> tuple[dict[str, int], dict[str, int]]:
    """Records by result, and requests given up by reason."""
    results = {name: mirror.ingested[name] for name in STREAM_RESULTS}
    dropped = {name: mirror.ingested[name] for name in ("unknown_request", "never_finished")}
    dropped |= {name: count for name, count in mirror.ingested.items() if name not in results}
    return results | {"rejected": rejected}, dropped


def slo_lines(slos: Sequence[Slo]) -> tuple[SloLine, ...]:
    """Objectives, each by the KPI it bounds as that is shown."""
    return tuple(SloLine(slo.name, *STATISTICS[slo.metric], slo.threshold, slo.higher_is_better) for slo in slos)


def outlook(forecast: Forecast, made_unix_seconds: float, policies: Mapping[str, PolicyInForce]) -> Outlook:
    """A forecast as it is shown, the best policy first. `policies`: how each is deployed, by name."""
    shown = []
    for name in dict.fromkeys(row.policy for row in forecast.rows):
        horizons = tuple(_horizon(row) for row in forecast.rows if row.policy == name)
        breaches = [breach for breach in forecast.first_breaches if breach.policy == name]
        policy = policies[name]
        in_force = not policy.overrides
        shown.append(
            PolicyOutlook(
                name,
                policy.flags,
                policy.deployable,
                horizons,
                first_breach={
                    breach.slo: {0.1: breach.early_seconds, 0.5: breach.expected_seconds} for breach in breaches
                },
                first_breach_probability={breach.slo: breach.probability for breach in breaches},
                in_force=in_force,
            )
        )
    shown += [PolicyOutlook(failed.policy, (), False, (), problem=failed.error) for failed in forecast.failed]
    return Outlook(
        event_seconds=forecast.time_seconds,
        made_unix_seconds=made_unix_seconds,
        duration_seconds=math.nan if forecast.duration_seconds is None else forecast.duration_seconds,
        scenarios=forecast.scenarios,
        rate_per_second=forecast.rate_requests_per_second,
        load=forecast.load,
        calibrated=forecast.calibrated,
        policies=tuple(sorted(shown, key=lambda policy: _rank(policy, forecast.verdict))),
        best=_best(forecast.verdict),
        stopped_because=forecast.stopped_because,
        shed=forecast.shed,
        notes=forecast.notes,
    )


def judged(view: TwinView, mirror: Mirror) -> TwinView:
    """The view with the mirror's errors and calibration in it, and what is to be trusted marked in all it shows."""
    fitted = mirror.calibration.coefficients if mirror.calibration else {}
    trust = {kpi: KpiTrust(found.trusted, found.reason) for kpi, found in mirror.judge.trust.items()}
    observed = {score.kpi for score in mirror.scores} & trust.keys()
    reasons = [trust[kpi].reason for kpi in trust if kpi in observed and not trust[kpi].trusted]
    if not observed:
        reasons.append("nothing was observed yet that a prediction could be compared with")
    if not mirror.calibrated:
        reasons.append("step times are not fitted to this pool yet")
    return replace(
        view,
        step_time_deviation={name: found.deviation for name, found in fitted.items()},
        calibration=CalibrationState(
            event_seconds=mirror.calibrated_seconds,
            changes=mirror.speed_changes,
            change_event_seconds=mirror.last_change.since_seconds if mirror.last_change else math.nan,
            change_ratio=mirror.last_change.ratio if mirror.last_change else math.nan,
            failures=dict(mirror.calibration_failures),
        ),
        errors=tuple(
            WindowError(s.kpi, s.statistic, s.window, s.count, s.predicted, s.observed, s.error) for s in mirror.scores
        ),
        trust=trust,
        trusted=not reasons,
        untrusted_reasons=tuple(reasons),
        beside=tuple(replace(entry, trusted=_trusted(trust, entry.kpi)) for entry in view.beside),
        outlook=view.outlook and _judged_outlook(view.outlook, trust, {slo.name: slo.kpi for slo in view.slos}),
    )


def _judged_outlook(outlook: Outlook, trust: Mapping[str, KpiTrust], slo_kpis: Mapping[str, str]) -> Outlook:
    def horizon(entry: Horizon) -> Horizon:
        return replace(
            entry,
            predicted=tuple(replace(p, trusted=_trusted(trust, p.kpi)) for p in entry.predicted),
            breach_trusted={slo: _trusted(trust, slo_kpis.get(slo, "")) for slo in entry.breach},
        )

    policies = (replace(policy, horizons=tuple(map(horizon, policy.horizons))) for policy in outlook.policies)
    return replace(outlook, policies=tuple(policies))


def _trusted(trust: Mapping[str, KpiTrust], kpi: str) -> bool:
    return kpi in trust and trust[kpi].trusted


def _of_score(kpi: str, statistic: str, score: Score, error: float) -> Beside:
    return Beside(kpi, statistic, score.predicted_mean, score.observed_mean, error, score.count)


def _of_percentile(mirror: Mirror, kpi: str, statistic: str) -> Beside:
    pairs: Sequence[tuple[float, float]] = mirror.fidelity.pairs(kpi)
    mirrored, observed = map(float, np.quantile(np.array(pairs), share(statistic), axis=0))
    error = (mirrored - observed) / observed if observed > 0.0 else math.nan
    return Beside(kpi, statistic, mirrored, observed, error, len(pairs))


def _horizon(row: Row) -> Horizon:
    return Horizon(
        row.horizon_seconds,
        tuple(Predicted(*STATISTICS[metric], values.values) for metric, values in row.kpis.items()),
        dict(row.breach_probability),
        breach_interval=dict(row.breach_interval),
    )


def _rank(policy: PolicyOutlook, verdict: Verdict) -> tuple[bool, bool, float, float]:
    """The verdict, then by expected breaches and latency at the longest horizon; what was not simulated is last."""
    chosen = verdict.policy == policy.name
    breaches = sum(sum(horizon.breach.values()) for horizon in policy.horizons)
    latency = policy.horizons[-1].median("e2e_seconds", "p95") if policy.horizons else math.inf
    return not chosen, not policy.horizons, breaches, math.inf if math.isnan(latency) else latency


def _best(verdict: Verdict) -> Best:
    breaches, latency = f"{verdict.expected_breaches:.2f}", f"{verdict.e2e_p95_seconds:.2f} s"
    if verdict.vllm_flags or not verdict.deployable:  # beside today's where it is another
        breaches += f" (today's: {verdict.today_expected_breaches:.2f})"
        latency += f" (today's: {verdict.today_e2e_p95_seconds:.2f} s)"
    reason = f"expected SLO breaches {breaches}"
    if math.isfinite(verdict.e2e_p95_seconds):
        reason += f", e2e p95 {latency}"
    if math.isfinite(verdict.gain.probability):
        reason += f"; better than today's with probability {verdict.gain.probability:.2f}"
    switch = verdict.switch
    if switch is not None:
        reason += f", {switch.gain.probability:.2f} while it is brought to the engines"
    return Best(
        verdict.policy,
        verdict.vllm_flags,
        verdict.deployable,
        reason,
        gain=verdict.gain,
        switch=() if switch is None else tuple(map(_horizon, switch.rows)),
        switch_gain=None if switch is None else switch.gain,
    )
