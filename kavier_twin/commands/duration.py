"""Durations on the command line."""

from __future__ import annotations

import argparse
import math
from typing import Final

_UNITS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def seconds_of(text: str) -> float:
    """Seconds in "90", "90s", "15m", "1h", "2d" or "500ms", more than 0. A type for argparse."""
    number, unit = text.strip(), 1.0
    for suffix, seconds in _UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), seconds
            break
    try:
        found = float(number) * unit
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found > 0.0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a duration such as 90s, 15m or 1h")
    return found
