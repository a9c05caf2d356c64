"""Where the simulations of a sweep run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Cancelled = Callable[[], bool]
"""Whether nobody waits for a result any more. A long task asks now and then, and ends early."""


def never() -> bool:
    """Nobody cancels."""
    return False


class Executor(Protocol):
    """Runs independent tasks. Results come in the order of the tasks, whatever ran where."""

    def run(
        self, function: Callable[[Task, Cancelled], Result], tasks: Iterable[Task], cancelled: Cancelled = never
    ) -> Generator[Result, None, None]:
        """`function(task, cancelled)` of each task, which are taken a few ahead; raises what the first failing raised.

        Closing the generator cancels what was begun and not handed out.
        """
        ...


class ThreadExecutor:
    """Threads of this process: the simulation's kernels release the interpreter lock."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: at least 1 is needed")
        self.workers = workers

    def run(
        self, function: Callable[[Task, Cancelled], Result], tasks: Iterable[Task], cancelled: Cancelled = never
    ) -> Generator[Result, None, None]:
        closed = Event()
        begun: deque[Future[Result]] = deque()

        def unwanted() -> bool:
            return closed.is_set() or cancelled()

        with ThreadPoolExecutor(self.workers, thread_name_prefix="forecast") as pool:
            try:
                for task in tasks:
                    begun.append(pool.submit(function, task, unwanted))
                    if len(begun) > self.workers:
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()
            finally:
                closed.set()
                for future in begun:
                    future.cancel()
