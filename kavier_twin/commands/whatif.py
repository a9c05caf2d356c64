"""`kavier-twin whatif`: a question to a running daemon."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import urllib3
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from connectors.secret import Secret, SecretError
from kavier_twin.duration import seconds_of
from kavier_twin.errors import UserError
from kavier_twin.forecast.slo import METRICS
from kavier_twin.forecast.whatif import Answer, Case, Question
from kavier_twin.simulation.policies import Override, PolicyError, parse_override

_CONNECT_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 120.0  # others may be asked first
_UNITS: Final = {
    "_seconds": (" s", 1.0),
    "_ratio": (" %", 100.0),
    "_watts": (" W", 1.0),
}

_EXAMPLE = """examples:
  kavier-twin whatif --token-file token --policy kv_cache_dtype=fp8 --replicas 6 --load 1.5x --horizon 15m
  kavier-twin whatif --url https://twin.example:9469 --token-file token --policy num_gpu_blocks=0.5x --json

The daemon forks its live state, simulates today's policy and the one asked about in the same futures, and answers;
its mirror and its forecasts go on undisturbed. Nothing about the fleet is changed.
exit status: 0 answered, 1 not answered (the message says why), 2 wrong use
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "whatif",
        help="ask a running daemon what another policy or load would do to the live fleet",
        description="Ask a running daemon what another policy, fleet size or load would do to the live fleet now.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:9469", help="the daemon (default: %(default)s)")
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting to change, as in a policy; may be given several times",
    )
    parser.add_argument("--replicas", type=int, metavar="N", help="so many replicas")
    parser.add_argument("--load", type=_factor, default=1.0, metavar="FACTOR", help="so much load, e.g. 1.5x")
    parser.add_argument(
        "--horizon", type=seconds_of, default=900.0, metavar="TIME", help="how far to look, e.g. 15m (the default)"
    )
    parser.add_argument("--futures", type=int, metavar="N", help="futures simulated for each policy")
    parser.add_argument("--pool", help="the pool asked about, where there are several")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the daemon's bearer token")
    parser.add_argument("--json", action="store_true", help="print the daemon's JSON answer")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    question = _question(args)
    body = _ask(args.url, question, args.token_file)
    try:
        answer = Answer.model_validate_json(body)
    except ValidationError:
        raise UserError(f"{args.url}: answers with something else than a what-if; is it a Kavier Twin?") from None
    if args.json:
        print(answer.model_dump_json())
    else:
        _print(answer)
    return 0


def _question(args: argparse.Namespace) -> Question:
    overrides: dict[str, Override] = {}
    try:
        overrides |= dict(map(parse_override, args.policy))
    except PolicyError as error:
        raise UserError(f"--policy {error}") from None
    if args.replicas is not None:
        overrides["replicas"] = args.replicas
    given = {"overrides": overrides, "load": args.load, "horizon_seconds": args.horizon, "pool": args.pool}
    if args.futures is not None:
        given["futures"] = args.futures
    try:
        return Question.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"the question cannot be asked: {problems}") from None


def _ask(url: str, question: Question, token_file: Path | None) -> bytes:
    headers = {"content-type": "application/json"}
    if token_file is not None:
        try:
            headers["authorization"] = f"Bearer {Secret(file=token_file).read()}"
        except SecretError as error:
            raise UserError(f"--token-file {error}") from None
    try:
        response = urllib3.request(
            "POST",
            f"{url.rstrip('/')}/v1/whatif",
            body=question.model_dump_json(),
            headers=headers,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_ANSWER_SECONDS),
            retries=False,
            redirect=False,  # it could carry the token to another server
        )
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        refused = isinstance(error, urllib3.exceptions.NewConnectionError)
        if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
            raise UserError(f"{url}: no answer in time; ask for a shorter --horizon or fewer --futures") from None
        raise UserError(f"{url}: no daemon answers there; start one with kavier-twin run, or correct --url") from None
    if response.status != 200:
        raise UserError(_refusal(url, response.status, response.data))
    return response.data


def _refusal(url: str, status: int, body: bytes) -> str:
    """Why there is no answer, and the way out. The daemon tells problems as RFC 9457 says."""
    try:
        detail = str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        detail = ""
    told = f": {detail}" if detail else ""
    way_out = {
        401: "; give the daemon's token with --token-file",
        404: "; is this a Kavier Twin that answers what-ifs?",
        429: "; too many ask, try again in a few seconds",
    }.get(status, "")
    return f"{url}: refused (HTTP {status}){told}{way_out}"


def _factor(text: str) -> float:
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a factor such as 1.5x") from None


# --- the table ----------------------------------------------------------------------------------------------------


def _print(answer: Answer) -> None:
    console = Console()
    titles = {"today": "today's policy", "today_at_load": "today's policy", "asked": "what if"}
    table = Table(
        "",
        *(f"{titles[case.name]}\n{_changes(case)}" for case in answer.cases),
        title=f"pool {answer.pool}: the next {answer.horizon_seconds:g} s over {answer.futures} futures, median "
        "(10th to 90th percentile)",
    )
    for metric in METRICS:
        cells = [_spread(case, metric) for case in answer.cases]
        if any(cells):
            table.add_row(_plain_name(metric), *cells)
    for slo in answer.cases[0].breach_probability:
        table.add_row(f"breaches {slo}", *(f"{case.breach_probability[slo]:.0%}" for case in answer.cases))
    console.print(table)
    if not answer.calibrated:
        console.print("Step times are not fitted to this fleet yet: latencies are a guess.")
    if answer.vllm_flags:
        console.print(f"deploy with: vllm serve ... {' '.join(answer.vllm_flags)}", soft_wrap=True)
    for reason in answer.hypothetical_reasons:
        console.print(f"no flag of vllm serve does this: {reason}", soft_wrap=True)


def _changes(case: Case) -> str:
    changes = [f"{name}={value}" for name, value in case.overrides.items()]
    return ", ".join([*changes, f"load x {case.load:g}"])


def _spread(case: Case, metric: str) -> str:
    spread = case.kpis[metric]  # type: ignore[index]
    if spread.p50 is None or spread.p10 is None or spread.p90 is None:
        return ""
    unit, factor = next((found for suffix, found in _UNITS.items() if metric.endswith(suffix)), ("", 1.0))
    low, middle, high = (f"{factor * value:,.4g}" for value in (spread.p10, spread.p50, spread.p90))
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} to {high})"


def _plain_name(metric: str) -> str:
    for suffix in _UNITS:
        metric = metric.removesuffix(suffix)
    return metric.replace("_", " ")
