"""What a command that runs until it is told to end needs of its process: signals, log, end."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any


class StopSignals:
    """Within it, SIGTERM and Ctrl-C are remembered instead of ending the process; a second one ends it as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _take(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    @property
    def exit_status(self) -> int:
        """0 where a service manager ended the process as it should, 130 for Ctrl-C."""
        return 130 if self.received == signal.SIGINT else 0


def leave(status: int) -> None:
    """End the process now, with what was printed."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
