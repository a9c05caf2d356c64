"""What engines do that the twin does not model, as a metric."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import InfoMetricFamily

from kavier_twin.serve.metrics.families import PREFIX
from kavier_twin.serve.models import Unmodelled


def unmodelled_metric(pool: str, features: Sequence[Unmodelled]) -> InfoMetricFamily:
    """One sample for each feature."""
    info = InfoMetricFamily(
        f"{PREFIX}_unmodelled",
        "A feature that the pool's engines use and the twin does not model, always 1. The KPIs that it spoils are not "
        "trusted. The notes of the status tell how it was seen.",
        labels=["pool", "feature"],
    )
    for feature in features:
        info.add_metric([pool, feature.name], {})
    return info
