"""What a server or a page has in place of the engines that were asked for, and the setting that would choose it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from connectors.prometheus.api import PrometheusApi, matchers
from connectors.prometheus.http import FetchError
from connectors.prometheus.names import PLAIN_GAUGES, STARTED, is_bare, place_of, running_selector, series_of
from connectors.prometheus.servers import readable

# Some of the names by which an engine shows under whatever prefix.
_WORDS: Final = (
    *(series_of(field).removeprefix("vllm:") for field in sorted(PLAIN_GAUGES)),
    "gpu_cache_usage_perc",
    "time_to_first_token_seconds_count",
)
_LISTED: Final = ("job", "namespace", "pod", "instance", "model_name")  # of what is there
_SHOWN: Final = 4


def what_is_there(api: PrometheusApi, wanted: Mapping[str, str], prefix: str) -> str:
    """Why a server gives no engine with these label values, in a line; empty where it does. Raises FetchError."""
    if _engines(api, matchers(wanted), prefix):
        return ""
    asked = matchers(wanted).removeprefix(",").replace(",", ", ")
    try:
        there = _engines(api, "", prefix) if wanted else []
        if there:
            return f"no-engine: no series of vLLM has {asked}; {_how_to_choose(there, wanted)}"
        found = api.instant(f'{{__name__=~".*({"|".join(_WORDS)})"}}')
        names = {series.labels.get("__name__", "") for series in found}
    except FetchError:
        return f"no-engine: no series of vLLM{f' has {asked}' if asked else ''}; correct engines"
    hint = prefix_hint(names) or "does the server scrape the engines' /metrics?"
    return f"no-engine: no vLLM series such as {series_of('requests_running')}; {hint}"


def prefix_hint(names: Iterable[str]) -> str:
    """The setting that reads metrics that are named as vLLM's but for their prefix; empty where none are."""
    prefixes = dict.fromkeys(
        match[1] for name in sorted(names) if (match := re.fullmatch(f"(.+?)(?:{'|'.join(_WORDS)})", name))
    )
    if not prefixes:
        return ""
    prefix = next(iter(prefixes))
    example = next(name for name in sorted(names) if name.startswith(prefix))
    return f"there is {example}: set metric_prefix: {json.dumps(prefix)} if that is an engine's"


def names_seen(names: Iterable[str]) -> str:
    """A few names of metrics, for a page that has none of an engine's."""
    return some(sorted(name for name in set(names) if name not in STARTED))


def _engines(api: PrometheusApi, matchers: str, prefix: str) -> list[dict[str, str]]:
    """The labels of the engines that a server knows now."""
    found = []
    for series in api.instant(running_selector(matchers, prefix)):
        name = series.labels.get("__name__", "")
        place = place_of(name, prefix)
        if place is not None and (place.field == "requests_running" or not is_bare(name, prefix)):
            found.append(readable(series.labels))
    return found


def _how_to_choose(there: list[dict[str, str]], wanted: Mapping[str, str]) -> str:
    """What label values there are, those asked for first."""
    values = {
        name: sorted({labels[name] for labels in there if labels.get(name)})
        for name in dict.fromkeys((*wanted, *_LISTED))
    }
    told = [f"{name} {some(found)}" for name, found in values.items() if found]
    missing = [f"none has a label {name}" for name in wanted if not values[name]]
    return f"there are vLLM series with {'; '.join([*told, *missing])}: set engines to what yours have"


def some(values: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(values[:_SHOWN]) + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
