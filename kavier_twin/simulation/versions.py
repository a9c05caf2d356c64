"""The versions of vLLM that the engine reproduces: where they decide differently, as named switches.

The kernels read switches and never a version. A new version is a profile here, its golden runs in
`tests/golden/test_versions.py`.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class Profile(NamedTuple):
    """How one version decides. Paths are vLLM's, relative to `vllm/`."""

    self_preemption_ends_pass: bool
    """Priority policy: a request that preempts itself ends the pass over the running requests.

    Otherwise the pass goes on with the requests behind it (`v1/core/sched/scheduler.py`, `schedule`).
    """

    offload_ranks_by_request: bool
    """Host tier under lru: the chunks of a live request share one place in the order of use, tails first.

    Otherwise a chunk takes its place when it is inserted, and again when its request ends
    (`v1/kv_offload/cpu/policies/lru.py`).
    """

    offload_offers_again: bool
    """Host tier: a request that looks for its prefix again, as after a preemption, offers all its chunks again.

    (`distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py`, `get_num_new_matched_tokens`.)
    """

    lora_counts_all_running: bool
    """`max_loras` counts the adapters of all running requests, otherwise of those in the batch being scheduled."""


PROFILES: Final = {
    "0.32": Profile(
        self_preemption_ends_pass=True,
        offload_ranks_by_request=False,
        offload_offers_again=False,
        lora_counts_all_running=False,
    ),
    "0.33": Profile(
        self_preemption_ends_pass=False,
        offload_ranks_by_request=True,
        offload_offers_again=True,
        lora_counts_all_running=True,
    ),
}
OLDEST: Final = next(iter(PROFILES))
NEWEST: Final = next(reversed(PROFILES))


def release(version: object) -> str | None:
    """MAJOR.MINOR of a version such as "0.33.1rc2" or the number 0.33; None if it is no version."""
    text = f"{version:.2f}" if isinstance(version, float) else version
    found = re.match(r"v?(\d+)\.(\d+)(?!\d)", text) if isinstance(text, str) else None
    return f"{int(found[1])}.{int(found[2])}" if found else None


def nearest_profile(version: object) -> str | None:
    """The newest profile that is not newer than this version, else the oldest; None if it is no version."""
    asked = release(version)
    if asked is None:
        return None
    order = _order(asked)
    return max((name for name in PROFILES if _order(name) <= order), key=_order, default=OLDEST)


def is_newer(version: object) -> bool:
    """Whether it is a version after the newest profile."""
    asked = release(version)
    return asked is not None and _order(asked) > _order(NEWEST)


def _order(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
