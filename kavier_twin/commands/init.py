"""`kavier-twin init`: a first settings file from what Prometheus and Kafka know of the fleet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from connectors.prometheus.api import PrometheusApi
from connectors.prometheus.http import Access, HttpClient
from connectors.secret import SecretPlace
from kavier_twin.daemon.config import check_settings
from kavier_twin.daemon.discovery import Found, ask_kafka, ask_prometheus, settings_text
from kavier_twin.errors import UserError

_EPILOG = """examples:
  kavier-twin init --prometheus http://prometheus:9090
  kavier-twin init --prometheus http://prometheus:9090 --kafka kafka:9092 --topic llm-requests --output twin.yaml

It reads, and writes nothing but the settings file. Kubernetes is not asked: pods come from the metrics' labels.
exit status: 0 the file was written, 1 no engine was found or the file exists, 2 wrong use
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "init",
        help="write a first settings file from what Prometheus and Kafka know",
        description="Look for vLLM engines, their models, GPUs and pods, and for topics; write a settings file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prometheus", required=True, metavar="URL", help="the Prometheus server")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the bearer token that Prometheus asks for")
    parser.add_argument("--kafka", nargs="+", default=[], metavar="HOST:PORT", help="brokers, without TLS and user")
    parser.add_argument("--topic", default="", help="the topic of request records")
    parser.add_argument("--output", type=Path, default=Path("twin.yaml"), metavar="FILE", help="(twin.yaml)")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.output.exists():
        raise UserError(f"{args.output}: exists already; remove it, or give another file with --output")
    http = HttpClient(Access(bearer_token=SecretPlace(file=args.token_file) if args.token_file else None))
    try:
        found = ask_prometheus(PrometheusApi(args.prometheus, http, 10.0))
    finally:
        http.close()
    if args.kafka:
        kafka = ask_kafka(args.kafka)
        if args.topic and args.topic not in kafka.topics:
            kafka = Found(topics=kafka.topics, missing=(*kafka.missing, f"Kafka: the topic {args.topic}"))
        found = Found(found.pools, kafka.topics, (*found.missing, *kafka.missing))
    _show(found)
    if not found.pools:
        print("kavier-twin: no engine was found, so no file was written", file=sys.stderr)
        return 1
    text = settings_text(found, args.prometheus, args.kafka, args.topic if args.topic in found.topics else "")
    check_settings(yaml.safe_load(text), args.output)
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror}); choose another with --output") from None
    print(f"{args.output} is written; check it with: kavier-twin doctor --config {args.output}")
    return 0


def _show(found: Found) -> None:
    for pool in found.pools:
        chosen = ", ".join(f"{name}={value}" for name, value in pool.selector.items()) or "all series"
        gpus = f"{pool.gpus or ''} {pool.gpu or 'unknown GPUs'}".strip()
        print(f"pool {pool.name}: {pool.model or 'a model without name'} on {gpus}, selected by {chosen}")
        print(f"  engines: {', '.join(pool.engines)}")
    if found.topics:
        print(f"topics: {', '.join(found.topics)}")
    for line in found.missing:
        print(f"not found: {line}")
