"""Errors over HTTP: RFC 9457 problem documents that name the field at fault."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.routing import Match

from kavier_twin.errors import findings, refusal

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class FieldProblem(BaseModel):
    """What is wrong with one field of the request."""

    field: str = Field(description="Path of the field, with dots between its parts.", examples=["horizon_seconds"])
    detail: str = Field(description="What is wrong and what is expected.", examples=["at most 3600"])


class Problem(BaseModel):
    """Why a request was not answered (RFC 9457)."""

    type: str = Field(default="about:blank", description="`about:blank`: the status is the whole type.")
    title: str = Field(description="Reason phrase of the status.", examples=["Unprocessable Content"])
    status: int = Field(description="HTTP status.", examples=[422])
    detail: str = Field(description="What happened and what to do.", examples=["horizon_seconds: at most 3600"])
    errors: tuple[FieldProblem, ...] = Field(default=(), description="One entry for each invalid field.")


class ProblemError(Exception):
    """Answers the request with a problem document. `field`: the one at fault, where there is one."""

    def __init__(
        self, status: HTTPStatus, detail: str, *, field: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.errors = (FieldProblem(field=field, detail=detail),) if field else ()
        self.headers = headers


def answer(
    status: int, detail: str, errors: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The response of a problem."""
    problem = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=tuple(errors))
    return JSONResponse(problem.model_dump(), status, headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let every error of the app be told as a problem."""

    @app.exception_handler(ProblemError)
    def _told(_: Request, error: ProblemError) -> JSONResponse:
        return answer(error.status, error.detail, error.errors, error.headers)

    @app.exception_handler(HTTPException)
    def _by_status(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:
            wrong = FieldProblem(field="body", detail="cannot be read; send JSON in UTF-8")
            return answer(400, f"{wrong.field}: {wrong.detail}", [wrong])
        if error.status_code == 404:
            return answer(404, "not found; /openapi.json lists all paths")
        if error.status_code == 405:
            allowed = ", ".join(_allowed(app, request))
            return answer(405, f"not for this path; allowed: {allowed}", headers={"Allow": allowed})
        return answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [_field_problem(entry) for entry in findings(error.errors())]
        return answer(422, "; ".join(f"{entry.field}: {entry.detail}" for entry in errors), errors)

    @app.exception_handler(Exception)
    def _unforeseen(_: Request, error: Exception) -> JSONResponse:
        return answer(500, "internal error; see the twin's log")  # which uvicorn writes


def _allowed(app: FastAPI, request: Request) -> list[str]:
    """The methods of a path. The router only knows those of the first route it has there, and a mount none."""
    found = [
        method
        for method in ("GET", "HEAD", "POST", "PUT")
        for scope in [{**request.scope, "method": "GET" if method == "HEAD" else method}]
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)
    ]
    return found or ["GET", "HEAD"]


def _field_problem(found: ErrorDetails) -> FieldProblem:
    """One of pydantic's findings. The first part of its place is where in the request: path, query or body."""
    place = found["loc"]
    if found["type"] == "json_invalid":  # its place is an offset
        return FieldProblem(field="body", detail=f"not JSON ({place[-1]} characters are)")
    return FieldProblem(field=".".join(map(str, place[1:])) or str(place[0]), detail=refusal(found))
