"""Every KPI of the twin: what it is, how it is measured and judged, and how it is shown.

Simulation, scores, trust, metrics, API, command line and page read this table. Names follow vLLM's metrics, and their
units stand in them. A *metric* is what a forecast gives and an SLO may bound: a KPI, or for a latency one quantile of
it over requests, `ttft_p99_seconds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Scale:
    """How values are written whose size is at least `from_value`: times `factor`, followed by `sign`."""

    from_value: Annotated[float, Field(examples=[0.0])]
    factor: Annotated[float, Field(examples=[1000.0])]
    sign: Annotated[str, Field(examples=[" ms"])]


@dataclass(frozen=True)
class Unit:
    """A unit, and the scales to show it in, by size."""

    name: Annotated[str, Field(examples=["seconds"])]
    scales: tuple[Scale, ...]


SECONDS: Final = Unit("seconds", (Scale(0.0, 1e3, " ms"), Scale(1.0, 1.0, " s")))
RATIO: Final = Unit("ratio", (Scale(0.0, 100.0, " %"),))
COUNT: Final = Unit("count", (Scale(0.0, 1.0, ""),))
PER_SECOND: Final = Unit("per second", (Scale(0.0, 1.0, ""),))
WATTS: Final = Unit("watts", (Scale(0.0, 1.0, " W"), Scale(1e4, 1e-3, " kW")))
JOULES: Final = Unit("joules", (Scale(0.0, 1e-3, " kJ"), Scale(1e5, 1e-6, " MJ")))
GRAMS: Final = Unit("grams", (Scale(0.0, 1.0, " g"),))
CURRENCY: Final = Unit("currency", (Scale(0.0, 1.0, ""),))


class Kpi(BaseModel):
    """A row of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(examples=["ttft_seconds"])
    """As metrics, API and settings call it; it ends with the unit."""
    label: str = Field(examples=["TTFT"])
    """In tables, where room is scarce."""
    title: str = Field(examples=["time to first token"])
    """In words."""
    help: str = Field(examples=["Time from the arrival of a request to its first output token, in seconds."])
    """What it is, in a sentence."""
    unit: Unit
    """What it is measured in, and how values are written."""
    statistics: tuple[str, ...] = ()
    """Of a latency: its quantiles over requests, ascending; the last is the one that is charted. Its mean is given too,
    where it is observed."""
    interval: tuple[str, str] | None = Field(default=None, examples=[("arrival", "first_token")])
    """Of a latency: the moments of a request that it lies between."""
    per_token: bool = False
    """Whether it is divided by the output tokens after the first."""
    gauge: bool = False
    """Whether it is a state of the engines at a moment."""
    higher_is_better: bool = False
    """Whether an SLO bounds it from below."""
    objective: str = ""
    """The objective of a policy that it stands for: less of it is better."""
    max_error: float | None = Field(default=None, examples=[0.25])
    """The error up to which predictions are trusted by default; None: nothing observes it."""
    negligible: float = 0.0
    """Differences up to this do not count, however large they are relative to a small observed value."""
    stand_in: str = ""
    """The KPI that it is judged by where it is not observed, as it moves with it."""
    charted: bool = False
    """Whether the page charts it over time and shows how well it was forecast."""
    compared: bool = False
    """Whether tables that compare policies have a column for it."""

    @property
    def metrics(self) -> dict[Metric, str]:
        """Its metrics, each with its statistic; that of a KPI without statistics is empty."""
        stem = self.name.removesuffix("_seconds")
        return {f"{stem}_{one}_seconds": one for one in self.statistics} or {self.name: ""}

    @property
    def metric(self) -> Metric:
        """The one that stands for it where there is room for one only."""
        return list(self.metrics)[-1]

    @property
    def error(self) -> Literal["relative", "difference"]:
        """What its error is: (predicted - observed) / observed, or predicted - observed."""
        return "difference" if self.unit == RATIO else "relative"


# fmt: off
_ROWS: Final = (
    Kpi(name="ttft_seconds", label="TTFT", title="time to first token", unit=SECONDS, statistics=("p50", "p99"),
        interval=("arrival", "first_token"), max_error=0.25, negligible=0.01, charted=True, compared=True,
        help="Time from the arrival of a request to its first output token, in seconds."),
    Kpi(name="itl_seconds", label="ITL", title="inter-token latency", unit=SECONDS, statistics=("p99",),
        stand_in="tpot_seconds",
        help="Time between two consecutive output tokens of a request, in seconds."),
    Kpi(name="tpot_seconds", label="TPOT", title="time per output token", unit=SECONDS, statistics=("p50", "p99"),
        interval=("first_token", "finish"), per_token=True, max_error=0.2, negligible=0.001,
        help="Mean time per output token after the first, in seconds."),
    Kpi(name="e2e_seconds", label="e2e", title="end-to-end latency", unit=SECONDS, statistics=("p95",),
        interval=("arrival", "finish"), objective="latency", max_error=0.2, charted=True, compared=True,
        help="Time from the arrival of a request to its last output token, in seconds."),
    Kpi(name="queue_seconds", label="queue", title="queue time", unit=SECONDS, statistics=("p95",),
        interval=("queued", "scheduled"), max_error=0.5, negligible=0.02, stand_in="ttft_seconds", charted=True,
        help="Time that a request waits in the engine before it is first scheduled, in seconds."),
    Kpi(name="prefix_cache_hit_ratio", label="hit ratio", title="prefix-cache hit ratio", unit=RATIO,
        higher_is_better=True, max_error=0.03, charted=True, compared=True,
        help="Share of prompt tokens found in the prefix cache, 0 to 1."),
    Kpi(name="requests_running", label="running", title="requests running", unit=COUNT, gauge=True, max_error=0.25,
        negligible=1.0, stand_in="e2e_seconds",  # Little's law
        charted=True,
        help="Number of requests in the running batch."),
    Kpi(name="requests_waiting", label="waiting", title="requests waiting", unit=COUNT, gauge=True, max_error=0.5,
        negligible=1.0, stand_in="queue_seconds", charted=True, compared=True,
        help="Number of requests waiting to be scheduled."),
    Kpi(name="kv_cache_usage_ratio", label="KV cache usage", title="KV cache usage", unit=RATIO, gauge=True,
        max_error=0.1, stand_in="requests_running", charted=True,
        help="Share of KV cache blocks in use, 0 to 1."),
    Kpi(name="requests_per_second", label="requests/s", title="requests finished per second", unit=PER_SECOND,
        higher_is_better=True, max_error=0.1, charted=True,
        help="Requests finished per second."),
    Kpi(name="output_tokens_per_second", label="output tokens/s", title="output tokens per second", unit=PER_SECOND,
        higher_is_better=True, max_error=0.1, charted=True, compared=True,
        help="Output tokens generated per second."),
    Kpi(name="preemptions", label="preemptions", title="preemptions", unit=COUNT, stand_in="kv_cache_usage_ratio",
        help="Number of preemptions of running requests."),
    Kpi(name="requests_rejected", label="rejected", title="requests rejected", unit=COUNT,
        stand_in="requests_per_second",
        help="Number of requests that the engines reject because they exceed the context length or the KV "
"cache."),
    Kpi(name="power_watts", label="power", title="power", unit=WATTS, max_error=0.15, compared=True,
        help="Mean power of the GPUs in watts, times PUE."),
    Kpi(name="energy_joules_per_million_tokens", label="energy/M tokens", title="energy per million tokens",
        unit=JOULES, objective="energy", stand_in="power_watts", compared=True,
        help="Energy in joules per million tokens of prompts and outputs, times PUE."),
    Kpi(name="carbon_grams_per_million_tokens", label="carbon/M tokens", title="carbon per million tokens",
        unit=GRAMS, stand_in="power_watts", compared=True,
        help="CO2 emitted in grams per million tokens of prompts and outputs."),
    Kpi(name="cost_per_million_tokens", label="cost/M tokens", title="cost per million tokens", unit=CURRENCY,
        objective="cost", stand_in="output_tokens_per_second", compared=True,
        help="Price of the GPU time per million tokens of prompts and outputs, in the currency of the settings."),
)
# fmt: on
KPIS: Final = {kpi.name: kpi for kpi in _ROWS}
"""The table, by name."""


class Statistic(NamedTuple):
    """What a metric is: a statistic of a KPI, empty for a KPI that has none."""

    kpi: str
    statistic: str


STATISTICS: Final = {metric: Statistic(kpi.name, one) for kpi in KPIS.values() for metric, one in kpi.metrics.items()}
"""Every metric, in the order in which tables show them."""
METRICS: Final = tuple(STATISTICS)

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[METRICS]
"""The name of a metric; a model that has one accepts no other."""

LATENCIES: Final = tuple(name for name, kpi in KPIS.items() if kpi.unit == SECONDS)
RATES: Final = tuple(name for name, kpi in KPIS.items() if kpi.unit == PER_SECOND)
GAUGES: Final = tuple(name for name, kpi in KPIS.items() if kpi.gauge)


def share(statistic: str) -> float:
    """The quantile, 0 to 1, that "p99" names."""
    return float(statistic[1:]) / 100.0


def kpi_of(name: str) -> Kpi:
    """The row of a KPI or of one of its metrics."""
    return KPIS[STATISTICS[name].kpi if name in STATISTICS else name]


def label_of(metric: Metric) -> str:
    """A metric in a table: "TTFT p99"."""
    kpi, statistic = STATISTICS[metric]
    return f"{KPIS[kpi].label} {statistic}".rstrip()
