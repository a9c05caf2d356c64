"""The data plane: compiled kernels over the arrays of `state.FleetState`. No I/O, no clock, no Python objects.

They are compiled in four libraries. Every simulation needs the first two; a fleet without host tiers and with vLLM's
own eviction policy, LRU, never calls the others.
"""

from typing import Final

from kavier_twin.simulation.compiler.libraries import Library

_ENTRIES: Final = "kavier_twin.simulation.kernels.entries"

ENGINE: Final = Library("engine", _ENTRIES)
FLEET: Final = Library("fleet", _ENTRIES)
POLICIES: Final = Library("policies", _ENTRIES, on_demand=True)
TIERS: Final = Library("tiers", _ENTRIES, on_demand=True)
