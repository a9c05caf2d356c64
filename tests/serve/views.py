"""A view with everything in it, for the tests of what is served."""

from __future__ import annotations

import math

from kavier_twin.forecast.load import LoadAhead, LoadOutlook
from kavier_twin.forecast.result import Gain
from kavier_twin.mirror.fidelity.trust import Trust
from kavier_twin.mirror.fidelity.windows import WindowScore
from kavier_twin.mirror.replicas import Replica
from kavier_twin.serve.models import (
    ApplicationTokens,
    Best,
    CacheAgreement,
    CalibrationState,
    CapacityPoint,
    Engine,
    Gauge,
    GpuPower,
    Horizon,
    Objective,
    Outlook,
    PolicyOutlook,
    Predicted,
    PrefixCache,
    SourceState,
    SweepCounts,
    TwinView,
)
from kavier_twin.simulation.kpi_table import STATISTICS
from kavier_twin.simulation.replica_state import ReplicaState

QUANTILES = {0.1: 0.5, 0.5: 0.75, 0.9: 1.0}


def full_view(pool: str = "chat") -> TwinView:
    horizons = tuple(
        Horizon(
            seconds,
            tuple(
                Predicted(kpi, statistic, QUANTILES, kpi == "ttft_seconds") for kpi, statistic in STATISTICS.values()
            ),
            {"fast": 0.25, "steady": 0.0},
            {"fast": True, "steady": False},
            breach_interval={"fast": (0.04, 0.65), "steady": (0.0, 0.37)},
        )
        for seconds in (60.0, 300.0)
    )
    outlook = Outlook(
        event_seconds=100.0,
        made_unix_seconds=1.7e9,
        duration_seconds=0.5,
        scenarios=4,
        rate_per_second=2.5,
        calibrated=True,
        policies=(
            PolicyOutlook(
                "today",
                (),
                True,
                horizons,
                first_breach={"fast": {0.1: 120.0, 0.5: math.inf}},
                first_breach_probability={"fast": 0.35},
                in_force=True,
            ),
            PolicyOutlook("half", ("--max-num-seqs 3", "--no-async-scheduling"), True, horizons),
            PolicyOutlook("odd", (), False, (), problem='cannot be "applied"'),
        ),
        best=Best(
            "half",
            ("--max-num-seqs 3",),
            True,
            "expected SLO breaches 0.25",
            gain=Gain({"slo": 0.5, "cost": -0.1}, "slo", 0.97),
            switch=horizons,
            switch_gain=Gain({"slo": -0.25, "cost": -0.2}, "slo", 0.2),
        ),
        stopped_because="certain",
        shed=("slow",),
        notes=("4 scenarios are few",),
        load=LoadOutlook(
            "lag_regression",
            {"persistence": 1.2, "lag_regression": 0.9},
            1.1,
            90.0,
            (LoadAhead(60.0, 2.5, 2.0, 3.0, {"persistence": 2.4, "lag_regression": 2.5}),),
        ),
    )
    return TwinView(
        pool=pool,
        version="1.2.3",
        unix_seconds=1.7e9,
        event_seconds=101.5,
        lag_seconds=2.0,
        buffered_records=3,
        last_record_unix_seconds=1.7e9,
        records={"accepted": 10, "duplicate": 1, "late": 2, "rejected": 4},
        dropped={"unknown_request": 1, "never_finished": 0},
        finished_requests=5,
        calibrated=True,
        calibrated_on_requests=60,
        step_time_scale_ratio=1.1,
        frontend_seconds=0.005,
        step_time={"fixed": 0.01, "per_prefill_token": 3e-5},
        step_time_deviation={"fixed": 0.001, "per_prefill_token": math.inf},
        calibration=CalibrationState(1.7e9, 2, 1.4, {"too_few_latencies": 1}),
        stream_coverage_ratio=1.0,
        exact_cache_ratio=0.99,
        gauges=(
            Gauge("requests_running", 3.0, 4.0),
            Gauge("requests_waiting", 1.0, math.nan),
            Gauge("kv_cache_usage_ratio", 0.2, 0.25),
        ),
        errors=(
            WindowScore("ttft_seconds", "mean", "5m", 40, 0.11, 0.1, 0.1),
            WindowScore("ttft_seconds", "p99", "5m", 40, 1.1, 1.0, 0.1),
            WindowScore("prefix_cache_hit_ratio", "", "5m", 40, 0.8, 0.81, -0.01),
            WindowScore("requests_waiting", "", "5m", 10, 0.5, 0.6, -0.1 / 0.6),
            WindowScore("e2e_seconds", "mean", "1h", 500, 2.0, 2.5, -0.2),
            WindowScore("queue_seconds", "mean", "5m", 40, 0.0, 0.0, math.nan),
        ),
        trust={"ttft_seconds": Trust(True), "e2e_seconds": Trust(False, "e2e_seconds: 20 % off")},
        untrusted_reasons=("e2e_seconds: 20 % off",),
        replicas=(
            Replica(0, "vllm-0", ReplicaState.READY, 3, 1, 0.2, 0.8, 5, 500, 0),
            Replica(1, "", ReplicaState.DRAINING, 0, 0, 0.0, math.nan, 0, 0, 0),
        ),
        slos=(
            Objective("fast", "ttft_seconds", "p99", 1.0, False),
            Objective("cached", "prefix_cache_hit_ratio", "", 0.5, True),
        ),
        every_seconds=30.0,
        prefix_cache=PrefixCache(
            tuple(
                CapacityPoint(factor, round(299 * factor), 0.5 + 0.1 * factor / 8) for factor in (0.5, 1.0, 2.0, 8.0)
            ),
            500,
            400_000,
            250_000,
            {"first_seen": 90_000, "evicted": 50_000, "partial_block": 10_000, "lost": 0},
            (
                ApplicationTokens("a706ddc0e1f2a000", 400, 300_000, 200_000, {"first_seen": 60_000, "evicted": 40_000}),
                ApplicationTokens("others", 100, 100_000, 50_000, {"first_seen": 50_000}),
            ),
        ),
        caches=(
            CacheAgreement("vllm-0", "0", 0.95, both=380, only_mirrored=12, only_real=8, filled=350),
            CacheAgreement("vllm-1", "0"),
        ),
        power=GpuPower(412.0, 400.0, calibrations=3),
        engines=(Engine("vllm-0", "0", "m", "0.32.0", {"lifetime": 40.0, "reuse_gap": 2.5}), Engine("vllm-1", "0")),
        sources=(SourceState("file:a", False, {"not-json": 3, "bad-value": 1}), SourceState("file:b", True, {})),
        forecasts={"succeeded": 7, "failed": 1},
        sweeps=SweepCounts(late=2, scenarios=28, shed={"slow": 3}, stopped={"certain": 6, "time": 1}),
        outlook=outlook,
        currency="EUR",
        notes=("a note",),
    )


def empty_view(pool: str = "chat") -> TwinView:
    return TwinView(pool=pool, version="1.2.3", unix_seconds=1.7e9)
