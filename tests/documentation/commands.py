"""The commands that the documentation shows: in fences, in running text, in the chart's notes, below `--help`."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deploy.helm_chart import CHART, ROOT, SAMPLES
from kavier_twin.commands.main import _EXAMPLES, COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("sh", "console")
# What a command begins with, after assignments to the environment.
PROGRAMS = (
    *("kavier-twin", "python", "python3", "pip", "pytest", "ruff", "mypy", "lint-imports", "bash", "curl"),
    *("docker", "helm", "kubectl", "mkdir", "."),
)
_FENCE = re.compile(r"^ *```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Fence(NamedTuple):
    """A block of a page. `says` is the line of text before it."""

    page: Path
    line: int
    language: str
    text: str
    says: str


class Command(NamedTuple):
    """One command as it is written, and where. A `mention` stands in running text and may leave out what follows."""

    text: str
    page: str
    line: int
    mention: bool = False

    @property
    def words(self) -> list[str]:
        return self.text.split()


def fences(page: Path) -> Iterator[Fence]:
    """All blocks of a page."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        before = text[: found.start()].rstrip().rsplit("\n\n", 1)[-1]
        yield Fence(page, text[: found.start()].count("\n") + 1, found[1], found[2], " ".join(before.split()))


def documented() -> list[Command]:
    """Every command, each text once."""
    found: dict[str, Command] = {}
    for command in (*_of_pages(), *_of_the_chart(), *of_the_help()):
        if command.text not in found or found[command.text].mention:
            found[command.text] = command
    return list(found.values())


def lines_of(script: str) -> Iterator[str]:
    """The commands of a block: joined where a line goes on, comments and prompts left out, parted at `&&`."""
    for line in script.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
        yield from (re.sub(r"\s+", " ", part.strip()) for part in line.split(" && ") if part.strip())


def _of_pages() -> Iterator[Command]:
    for page in PAGES:
        place = str(page.relative_to(ROOT))
        for fence in fences(page):
            if fence.language in SHELLS:
                for number, text in enumerate(lines_of(fence.text), fence.line + 1):
                    yield Command(text, place, number)
        running = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())
        for span in re.finditer(r"`([^`]+)`", running):
            words = span[1].split()
            if words[0] in PROGRAMS[:-1] and len(words) > 1:
                for text in lines_of(" ".join(words)):
                    yield Command(text, place, running[: span.start()].count("\n") + 1, mention=True)


def _of_the_chart() -> Iterator[Command]:
    """Of the notes as the first release sees them, and of the samples' heads."""
    filled = {".Release.Namespace": "vllm", ".Release.Name": "twin", "$name": "twin-kavier-twin"}
    filled[".Values.service.port"] = "9469"
    for path in (CHART / "templates/NOTES.txt", *SAMPLES):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            line = re.sub(r"{{ ([^ }]+) }}", lambda found: filled.get(found[1], found[0]), line)
            if re.match(r"(#  |    ) +(helm|kubectl) ", line):
                yield Command(line.strip("# "), str(path.relative_to(ROOT)), number)


def of_the_help() -> Iterator[Command]:
    """The examples below `--help`; two spaces part a command from what is said of it."""
    commands = argparse.ArgumentParser().add_subparsers()
    for name in COMMANDS:
        importlib.import_module(f"kavier_twin.commands.{name}").add_parser(commands)
    epilogs = {name: parser.epilog or "" for name, parser in commands.choices.items()}
    for name, epilog in {"": _EXAMPLES, **epilogs}.items():
        for number, line in enumerate(epilog.splitlines(), 1):
            if line.startswith("  kavier-twin "):
                yield Command(re.split(r" {2,}", line.strip())[0], f"kavier-twin {name} --help", number)
