"""What the live tests need: vLLM for the CPU in its environment, Apache Kafka and Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_broker import OurBroker
from live import environment
from live.rig import Rig, rig
from real_parts import require


@pytest.fixture
def live(real_kafka: OurBroker, tmp_path: Path) -> Iterator[Rig]:
    """A rig with one replica."""
    how = "build its environment: python tests/live/environment.py (some 6 GB)"
    require("vLLM for the CPU", environment.is_built(), how)
    with rig(tmp_path, real_kafka) as made:
        yield made
