"""Which series are of the same vLLM server, and what that server and its engines are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from connectors.prometheus.names import (
    PLAIN_GAUGES,
    address_of,
    flat_labels,
    kubernetes_pod_of,
    label,
    namespace_of,
    place_of,
    ray_replica_of,
)
from connectors.prometheus.readings import Reading

Server = tuple[tuple[str, str], ...]
"""The labels that tell a server from others."""

_OWN: Final = ("__name__", "le", "engine", "model_name", "model")  # given by vLLM
# Two of these on one server's series: it is scraped twice, by two jobs or by two Prometheus servers of a pair.
_OF_THE_SCRAPE: Final = (
    "job",
    "service",
    "endpoint",
    "prometheus",
    "prometheus_replica",
    "replica",
    "receive",
    "tenant_id",
)
_NO_TELLING: Final = frozenset(
    f"{level}{name}" for name in (*_OWN, *_OF_THE_SCRAPE) for level in ("", "exported_", "exported_exported_")
)
_SUCCEEDS_SECONDS: Final = 120.0  # without a scrape, until another server in its place is its successor


class Named(NamedTuple):
    """Where an engine runs. `spot` tells a pod's servers apart, and is empty for the first."""

    namespace: str
    pod: str
    spot: str


@dataclass
class _Spot:
    text: str
    newest_seconds: float


class Servers:
    """Groups series by server and names the servers, the same way from call to call.

    vLLM's plain gauges bear its own labels `engine` and `model_name` and no others. Whatever else they bear was put
    there on the way and tells servers apart: `instance`, `pod`, `exported_instance`, Ray's `ReplicaId`, anything.
    Labels that only other metrics have are vLLM's own. Where no gauge is told of, labels that all metrics have do.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._telling: set[str] = set()
        self._spots: dict[tuple[str, str], dict[str, _Spot]] = {}  # by namespace and pod, then by what tells them apart

    def learn(self, series: Iterable[tuple[str, Mapping[str, str]]]) -> None:
        """Find out from series (name and labels) which labels tell servers apart."""
        known = [(place, labels) for name, labels in series if (place := place_of(name, self._prefix)) is not None]
        by_metric: dict[str, set[str]] = {}
        for place, labels in known:
            by_metric.setdefault(place.field, set()).update(labels.keys() - _NO_TELLING)
        gauges = [labels for field, labels in by_metric.items() if field in PLAIN_GAUGES]
        if gauges:
            self._telling.update(*gauges)
        elif by_metric and not self._telling:
            self._telling.update(set.intersection(*by_metric.values()))

    def server_of(self, labels: Mapping[str, str]) -> Server:
        """Whose series this is."""
        return tuple((name, labels[name]) for name in sorted(self._telling) if labels.get(name))

    def named(self, server: Server, time_seconds: float, pod: str = "") -> Named:
        """What to call a server that was scraped then; `pod` where that is known otherwise.

        The second server of a pod has its port for a spot, or whatever else tells it from the first.
        """
        labels = dict(server)
        namespace, base = namespace_of(labels), pod or ray_replica_of(labels) or kubernetes_pod_of(labels)
        if base and not pod and ray_replica_of(labels):
            place = ""
        elif base and not pod:
            place = "/".join(filter(None, (label(labels, "cluster"), _port(address_of(labels), labels))))
        else:
            base = base or address_of(labels)
            place = "/".join(value for _, value in server if value not in (base, namespace))
        spots = self._spots.setdefault((namespace, base), {})
        spot = spots.get(place)
        if spot is None:
            gone = [key for key, old in spots.items() if old.newest_seconds < time_seconds - _SUCCEEDS_SECONDS]
            spot = spots.pop(gone[0]) if gone else _Spot(place if spots else "", time_seconds)
            spots[place] = spot
        spot.newest_seconds = max(spot.newest_seconds, time_seconds)
        return Named(namespace, base, spot.text)

    def forget(self, before_seconds: float) -> None:
        """Let go of servers that were not scraped since then."""
        for pod, spots in list(self._spots.items()):
            for place, spot in list(spots.items()):
                if spot.newest_seconds < before_seconds:
                    del spots[place]
            if not spots:
                del self._spots[pod]

    def save(self) -> list[Any]:
        """The names, as JSON types."""
        return [
            [*pod, place, spot.text, spot.newest_seconds]
            for pod, spots in self._spots.items()
            for place, spot in spots.items()
        ]

    def restore(self, saved: Iterable[Any]) -> None:
        """What `save` gave."""
        for namespace, pod, place, text, newest in saved:
            self._spots.setdefault((namespace, pod), {})[place] = _Spot(text, newest)


def by_server(readings: Iterable[Reading], servers: Servers, prefix: str = "") -> dict[Server, list[Reading]]:
    """The readings of one page. What its process says of itself goes to the server where there is only one.

    Series that lack a label by which servers are told apart are nobody's.
    """
    readings = list(readings)
    servers.learn((reading.name, reading.labels) for reading in readings)
    found: dict[Server, list[Reading]] = {}
    for reading in readings:
        found.setdefault(servers.server_of(reading.labels), []).append(reading)
    engines = with_gauges(found, prefix)
    if len(engines) == 1:
        return {next(iter(engines)): readings}
    return engines


def with_gauges(found: Mapping[Server, list[Reading]], prefix: str) -> dict[Server, list[Reading]]:
    """Without groups that have no gauge and are told less precisely than one that has."""
    whole = [
        set(server)
        for server, readings in found.items()
        if any((place := place_of(r.name, prefix)) is not None and place.field in PLAIN_GAUGES for r in readings)
    ]
    return {server: readings for server, readings in found.items() if not any(set(server) < one for one in whole)}


def readable(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels as `Servers` takes them."""
    return dict(labels) if all(map(str.isidentifier, labels)) else flat_labels(labels)


def _port(address: str, labels: Mapping[str, str]) -> str:
    """What tells servers of one pod apart; a pod's address changes when it is made anew, its ports do not."""
    if label(labels, "service_instance_id"):
        return address  # behind a collector, which may have a pod of its own
    _, colon, port = address.rpartition(":")
    return port if colon and port.isdigit() else label(labels, "container") or address
