from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from kavier_twin.scores.scorer import Interval, KpiScore, Scores
from kavier_twin.serve.metrics.exporter import registry_of
from kavier_twin.serve.models import TwinView
from kavier_twin.simulation.kpi_table import KPIS
from real_parts import promtool
from serve.views import empty_view, full_view

UNITS = (
    "seconds",
    "ratio",
    "total",
    "records",
    "blocks",
    "replicas",
    "requests",
    "scenarios",
    "per_second",
    "info",
    "watts",
)
UNITS += ("joules_per_million_tokens", "grams_per_million_tokens", "cost_per_million_tokens")
# Counts of things in their own unit, and flags.
WITHOUT_UNIT = ("source_up", "_running", "_waiting", "_preemptions", "_rejected", "_calibrated", "_best_policy")
WITHOUT_UNIT += ("_trusted", "_stale", "_breaches", "_contradictions", "_notes", "_libraries")


def text_of(view: TwinView) -> str:
    return generate_latest(registry_of(lambda: {view.pool: view})).decode()


def value(view: TwinView, name: str, **labels: str) -> float | None:
    return registry_of(lambda: {view.pool: view}).get_sample_value(name, {"pool": "chat", **labels})


# Scores count forecasts and alerts; an error is in the unit of the KPI that its label names.
OF_SCORES = ("_forecasts", "score_alerts", "score_breaches", "_brier", "_absolute_error", "_prediction_bound")


@pytest.mark.real
@pytest.mark.parametrize("view", [full_view(), empty_view()], ids=["full", "empty"])
def test_promtool_finds_nothing(view: TwinView) -> None:
    tool = promtool()
    found = subprocess.run([tool, "check", "metrics"], input=text_of(view), capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_every_metric_says_what_it_is_and_ends_in_its_unit() -> None:
    families = [family for family in parse(text_of(full_view())) if family.name.startswith("kavier_twin_")]
    assert len(families) > 30
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name.endswith((*UNITS, *WITHOUT_UNIT, *OF_SCORES)), name
        assert len(family.documentation) > 20, name
        assert family.documentation.endswith("."), name


def test_openmetrics_holds_the_same() -> None:
    registry = registry_of(lambda: {"chat": full_view(), "code": full_view("code")})
    samples = {
        (sample.name, *sorted(sample.labels.items()))
        for family in parse_openmetrics(generate_openmetrics(registry).decode())
        for sample in family.samples
    }
    plain = {
        (sample.name, *sorted(sample.labels.items()))
        for family in parse(generate_latest(registry).decode())
        for sample in family.samples
    }
    assert samples == plain


def test_predictions_carry_policy_horizon_and_quantile() -> None:
    view = full_view()
    at = {"policy": "half", "in_force": "0", "horizon": "300", "quantile": "0.9", "source": "stream"}
    assert value(view, "kavier_twin_predicted_ttft_seconds", statistic="p99", trusted="1", **at) == 1.0
    assert value(view, "kavier_twin_predicted_prefix_cache_hit_ratio", trusted="0", **at) == 1.0
    breach = {"policy": "today", "in_force": "1", "horizon": "60", "source": "stream"}
    assert value(view, "kavier_twin_slo_breach_probability_ratio", slo="fast", trusted="1", **breach) == 0.25
    assert value(view, "kavier_twin_slo_breach_probability_ratio", slo="steady", trusted="0", **breach) == 0.0
    assert value(view, "kavier_twin_best_policy", policy="half") == 1.0
    assert value(view, "kavier_twin_best_policy", policy="today") == 0.0
    flags = {"flags": "--max-num-seqs 3 --no-async-scheduling", "deployable": "true"}
    assert value(view, "kavier_twin_policy_info", policy="half", in_force="0", **flags) == 1.0


def test_every_kpi_predicted_is_exported() -> None:
    view = full_view()
    assert view.outlook is not None
    predicted = {entry.kpi for entry in view.outlook.policies[0].horizons[0].predicted}
    assert predicted <= KPIS.keys()
    names = {family.name for family in parse(text_of(view))}
    assert {f"kavier_twin_predicted_{kpi}" for kpi in predicted} <= names


def test_energy_carbon_and_cost() -> None:
    view = full_view()
    at = {"policy": "half", "in_force": "0", "horizon": "300", "quantile": "0.5", "trusted": "0", "source": "stream"}
    for kpi in (
        "power_watts",
        "energy_joules_per_million_tokens",
        "carbon_grams_per_million_tokens",
        "cost_per_million_tokens",
    ):
        assert value(view, f"kavier_twin_predicted_{kpi}", **at) == 0.75
    assert value(view, "kavier_twin_cost_info", currency="EUR") == 1.0
    assert "kavier_twin_cost_info" not in text_of(replace(view, currency=""))


def test_mirrored_and_observed() -> None:
    view = full_view()
    assert value(view, "kavier_twin_mirrored_ttft_seconds", statistic="p99") == 1.1
    assert value(view, "kavier_twin_observed_ttft_seconds", statistic="p99") == 1.0
    assert value(view, "kavier_twin_mirrored_e2e_seconds", statistic="mean") is None  # not in the last five minutes
    assert value(view, "kavier_twin_mirrored_replicas", state="ready") == 1.0
    assert value(view, "kavier_twin_mirrored_replicas", state="draining") == 1.0
    assert value(view, "kavier_twin_mirrored_requests_waiting") == 1.0
    assert value(view, "kavier_twin_observed_requests_waiting") is None  # not known: no sample


def test_errors_and_trust() -> None:
    view = full_view()
    errors = "kavier_twin_fidelity_error_ratio"
    assert value(view, errors, kpi="e2e_seconds", statistic="mean", window="1h") == -0.2
    assert value(view, errors, kpi="queue_seconds", statistic="mean", window="5m") is None  # not known
    assert value(view, "kavier_twin_fidelity_observed_requests", kpi="ttft_seconds", window="5m") == 40.0
    assert value(view, "kavier_twin_trusted", kpi="ttft_seconds") == 1.0
    assert value(view, "kavier_twin_trusted", kpi="e2e_seconds") == 0.0
    assert value(view, "kavier_twin_pool_trusted") == 0.0


def test_how_step_times_follow_the_fleet() -> None:
    view = full_view()
    deviation = "kavier_twin_step_time_coefficient_deviation_seconds"
    assert value(view, deviation, coefficient="fixed") == 0.001
    assert value(view, deviation, coefficient="per_prefill_token") is None  # nothing is known of it
    assert value(view, "kavier_twin_calibration_last_timestamp_seconds") == 1.7e9
    assert value(view, "kavier_twin_calibration_changes_total") == 2.0
    assert value(view, "kavier_twin_calibration_failures_total", reason="too_few_latencies") == 1.0


def test_the_stream() -> None:
    view = full_view()
    assert value(view, "kavier_twin_records_total", result="rejected") == 4.0
    assert value(view, "kavier_twin_source_rejected_total", source="file:a", reason="not-json") == 3.0
    assert value(view, "kavier_twin_forecasts_total", result="failed") == 1.0
    assert value(view, "kavier_twin_stream_lag_seconds") == 2.0


def test_what_is_not_known_has_no_sample() -> None:
    text = text_of(empty_view())
    assert "NaN" not in text
    assert "Inf" not in text
    assert "predicted" not in text
    assert value(empty_view(), "kavier_twin_calibrated") == 0.0


def test_labels_are_escaped() -> None:
    view = replace(full_view(), pool='a"b\\c\nd')
    found = registry_of(lambda: {view.pool: view}).get_sample_value(
        "kavier_twin_step_time_scale_ratio", {"pool": view.pool}
    )
    assert found == 1.1
    read = next(family for family in parse(text_of(view)) if family.name == "kavier_twin_step_time_scale_ratio")
    assert read.samples[0].labels["pool"] == view.pool


def test_caches_are_shown_where_they_are_known() -> None:
    engine = {"pod": "vllm-0", "engine": "0"}
    assert value(full_view(), "kavier_twin_kv_cache_agreement_ratio", **engine) == 0.95
    assert value(full_view(), "kavier_twin_kv_cache_blocks", where="only_real", **engine) == 8
    assert value(full_view(), "kavier_twin_kv_cache_filled_blocks", **engine) == 350
    assert value(full_view(), "kavier_twin_kv_cache_agreement_ratio", pod="vllm-1", engine="0") is None


def test_the_load_forecast_tells_the_method_in_use_and_the_others_beside_it() -> None:
    view = full_view()
    forecast = "kavier_twin_load_forecast"
    assert value(view, f"{forecast}_method_info", method="lag_regression") == 1.0
    assert value(view, f"{forecast}_error_ratio", method="persistence") == 1.2
    assert value(view, f"{forecast}_error_ratio", method="sparse") is None  # not tried yet
    assert value(view, f"{forecast}_requests_per_second", method="persistence", horizon="60") == 2.4
    assert value(view, f"{forecast}_end_requests_per_second", percentile="90", horizon="60") == 3.0


def test_watts_are_shown_side_by_side() -> None:
    assert value(full_view(), "kavier_twin_gpu_power_watts", side="mirrored") == 412.0
    assert value(full_view(), "kavier_twin_gpu_power_watts", side="observed") == 400.0
    assert value(full_view(), "kavier_twin_gpu_power_error_ratio") == pytest.approx(0.03)
    assert value(empty_view(), "kavier_twin_gpu_power_calibrations_total") is None


def test_sweeps_and_what_their_verdict_is_worth() -> None:
    view = full_view()
    assert value(view, "kavier_twin_forecast_late_total") == 2.0
    assert value(view, "kavier_twin_forecast_simulated_scenarios_total") == 28.0
    assert value(view, "kavier_twin_forecast_shed_total", policy="slow") == 3.0
    assert value(view, "kavier_twin_forecast_stops_total", reason="time") == 1.0
    now = {"policy": "today", "in_force": "1", "trusted": "1", "source": "stream"}
    breach = {**now, "horizon": "300", "slo": "fast"}
    assert value(view, "kavier_twin_slo_breach_probability_bound_ratio", **breach, bound="high") == 0.65
    first = {**now, "slo": "fast"}
    assert value(view, "kavier_twin_time_to_breach_seconds", **first, scenarios="worst") == 120.0
    assert value(view, "kavier_twin_time_to_breach_seconds", **first, scenarios="median") is None
    assert value(view, "kavier_twin_slo_first_breach_probability_ratio", **first) == 0.35
    best = {"policy": "half"}
    assert value(view, "kavier_twin_best_policy_gain_probability_ratio", **best, switch="no") == 0.97
    assert value(view, "kavier_twin_best_policy_gain_probability_ratio", **best, switch="yes") == 0.2
    assert value(view, "kavier_twin_best_policy_gain_ratio", **best, switch="no", objective="cost") == -0.1
    assert value(view, "kavier_twin_best_policy_avoided_breaches", **best, switch="yes") == -0.25


def test_scores_name_kpis_as_all_other_metrics_do() -> None:
    kpi = KpiScore("ttft_p99_seconds", 60.0, 40, 0.09, 0.1, 0.9, 0.08, 0.8, 0.6, 0.9, 0.2, 0.4)
    interval = Interval("requests_waiting", 60.0, 1.0, 2.0, 3.0, 0.5, 2.1, 4.0)
    view = replace(full_view(), scores=Scores(kpis=(kpi,), intervals=(interval,), unobserved={"power_watts": 7}))
    ttft = {"kpi": "ttft_seconds", "statistic": "p99"}
    assert value(view, "kavier_twin_score_forecasts", **ttft, horizon="60") == 40.0
    assert value(view, "kavier_twin_score_absolute_error", **ttft, horizon="60", method="served") == 0.08
    waiting = {"kpi": "requests_waiting", "statistic": "", "horizon": "60"}
    assert value(view, "kavier_twin_prediction_bound", **waiting, interval="widened", bound="median") == 2.1
    assert value(view, "kavier_twin_score_unobserved_forecasts_total", kpi="power_watts", statistic="") == 7.0
