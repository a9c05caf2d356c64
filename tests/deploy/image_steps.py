"""Carries out the steps of deploy/Dockerfile below a directory, then runs what comes of it as the image would.

    python tests/deploy/image_steps.py      (as root on Debian, so that it can become the image's user)

No container engine is needed, and none replaces what it cannot do: the base image is this machine. Checked is that the
steps work, and that the twin runs as the image's user on a read-only file system with a /tmp as compose and Helm give
it, compiling no kernel. (Where mounting is not allowed, as in some containers, only the user keeps it from that.)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
USER = 10001
# Runs a command as the image's user, in mounts of its own.
_READ_ONLY = [
    *("unshare", "--mount", "--propagation", "private", "sh", "-ec"),
    'mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$1/tmp"; mount -o remount,bind,ro /; shift; '
    f'exec setpriv --reuid={USER} --regid={USER} --clear-groups -- "$@"',
    "sh",
]
_OURS = re.compile(r"(?<![\w/.])/(opt|src|var/lib/kavier-twin)\b")


class Image:
    """The file system of the last stage so far, below `root`: absolute paths of the Dockerfile are moved there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir()
        (root / "bin/python").symlink_to("/usr/bin/python3")  # Debian's, which the image's user can read
        self.environment = {"PATH": f"{root}/bin:/usr/bin:/bin", "HOME": str(root)}
        self.arguments: dict[str, str] = {}
        self.directory = root
        self.health: list[str] = []

    def moved(self, text: str) -> str:
        """With the image's paths below `root`, and its variables put in."""
        for name, value in {**self.arguments, **self.environment}.items():
            text = text.replace(f"${{{name}}}", value)
        return _OURS.sub(lambda found: f"{self.root}{found.group()}", text)

    def step(self, instruction: str, text: str) -> None:
        """One instruction."""
        if instruction == "ARG":
            name, _, value = text.partition("=")
            self.arguments[name] = value
        elif instruction == "ENV":
            self.environment |= dict(pair.split("=", 1) for pair in shlex.split(self.moved(text)))
        elif instruction == "WORKDIR":
            self.directory = Path(self.moved(text))
            self.directory.mkdir(parents=True)
        elif instruction == "COPY" and not text.startswith("--from"):  # between stages: it is there
            *names, to = shlex.split(text)
            target = Path(self.moved(to)) if to.startswith("/") else self.directory / to
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, target)
        elif instruction == "RUN":
            self.run(self.moved(text))
        elif instruction == "HEALTHCHECK":
            self.health = json.loads(text[text.index("CMD") + 3 :])

    def run(self, command: str) -> None:
        print(f"+ {command}", flush=True)
        subprocess.run(command, shell=True, check=True, cwd=self.directory, env=self.environment)


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="image-") as made:
        root = Path(made)
        root.chmod(0o755)
        image = Image(root)
        for instruction, text in instructions():
            image.step(instruction, text)
        shutil.rmtree(root / "src")
        subprocess.run(["chmod", "-R", "a-w,a+rX", root / "opt"], check=True)
        (root / "tmp").mkdir(mode=0o1777)
        (root / "tmp").chmod(0o1777)
        try_out(image)


def try_out(image: Image) -> None:
    """The demo, which goes through all that a daemon does, asked for its health meanwhile."""
    environment = {**image.environment, "HOME": "/nonexistent", "TMPDIR": str(image.root / "tmp")}
    drop = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
    began = time.monotonic()
    command = [f"{image.root}/opt/twin/bin/kavier-twin", "demo", "--no-ui", "--speed", "1000"]
    kept = sorted((image.root / "opt/kernels").iterdir())
    inside = _READ_ONLY if subprocess.run([*_READ_ONLY, image.root, "true"], check=False).returncode == 0 else None
    print(
        "the root file system is read-only" if inside else "no mounting here: files are the user's only bar", flush=True
    )
    log = (image.root / "tmp/log").open("wb")
    if inside:
        twin = subprocess.Popen([*inside, image.root, *command], env=environment, cwd="/", stderr=log)
    else:
        twin = subprocess.Popen(command, env=environment, cwd="/", stderr=log, **drop)
    try:
        while subprocess.run(
            image.health, check=False, env=environment, cwd="/", stderr=subprocess.DEVNULL, **drop
        ).returncode:
            assert twin.poll() is None, "the twin ended"
            assert time.monotonic() - began < 120, "it does not become healthy"
            time.sleep(0.5)
        print(f"healthy {time.monotonic() - began:.1f} s after its start", flush=True)
        time.sleep(5)
    finally:
        twin.terminate()
        twin.wait(30)
    told = (image.root / "tmp/log").read_text()
    print(told)
    assert len(kept) == 5, kept
    assert sorted((image.root / "opt/kernels").iterdir()) == kept
    assert "cannot be kept" not in told  # as it says where kernels have to be compiled
    assert twin.returncode == 0, twin.returncode


if __name__ == "__main__":
    main()
