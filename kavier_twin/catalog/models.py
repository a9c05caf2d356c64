"""Models by name: the `config.json` files in `models/`, or any of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from kavier_twin.catalog.config_json import read_config
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.model import ModelShape
from kavier_twin.catalog.names import Found, find_name, nearest


def _quantization_beside(file: Path) -> object:
    """NVIDIA's Model Optimizer may say how it quantised in a file of its own beside `config.json`."""
    beside = file.with_name("hf_quant_config.json")
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text(encoding="utf-8")).get("quantization")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise CatalogError(f"{beside}: cannot be read: {error}") from None


@cache
def _configs() -> Mapping[str, dict[str, Any]]:
    """The `config.json` files that ship, by name."""
    files = sorted((resources.files("kavier_twin.catalog") / "models").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".json").replace("--", "/"): json.loads(file.read_text(encoding="utf-8"))
        for file in files
        if file.name.endswith(".json")
    }


@cache
def models() -> Mapping[str, ModelShape]:
    """The models that ship, by their Hugging Face names (`Qwen/Qwen3-32B`; in file names `--` stands for the slash)."""
    return {name: read_config(raw, name).model_copy(update={"name": name}) for name, raw in _configs().items()}


def find_model(name: str) -> ModelShape:
    """The model that a served name means (`names.py` has the rules), or the path of a `config.json`, or of a folder
    that holds one.

    Raises CatalogError for a name that fits none: it names the three nearest, and how to give a `config.json`.
    """
    path = Path(name)
    if name.endswith(".json") or (path.is_dir() and (path / "config.json").is_file()):
        return _read_file(path / "config.json" if path.is_dir() else path)
    found = find_name(name, _configs())
    if found is None or found.refused:
        raise CatalogError(f"model {name!r} {_why_not(name, found)}")
    if not found.rule:
        return models()[found.model]
    shape = models()[found.model]
    if found.changes:
        shape = read_config(_with_changes(_configs()[found.model], found.changes), found.model)
    published = shape.quantization.name if shape.quantization else None
    told = {
        "name": found.model,
        "rule": found.rule,
        "named_quantization": None if found.quantization == published else found.quantization,
    }
    if found.kv_cache_dtype != "auto":
        told["kv_cache_dtype"] = found.kv_cache_dtype
    return shape.model_copy(update=told)


def _why_not(name: str, found: Found | None) -> str:
    if found is not None:
        return f"is not simulated: {found.refused}"
    near = ", ".join(nearest(name, _configs()))
    return (
        f"is not in the catalogue; nearest: {near}; if it has the sizes of one of them, name that one, else give the"
        " path of its config.json (every model's repository has one: hf download MODEL config.json)"
    )


def _with_changes(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(raw.get("text_config"), Mapping):
        return {**raw, "text_config": {**raw["text_config"], **changes}}
    return {**raw, **changes}


def _read_file(file: Path) -> ModelShape:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogError(f"{file}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{file}: not JSON: {error}") from None
    beside = _quantization_beside(file)
    if beside and isinstance(raw, dict):
        raw = {"quantization_config": beside, **raw}
    return read_config(raw, str(file))
