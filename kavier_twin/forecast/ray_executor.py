"""Simulations of a sweep on a Ray cluster, for when one machine is not enough. Needs the extra `ray`."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final

import ray

from kavier_twin.forecast.executors import Cancelled, Result, Task, never

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.2  # between looks at whether anybody still waits
_TRIES: Final = 2  # on the cluster, before a simulation is run in this process


class RayExecutor:
    """One Ray task for each simulation, of one core each.

    Joins the cluster that `ray.init` was called for or that the environment names (`RAY_ADDRESS`), else starts Ray on
    this machine with `workers` cores. The first field of a task, which many tasks share, is sent once.
    """

    def __init__(self, workers: int | None = None) -> None:
        if not ray.is_initialized():
            # A cluster that is there has its own number of cores, and refuses to be told.
            started: dict[str, Any] = (
                {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            )
            ray.init(log_to_driver=False, configure_logging=False, **started)
        self._workers = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]

    def run(
        self, function: Callable[[Task, Cancelled], Result], tasks: Iterable[Task], cancelled: Cancelled = never
    ) -> Generator[Result, None, None]:
        """See `Executor.run`. A task whose worker died is tried again, then run here; the log says so."""
        begun: deque[tuple[Task, Any]] = deque()
        shared: tuple[Any, Any] = (None, None)  # the newest shared part and where Ray keeps it

        def begin(task: Any) -> Any:
            nonlocal shared
            if shared[0] is not task[0]:
                shared = (task[0], ray.put(task[0]))
            return _remote.remote(function, type(task), shared[1], tuple(task)[1:])

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


@ray.remote(num_cpus=1, max_retries=0)  # a second try is made, and told, by who waits
def _remote(function: Callable[[Any, Cancelled], Any], kind: Any, shared: Any, own: tuple[Any, ...]) -> Any:
    return function(kind(shared, *own), never)
