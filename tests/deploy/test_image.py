"""The image, as far as it can be checked without a container engine. CI carries out its steps: image_steps.py."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from deploy.helm_chart import ROOT
from kavier_twin import __version__
from real_parts import hadolint

DOCKERFILE = ROOT / "deploy/Dockerfile"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([hadolint(), DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    copied = {name for line in lines for name in shlex.split(line)[:-1]}
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept


def test_the_label_tells_this_version() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE.read_text()
