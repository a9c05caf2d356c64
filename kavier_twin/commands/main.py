"""The command line: `kavier-twin COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from kavier_twin import __version__
from kavier_twin.errors import UserError

COMMANDS = (
    "simulate",
    "compare",
    "capacity",
    "misses",
    "accuracy",
    "counterfactual",
    "backtest",
    "kavier",
    "demo",
    "run",
    "doctor",
    "init",
    "scores",
    "replay",
    "mirror",
    "whatif",
    "calibrate_power",
    "schema",
    "tap",
)

_EXAMPLES = """examples:
  kavier-twin demo                                 mirror and forecast a recorded vLLM server
  kavier-twin simulate trace.jsonl --fleet f.yaml  simulate a trace
  kavier-twin run --config twin.yaml               run the daemon
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="kavier-twin",
        description="Digital twin for fleets of vLLM servers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kavier-twin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name in _wanted(sys.argv[1:] if argv is None else argv):
        modules[name.replace("_", "-")] = module = importlib.import_module(f"kavier_twin.commands.{name}")
        module.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return int(modules[args.command].run(args))
    except UserError as error:
        print(f"kavier-twin: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kavier-twin: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _wanted(argv: Sequence[str]) -> Sequence[str]:
    """The commands whose code is needed: one that is named at once, all for the help that lists them."""
    return [name for name in COMMANDS if argv and argv[0] == name.replace("_", "-")] or COMMANDS


if __name__ == "__main__":
    raise SystemExit(main())
