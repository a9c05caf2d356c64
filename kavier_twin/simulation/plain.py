"""Results as what JSON knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


Figure = Annotated[float, PlainSerializer(_finite, return_type=float | None, when_used="json")]
"""A number that may be unknown: NaN or infinite here, null in the API's JSON."""


def plain(value: Any) -> Any:
    """Plain JSON types; what is not finite becomes None, and keys become text."""
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
