"""The states of a replica's life, as API, metrics, page and commands name them."""

from __future__ import annotations

from enum import StrEnum

import numpy as np


class ReplicaState(StrEnum):
    """Where a replica stands. One whose process restarts begins again with empty caches."""

    STARTING = "starting"  # its process has begun, and it serves nothing yet
    READY = "ready"  # routers send it requests
    DRAINING = "draining"  # it gets no new requests, and ends those it has
    STOPPED = "stopped"


def replica_state(replica: np.void) -> ReplicaState:
    """The state of one row of `FleetState.replicas`. Such a row is there once a replica has started."""
    if not replica["alive"]:
        return ReplicaState.STOPPED
    return ReplicaState.READY if replica["accepting"] else ReplicaState.DRAINING
