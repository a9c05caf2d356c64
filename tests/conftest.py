"""Fixtures and options of all tests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import settings
from hypothesis.vendor.pretty import RepresentationPrinter

import effort
from kafka_broker import Broker, OurBroker, kafka_broker
from real_parts import NO_SHARED_DATA, in_ci, require, require_shared_data

WORKER_BYTES = 3 << 30  # a process that has compiled every kernel
SEED, KAFKA = "hypothesis_seed", "kafka"  # names of what the processes of a run tell each other

# The same everywhere: left to itself, Hypothesis would try the same examples in each CI run.
settings.register_profile("tests", deadline=None, print_blob=True)
settings.load_profile("tests")
# Schemathesis, which pytest loads as a plugin, replaces the printer: no test would show the example that it failed on.
hypothesis.core.RepresentationPrinter = RepresentationPrinter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effort",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="try FACTOR times as many random examples and records: 10 before a change of the engine is merged",
    )


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads the seed
def pytest_configure(config: pytest.Config) -> None:
    """All processes of a run use one seed, which is drawn if none is given."""
    of_the_run = getattr(config, "workerinput", {}).get(SEED)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = of_the_run or str(random.SystemRandom().randrange(1 << 32))
    if config.option.effort < 1.0:
        raise pytest.UsageError("--effort must be at least 1; to try less, leave tests out: -m 'not slow'")
    effort.FACTOR, effort.SEED = config.option.effort, config.option.hypothesis_seed


def pytest_report_header(config: pytest.Config) -> str:
    again = f"--hypothesis-seed={config.option.hypothesis_seed} --effort={config.option.effort:g}"
    return f"random examples: to get the same ones again, {again}"


# ---- several processes (pytest-xdist) -----------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Hand the seed to a worker."""
    node.workerinput[SEED] = node.config.option.hypothesis_seed  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take from a worker which Kafka it found."""
    Broker.last_described = getattr(node, "workeroutput", {}).get(KAFKA) or Broker.last_described


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, as far as memory goes. None where single files are named: starting them takes longer."""
    if config.args and all(".py" in argument for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    workers = min(cores, memory_bytes // WORKER_BYTES)
    return workers if workers > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Compile the kernels once, or each worker would. An error is left to the tests."""
    terminalreporter = config.pluginmanager.get_plugin("terminalreporter")
    if terminalreporter is not None:
        terminalreporter.write_line("making the kernels ready: they are compiled on the first run, then cached")
    program = "from kavier_twin.daemon.warm_up import make_ready; make_ready()"
    subprocess.run([sys.executable, "-c", program], cwd=config.rootpath, check=False)


# ---- what is left out ---------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Kafka the tests ran against, how many tests want data that is not in the repository, and what repeats a
    failure."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(pytest_report_header(terminalreporter.config))
    if described := Broker.last_described:
        terminalreporter.write_line(f"Kafka: {described}")
    without_data, others = skipped(terminalreporter)
    if without_data:
        terminalreporter.write_line(
            "Tests left out because they need data that others published and that may not be copied into this "
            f"repository (docs/contributing.md): {len(without_data)}"
        )
    if others and in_ci():
        terminalreporter.write_line("FAILED: in CI no test may be skipped for another reason:", red=True)
        for report in others:
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
            terminalreporter.write_line(f"  {report.nodeid}: {why}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing is skipped but for want of data."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output[KAFKA] = Broker.last_described
    terminalreporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminalreporter is not None and in_ci() and skipped(terminalreporter)[1] and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def skipped(
    terminalreporter: pytest.TerminalReporter,
) -> tuple[list[pytest.TestReport | pytest.CollectReport], list[pytest.TestReport | pytest.CollectReport]]:
    """The reports of tests and modules skipped for want of data, and of those skipped for another reason."""
    reports = terminalreporter.stats.get("skipped", [])
    without_data = [report for report in reports if NO_SHARED_DATA in report.longreprtext]
    return without_data, [report for report in reports if report not in without_data]


# ---- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data that others published: `KAVIER_SHARED_DATA`, or `../shared/data` beside the repository."""
    named = os.environ.get("KAVIER_SHARED_DATA")
    return require_shared_data(Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def kafka() -> Iterator[Broker]:
    """A Kafka, see tests/kafka_broker.py. In CI it is Apache Kafka itself."""
    with kafka_broker() as broker:
        how = "install Java and Maven (Debian: apt-get install default-jre-headless maven), or set KAVIER_TEST_KAFKA"
        require("Apache Kafka", broker is not None and (broker.real or not in_ci()), how)
        assert broker is not None
        yield broker


@pytest.fixture(scope="session")
def apache_kafka(kafka: Broker) -> Broker:
    """A Kafka that serves clients with their own settings. The mock needs `Broker.client_options`."""
    require("Apache Kafka", kafka.real, f"found {kafka.described}; install Java and Maven, or set KAVIER_TEST_KAFKA")
    return kafka


@pytest.fixture
def real_kafka(kafka: Broker) -> OurBroker:
    """Apache Kafka, started here: it may be stopped and started again, if it runs again afterwards."""
    how = f"found {kafka.described}; install Java and Maven, and leave KAVIER_TEST_KAFKA unset"
    require("an Apache Kafka of our own", isinstance(kafka, OurBroker), how)
    assert isinstance(kafka, OurBroker)
    return kafka
