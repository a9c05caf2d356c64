from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.memory import MemorySource
from connectors.traces import read_trace
from kavier_twin import demo_data as _  # noqa: F401
from kavier_twin.config import CRUDE_STEP_TIME
from kavier_twin.daemon import Daemon
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.replay_source import ReplaySource
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.telemetry import EngineSample, RequestRecord
from kavier_twin.twin.mirror import MirrorSettings
