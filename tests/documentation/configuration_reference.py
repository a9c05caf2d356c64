"""docs/configuration.md, made from the models that check a settings file.

PYTHONPATH=tests python -m documentation.configuration_reference > docs/configuration.md
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from kavier_twin.daemon.config import SOURCE_TYPES, Settings

_HEAD = """# Configuration

Every setting of the file that `kavier-twin run --config twin.yaml` reads. `kavier-twin run --check --config twin.yaml`
checks one without starting anything and tells all that is wrong at once. Generated from the code: see
`tests/documentation/configuration_reference.py`; a test keeps it up to date.

- What stands under a section's name is indented or in braces: `fleet: {engine: {max_num_seqs: 256}}`. A name
  that is not known is refused.
- Default *none*: nothing, unless given. *needed*: there is no default. A default that is a section is that section's.
- A relative path counts from the settings file. Secrets are never written here, only where they lie.
- `fleet` or `pools` is needed: `fleet` with `pool`, `mirror` and `forecast` describes a single pool, `pools` several.

A file may be as short as this:

```yaml
fleet:
  hardware: {gpu: H100 SXM 80GB, model: meta-llama/Llama-3.1-8B}
sources:
  - {type: kafka, brokers: ["kafka:9092"], topics: [llm-requests]}
```

## Sections

"""
# Units that stand in a name, and those of the names that have none.
_SUFFIXES = {
    "_bytes_per_second": "bytes/s",
    "_gpu_hour": "currency/h",
    "_seconds": "s",
    "_tokens": "tokens",
    "_token_threshold": "tokens",
    "_bytes": "bytes",
    "_bytes_per_token": "bytes/token",
    "_gib": "GiB",
    "_watts": "W",
    "_per_kwh": "g/kWh",
    "_ratio": "ratio",
    "_requests": "requests",
    "_replicas": "replicas",
    "_requests_at_once": "requests",
    "_gpu_blocks": "blocks",
    "_blocks_per_chunk": "blocks",
    "_seqs": "requests",
    "_size": "GPUs",
    "_load": "ratio",
    "_share": "ratio",
}
_UNITS = {
    "bytes_per_second": "bytes/s",
    "replicas": "replicas",
    "fixed": "s/step",
    "per_prefill_token": "s/token",
    "per_decode_sequence": "s/request",
    "per_context_token": "s/token",
    "per_prefill_attention": "s/token²",
    "linear_scale": "ratio",
    "router_max_imbalance": "requests",
    "block_size": "tokens",
    "max_model_len": "tokens",
    "max_loras": "adapters",
    "blocks_per_chunk": "blocks",
    "store_threshold": "lookups",
    "max_tracker_size": "chunks",
    "watermark": "ratio",
    "gpu_memory_utilization": "ratio",
    "gpus_per_replica": "GPUs",
    "pue": "ratio",
    "by_hour_utc": "g/kWh",
    "scenarios": "scenarios",
    "least_scenarios": "scenarios",
    "certainty": "probability",
    "quantiles": "probability",
    "workers": "threads",
    "keep": "files",
    "threshold": "the KPI's",
}
_WITHOUT_UNIT = {"start", "port", "seed", "linear_layers", "points", "max_error", "overrides"}


def sections() -> dict[str, type[BaseModel]]:
    """Every model of the tree by its place in the file, the first where it has several."""
    found: dict[str, type[BaseModel]] = {"The file": Settings}
    for name, field in _settings(Settings).items():
        if name == "sources":
            for kind, model in SOURCE_TYPES.items():
                _collect(f"sources: type {kind}", model, found)
        else:
            _beneath("pools.NAME" if name == "pools" else name, field, found)
    return found


def _collect(place: str, model: type[BaseModel], found: dict[str, type[BaseModel]]) -> None:
    if model in found.values():
        return
    found[place] = model
    for name, field in _settings(model).items():
        _beneath(f"{place}, {name}" if ":" in place else f"{place}.{name}", field, found)


def _beneath(place: str, field: FieldInfo, found: dict[str, type[BaseModel]]) -> None:
    for model in _models(field.annotation):
        _collect(place, model, found)


def _settings(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {name: field for name, field in model.model_fields.items() if not field.exclude}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def kind(annotation: Any) -> str:
    """A type in the words of YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(part) for part in inner if part is not type(None)))
    if origin is tuple:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return f"mapping of {kind(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Path": "path"}
    return names.get(annotation.__name__, "time" if "atetime" in annotation.__name__ else annotation.__name__)


def unit(name: str, field: FieldInfo) -> str:
    """Of a number; empty for what is none. Raises KeyError where it is not known."""
    if name in _UNITS:
        return _UNITS[name]
    words = kind(field.annotation)
    if "number" not in words or name in _WITHOUT_UNIT:
        return ""
    for suffix, found in _SUFFIXES.items():
        if f"_{name}".endswith(suffix):
            return found
    raise KeyError(f"{name}: no unit in its name; name it so, or add it to the tables here")


def example(name: str, field: FieldInfo) -> Any:
    """A value that may be written: one that the code names, else the default."""
    if field.examples:
        return field.examples[0]
    found = get_args(field.annotation)[0] if name == "type" else field.get_default(call_default_factory=True)
    return to_jsonable_python(found)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n...\n").strip()


def _plain(value: Any) -> Any:
    """With 60 for 60.0."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def default(field: FieldInfo) -> str:
    """As the table shows it."""
    if field.is_required():
        return "*needed*"
    value = field.default
    if value is None or field.default_factory is not None:
        return "*none*"
    if isinstance(value, BaseModel):
        return "its section's"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return ", ".join(f"`{entry.name}`" for entry in value)
    return f"`{_yaml(to_jsonable_python(value))}`"


def check_example(model: type[BaseModel], name: str) -> None:
    """Raises pydantic's ValidationError where a field's example is not one."""
    field = model.model_fields[name]
    wanted = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    TypeAdapter(wanted).validate_python(example(name, field))


def reference() -> str:
    """The page."""
    found = sections()
    text = _HEAD
    for place, model in found.items():
        about = " ".join((model.__doc__ or "").split("\n\n")[0].split())
        text += f"### {place}\n\n{about}\n\n"
        text += "| setting | type | default | unit | says | example |\n|---|---|---|---|---|---|\n"
        for name, field in _settings(model).items():
            shown = _yaml({name: example(name, field)})[1:-1]
            cells = [
                f"`{name}`",
                _linked(field, found),
                default(field),
                unit(name, field),
                field.description,
                f"`{shown}`",
            ]
            text += " | ".join(["", *(str(cell or "").replace("|", "\\|") for cell in cells), ""]).strip() + "\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


def _linked(field: FieldInfo, found: dict[str, type[BaseModel]]) -> str:
    """The type of a setting, with links to the sections it may be."""
    places = {model: place for place, model in found.items()}
    links = []
    for model in dict.fromkeys(_models(field.annotation)):
        if model in places:
            anchor = re.sub(r"[^\w -]", "", places[model].lower()).replace(" ", "-")
            links.append(f"[{places[model]}](#{anchor})")
    words = kind(field.annotation)
    return words.replace("section", " or ".join(links)) if links else words


if __name__ == "__main__":
    print(reference(), end="")
