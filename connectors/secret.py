"""Passwords and tokens: kept in the environment or in a file, read when needed, never shown."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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
