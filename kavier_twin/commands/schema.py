"""`kavier-twin schema`: the JSON Schema of the records that the twin reads."""

from __future__ import annotations

import argparse
import json
from typing import Any

from connectors.traces.telemetry import RECORD

_EXAMPLES = """examples:
  kavier-twin schema > telemetry.schema.json
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    commands.add_parser(
        "schema",
        help="print the JSON Schema of telemetry records",
        description="Print the JSON Schema of telemetry records (see docs/telemetry.md).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """The schema, generated from the models that check the records."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Kavier Twin telemetry record",
        **RECORD.json_schema(),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
