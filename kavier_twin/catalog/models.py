"""Models by name: the `config.json` files in `models/`, or any of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from kavier_twin.catalog.config_json import read_config
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.model import ModelShape


def _read(text: str, origin: str, quantization: object = None) -> ModelShape:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise CatalogError(f"{origin}: not JSON: {error}") from None
    if quantization and isinstance(raw, dict):
        raw = {"quantization_config": quantization, **raw}
    return read_config(raw, origin)


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
def models() -> Mapping[str, ModelShape]:
    """The models that ship, by their Hugging Face names (`Qwen/Qwen3-32B`; in file names `--` stands for the slash)."""
    files = sorted((resources.files("kavier_twin.catalog") / "models").iterdir(), key=lambda file: file.name)
    names = {file.name.removesuffix(".json").replace("--", "/"): file for file in files if file.name.endswith(".json")}
    return {
        name: _read(file.read_text(encoding="utf-8"), name).model_copy(update={"name": name})
        for name, file in names.items()
    }


def _key(name: str) -> str:
    """What a name is compared by: no organisation, no case or punctuation, no words that change no size."""
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"-(hf|instruct|chat|it|base)\b", "", name.lower().rsplit("/", 1)[-1]))
    return plain.replace("metallama", "llama")


@cache
def _index() -> Mapping[str, str]:
    return {_key(name): name for name in models()}


def find_model(name: str) -> ModelShape:
    """The model of that name, with or without organisation, `-Instruct`, `-hf` and the like; or the path of a
    `config.json`, or of a folder that holds one.

    Raises CatalogError for a name that is not known, listing those that are.
    """
    path = Path(name)
    if name.endswith(".json") or (path.is_dir() and (path / "config.json").is_file()):
        file = path / "config.json" if path.is_dir() else path
        try:
            return _read(file.read_text(encoding="utf-8"), str(file), _quantization_beside(file))
        except OSError as error:
            raise CatalogError(f"{file}: cannot be read: {error.strerror}") from None
    known = _index().get(_key(name))
    if known is None:
        raise CatalogError(
            f"model {name!r} is not in the catalogue; known: {', '.join(models())}; or give the path of its config.json"
        )
    return models()[known]
