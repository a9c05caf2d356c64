"""Settings that name files and secrets.

Passwords and tokens lie in the environment or in a file, are read when they are needed, and are never shown.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from kavier_twin.errors import SECRET_GIVEN

Name = Annotated[str, Field(min_length=1)]


class SecretError(Exception):
    """A secret cannot be read. The message says where it was looked for and what to do, never what it is."""


class Settings(BaseModel):
    """A part of the settings file. Relative paths count from that file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def with_paths_from(self, directory: Path) -> Self:
        """The same with absolute paths."""
        changed = {name: _absolute(value, directory) for name, value in self}
        return self.model_copy(update=changed)

    def problems(self) -> list[str]:
        """What is missing on this machine, each as "field: what; what to do"."""
        return list(_missing(self))


class SecretPlace(Settings):
    """Where a password or token lies; never the secret itself. A relative path counts from the settings file."""

    env: Name | None = Field(default=None, examples=["TWIN_TOKEN"])
    """Name of an environment variable."""

    file: Path | None = Field(default=None, examples=["/run/secrets/twin/token"])
    """File that contains only the secret."""

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise PydanticCustomError(SECRET_GIVEN, "expected {env: NAME} or {file: PATH}, never the secret itself")
        return given

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("give either env (the name of an environment variable) or file (a path)")
        return self

    def read(self) -> str:
        """The secret as it is now: a file may be rewritten while the twin runs (Kubernetes renews its tokens).

        White space around it is dropped. Raises SecretError where there is none.
        """
        if self.file is None:
            where, value = f"the environment variable {self.env}", os.environ.get(self.env or "", "")
        else:
            where = str(self.file)
            try:
                value = self.file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", "not UTF-8")
                raise SecretError(f"{where}: cannot be read ({why}); create it or correct the path") from None
        if not value.strip():
            raise SecretError(f"{where} is empty or not set; set it")
        return value.strip()


def _absolute(value: Any, directory: Path) -> Any:
    if isinstance(value, Settings):
        return value.with_paths_from(directory)
    if isinstance(value, dict):
        return {name: _absolute(entry, directory) for name, entry in value.items()}
    return directory / value if isinstance(value, Path) else value


def _missing(settings: Iterable[tuple[str, Any]], prefix: str = "") -> Iterator[str]:
    for name, value in settings:
        if isinstance(value, SecretPlace):
            try:
                value.read()
            except SecretError as error:
                yield f"{prefix}{name}: {error}"
        elif isinstance(value, Settings):
            yield from _missing(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from _missing(value.items(), f"{prefix}{name}.")
        elif isinstance(value, Path) and not value.is_file():
            yield f"{prefix}{name}: there is no file {value}; create it or correct the path"
