"""Sweeps on a real local Ray of two workers."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forecast.streams import chat_stream, fleet_settings, snapshot_at
from kavier_twin.forecast.executors import Cancelled, ThreadExecutor
from kavier_twin.forecast.settings import ForecastSettings
from kavier_twin.forecast.sweep import OutOfTime, sweep
from real_parts import require

pytestmark = [pytest.mark.slow, pytest.mark.real]


class Job(NamedTuple):
    shared: Path
    number: int


@pytest.fixture(scope="module")
def executor() -> Iterator[Any]:
    require("ray", find_spec("ray") is not None, "install the extra `ray`")
    require("Bash", shutil.which("bash") is not None, "Ray starts its workers with it")
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}},
    )
    from kavier_twin.forecast.executors import RayExecutor

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have this module
    yield RayExecutor()
    ray.shutdown()


def test_the_same_bytes_as_in_threads(executor: Any) -> None:
    snapshot = snapshot_at(chat_stream(1, 200.0), fleet_settings(replicas=2, num_gpu_blocks=500), 150.0, 100.0)
    settings = ForecastSettings(horizons_seconds=(20.0, 60.0), scenarios=3)
    texts = {json.dumps(sweep(snapshot, settings, each).to_dict()) for each in (executor, ThreadExecutor(2))}
    assert len(texts) == 1
    with pytest.raises(OutOfTime):
        sweep(snapshot, settings, executor, lambda: True)


def test_errors_are_handed_on(executor: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        list(executor.run(_divide, [Job(Path(), 1), Job(Path(), 0)]))


def test_a_lost_worker_costs_no_result(executor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The worker dies at its first try of job 1, and at every try of job 2, which then runs here."""
    with caplog.at_level(logging.WARNING):
        assert list(executor.run(_die, [Job(tmp_path, number) for number in range(4)])) == [0, 10, 20, 30]
    assert caplog.text.count("a Ray worker was lost") == 3
    assert caplog.text.count("it is run in this process") == 1


def _divide(job: Job, _: Cancelled) -> int:
    return 1 // job.number


def _die(job: Job, _: Cancelled) -> int:
    import ray

    if ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return 10 * job.number  # not on the cluster
    tried = job.shared / f"{job.number}"
    if job.number == 2 or (job.number == 1 and not tried.exists()):
        tried.touch()
        os._exit(1)
    return 10 * job.number
