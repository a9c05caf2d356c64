"""Where the simulations of a sweep run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs independent tasks. Results come in the order of the tasks, whatever ran where."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """`[function(task) for task in tasks]`; raises what the first failing task raised."""
        ...


class ThreadExecutor:
    """Threads of this process: the simulation's kernels release the interpreter lock."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: at least 1 is needed")
        self.workers = workers

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="forecast") as pool:
            return list(pool.map(function, tasks))
