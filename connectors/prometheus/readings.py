"""One value of one series at one moment: what scraping an engine and asking a Prometheus server have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

Reject = Callable[[str], None]
"""Takes the reason for which a piece of input was left out."""


class Reading(NamedTuple):
    """A series (name and labels) and its value."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse_exposition(text: str) -> list[Reading]:
    """The readings of a `/metrics` page in the text format. Raises ValueError where it is not in that format."""
    return [
        Reading(sample.name, sample.labels, float(sample.value))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
