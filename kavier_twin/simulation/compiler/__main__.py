"""Compiles one library: python -m kavier_twin.simulation.compiler MODULE LIBRARY FILE, ending when its input does."""

import os
import sys
from importlib import import_module
from pathlib import Path
from threading import Thread

from kavier_twin.simulation.compiler import libraries


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_end_with_parent, daemon=True).start()
    module, name, file = sys.argv[1:]
    import_module(module)
    libraries.keep(libraries.named(name).compile(), Path(file))
