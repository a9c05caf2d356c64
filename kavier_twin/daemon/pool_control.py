"""What the API may ask of a pool: its policies, a replica, a what-if."""

from __future__ import annotations

from threading import Lock

from kavier_twin.daemon.kept_policies import KeptPolicies
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.policy_set import Policies, PolicySet, check_cost, in_force
from kavier_twin.forecast.whatif import Answer, Question
from kavier_twin.mirror.replicas import ReplicaDetail, replica_detail
from kavier_twin.serve.app import RefusedError
from kavier_twin.simulation.policies import PolicyError


class PoolControl:
    """A pool as the API takes it (`serve.app.Pool`). From any thread. With `kept`, policies that are set outlive it."""

    def __init__(self, pool: PoolTwin, kept: KeptPolicies | None = None) -> None:
        self._pool = pool
        self._kept = kept
        self._setting = Lock()
        self._configured = pool.forecaster.settings.policies
        self._are_kept = True
        found = kept.of(pool.name, self._configured) if kept else None
        if found is not None:
            pool.forecast_under(found)

    def policies(self) -> Policies:
        """Those that are forecast, as they would be deployed now."""
        fleet, policies = self._pool.mirror.fleet.settings, self._pool.forecaster.settings.policies
        told = tuple(in_force(fleet, policy) for policy in policies)
        return Policies(told, configured=policies == self._configured, kept=self._are_kept)

    def set_policies(self, policies: PolicySet) -> None:
        """Forecast these from the next cycle on. Raises RefusedError that names the policy at fault."""
        for number, policy in enumerate(policies.policies):
            try:
                check_cost(self._pool.mirror.fleet.settings, policy.overrides)
            except PolicyError as error:
                raise RefusedError(f"policies.{number}.overrides", f"{policy.name}: {error}") from None
        with self._setting:
            self._pool.forecast_under(policies.policies)
            kept = self._kept is not None and self._kept.keep(self._pool.name, self._configured, policies.policies)
            self._are_kept = kept or policies.policies == self._configured

    def replica(self, number: int) -> ReplicaDetail | None:
        """A replica as it is now; None: there is none of this number."""
        return self._pool.look(lambda mirror: replica_detail(mirror, number))

    def what_if(self, question: Question) -> Answer:
        """The answer, once those asked before have theirs. Raises RefusedError, Busy and NothingYet."""
        try:
            check_cost(self._pool.mirror.fleet.settings, question.overrides)
            return self._pool.what_if.ask(question)
        except PolicyError as error:
            raise RefusedError("overrides", str(error)) from None
