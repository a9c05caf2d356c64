"""The twin over HTTP: metrics, health, the API under /v1, and the page.

| path | answers |
|---|---|
| `/` | the page; its parts lie under `/static/` |
| `/metrics` | Prometheus text or OpenMetrics, as the scraper asks |
| `/healthz` | 200 while the process serves |
| `/readyz` | 200 once the process works, else 503 and why; then a line for each pool that has no figures yet |
| `/v1/...` | the API, described by `/openapi.json` and in docs/api.md |

Handlers are plain functions: they run on threads, so that the event loop is free while one of them works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, FastAPI, Path, Query, Request, Response, Security
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import Field
from starlette.types import ASGIApp

from kavier_twin import __version__
from kavier_twin.forecast.policy_set import SETTINGS, Policies, PolicySet
from kavier_twin.forecast.whatif import Answer, Busy, NothingYet, Question
from kavier_twin.mirror.replicas import ReplicaDetail
from kavier_twin.serve import problems
from kavier_twin.serve.access import Access, guarded
from kavier_twin.serve.limits import Envelope, Limits
from kavier_twin.serve.metrics.exporter import registry_of
from kavier_twin.serve.models import (
    KpiTable,
    PoolFidelity,
    PoolForecast,
    PoolHistory,
    PoolPolicies,
    PoolPrefixCache,
    Pools,
    PoolScores,
    State,
    TwinView,
)
from kavier_twin.serve.problems import ProblemError
from kavier_twin.simulation.kpi_table import KPIS, STATISTICS

STATIC: Final = files("kavier_twin.serve").joinpath("static")


class RefusedError(ValueError):
    """A request for a pool that cannot be done. `field` names what is at fault, the message says why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class Pool(Protocol):
    """What the API asks of a pool, beyond its view. All may be called from any thread."""

    def policies(self) -> Policies:
        """Those that are forecast, as they would be deployed now."""

    def set_policies(self, policies: PolicySet) -> None:
        """Forecast these from the next cycle on. Raises RefusedError."""

    def replica(self, number: int) -> ReplicaDetail | None:
        """A replica as it is now; None: there is none of this number."""

    def what_if(self, question: Question) -> Answer:
        """The answer, once those asked before have theirs. Raises RefusedError, Busy and NothingYet."""


@dataclass(frozen=True)
class Twin:
    """What is served: `current` gives the views by pool, `pools` what can be asked of each."""

    current: Callable[[], Mapping[str, TwinView]]
    pools: Mapping[str, Pool] = field(default_factory=dict)


class PolicyChange(PolicySet):
    """The policies a pool shall be forecast under."""

    pool: str = Field(default="", description="Name of the pool. Optional if there is only one.", examples=["chat"])


_Pool = Annotated[str | None, Query(description="Name of a pool. By default all pools.")]
_REFUSALS: Final = {
    400: "The body is not UTF-8 text.",
    401: "The token is missing or wrong.",
    403: "No token is configured.",
    404: "The pool or replica does not exist.",
    413: "The body is too long.",
    422: "A field is invalid. `errors` names it.",
    429: "Too many requests are waiting.",
    503: "Too many concurrent requests, or there is no data yet.",
}


def make_app(twin: Twin, access: Access, limits: Limits) -> ASGIApp:
    """The ASGI application."""
    app = FastAPI(
        title="Kavier Twin",
        version=__version__,
        summary="Digital twin of a fleet of vLLM servers: its mirrored state, its forecasts and their accuracy.",
        docs_url=None,  # both would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"auto_configure": False},
    )
    problems.install(app)
    app.include_router(_plain(twin, access))
    app.include_router(_reading(twin, access))
    app.include_router(_changing(twin, access, limits))
    app.mount("/static", StaticFiles(directory=str(STATIC)))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return Envelope(app, limits)


def _plain(twin: Twin, access: Access) -> APIRouter:
    """What is not JSON."""
    router = APIRouter(tags=["operating"], default_response_class=PlainTextResponse)
    registry = registry_of(twin.current)

    @router.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(str(STATIC.joinpath("index.html")), media_type="text/html; charset=utf-8")

    @router.get(
        "/metrics",
        summary="All metrics, in the Prometheus text format or as OpenMetrics",
        responses={
            200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}},
            **_problems(401),
        },
        dependencies=[] if access.open_reading else [Security(_BEARER)],
    )
    def metrics(request: Request) -> Response:
        access.to_read(request)
        return _metrics(registry, request.headers.get("accept", ""))

    @router.get("/healthz", summary="Whether the process is alive")
    async def healthy() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @router.get(
        "/readyz",
        summary="Whether the twin is ready: its kernels are compiled, and a warm-up is over",
        responses={
            200: {"description": "Ready. One further line for each pool without figures, with the reason."},
            503: {"description": "Not ready. One line for each pool and reason.", "content": {"text/plain": {}}},
        },
    )
    def ready() -> PlainTextResponse:
        views = twin.current().items()
        starting = [f"not ready: pool {name}: {why}\n" for name, view in views for why in view.starting]
        if starting:
            return PlainTextResponse("".join(starting), HTTPStatus.SERVICE_UNAVAILABLE)
        waiting = [f"pool {name}: {why}\n" for name, view in views for why in view.not_ready]
        return PlainTextResponse("".join(["ready\n", *waiting]))

    return router


def _reading(twin: Twin, access: Access) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        tags=["reading"],
        route_class=guarded(access.to_read),
        responses=_problems(401, 404, 422, 503),
        dependencies=[] if access.open_reading else [Security(_BEARER)],
    )

    @router.get("/kpis", summary="All KPIs: unit, statistics, error bound and display")
    def kpis() -> KpiTable:
        return KpiTable.model_validate({"kpis": tuple(KPIS.values()), "metrics": STATISTICS})

    @router.get("/state", summary="State of the mirror, by pool and replica")
    def state(pool: _Pool = None) -> State:
        return State(version=__version__, unix_seconds=time.time(), pools=_views(twin, pool))

    @router.get("/state/{pool}/replicas/{replica}", summary="State of a replica with its cache and batch")
    def replica(
        pool: Annotated[str, Path(description="The pool.")],
        replica: Annotated[int, Path(ge=0, lt=2**31, description="Number of the replica, as in /v1/state.")],
    ) -> ReplicaDetail:
        found = _pool(twin, pool).replica(replica)
        if found is None:
            raise ProblemError(HTTPStatus.NOT_FOUND, f"pool {pool} has no replica {replica}", field="replica")
        return found

    @router.get("/fidelity", summary="Errors of the mirror and trust in its figures")
    def fidelity(pool: _Pool = None) -> Pools[PoolFidelity]:
        return Pools[PoolFidelity](pools=_views(twin, pool))

    @router.get("/forecast", summary="Forecast by policy")
    def forecast(pool: _Pool = None) -> Pools[PoolForecast]:
        return Pools[PoolForecast](pools=_views(twin, pool))

    @router.get("/scores", summary="Accuracy of past forecasts")
    def scores(pool: _Pool = None) -> Pools[PoolScores]:
        return Pools[PoolScores](pools=_views(twin, pool))

    @router.get("/history", summary="Mirrored and observed KPIs of the last hour")
    def history(pool: _Pool = None) -> Pools[PoolHistory]:
        views = _views(twin, pool)
        return Pools[PoolHistory](pools=tuple(PoolHistory(pool=view.pool, **vars(view.history)) for view in views))

    @router.get("/cache", summary="Hit ratio by KV cache size, and why prompt tokens missed")
    def cache(pool: _Pool = None) -> Pools[PoolPrefixCache]:
        views = _views(twin, pool)
        found = tuple(PoolPrefixCache(pool=view.pool, **vars(view.prefix_cache)) for view in views)
        return Pools[PoolPrefixCache](pools=found)

    @router.get("/policies", summary="Policies that are forecast")
    def policies(pool: _Pool = None) -> Pools[PoolPolicies]:
        return _policies(twin, [view.pool for view in _views(twin, pool)])

    return router


def _changing(twin: Twin, access: Access, limits: Limits) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        tags=["changing"],
        route_class=guarded(access.to_change),
        responses=_problems(400, 401, 403, 404, 413, 422, 503),
        dependencies=[Security(_BEARER)],
    )

    @router.put("/policies", summary="Replace the policies, starting with the next forecast")
    def set_policies(change: PolicyChange) -> Pools[PoolPolicies]:
        name = _named(twin, change.pool)
        try:
            _pool(twin, name).set_policies(PolicySet(policies=change.policies))
        except RefusedError as error:
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), field=error.field) from None
        return _policies(twin, [name])

    @router.post("/whatif", summary="Predict the effect of another policy or load", responses=_problems(429))
    def what_if(question: Question) -> Answer:
        name = _named(twin, question.pool or "")
        pool = _pool(twin, name)
        _check_cost(question, twin.current()[name], limits)
        try:
            return pool.what_if(question)
        except RefusedError as error:
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), field=error.field) from None
        except Busy as error:
            raise ProblemError(HTTPStatus.TOO_MANY_REQUESTS, str(error), headers={"Retry-After": "5"}) from None
        except NothingYet as error:
            raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), headers={"Retry-After": "5"}) from None

    return router


_BEARER: Final = HTTPBearer(auto_error=False, scheme_name="token", description="Token configured in http.token.")


def _views(twin: Twin, pool: str | None) -> tuple[TwinView, ...]:
    views = twin.current()
    if pool is None:
        return tuple(views.values())
    if pool not in views:
        raise _no_such_pool(pool, views)
    return (views[pool],)


def _pool(twin: Twin, name: str) -> Pool:
    if name not in twin.pools:
        raise _no_such_pool(name, twin.pools)
    return twin.pools[name]


def _named(twin: Twin, name: str) -> str:
    """The pool meant where its name may be left out."""
    if name or len(twin.pools) != 1:
        return name
    return next(iter(twin.pools))


def _check_cost(question: Question, view: TwinView, limits: Limits) -> None:
    """Refuse a question that would take too long. Raises ProblemError."""
    if question.horizon_seconds > limits.horizon_seconds:
        most = f"at most {limits.horizon_seconds:g} (http.max_horizon_seconds)"
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, most, field="horizon_seconds")
    rate = view.outlook.rate_per_second if view.outlook else 0.0
    requests = rate * question.load * question.horizon_seconds
    if requests > limits.requests:
        most = f"would be {requests:.0f} requests within the horizon; at most {limits.requests} are simulated"
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, most, field="load")


def _no_such_pool(name: str, known: Mapping[str, Any]) -> ProblemError:
    why = f"there is no pool {name!r}" if name else "which pool?"
    return ProblemError(HTTPStatus.NOT_FOUND, f"{why}; there are: {', '.join(known)}", field="pool")


def _policies(twin: Twin, names: Sequence[str]) -> Pools[PoolPolicies]:
    pools = (PoolPolicies(pool=name, settings=SETTINGS, **vars(_pool(twin, name).policies())) for name in names)
    return Pools[PoolPolicies](pools=tuple(pools))


def _metrics(registry: CollectorRegistry, accept: str) -> Response:
    encode, content_type = choose_encoder(accept)
    return Response(encode(registry), media_type=content_type)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": problems.Problem, "description": _REFUSALS[status]} for status in statuses}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, problems under the media type they have."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for operations in found["paths"].values():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400 and "application/json" in response["content"]:
                        response["content"] = {problems.MEDIA_TYPE: response["content"]["application/json"]}
        app.openapi_schema = found
    return app.openapi_schema
