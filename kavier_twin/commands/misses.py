"""`kavier-twin misses`: why prompt tokens of a trace were not in the prefix cache."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from kavier_twin.commands.reuse_tables import add_command, watched
from kavier_twin.commands.score_tables import wide_console
from kavier_twin.reuse.misses import DESCRIPTIONS, Reason, Tokens, age_ranges
from kavier_twin.reuse.watch import ReuseWatch

_SHOWN: Final = 10  # applications

_DESCRIPTION = """Simulate a trace and say why prompt tokens were not found in the prefix cache. Each missed token has
one reason, and the reasons sum to all missed tokens. An application is the set of requests whose prompts begin with
the same block.
"""
_EXAMPLES = """examples:
  kavier-twin misses trace.jsonl --fleet fleet.yaml
  kavier-twin misses recording/ --json
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    add_command(commands, "misses", "why prompt tokens of a trace missed the prefix cache", _DESCRIPTION, _EXAMPLES)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with Console(stderr=True).status("simulating (the first run compiles kernels)"):
        scenario, watch = watched(args)
    if args.json:
        document = {"trace": str(args.trace), "fleet_source": scenario.fleet_source, **_document(watch)}
        print(json.dumps(document, allow_nan=False))
    else:
        console = wide_console()
        console.print(f"{args.trace}: {watch.misses.total.requests:,} requests; fleet from {scenario.fleet_source}")
        _print(console, watch)
    return 0


def _print(console: Console, watch: ReuseWatch) -> None:
    total = watch.misses.total
    missed = total.prompt - total.hit
    table = Table("prompt tokens", title_justify="left")
    for name in ("tokens", "share"):
        table.add_column(name, justify="right")
    table.add_column("why")
    table.add_row("all", f"{total.prompt:,}", "100.00%", "")
    table.add_row("hit", f"{total.hit:,}", f"{total.hit / total.prompt:.2%}", "")
    table.add_row("missed", f"{missed:,}", f"{missed / total.prompt:.2%}", "", end_section=True)
    for reason in Reason:
        if tokens := total.missed[reason]:
            table.add_row(reason.value, f"{tokens:,}", f"{tokens / total.prompt:.2%}", DESCRIPTIONS[reason])
    console.print(table)
    if total.missed[Reason.EVICTED]:
        ages = zip(age_ranges(), watch.misses.evicted_by_age, strict=True)
        parts = [f"{tokens:,} {age}" for age, tokens in ages if tokens]
        console.print(f"Evicted tokens by time since their last use: {', '.join(parts)}.", soft_wrap=True)
    applications = Table(title="Applications by prompt tokens", title_justify="left")
    applications.add_column("application", no_wrap=True)
    for name in ("requests", "prompt tokens", "hit", *(reason.value for reason in Reason if total.missed[reason])):
        applications.add_column(name, justify="right")
    named, others = watch.misses.by_application(_SHOWN)
    for key, one in named:
        applications.add_row(key, *_cells(one, total))
    if others.requests:
        applications.add_row("others", *_cells(others, total))
    console.print(applications)


def _cells(tokens: Tokens, total: Tokens) -> list[str]:
    shares = [tokens.missed[reason] / tokens.prompt for reason in Reason if total.missed[reason]]
    return [
        f"{tokens.requests:,}",
        f"{tokens.prompt:,}",
        *(f"{share:.1%}" for share in (tokens.hit / tokens.prompt, *shares)),
    ]


def _document(watch: ReuseWatch) -> dict[str, Any]:
    named, others = watch.misses.by_application(_SHOWN)
    return {
        **_tokens(watch.misses.total),
        "evicted_tokens_by_age": dict(zip(age_ranges(), watch.misses.evicted_by_age, strict=True)),
        "applications": [{"application": name, **_tokens(tokens)} for name, tokens in named],
        "other_applications": _tokens(others),
    }


def _tokens(tokens: Tokens) -> dict[str, Any]:
    return {
        "requests": tokens.requests,
        "prompt_tokens": tokens.prompt,
        "hit_tokens": tokens.hit,
        "missed_tokens": {reason.value: tokens.missed[reason] for reason in Reason},
    }
