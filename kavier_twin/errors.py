"""Errors that are the user's to mend, and the log in which they are read."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the message names the file, the field and the fix, and is all they see."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is closest; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def set_up_logging(level: str) -> None:
    """One line an event on standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a cycle that waits for the last one is no news
    logging.getLogger("numba").setLevel(logging.WARNING)
