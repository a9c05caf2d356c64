"""How a command asks a running daemon, and what it tells the user where there is no answer."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Final

import urllib3

from connectors.secret import SecretError, SecretPlace
from kavier_twin.errors import UserError

TOKEN_VARIABLE: Final = "KAVIER_TWIN_TOKEN"
_URL: Final = "http://127.0.0.1:9469"
_CONNECT_SECONDS: Final = 5.0
_WAYS_OUT: Final = {
    401: f"give the daemon's token with --token-file, or in the environment variable {TOKEN_VARIABLE}",
    429: "too many concurrent requests; try again in a few seconds",
}


def add_url(parser: argparse._ActionsContainer) -> None:
    """Declare where the daemon is."""
    parser.add_argument("--url", default=_URL, help="URL of a running daemon (default: %(default)s)")


def add_token(parser: argparse._ActionsContainer) -> None:
    """Declare where its token is."""
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file with the daemon's bearer token (default: the environment variable {TOKEN_VARIABLE})",
    )


def ask(args: argparse.Namespace, path: str, body: str | None = None, *, seconds: float) -> bytes:
    """What the daemon answers within so many seconds: GET, or POST of a JSON body. Raises UserError."""
    url = str(args.url).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {args.url}: expected an address such as {_URL}; correct --url")
    headers = {} if body is None else {"content-type": "application/json"}
    token = _token(args.token_file)
    if token:
        headers["authorization"] = f"Bearer {token}"
    try:
        response = urllib3.request(
            "GET" if body is None else "POST",
            f"{url}{path}",
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=seconds),
            retries=False,
            redirect=False,  # it could carry the token to another server
        )
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        refused = isinstance(error, urllib3.exceptions.NewConnectionError)
        if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
            raise UserError(f"{url}: no answer within {seconds:g} s") from None
        raise UserError(f"{url}: no daemon answers; start one with kavier-twin run, or correct --url") from None
    if response.status != 200:
        raise UserError(_refusal(url, response.status, response.data))
    return response.data


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        return SecretPlace(file=file).read()
    except SecretError as error:
        raise UserError(f"--token-file {error}") from None


def _refusal(url: str, status: int, body: bytes) -> str:
    """Why there is no answer, and the way out. The daemon tells problems as RFC 9457 says."""
    try:
        detail = str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        detail = ""
    way_out = _WAYS_OUT.get(status, "" if detail else "is it a Kavier Twin of this version?")
    told = "; ".join(text for text in (detail if status != 401 else "", way_out) if text)
    return f"{url}: refused (HTTP {status}): {told}"
