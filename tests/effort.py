"""How much the random tests try: the option `--effort` multiplies it.

Counts in the tests are those of a run without the option, which keeps the whole suite short. `--effort 10` is what a
change of the engine should have been through once.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, Phase, settings

FACTOR = 1.0  # both set in tests/conftest.py, before any test module is read
SEED = ""


def times(count: int) -> int:
    """The count under the effort asked for; at least 1."""
    return max(1, round(count * FACTOR))


def dice() -> random.Random:
    """Randomness of this run, for what is random without Hypothesis: the same for the same `--hypothesis-seed`."""
    return random.Random(SEED)


def examples(count: int) -> settings:
    """Settings of a property test with this many examples."""
    return settings(
        max_examples=times(count),
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
