"""Policies set through the API, kept beside the checkpoints so that a restart goes on with them.

They hold until the settings file names others than it did when they were set: what the operator wrote last counts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from threading import Lock
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from kavier_twin.forecast.policy_set import PolicySet
from kavier_twin.mirror.checkpoint_file import replacing
from kavier_twin.simulation.policies import Policy

log = logging.getLogger(__name__)

FILE_NAME: Final = "policies.json"
_POLICIES: Final = TypeAdapter(tuple[Policy, ...])


class KeptPolicies:
    """Those of all pools. From any thread."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._by_pool = self._read()
        self._lock = Lock()

    def of(self, pool: str, configured: tuple[Policy, ...]) -> tuple[Policy, ...] | None:
        """Those to go on with in place of the `configured` ones of the settings file; None: there are none."""
        entry = self._by_pool.get(pool)
        if entry is None:
            return None
        try:
            if _POLICIES.validate_python(entry["configured"]) != configured:
                log.info(
                    "pool %s: the policies in the settings file have changed; policies set through the API are "
                    "discarded",
                    pool,
                )
                return None
            kept = PolicySet.model_validate({"policies": entry["policies"]}).policies
        except (ValidationError, KeyError, TypeError):
            log.warning("%s: no usable policies for pool %s; the settings file applies", self._path, pool)
            return None
        names = ", ".join(policy.name for policy in kept)
        log.info("pool %s: using the policies set through the API: %s", pool, names)
        return kept

    def keep(self, pool: str, configured: tuple[Policy, ...], policies: tuple[Policy, ...]) -> bool:
        """Keep these of a pool. Returns whether they are; trouble is logged."""
        entry = {
            "configured": _POLICIES.dump_python(configured, mode="json"),
            "policies": _POLICIES.dump_python(policies, mode="json"),
        }
        with self._lock:
            by_pool = {**self._by_pool, pool: entry}
            try:
                with replacing(self._path) as file:
                    file.write(json.dumps(by_pool).encode())
            except OSError as error:
                log.error("cannot save the policies of pool %s: %s; they are lost when the twin stops", pool, error)
                return False
            self._by_pool = by_pool
        return True

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("cannot read %s (%s); the policies in the settings file apply", self._path, error)
            return {}
        return found
