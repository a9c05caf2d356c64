"""`kavier-twin run`: the daemon."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from kavier_twin.commands.duration import seconds_of
from kavier_twin.commands.process import StopSignals, leave
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.warm_up import cannot_keep
from kavier_twin.errors import set_up_logging

log = logging.getLogger(__name__)

_EXAMPLE = """examples:
  kavier-twin run --check --config twin.yaml
  kavier-twin run --config twin.yaml
  kavier-twin run --config twin.yaml --warm-up 30m    start next to a running fleet

an example of a settings file:
  pool: chat
  fleet:
    replicas: 2
    hardware: {gpu: H100 SXM 80GB, model: meta-llama/Llama-3.1-8B}  # or the path of a config.json
    engine: {max_num_seqs: 256}    # as vLLM was started; num_gpu_blocks and the rest follow from the hardware
    footprint: {pue: 1.2, carbon: 210, price_per_gpu_hour: 2.5, currency: EUR}  # for energy, carbon and cost
  sources:
    - {type: trace_file, path: requests.jsonl, follow: true}
  checkpoints: {directory: state}  # a restart goes on where the last run stood
  forecast:
    every_seconds: 30
    horizons_seconds: [60, 300]
    slos: [{name: fast, metric: ttft_p99_seconds, threshold: 1.0}]

several pools in one daemon, each with records of its own name:
  pools:
    chat: {fleet: {hardware: {gpu: H100 SXM 80GB, model: meta-llama/Llama-3.1-8B}}}
    code: {fleet: {hardware: {gpu: L40S, model: Qwen/Qwen3-8B}, replicas: 4}}
  sources:
    - {type: kafka, brokers: ["kafka:9092"], topics: [llm-requests]}
    - {type: prometheus, url: "http://prometheus:9090", engines: {namespace: code}, pool: code}

docs/configuration.md has every setting.
exit status: 0 ended by SIGTERM, 1 failed, 2 wrong use, 130 ended by Ctrl-C
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "run",
        help="run the daemon: mirror and forecast a fleet",
        description="Mirror a fleet of vLLM servers from its telemetry, forecast it, and serve metrics, an API and a "
        "page.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="TWIN.yaml", help="settings file")
    parser.add_argument(
        "--warm-up",
        type=seconds_of,
        default=0.0,
        metavar="TIME",
        help="without a checkpoint, first mirror this much of the logs' past, e.g. 30m; the twin is ready afterwards",
    )
    parser.add_argument("--check", action="store_true", help="check the settings file and exit")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    settings = read_settings(args.config)
    if args.check:
        if why := cannot_keep():
            print(f"warning: {why}")
        print(f"{args.config}: fine")
        return 0
    set_up_logging(settings.log_level)
    if why := cannot_keep():
        log.warning("%s", why)
    with StopSignals() as signals:
        daemon = Daemon.of(settings, args.warm_up)
        daemon.start()
        while signals.received is None and not daemon.failed:
            time.sleep(0.1)
        ended = daemon.stop()
    status = 1 if daemon.failed else signals.exit_status
    if not ended:  # the interpreter would wait for threads that compute
        leave(status)
    return status
