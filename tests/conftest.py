"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_broker import Broker, OurBroker, kafka_broker
from real_parts import in_ci, require


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data: `KAVIER_SHARED_DATA`, or `../shared/data` beside the repository.

    Most of it may not be copied into the repository, so a test that asks for it skips where it is not there.
    """
    named = os.environ.get("KAVIER_SHARED_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data is missing: {path} is no directory; set KAVIER_SHARED_DATA")
    return path


@pytest.fixture(scope="session")
def kafka() -> Iterator[Broker]:
    """A Kafka, see tests/kafka_broker.py. In CI it is Apache Kafka itself."""
    with kafka_broker() as broker:
        how = "install Java and Maven (Debian: apt-get install default-jre-headless maven), or set KAVIER_TEST_KAFKA"
        require("Apache Kafka", broker is not None and (broker.real or not in_ci()), how)
        assert broker is not None
        yield broker


@pytest.fixture
def real_kafka(kafka: Broker) -> OurBroker:
    """Apache Kafka, started here: it may be stopped and started again, if it runs again afterwards."""
    how = f"found {kafka.described}; install Java and Maven, and leave KAVIER_TEST_KAFKA unset"
    require("an Apache Kafka of our own", isinstance(kafka, OurBroker), how)
    assert isinstance(kafka, OurBroker)
    return kafka


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Kafka the tests ran against."""
    if described := Broker.last_described:
        terminalreporter.write_line(f"Kafka: {described}")
