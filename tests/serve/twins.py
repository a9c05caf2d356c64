"""A twin whose views and answers a test sets, served."""

from __future__ import annotations

import http.client

from kavier_twin.forecast.policy_set import Policies, PolicySet, in_force
from kavier_twin.forecast.whatif import Answer, Case, Question, Spread
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.replicas import ReplicaDetail, replica_detail
from kavier_twin.serve.access import Access
from kavier_twin.serve.app import RefusedError, Twin
from kavier_twin.serve.http import HttpServer
from kavier_twin.serve.limits import Limits
from kavier_twin.serve.models import TwinView
from kavier_twin.simulation.policies import DEFAULT_POLICIES, PolicyError, apply_overrides
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from serve.views import full_view

TOKEN = "the-right-token"
FLEET = FleetSettings(engine=EngineSettings(num_gpu_blocks=300), step_time=StepTime(fixed=0.01))


class FakePool:
    """A pool with a mirror that has seen nothing."""

    def __init__(self) -> None:
        self.set = PolicySet(policies=DEFAULT_POLICIES)
        self.asked: list[Question] = []
        self.refusal: Exception | None = None
        self.mirror = Mirror(MirrorSettings(), FLEET)

    def policies(self) -> Policies:
        told = tuple(in_force(FLEET, policy) for policy in self.set.policies)
        return Policies(told, configured=self.set.policies == DEFAULT_POLICIES, kept=True)

    def set_policies(self, policies: PolicySet) -> None:
        for number, policy in enumerate(policies.policies):
            try:
                apply_overrides(FLEET, policy.overrides)
            except PolicyError as error:
                raise RefusedError(f"policies.{number}.overrides", str(error)) from None
        self.set = policies

    def what_if(self, question: Question) -> Answer:
        self.asked.append(question)
        if self.refusal is not None:
            raise self.refusal
        spread = Spread(p10=0.4, p50=0.5, p90=None)
        kpis = {"ttft_p99_seconds": spread, "e2e_p95_seconds": spread}
        cases = [("today", {}, 1.0), ("asked", question.overrides, question.load)]
        return Answer(
            pool="chat",
            event_seconds=101.5,
            calibrated=True,
            horizon_seconds=question.horizon_seconds,
            scenarios=question.scenarios,
            rate_requests_per_second=2.5,
            deployable=True,
            vllm_flags=("--kv-cache-dtype fp8",),
            hypothetical_reasons=(),
            cases=tuple(
                Case(
                    name=name,
                    overrides=overrides,
                    load=load,
                    kpis=kpis,
                    breach_probability={"fast": 0.25},
                    breach_interval={"fast": (0.1, 0.5)},
                )
                for name, overrides, load in cases
            ),
            duration_seconds=0.5,
        )

    def replica(self, number: int) -> ReplicaDetail | None:
        return replica_detail(self.mirror, number)


class Served:
    """A server whose view the test sets."""

    def __init__(self, access: Access | None = None, limits: Limits | None = None) -> None:
        self.views: dict[str, TwinView] = {"chat": full_view()}
        self.pools = {"chat": FakePool()}
        self.twin = Twin(lambda: self.views, self.pools)
        self.server = HttpServer(self.twin, "127.0.0.1", 0, access, limits)
        self.server.start()

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()
