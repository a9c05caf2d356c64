"""`kavier-twin scores`: how good a daemon's forecasts have been."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from kavier_twin.commands.client import add_token, add_url, ask
from kavier_twin.commands.score_tables import print_scores, wide_console
from kavier_twin.errors import UserError
from kavier_twin.scores.scorer import Scorer, Scores
from kavier_twin.scores.store import FILE_NAME, read_judged
from kavier_twin.simulation.plain import plain

_SCORES: Final = TypeAdapter(Scores)
_ANSWER_SECONDS: Final = 10.0

_EXAMPLES = f"""examples:
  kavier-twin scores                            scores of the daemon on this machine
  kavier-twin scores --url http://twin:9469
  kavier-twin scores --db state/{FILE_NAME}  scores in a daemon's checkpoint directory
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "scores",
        help="show the accuracy of a daemon's forecasts",
        description="Show the errors of past forecasts against persistence, the coverage of their intervals, and the "
        "quality of predicted SLO violations and alerts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place = parser.add_mutually_exclusive_group()
    add_url(place)
    place.add_argument("--db", type=Path, metavar="FILE", help=f"path of a daemon's {FILE_NAME}")
    add_token(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    pools = _from_file(args.db) if args.db is not None else _from_daemon(args)
    if args.json:
        print(json.dumps({"pools": {pool: plain(asdict(scores)) for pool, scores in pools.items()}}))
        return 0
    console = wide_console()
    for pool, scores in pools.items():
        console.print(f"Pool {pool}", style="bold", markup=False)
        if not scores.kpis and not scores.alerts:
            console.print(f"No forecast has been scored yet; {scores.pending} are pending.")
        else:
            print_scores(console, scores)
    return 0


def _from_file(path: Path) -> dict[str, Scores]:
    found = {}
    for pool, judged in read_judged(path).items():
        scorer = Scorer(())
        scorer.remember(judged)
        found[pool] = scorer.scores()
    return found


def _from_daemon(args: argparse.Namespace) -> dict[str, Scores]:
    body = ask(args, "/v1/scores", seconds=_ANSWER_SECONDS)
    try:
        pools = _known(json.loads(body))["pools"]
        return {pool["pool"]: _SCORES.validate_python(pool["scores"]) for pool in pools}
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError):
        raise UserError(f"{args.url}: the answer is not a list of scores; is it a Kavier Twin?") from None


def _known(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _known(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_known(entry) for entry in value]
    return math.nan if value is None else value
