"""From the mirror and the forecaster to what is shown of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from kavier_twin.forecast.policy_set import PolicyInForce
from kavier_twin.forecast.result import Forecast, Row, Verdict
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror.fidelity.cache import CacheWatch
from kavier_twin.mirror.fidelity.power import PowerWatch
from kavier_twin.mirror.fidelity.trust import Trust
from kavier_twin.mirror.fidelity.windows import Stretch
from kavier_twin.mirror.mirror import Mirror
from kavier_twin.reuse.misses import Reason, Tokens
from kavier_twin.reuse.watch import ReuseWatch
from kavier_twin.serve.models import (
    ApplicationTokens,
    Best,
    CacheAgreement,
    CalibrationState,
    CapacityPoint,
    Gauge,
    GpuPower,
    History,
    Horizon,
    Objective,
    Outlook,
    PolicyOutlook,
    Predicted,
    PrefixCache,
    Series,
    TwinView,
    Unmodelled,
)
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, STATISTICS

CHARTED: Final = tuple(STATISTICS[kpi.metric] for kpi in KPIS.values() if kpi.charted)
_APPLICATIONS: Final = 10  # shown
STREAM_RESULTS: Final = ("accepted", "completed", "duplicate", "late", "future_time")


def gauges(mirror: Mirror, reported: tuple[float, float, float]) -> tuple[Gauge, ...]:
    """Gauges of now. `reported`: running, waiting and KV usage as the engines say; NaN where they do not."""
    if not math.isfinite(mirror.time_seconds):
        return ()
    return tuple(
        Gauge(kpi, float(mirrored), observed)
        for kpi, mirrored, observed in zip(GAUGES, mirror.load(), reported, strict=True)
    )


def history(course: Sequence[Stretch]) -> History:
    """The last hour of what is charted; what nobody reports is left out."""
    unknown = (math.nan, math.nan)
    series = []
    for key in CHARTED:
        if any(key in stretch.values for stretch in course):
            mirrored, observed = zip(*(stretch.values.get(key, unknown) for stretch in course), strict=True)
            series.append(Series(*key, mirrored, observed))
    return History(tuple(stretch.until_seconds for stretch in course), tuple(series))


def caches(watch: CacheWatch) -> tuple[CacheAgreement, ...]:
    """Mirrored KV caches compared with real ones, as of the last comparison."""
    entries = []
    for engine in sorted(watch.engines):
        share = watch.share(engine)
        ratio = math.nan if share is None else share.ratio
        entries.append(CacheAgreement(*engine, ratio, *(share or (0, 0, 0)), filled=watch.filled.get(engine)))
    return tuple(entries)


def prefix_cache(watch: ReuseWatch | None) -> PrefixCache:
    """What is known of the reuse of prompts."""
    if watch is None:
        return PrefixCache()
    named, others = watch.misses.by_application(_APPLICATIONS)
    applications = [ApplicationTokens(name, *_tokens(tokens)) for name, tokens in named]
    if others.requests:
        applications.append(ApplicationTokens("others", *_tokens(others)))
    curve = tuple(CapacityPoint(*point) for point in watch.points()) if watch.curve.prompt_tokens else ()
    return PrefixCache(curve, *_tokens(watch.misses.total), tuple(applications))


def _tokens(tokens: Tokens) -> tuple[int, int, int, dict[str, int]]:
    missed = {reason.value: tokens.missed[reason] for reason in Reason}
    return tokens.requests, tokens.prompt, tokens.hit, missed


def power(watch: PowerWatch, mirror: Mirror) -> GpuPower | None:
    """Watts of a GPU, mirrored and observed."""
    if mirror.fleet.settings.footprint is None:
        return None
    return GpuPower(*watch.means(), watch.calibrations)


def records(mirror: Mirror, rejected: int) -> tuple[dict[str, int], dict[str, int]]:
    """Records by result, and requests given up by reason."""
    results = {name: mirror.ingested[name] for name in STREAM_RESULTS}
    dropped = {name: mirror.ingested[name] for name in ("unknown_request", "never_finished")}
    dropped |= {name: count for name, count in mirror.ingested.items() if name not in results}
    return results | {"rejected": rejected}, dropped


def slo_lines(slos: Sequence[Slo]) -> tuple[Objective, ...]:
    """Objectives, each by the KPI it bounds as that is shown."""
    return tuple(Objective(slo.name, *STATISTICS[slo.metric], slo.threshold, slo.higher_is_better) for slo in slos)


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
    """The view with the mirror's errors and calibration in it, and what is to be trusted marked in all it shows.

    Nothing is trusted while a source that the mirror follows cannot be read, or the newest evidence is against it.
    """
    fitted = mirror.calibration.coefficients if mirror.calibration else {}
    trust = dict(mirror.judge.trust)
    observed = {score.kpi for score in mirror.scores} & trust.keys()
    away = [source for source in view.sources if source.trouble and not source.ended and not source.checks_only]
    doubts = [f"{source.name} cannot be read: {source.trouble}" for source in away] + mirror.doubts.reasons()
    reasons = doubts + [trust[kpi].reason for kpi in trust if kpi in observed and not trust[kpi].trusted]
    if doubts:
        trust = {kpi: Trust(False, doubts[0]) for kpi in trust}
    if not observed:
        reasons.append("no observations yet to compare predictions with")
    if not mirror.calibrated:
        reasons.append("step times have not been fitted to this pool yet")
    return replace(
        view,
        step_time_deviation={name: found.deviation for name, found in fitted.items()},
        calibration=CalibrationState(
            event_seconds=mirror.calibrated_seconds,
            changes=mirror.speed_changes,
            change_ratio=mirror.last_change.ratio if mirror.last_change else math.nan,
            failures=dict(mirror.calibration_failures),
        ),
        errors=mirror.scores,
        trust=trust,
        trusted=not reasons,
        untrusted_reasons=tuple(reasons),
        outlook=view.outlook and _judged_outlook(view.outlook, trust, {slo.name: slo.kpi for slo in view.slos}),
    )


def spoiled(view: TwinView, features: Sequence[Unmodelled]) -> TwinView:
    """The view with no trust in the KPIs that features spoil, nor in those that are not observed and judged by them."""
    why: dict[str, str] = {}
    for feature in features:
        for kpi in feature.spoils:
            why.setdefault(kpi, f"{kpi}: {feature.what}: not modelled")
    if not why:
        return replace(view, unmodelled=())
    observed = {entry.kpi for entry in view.errors}
    for kpi in KPIS:
        judged_by = kpi
        while judged_by not in why and judged_by not in observed and KPIS[judged_by].stand_in:
            judged_by = KPIS[judged_by].stand_in
        if judged_by in why:
            why[kpi] = why[judged_by]
    trust = {kpi: Trust(False, why[kpi]) if kpi in why else known for kpi, known in view.trust.items()}
    reasons = tuple(f"not modelled: {feature.what}" for feature in features)
    return replace(
        view,
        unmodelled=tuple(features),
        trust=trust,
        trusted=False,
        untrusted_reasons=(*view.untrusted_reasons, *reasons),
        outlook=view.outlook and _judged_outlook(view.outlook, trust, {slo.name: slo.kpi for slo in view.slos}),
    )


def _judged_outlook(outlook: Outlook, trust: Mapping[str, Trust], slo_kpis: Mapping[str, str]) -> Outlook:
    def horizon(entry: Horizon) -> Horizon:
        return replace(
            entry,
            predicted=tuple(replace(p, trusted=_trusted(trust, p.kpi)) for p in entry.predicted),
            breach_trusted={slo: _trusted(trust, slo_kpis.get(slo, "")) for slo in entry.breach},
        )

    policies = (replace(policy, horizons=tuple(map(horizon, policy.horizons))) for policy in outlook.policies)
    return replace(outlook, policies=tuple(policies))


def _trusted(trust: Mapping[str, Trust], kpi: str) -> bool:
    return kpi in trust and trust[kpi].trusted


def _horizon(row: Row) -> Horizon:
    return Horizon(
        row.horizon_seconds,
        tuple(Predicted(*STATISTICS[metric], values.values, trusted=False) for metric, values in row.kpis.items()),
        row.breach_probability,
        breach_trusted={},  # `judged` says so
        breach_interval=row.breach_interval,
    )


def _rank(policy: PolicyOutlook, verdict: Verdict) -> tuple[bool, bool, float, float]:
    """The verdict, then by expected breaches and latency at the longest horizon; what was not simulated is last."""
    chosen = verdict.policy == policy.name
    breaches = sum(sum(horizon.breach.values()) for horizon in policy.horizons)
    latency = policy.horizons[-1].median("e2e_seconds", "p95") if policy.horizons else math.inf
    return not chosen, not policy.horizons, breaches, math.inf if math.isnan(latency) else latency


def _best(verdict: Verdict) -> Best:
    breaches, latency = f"{verdict.expected_breaches:.2f}", f"{verdict.e2e_p95_seconds:.2f} s"
    if verdict.vllm_flags or not verdict.deployable:  # with the current one's figures where it is another
        breaches += f" (current policy: {verdict.today_expected_breaches:.2f})"
        latency += f" (current policy: {verdict.today_e2e_p95_seconds:.2f} s)"
    reason = f"expected SLO breaches {breaches}"
    if math.isfinite(verdict.e2e_p95_seconds):
        reason += f", e2e p95 {latency}"
    if math.isfinite(verdict.gain.probability):
        reason += f"; better than the current policy with probability {verdict.gain.probability:.2f}"
    switch = verdict.switch
    if switch is not None:
        reason += f", {switch.gain.probability:.2f} including the rollout"
    return Best(
        verdict.policy,
        verdict.vllm_flags,
        verdict.deployable,
        reason,
        gain=verdict.gain,
        switch=() if switch is None else tuple(map(_horizon, switch.rows)),
        switch_gain=None if switch is None else switch.gain,
    )
