"""Passwords and tokens: kept in the environment or in a file, read when needed, never shown."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(min_length=1)]

SECRET_GIVEN: Final = "secret_given"
"""pydantic's type of an error whose input must not be shown."""


class SecretError(Exception):
    """A secret cannot be read. The message says where it was looked for, never what it is."""


@dataclass(frozen=True)
class Secret:
    """Where a secret lies: exactly one of an environment variable and a file."""

    env: str | None = None
    file: Path | None = None

    def read(self) -> str:
        """The secret as it is now: a file may be rewritten while the twin runs (Kubernetes renews its tokens).

        White space around it is dropped. Raises SecretError where there is none.
        """
        if self.file is not None:
            try:
                value = self.file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SecretError(f"{self.file}: cannot be read ({getattr(error, 'strerror', 'not UTF-8')})") from None
            where = str(self.file)
        else:
            value, where = os.environ.get(self.env or "", "").strip(), f"the environment variable {self.env}"
        if not value:
            raise SecretError(f"{where} is empty or not set")
        return value


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SecretPlace(_Settings):
    """Where a password or token lies; never the secret itself. A relative path counts from the settings file."""

    env: Name | None = Field(default=None, examples=["TWIN_TOKEN"])
    """The name of an environment variable."""

    file: Path | None = Field(default=None, examples=["/run/secrets/twin/token"])
    """A file with nothing but the secret."""

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
