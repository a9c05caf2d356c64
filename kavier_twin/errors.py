"""Errors that are the user's to mend, what pydantic's say in words, and the log in which they are read."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

Place = tuple[int | str, ...]
"""Where in a document pydantic found something wrong."""

SECRET_GIVEN: Final = "secret_given"
"""pydantic's type of an error whose input must not be shown."""


class UserError(Exception):
    """A mistake of the user's: the message names the file, the field and the fix, and is all they see."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is closest; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def dotted(place: Place) -> str:
    """A place as users write it: its parts joined by dots."""
    return ".".join(map(str, place)) or "(top)"


def problems_of(
    error: ValidationError, name: Callable[[Place], str] = dotted, known: Callable[[Place], Iterable[str]] | None = None
) -> list[str]:
    """What pydantic found, each as "where: what; what to do".

    `name` turns a place into words, `known` tells which names could stand there.
    """
    found = findings(error.errors(include_url=False))
    return [_problem(entry, name, known or (lambda _: ())) for entry in found]


def findings(found: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """The same without lists that pass for empty because all of their entries are wrong."""
    found = list(found)
    beneath = {entry["loc"][:depth] for entry in found for depth in range(1, len(entry["loc"]))}
    return [entry for entry in found if not (entry["type"] == "too_short" and entry["loc"] in beneath)]


def refusal(found: ErrorDetails) -> str:
    """Why a value is refused. The value is not quoted."""
    if found["type"] == "missing":
        return "missing; add it"
    if found["type"] == "extra_forbidden":
        return "unknown; remove it"
    return str(found["msg"]).removeprefix("Value error, ").replace("Input should", "it should")


def _problem(found: ErrorDetails, name: Callable[[Place], str], known: Callable[[Place], Iterable[str]]) -> str:
    place, where = found["loc"], name(found["loc"])
    if found["type"] == "union_tag_not_found":
        return f"{where}.type: missing; add it, one of {', '.join(known((*place, 'type')))}"
    if found["type"] == "union_tag_invalid":
        given, tags = str(found["ctx"]["tag"]), re.findall(r"'([^']*)'", found["ctx"]["expected_tags"])
        return f"{where}.type: is {given!r}{nearest(given, tags)}; known: {', '.join(tags)}"
    if found["type"] == "extra_forbidden" and (names := list(known(place))):
        return f"{where}: unknown setting{nearest(str(place[-1]), names)}; known here: {', '.join(names)}"
    value = found["input"]
    secret = found["type"] == SECRET_GIVEN or any("password" in str(part) for part in place)
    of_value = found["type"] not in ("missing", "extra_forbidden") and isinstance(value, str | int | float)
    if secret or not of_value:
        return f"{where}: {refusal(found)}"
    return f"{where}: is {value!r}; {refusal(found)}"


def set_up_logging(level: str) -> None:
    """One line an event on standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a cycle that waits for the last one is no news
    logging.getLogger("numba").setLevel(logging.WARNING)
