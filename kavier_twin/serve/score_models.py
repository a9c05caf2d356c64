"""What `GET /v1/scores` answers. A value not known is null; times are seconds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from kavier_twin.serve.models import Figure, PoolName

_HORIZON = Field(examples=[300])


class _Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True, frozen=True)


class KpiScore(_Answer):
    """How well one KPI was foreseen over one horizon. Errors are mean absolute ones, in the KPI's unit."""

    kpi: str = Field(examples=["ttft_p99_seconds"])
    horizon_seconds: float = _HORIZON
    forecasts: int = Field(description="Judged.", examples=[120])
    error: Figure = Field(examples=[0.08])
    persistence_error: Figure = Field(description="Of saying that it stays as it was.", examples=[0.11])
    error_to_persistence_ratio: Figure = Field(description="Below 1 is better.", examples=[0.73])
    served_error: Figure = Field(description="Of medians corrected by what was observed.", examples=[0.07])
    served_error_to_persistence_ratio: Figure = Field(examples=[0.64])
    coverage_ratio: Figure = Field(description="Intervals, as simulated, that held what came.", examples=[0.7])
    widened_coverage_ratio: Figure = Field(description="The same, widened by what was observed.", examples=[0.9])
    width: Figure = Field(description="Mean, as simulated.", examples=[0.2])
    widened_width: Figure = Field(examples=[0.4])


class Bin(_Answer):
    """Forecasts with breach probabilities of about the same size."""

    lower: float = Field(description="End of the bin, a tenth wide.", examples=[0.3])
    forecasts: int = Field(examples=[14])
    probability: float = Field(description="Mean.", examples=[0.34])
    breached_ratio: float = Field(description="How often it came.", examples=[0.36])


class BreachScore(_Answer):
    """How true the breach probabilities of one objective over one horizon were."""

    slo: str = Field(examples=["fast"])
    horizon_seconds: float = _HORIZON
    forecasts: int = Field(examples=[120])
    breached: int = Field(description="Forecasts whose breach came.", examples=[9])
    brier: Figure = Field(description="Mean squared error, 0 is perfect.", examples=[0.04])
    simulated_brier: Figure = Field(description="Of the share of scenarios.", examples=[0.05])
    persistence_brier: Figure = Field(description="Of saying that it stays as it is.", examples=[0.07])
    reliability: tuple[Bin, ...]


class AlertScore(_Answer):
    """Alerts of one objective beside the breaches that came."""

    slo: str = Field(examples=["fast"])
    alerts: int = Field(examples=[4])
    breaches: int = Field(examples=[3])
    precision: Figure = Field(description="Alerts that a breach followed in time.", examples=[0.75])
    recall: Figure = Field(description="Breaches that an alert came before.", examples=[1.0])
    lead_seconds: tuple[float, ...] = Field(description="From alert to breach, of each.", examples=[[340, 420, 610]])
    median_lead_seconds: Figure = Field(examples=[420])


class Interval(_Answer):
    """Of the last forecast: as simulated, and as served: corrected and widened."""

    kpi: str = Field(examples=["ttft_p99_seconds"])
    horizon_seconds: float = _HORIZON
    low: Figure = Field(examples=[0.6])
    median: Figure = Field(examples=[0.7])
    high: Figure = Field(examples=[0.8])
    wide_low: Figure = Field(examples=[0.5])
    served: Figure = Field(description="The corrected median.", examples=[0.72])
    wide_high: Figure = Field(examples=[0.9])


class Scores(_Answer):
    """How good forecasts have been."""

    kpis: tuple[KpiScore, ...]
    breaches: tuple[BreachScore, ...]
    alerts: tuple[AlertScore, ...]
    intervals: tuple[Interval, ...]
    pending: int = Field(description="Forecasts, by horizon, whose time has not come.", examples=[12])
    unscored: dict[str, int] = Field(description="Not judged, by reason.", examples=[{"interrupted": 3}])
    unobserved: dict[str, int] = Field(
        description="By KPI: forecasts of whose time no telemetry told it, so that it was not judged.",
        examples=[{"power_watts": 120}],
    )


class PoolScores(_Answer):
    """Those of one pool."""

    pool: PoolName
    scores: Scores


class AllScores(_Answer):
    """Those of every pool asked for."""

    pools: tuple[PoolScores, ...]
