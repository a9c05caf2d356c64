"""Where the simulations of a sweep run."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any, Final, Protocol, TypeVar

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.2  # between looks at whether anybody still waits
_TRIES: Final = 2  # on a Ray cluster, before a simulation is run in this process

Task = TypeVar("Task")
Result = TypeVar("Result")
Cancelled = Callable[[], bool]
"""Whether the result is no longer needed. Long tasks check it from time to time and stop early."""


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


class RayExecutor:
    """One Ray task for each simulation, of one core each. Needs the extra `ray`.

    Joins the cluster that `ray.init` was called for or that the environment names (`RAY_ADDRESS`), else starts Ray on
    this machine with `workers` cores. The first field of a task, which many tasks share, is sent once.
    """

    def __init__(self, workers: int | None = None) -> None:
        import ray

        if not ray.is_initialized():
            # A cluster that is there has its own number of cores, and refuses to be told.
            started: dict[str, Any] = (
                {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            )
            ray.init(log_to_driver=False, configure_logging=False, **started)
        self._ray = ray
        # A second try is made, and told, by who waits.
        self._remote = ray.remote(num_cpus=1, max_retries=0)(_from_parts)
        self._workers = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]

    def run(
        self, function: Callable[[Task, Cancelled], Result], tasks: Iterable[Task], cancelled: Cancelled = never
    ) -> Generator[Result, None, None]:
        """See `Executor.run`. A task whose worker died is tried again, then run here; the log says so."""
        ray = self._ray
        begun: deque[tuple[Task, Any]] = deque()
        shared: tuple[Any, Any] = (None, None)  # the newest shared part and where Ray keeps it

        def begin(task: Any) -> Any:
            nonlocal shared
            if shared[0] is not task[0]:
                shared = (task[0], ray.put(task[0]))
            return self._remote.remote(function, type(task), shared[1], tuple(task)[1:])

        def result() -> Result:
            task, reference = begun.popleft()
            for _ in range(_TRIES):
                try:
                    while not cancelled() and not ray.wait([reference], timeout=_POLL_SECONDS)[0]:
                        pass
                    if cancelled():
                        ray.cancel(reference, force=True)
                        return function(task, cancelled)  # which ends at once, as told
                    found: Result = ray.get(reference)
                    return found
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    log.warning("a Ray worker was lost (%s); its simulation is run again", type(error).__name__)
                    reference = begin(task)
            log.warning("Ray lost a simulation %d times; it is run in this process", _TRIES)
            return function(task, cancelled)

        try:
            for task in tasks:
                begun.append((task, begin(task)))
                if len(begun) > self._workers:
                    yield result()
            while begun:
                yield result()
        finally:
            for _, reference in begun:
                ray.cancel(reference, force=True)


def _from_parts(function: Callable[[Any, Cancelled], Any], kind: Any, shared: Any, own: tuple[Any, ...]) -> Any:
    return function(kind(shared, *own), never)
