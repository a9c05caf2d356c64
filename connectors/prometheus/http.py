"""HTTP requests that end: within a time, within a size, with one kind of error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urljoin

import urllib3

from connectors.secret import SecretError, SecretPlace

_CHUNK_BYTES: Final = 2**16
_FORM: Final = "application/x-www-form-urlencoded"
_REDIRECTS: Final = frozenset({301, 302, 307, 308})  # under which the same request may be made again
_MOST_REDIRECTS: Final = 5
_TOO_MUCH: Final = ("too many", "too large", "too long", "exceed", "maximum", "max_", "max-")


class FetchError(Exception):
    """A server was not reached or did not answer as it should. `reason` is one of few words, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason

    @property
    def asks_for_less(self) -> bool:
        """Whether the server, or our own limit, refused what was asked for because it was too much."""
        if self.reason in ("http-413", "http-422", "too-large"):
            return True
        answered = self.reason.startswith("http-") or self.reason == "query-refused"
        return answered and any(word in str(self).lower() for word in _TOO_MUCH)


@dataclass(frozen=True)
class Access:
    """How to be let in, and how long to wait. `ca_file` replaces the system's certificate authorities.

    `headers` go with every request.
    """

    bearer_token: SecretPlace | None = None
    user: str | None = None
    password: SecretPlace | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    headers: Mapping[str, str | SecretPlace] = field(default_factory=dict)
    verify_tls: bool = True
    timeout_seconds: float = 10.0
    max_bytes: int = 128 * 2**20


class HttpClient:
    """Keeps connections open between requests. Any thread may ask."""

    def __init__(self, access: Access, servers: int = 1) -> None:
        self._access = access
        self._pool = urllib3.PoolManager(
            num_pools=servers,
            ca_certs=str(access.ca_file) if access.ca_file else None,
            cert_file=str(access.certificate_file) if access.certificate_file else None,
            key_file=str(access.key_file) if access.key_file else None,
            cert_reqs="CERT_REQUIRED" if access.verify_tls else "CERT_NONE",
        )

    def get(self, url: str) -> bytes:
        """The body of a 2xx answer. Raises FetchError."""
        return self._request("GET", url, None)

    def post(self, url: str, fields: Mapping[str, str]) -> bytes:
        """The body of a 2xx answer to a form. Raises FetchError."""
        return self._request("POST", url, fields)

    def close(self) -> None:
        self._pool.clear()

    def _request(self, method: str, url: str, fields: Mapping[str, str] | None) -> bytes:
        deadline = time.monotonic() + self._access.timeout_seconds
        asked = url
        for _ in range(_MOST_REDIRECTS):
            status, location, body = self._answer(method, asked, fields, deadline)
            if 200 <= status < 300:
                return body
            if not 300 <= status < 400 or status == 304:
                said = body[:300].decode(errors="replace").strip()
                raise FetchError(f"http-{status}", f"{_shown(url)}: {said}{_hint(status, said)}")
            if not location:
                raise FetchError(f"http-{status}", f"{_shown(url)}: a redirect without a target")
            target = urljoin(asked, location)
            # Followed within the server alone: elsewhere the redirect would carry the token and headers along.
            if status not in _REDIRECTS or _server(target) != _server(asked):
                raise FetchError(
                    f"http-{status}", f"{_shown(url)} redirects to {_shown(target)}; set this as url if it is correct"
                )
            asked = target
        raise FetchError("too-many-redirects", f"{_shown(url)} redirects too often, last to {_shown(asked)}")

    def _answer(
        self, method: str, url: str, fields: Mapping[str, str] | None, deadline: float
    ) -> tuple[int, str, bytes]:
        """Status, where a redirect points to, and the body."""
        seconds = self._access.timeout_seconds
        response = None
        try:
            response = self._pool.request(
                method,
                url,
                body=urlencode(fields) if fields is not None else None,
                headers=self._headers() | ({} if fields is None else {"content-type": _FORM}),
                timeout=urllib3.Timeout(connect=seconds, read=seconds),
                retries=False,
                redirect=False,
                preload_content=False,
            )
            return response.status, response.headers.get("location", ""), self._read(response, deadline)
        except SecretError as error:
            raise FetchError("no-secret", str(error)) from None
        except urllib3.exceptions.SSLError as error:
            raise FetchError("tls", f"{_shown(url)}: {error}") from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            # A refused connection passes for a kind of timeout in urllib3.
            refused = isinstance(error, urllib3.exceptions.NewConnectionError)
            if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
                raise FetchError("timeout", f"no answer within {seconds:g} s from {_shown(url)}") from None
            raise FetchError("unreachable", f"{_shown(url)}: {_in_short(error)}") from None
        finally:
            if response is not None:
                response.release_conn()

    def _headers(self) -> dict[str, str]:
        headers = dict(urllib3.make_headers(accept_encoding="gzip", user_agent="kavier-twin"))
        if self._access.bearer_token is not None:
            headers["authorization"] = f"Bearer {self._access.bearer_token.read()}"
        elif self._access.user is not None:
            password = self._access.password.read() if self._access.password else ""
            headers |= urllib3.make_headers(basic_auth=f"{self._access.user}:{password}")
        for name, value in self._access.headers.items():
            headers[name] = value.read() if isinstance(value, SecretPlace) else value
        for name, value in headers.items():
            if any(character in value for character in "\r\n\0"):  # the HTTP library would show the value
                raise SecretError(f"the header {name} holds a line break; correct it")
        return headers

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        body = bytearray()
        while chunk := response.read1(_CHUNK_BYTES, decode_content=True):
            body += chunk
            if len(body) > self._access.max_bytes:
                response.close()
                raise FetchError(
                    "too-large", f"more than {self._access.max_bytes} bytes; raise max_bytes or ask for less"
                )
            if time.monotonic() > deadline:
                response.close()
                raise FetchError("timeout", f"the answer did not end within {self._access.timeout_seconds:g} s")
        return bytes(body)


def _server(url: str) -> tuple[str | None, str | None, int | None]:
    parts = urllib3.util.parse_url(url)
    return parts.scheme, parts.host, parts.port or {"http": 80, "https": 443}.get(parts.scheme or "")


def _hint(status: int, said: str) -> str:
    """The setting that mends what the server asks for, where it says so."""
    text = said.lower()
    if "org id" in text or "orgid" in text or "tenant" in text:
        return "; name the tenant by headers, as in headers: {X-Scope-OrgID: team-a}"
    if status == 400 and "query parameter must be provided" in text:
        return "; put it at the end of url, as in ?namespace=llm"
    if status in (401, 403):
        return "; set bearer_token, or user and password"
    if status == 404:
        return "; correct the path of url"
    return ""


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urllib3.util.parse_url(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2] if parts.netloc else ''}{parts.path or ''}"


def _in_short(error: Exception) -> str:
    """What happened, without urllib3's names of objects."""
    return str(getattr(error, "reason", None) or error).rpartition(">: ")[2] or type(error).__name__
