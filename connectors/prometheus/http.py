"""HTTP requests that end: within a time, within a size, with one kind of error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

import urllib3

from connectors.secret import SecretError, SecretPlace

_CHUNK_BYTES: Final = 2**16
_FORM: Final = "application/x-www-form-urlencoded"


class FetchError(Exception):
    """A server was not reached or did not answer as it should. `reason` is one of few words, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Access:
    """How to be let in, and how long to wait. `ca_file` replaces the system's certificate authorities."""

    bearer_token: SecretPlace | None = None
    user: str | None = None
    password: SecretPlace | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
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
        seconds = self._access.timeout_seconds
        deadline = time.monotonic() + seconds
        response = None
        try:
            response = self._pool.request(
                method,
                url,
                body=urlencode(fields) if fields is not None else None,
                headers=self._headers() | ({} if fields is None else {"content-type": _FORM}),
                timeout=urllib3.Timeout(connect=seconds, read=seconds),
                retries=False,
                redirect=False,  # a redirect could carry the token to another server
                preload_content=False,
            )
            body = self._read(response, deadline)
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
        if not 200 <= response.status < 300:
            raise FetchError(f"http-{response.status}", f"{_shown(url)}: {body[:300].decode(errors='replace').strip()}")
        return body

    def _headers(self) -> dict[str, str]:
        headers = dict(urllib3.make_headers(accept_encoding="gzip", user_agent="kavier-twin"))
        if self._access.bearer_token is not None:
            headers["authorization"] = f"Bearer {self._access.bearer_token.read()}"
        elif self._access.user is not None:
            password = self._access.password.read() if self._access.password else ""
            headers |= urllib3.make_headers(basic_auth=f"{self._access.user}:{password}")
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


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urllib3.util.parse_url(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2] if parts.netloc else ''}{parts.path or ''}"


def _in_short(error: Exception) -> str:
    """What happened, without urllib3's names of objects."""
    return str(getattr(error, "reason", None) or error).rpartition(">: ")[2] or type(error).__name__
