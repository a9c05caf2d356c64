"""One settings tree for the daemon, read from a YAML file and checked as a whole before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from connectors.kafka.settings import KafkaSettings
from connectors.traces import FORMATS
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.hardware import FleetFile
from kavier_twin.simulation.policies import PolicyError, apply_overrides
from kavier_twin.simulation.settings import StepTime
from kavier_twin.twin.mirror import MirrorSettings

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 9469
# Until the mirror has fitted the pool's own: a step of a mid-sized model on a data-centre GPU. Not to be trusted.
CRUDE_STEP_TIME: Final = StepTime(
    fixed=0.01, per_prefill_token=3e-5, per_decode_sequence=3e-5, per_context_token=6e-8, per_prefill_attention=1e-9
)
_MIRROR: Final = MirrorSettings()

PositiveSeconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolFleet(FleetFile):
    """The pool's engines. Without `step_time` the mirror fits it to the stream, and says so until it has.

    With `hardware` it starts from what the data sheets say, and stays there where the stream cannot tell.
    """

    step_time: StepTime = CRUDE_STEP_TIME

    @property
    def calibrated(self) -> bool:
        """Whether the step time was given."""
        return "step_time" in self.model_fields_set and self.step_time != self.prior


class MirrorConfig(_Settings):
    """How the pool is mirrored (`MirrorSettings`), seconds of event time."""

    lateness_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = _MIRROR.lateness_seconds
    recent_seconds: PositiveSeconds = _MIRROR.recent_seconds
    recent_requests: Annotated[int, Field(ge=1)] = _MIRROR.recent_requests
    calibrate_after_requests: Annotated[int, Field(ge=30)] = _MIRROR.calibrate_after_requests
    recalibrate_every_requests: Annotated[int, Field(ge=1)] = _MIRROR.recalibrate_every_requests
    give_up_seconds: PositiveSeconds = _MIRROR.give_up_seconds

    def settings(self, pool: str) -> MirrorSettings:
        """As the mirror takes it."""
        return MirrorSettings(pool=pool, **self.model_dump())


class TraceFile(_Settings):
    """A trace file; followed as it grows unless told otherwise. A relative path counts from the settings file."""

    type: Literal["trace_file"]
    path: Path
    format: str | None = None
    follow: bool = True
    name: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is not None and value not in FORMATS:
            raise ValueError(f"there is no format {value!r}{_nearest(value, FORMATS)}; known: {', '.join(FORMATS)}")
        return value

    def with_paths_from(self, directory: Path) -> TraceFile:
        """With relative paths counted from `directory`."""
        return self.model_copy(update={"path": directory / self.path})

    def problems(self) -> list[str]:
        """What is missing on this machine, each as `field: what and the way out`."""
        if not self.follow and not self.path.exists():
            return [f"path: {self.path} does not exist; correct it, or set follow: true"]
        if not self.path.parent.is_dir():
            return [f"path: the directory {self.path.parent} does not exist; create it"]
        return []


SOURCES: Final[Mapping[str, type[BaseModel]]] = {"trace_file": TraceFile, "kafka": KafkaSettings}
"""Settings of a source by its `type`."""

SourceSettings = Annotated[TraceFile | KafkaSettings, Field(discriminator="type")]


class HttpConfig(_Settings):
    """Where metrics and the status page are served. Port 0 takes a free one."""

    host: Annotated[str, Field(min_length=1)] = DEFAULT_HOST
    port: Annotated[int, Field(ge=0, le=65535)] = DEFAULT_PORT


class Settings(_Settings):
    """Everything the daemon is told."""

    pool: Annotated[str, Field(min_length=1, max_length=512)] = "default"
    fleet: PoolFleet
    mirror: MirrorConfig = MirrorConfig()
    forecast: ForecastSettings = ForecastSettings()
    sources: Annotated[tuple[SourceSettings, ...], Field(min_length=1)]
    http: HttpConfig = HttpConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    dead_letters: Path | None = None  # where rejected lines are noted (file, line, reason; never their text)


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
        found = error.errors(include_url=False)
        # A list whose entries are all wrong passes for an empty one.
        beneath = {entry["loc"][:depth] for entry in found for depth in range(1, len(entry["loc"]))}
        problems += [_problem(e) for e in found if not (e["type"] == "too_short" and e["loc"] in beneath)]
    problems += _policy_problems(content)
    if settings is not None:
        settings = _with_absolute_paths(settings, path.resolve().parent)
        problems += _path_problems(settings)
    if problems or settings is None:
        lines = "\n".join(f"  {path}: {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in the settings, nothing was started:\n{lines}")
    return settings


def _with_absolute_paths(settings: Settings, directory: Path) -> Settings:
    sources = tuple(source.with_paths_from(directory) for source in settings.sources)
    letters = directory / settings.dead_letters if settings.dead_letters else None
    return settings.model_copy(update={"sources": sources, "dead_letters": letters})


def _path_problems(settings: Settings) -> list[str]:
    problems = [
        f"sources.{number}.{problem}" for number, source in enumerate(settings.sources) for problem in source.problems()
    ]
    if settings.dead_letters and not settings.dead_letters.parent.is_dir():
        problems.append(f"dead_letters: the directory {settings.dead_letters.parent} does not exist; create it")
    return problems


def _policy_problems(content: Mapping[str, Any]) -> list[str]:
    """Policies that cannot be applied to this fleet, as far as both can be read."""
    try:
        fleet = PoolFleet.model_validate(content.get("fleet")).settings()
        forecast = ForecastSettings.model_validate(content.get("forecast", {}))
    except ValidationError:
        return []  # told already
    problems = []
    for number, policy in enumerate(forecast.policies):
        try:
            apply_overrides(fleet, policy.overrides)
        except PolicyError as error:
            problems.append(f"forecast.policies.{number} ({policy.name}): {error}")
    return problems


def _problem(entry: Any) -> str:
    """One of pydantic's findings as: where, what, and what to do."""
    where = ".".join(_path(entry["loc"])) or "(top)"
    if entry["type"] == "union_tag_not_found":
        return f"{where}.type: missing; add it; known: {', '.join(SOURCES)}"
    if entry["type"] == "union_tag_invalid":
        tag = entry["ctx"]["tag"]
        return f"{where}.type: is {tag!r}{_nearest(tag, SOURCES)}; known: {', '.join(SOURCES)}"
    if entry["type"] == "extra_forbidden":
        name = str(entry["loc"][-1])
        known = _known_names(entry["loc"][:-1])
        return f"{where}: unknown setting{_nearest(name, known)}; known here: {', '.join(known)}"
    if entry["type"] == "missing":
        return f"{where}: missing; add it"
    message = str(entry["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should", "it should")
    value = entry["input"]
    secret = any("password" in part for part in _path(entry["loc"]))  # one that was given where only its place may be
    if isinstance(value, str | int | float | bool) and not secret:
        return f"{where}: is {value!r}; {message}"
    return f"{where}: {message}"


def _path(location: tuple[int | str, ...]) -> list[str]:
    """A place in the file: pydantic's, without the type that it adds after the number of a source."""
    if location[:1] == ("sources",):
        location = location[:2] + location[3:]
    return [str(part) for part in location]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    """The settings that exist at a place in the tree."""
    model: type[BaseModel] = Settings
    for part in location:
        if location[0] == "sources" and part in SOURCES:
            model = SOURCES[str(part)]
        elif isinstance(part, str) and part in model.model_fields:
            found = _model_in(model.model_fields[part].annotation)
            if found is None:
                return []
            model = found
    return list(model.model_fields)


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
