"""Settings of what is served over HTTP."""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from connectors.secret import Name, SecretPlace, Settings
from kavier_twin.serve.access import Access
from kavier_twin.serve.limits import Limits

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 9469
_LIMITS: Final = Limits()


class HttpConfig(Settings):
    """Where metrics, the API and the page are served, and to whom. Port 0 takes a free one.

    Without a `token` nobody may change anything or ask what-ifs; without `open_reading` figures need it as well.
    """

    host: Name = DEFAULT_HOST
    """Address to listen on. 0.0.0.0 listens on all interfaces."""

    port: Annotated[int, Field(ge=0, le=65535)] = DEFAULT_PORT
    """TCP port. 0 selects a free port."""

    open_reading: bool = True
    """Whether figures can be read without the token."""

    token: SecretPlace | None = Field(default=None, examples=[{"file": "/run/secrets/twin/token"}])
    """Bearer token for what-ifs and changes. Without a token both are disabled."""

    max_body_bytes: Annotated[int, Field(ge=1_024)] = _LIMITS.body_bytes
    """Maximum size of a request body."""

    max_requests_at_once: Annotated[int, Field(ge=1)] = _LIMITS.at_once
    """Maximum number of concurrent requests. Further requests get status 503."""

    max_horizon_seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = _LIMITS.horizon_seconds
    """Longest horizon of a what-if."""

    @model_validator(mode="after")
    def _someone_may_read(self) -> Self:
        if not self.open_reading and self.token is None:
            raise ValueError("open_reading: false needs a token, otherwise no one could read; set token (env or file)")
        return self

    @property
    def access(self) -> Access:
        """Who may ask for what. The token is read at each request: a file may be renewed while the twin runs."""
        return Access(None if self.token is None else self.token.read, self.open_reading)

    @property
    def limits(self) -> Limits:
        """What clients may cost."""
        return Limits(self.max_body_bytes, self.max_requests_at_once, self.max_horizon_seconds)
