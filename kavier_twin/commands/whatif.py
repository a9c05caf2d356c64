"""`kavier-twin whatif`: a question to a running daemon."""

from __future__ import annotations

import argparse
from typing import Any, Final

from pydantic import ValidationError
from rich import box
from rich.table import Table

from kavier_twin.commands.client import add_token, add_url, ask
from kavier_twin.commands.duration import seconds_of
from kavier_twin.commands.figures import spread
from kavier_twin.commands.score_tables import wide_console
from kavier_twin.errors import UserError, problems_of
from kavier_twin.forecast.whatif import Answer, Case, Question
from kavier_twin.simulation.kpi_table import METRICS, label_of
from kavier_twin.simulation.policies import Override, PolicyError, parse_override

_ANSWER_SECONDS: Final = 120.0  # others may be asked first
_EXAMPLE = """examples:
  kavier-twin whatif --token-file token --policy kv_cache_dtype=fp8 --replicas 6 --load 1.5x --horizon 15m
  kavier-twin whatif --url https://twin.example:9469 --token-file token --policy num_gpu_blocks=0.5x --json

The daemon forks its live state and simulates the current policy and yours in the same scenarios;
the mirror and the forecasts continue. Nothing in the fleet is changed.
exit status: 0 answered, 1 not answered (the message says why), 2 wrong use
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "whatif",
        help="predict the effect of another policy or load on the live fleet",
        description="Ask a running daemon to predict the effect of another policy, fleet size or load on the live "
        "fleet.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_url(parser)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting to change, as in a policy; can be repeated",
    )
    parser.add_argument("--replicas", type=int, metavar="N", help="number of replicas")
    parser.add_argument("--load", type=_factor, default=1.0, metavar="FACTOR", help="load factor, e.g. 1.5x")
    parser.add_argument("--horizon", type=seconds_of, default=900.0, metavar="TIME", help="horizon (default 15m)")
    parser.add_argument("--scenarios", type=int, metavar="N", help="number of scenarios for each policy")
    parser.add_argument("--pool", help="pool, if there are several")
    add_token(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    question = _question(args)
    body = ask(args, "/v1/whatif", question.model_dump_json(), seconds=_ANSWER_SECONDS)
    try:
        answer = Answer.model_validate_json(body)
    except ValidationError:
        raise UserError(f"{args.url}: the answer is not a what-if; is it a Kavier Twin?") from None
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
    if args.scenarios is not None:
        given["scenarios"] = args.scenarios
    try:
        return Question.model_validate(given)
    except ValidationError as error:
        raise UserError(f"invalid request: {'; '.join(problems_of(error, _option))}") from None


def _option(place: tuple[str | int, ...]) -> str:
    """The option that a field of the question comes from."""
    field = str(place[0])
    return "--" + {"overrides": "policy", "horizon_seconds": "horizon"}.get(field, field)


def _factor(text: str) -> float:
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a factor such as 1.5x") from None


# --- the table ----------------------------------------------------------------------------------------------------


def _print(answer: Answer) -> None:
    console = wide_console()
    titles = {"today": "current policy", "today_at_load": "current policy", "asked": "what if"}
    table = Table(
        title=f"pool {answer.pool}: the next {answer.horizon_seconds:g} s over {answer.scenarios} scenarios, median "
        "(10th–90th percentile)",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),  # so that ranges fit into 80 columns
    )
    table.add_column("")
    for case in answer.cases:
        table.add_column("\n".join([titles[case.name], *_changes(case)]), justify="right", overflow="fold")
    for metric in METRICS:
        spreads = [case.kpis[metric] for case in answer.cases]
        if any(one.p50 is not None for one in spreads):
            table.add_row(label_of(metric), *(spread(metric, one.p10, one.p50, one.p90) for one in spreads))
    table.add_section()
    for slo in answer.cases[0].breach_probability:
        table.add_row(f"breaks {slo}", *(f"{case.breach_probability[slo]:.0%}" for case in answer.cases))
    console.print(table)
    if not answer.calibrated:
        console.print("Step times have not been fitted to this fleet yet: latencies are rough.")
    if answer.vllm_flags:
        console.print(f"deploy with: vllm serve ... {' '.join(answer.vllm_flags)}", soft_wrap=True)
    for reason in answer.hypothetical_reasons:
        console.print(f"no flag of vllm serve does this: {reason}", soft_wrap=True)


def _changes(case: Case) -> list[str]:
    return [*(f"{name}={value}" for name, value in case.overrides.items()), f"load x {case.load:g}"]
