"""One settings tree for the daemon, read from a YAML file and checked as a whole before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from connectors.kafka.settings import KafkaSettings
from connectors.settings import KvEvents, LiveSource, Prometheus, TraceFile, VllmMetrics
from kavier_twin.daemon.checkpoints import EVERY_SECONDS, KEEP
from kavier_twin.daemon.freshness import STALE_AFTER_SECONDS
from kavier_twin.daemon.http_settings import HttpConfig
from kavier_twin.errors import Place, UserError, dotted, problems_of
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.hardware.fleet_file import FleetFile, fleet_with_carbon_read
from kavier_twin.mirror.fidelity.trust import TrustSettings
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.simulation.policies import PolicyError, apply_overrides
from kavier_twin.simulation.settings import CRUDE_STEP_TIME, StepTime

_MIRROR: Final = MirrorSettings()

PositiveSeconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PoolFleet(FleetFile):
    """The pool's engines. Without `step_time` the mirror fits it to the stream, and says so until it has.

    With `hardware` it starts from what the data sheets say, and stays there where the stream cannot tell.
    """

    step_time: StepTime = Field(default=CRUDE_STEP_TIME, examples=[{"fixed": 0.01, "per_prefill_token": 3e-5}])
    """Step-time coefficients of the engine. By default they are fitted to the stream."""

    engine_given: Annotated[
        tuple[str, ...], Field(exclude=True)
    ] = ()  # by the file, so that engines' words are not taken

    @model_validator(mode="before")
    @classmethod
    def _note_what_is_given(cls, content: Any) -> Any:
        engine = content.get("engine") if isinstance(content, Mapping) else None
        return {**content, "engine_given": tuple(engine)} if isinstance(engine, Mapping) else content

    @model_validator(mode="after")
    def _nobody_knows_the_future(self) -> PoolFleet:
        if self.engine.eviction == "belady":
            raise ValueError(
                "engine.eviction: belady needs to know future requests, which a live pool does not; use it in "
                "forecast.policies only"
            )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the step time was given."""
        return "step_time" in self.model_fields_set and self.step_time != self.prior


class MirrorConfig(_Settings):
    """How the pool is mirrored (`MirrorSettings`), seconds of event time."""

    late_seconds: PositiveSeconds = _MIRROR.late_seconds
    """Longest delay after which a record is still applied. A longer delay needs more memory."""

    recent_seconds: PositiveSeconds = _MIRROR.recent_seconds
    """Length of the past that scenarios are drawn from."""

    recent_requests: Annotated[int, Field(ge=1)] = _MIRROR.recent_requests
    """Maximum number of past requests that scenarios are drawn from."""

    calibrate_after_requests: Annotated[int, Field(ge=30)] = _MIRROR.calibrate_after_requests
    """Number of finished requests before step times are fitted for the first time."""

    recalibrate_every_requests: Annotated[int, Field(ge=1)] = _MIRROR.recalibrate_every_requests
    """Number of finished requests between two fits."""

    give_up_seconds: PositiveSeconds = _MIRROR.give_up_seconds
    """Time after which a request without a finish record is dropped."""

    pod_silent_seconds: PositiveSeconds = _MIRROR.pod_silent_seconds
    """Time after which a pod without data is removed from the mirror while other pods have data."""

    most_replicas: Annotated[int, Field(ge=1)] = _MIRROR.most_replicas
    """Maximum number of mirrored pods. It bounds memory."""

    trust: TrustSettings = Field(default=_MIRROR.trust, examples=[{"minimum_requests": 50}])
    """Error bounds within which figures are trusted."""

    @model_validator(mode="before")
    @classmethod
    def _no_lateness_to_choose(cls, content: Any) -> Any:
        """`lateness_seconds` was needed before late records were put in their place: read, and ignored."""
        if isinstance(content, Mapping):
            return {name: value for name, value in content.items() if name != "lateness_seconds"}
        return content

    def settings(self, pool: str) -> MirrorSettings:
        """As the mirror takes it."""
        return MirrorSettings(pool=pool, **dict(self))


AnySource = Annotated[TraceFile | KafkaSettings | Prometheus | VllmMetrics | KvEvents, Field(discriminator="type")]
SOURCE_TYPES: Final[dict[str, type[BaseModel]]] = {
    "trace_file": TraceFile,
    "kafka": KafkaSettings,
    "prometheus": Prometheus,
    "vllm_metrics": VllmMetrics,
    "kv_events": KvEvents,
}


class CheckpointConfig(_Settings):
    """Where the twin's state is kept across restarts, and how often it is written."""

    directory: Path = Field(examples=["state"])
    """Directory for checkpoints. It must exist."""

    every_seconds: PositiveSeconds = EVERY_SECONDS
    """Interval between checkpoints."""

    keep: Annotated[int, Field(ge=1, le=100)] = KEEP
    """Number of checkpoints to keep."""


class PoolSettings(_Settings):
    """One pool: engines of one model on one kind of hardware with the same settings."""

    fleet: PoolFleet = Field(examples=[{"hardware": {"gpu": "L40S", "model": "Qwen/Qwen3-8B"}}])
    """The engines."""

    mirror: MirrorConfig = Field(default=MirrorConfig(), examples=[{"late_seconds": 300}])
    """Settings of the mirror."""

    forecast: ForecastSettings = Field(default=ForecastSettings(), examples=[{"every_seconds": 60}])
    """Settings of the forecast."""


PoolName = Annotated[str, Field(min_length=1, max_length=512)]


class Settings(_Settings):
    """Everything the daemon is told. `pools`, or for a single one `pool` (its name), `fleet`, `mirror`, `forecast`."""

    pool: PoolName = Field(default="default", examples=["chat"])
    """Name of the pool, if there is only one."""

    fleet: PoolFleet | None = Field(default=None, examples=[{"hardware": {"gpu": "L40S", "model": "Qwen/Qwen3-8B"}}])
    """Engines of the pool, if there is only one."""

    mirror: MirrorConfig = Field(default=MirrorConfig(), examples=[{"late_seconds": 300}])
    """Settings of the mirror, if there is only one pool."""

    forecast: ForecastSettings = Field(default=ForecastSettings(), examples=[{"every_seconds": 60}])
    """Settings of the forecast, if there is only one pool."""

    pools: dict[PoolName, PoolSettings] = Field(
        default={}, examples=[{"chat": {"fleet": {"hardware": {"gpu": "L40S", "model": "Qwen/Qwen3-8B"}}}}]
    )
    """Pools by name. Replaces the four settings above."""

    sources: Annotated[tuple[AnySource, ...], Field(min_length=1)] = Field(
        examples=[[{"type": "kafka", "brokers": ["kafka:9092"], "topics": ["llm-requests"]}]]
    )
    """Telemetry sources."""

    http: HttpConfig = Field(default=HttpConfig(), examples=[{"host": "0.0.0.0"}])
    """Address of metrics, API and page, and access to them."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log messages."""

    stale_after_seconds: PositiveSeconds = STALE_AFTER_SECONDS
    """Time after which a failing or lagging source makes the figures stale."""

    checkpoints: CheckpointConfig | None = Field(default=None, examples=[{"directory": "state"}])
    """Where state is kept across restarts. Without it, a restart starts from scratch."""

    dead_letters: Path | None = Field(default=None, examples=["rejected.jsonl"])
    """File for rejected input: its position and the reason, never its text."""

    @property
    def by_pool(self) -> Mapping[str, PoolSettings]:
        """Every pool's settings, whichever form they were given in."""
        if self.fleet is None:
            return self.pools
        return {self.pool: PoolSettings(fleet=self.fleet, mirror=self.mirror, forecast=self.forecast)}


def read_settings(path: Path) -> Settings:
    """Read and check a settings file. Raises UserError that tells every problem at once."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the settings file with --config") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}; correct it there") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a mapping with {', '.join(Settings.model_fields)}")
    return check_settings(dict(content), path)


def check_settings(content: dict[str, Any], path: Path) -> Settings:
    """Settings from what a file holds; `path` names it in errors. Raises UserError that tells every problem at once."""
    problems: list[str] = []
    settings = None
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        problems += problems_of(error, _place, _known_names)
    problems += _pool_problems(content)
    for prefix, pool in _pools_given(content):
        problems += _policy_problems(prefix, pool)
    if settings is not None:
        settings = _with_absolute_paths(settings, path.resolve().parent)
        problems += _source_pool_problems(settings) + _path_problems(settings)
        settings = _with_carbon_read(settings, path.resolve().parent, problems)
    if problems or settings is None:
        lines = "\n".join(f"  {path}: {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in the settings, nothing was started:\n{lines}")
    return settings


def _with_absolute_paths(settings: Settings, directory: Path) -> Settings:
    sources = tuple(source.with_paths_from(directory) for source in settings.sources)
    letters = directory / settings.dead_letters if settings.dead_letters else None
    checkpoints = settings.checkpoints and settings.checkpoints.model_copy(
        update={"directory": directory / settings.checkpoints.directory}
    )
    http = settings.http.with_paths_from(directory)
    return settings.model_copy(
        update={"sources": sources, "dead_letters": letters, "checkpoints": checkpoints, "http": http}
    )


def _path_problems(settings: Settings) -> list[str]:
    problems = [
        f"sources.{number}.{problem}" for number, source in enumerate(settings.sources) for problem in source.problems()
    ]
    problems += [f"http.{problem}" for problem in settings.http.problems()]
    written = {
        "checkpoints.directory": settings.checkpoints and settings.checkpoints.directory,
        "dead_letters": settings.dead_letters and settings.dead_letters.parent,
    }
    problems += [
        f"{place}: {why}" for place, directory in written.items() if directory and (why := _unusable(directory))
    ]
    return problems


def _unusable(directory: Path) -> str:
    """Why files cannot be written to a directory, and what to do; empty where they can."""
    if not directory.is_dir():
        return f"the directory {directory} does not exist; create it, or mount a volume there"
    try:
        with TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return (
            f"the directory {directory} cannot be written to by user {os.getuid()} ({error.strerror}); give that "
            "user the right to, or mount a volume that it can write to"
        )


def _pools_given(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each pool as the file gives it, with the place where its settings begin."""
    pools = content.get("pools")
    if not isinstance(pools, Mapping):
        return [("", content)]
    return [(f"pools.{name}.", pool) for name, pool in pools.items() if isinstance(pool, Mapping)]


def _pool_problems(content: Mapping[str, Any]) -> list[str]:
    if not content.get("pools"):
        return [] if content.get("fleet") is not None else ["fleet: missing; add it, or pools if there are several"]
    both = [name for name in ("pool", *PoolSettings.model_fields) if name in content]
    return [f"{name}: belongs to each of the pools; move it to pools.NAME.{name}" for name in both]


def _source_pool_problems(settings: Settings) -> list[str]:
    """Sources of a pool that is not there, and figures that would have none."""
    problems = []
    known = settings.by_pool
    for number, source in enumerate(settings.sources):
        if source.pool is not None and source.pool not in known:
            known_pools = ", ".join(known)
            problems.append(f"sources.{number}.pool: there is no pool {source.pool!r}; known: {known_pools}")
        elif source.pool is None and len(known) > 1 and isinstance(source, LiveSource):
            problems.append(f"sources.{number}.pool: missing; say whose figures these are: {', '.join(known)}")
    fed = {source.pool for source in settings.sources}
    if None not in fed:
        problems += [f"pools.{name}: no source gives its records; add one" for name in known if name not in fed]
    return problems


def _with_carbon_read(settings: Settings, directory: Path, problems: list[str]) -> Settings:
    """With the contents of carbon files; what is wrong with them is added to `problems`."""
    found = {}
    for name, pool in settings.by_pool.items():
        place = "" if settings.fleet else f"pools.{name}."
        try:
            fleet = fleet_with_carbon_read(pool.fleet, directory)
        except UserError as error:
            problems.append(f"{place}fleet.footprint.carbon.file: {error}")
            continue
        found[name] = pool.model_copy(update={"fleet": fleet})
        if settings.fleet:
            return settings.model_copy(update={"fleet": fleet})
    return settings.model_copy(update={"pools": found})


def _policy_problems(prefix: str, pool: Mapping[str, Any]) -> list[str]:
    """Policies that cannot be applied to a pool's fleet, as far as both can be read."""
    try:
        fleet = PoolFleet.model_validate(pool.get("fleet")).settings()
        forecast = ForecastSettings.model_validate(pool.get("forecast", {}))
    except ValidationError:
        return []  # told already
    problems = []
    for number, policy in enumerate(forecast.policies):
        try:
            apply_overrides(fleet, policy.overrides)
        except PolicyError as error:
            problems.append(f"{prefix}forecast.policies.{number} ({policy.name}): {error}")
    return problems


def _place(location: Place) -> str:
    """pydantic names the type of a source between its number and its field."""
    return dotted(tuple(part for at, part in enumerate(location) if (at, location[0]) != (2, "sources")))


def _known_names(location: Place) -> list[str]:
    """The settings that could stand at a place in the tree, or the types of a source."""
    if location[0] == "sources" and location[2:] == ("type",):
        return list(SOURCE_TYPES)
    model: type[BaseModel] = Settings
    for part in location[:-1]:
        if part in SOURCE_TYPES and issubclass(model, tuple(SOURCE_TYPES.values())):
            model = SOURCE_TYPES[str(part)]
        elif isinstance(part, str) and part in model.model_fields:
            found = _model_in(model.model_fields[part].annotation)
            if found is None:
                return []
            model = found
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is None:
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return next((found for found in map(_model_in, get_args(annotation)) if found is not None), None)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)
