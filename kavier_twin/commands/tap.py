"""`kavier-twin tap`: request records from OpenAI traffic."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kavier_twin.commands.run import set_up_logging
from kavier_twin.daemon import StopSignals
from kavier_twin.duration import seconds_of
from kavier_twin.errors import UserError
from kavier_twin.tap.hashing import ALGORITHMS

_EXAMPLE = """examples:
  kavier-twin tap --upstream http://vllm:8000 --kafka kafka:9092 --topic llm-requests
  kavier-twin tap --mirror --upstream http://vllm:8000 --output requests.jsonl
"""
_END_SECONDS = 10.0  # for records that wait for Kafka


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "tap",
        help="make request records of a fleet's OpenAI traffic, as a proxy or from mirrored traffic",
        description="Pass OpenAI traffic on to vLLM, or receive a mirror of it, and make records of it without text.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--upstream", metavar="URL", help="the vLLM or router behind the tap, which also tokenises")
    parser.add_argument("--mirror", action="store_true", help="receive mirrored traffic: answer 204, pass nothing on")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=9470, help="port to listen at (9470; 0 takes a free one)")
    parser.add_argument("--metrics-port", type=int, default=9471, help="port of /metrics (9471)")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--kafka", metavar="HOST:PORT,...", help="Kafka's brokers")
    place.add_argument("--output", type=Path, metavar="FILE.jsonl", help="append the records to a file instead")
    parser.add_argument("--topic", default="llm-requests", help="Kafka's topic (llm-requests)")
    parser.add_argument("--pool", default="default", help="the pool that records name (default)")
    parser.add_argument("--pod", help="the pod that records name, where the tap stands before one engine")
    parser.add_argument("--tokenizer", type=Path, metavar="tokenizer.json", help="tokenise completions with this file")
    parser.add_argument("--block-tokens", type=int, default=16, help="vLLM's --block-size (16)")
    parser.add_argument("--hash-algorithm", choices=ALGORITHMS, default="sha256", help="its hash algorithm (sha256)")
    parser.add_argument(
        "--python-hash-seed",
        default=os.environ.get("PYTHONHASHSEED"),
        help="the engines' PYTHONHASHSEED, if they have one (the tap's own)",
    )
    parser.add_argument("--grace", type=seconds_of, default=30.0, metavar="TIME", help="for answers at the end (30s)")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    _check(args)
    try:
        from kavier_twin.tap import hashing, metrics, producer, prompts, server

        hasher = hashing.BlockHasher(args.hash_algorithm, args.block_tokens, args.python_hash_seed)
        tokenizer = None if args.tokenizer is None else prompts.LocalTokenizer(str(args.tokenizer))
        if args.kafka:
            import kafka  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it: pip install 'kavier-twin[tap,kafka]'") from error
    except ValueError as error:
        raise UserError(f"--hash-algorithm: {error}; give --python-hash-seed") from error
    set_up_logging("info")
    sys.setswitchinterval(0.0005)  # seconds; hashing in a thread must not hold up answers for Python's usual 5 ms
    measured = metrics.TapMetrics()
    sink: producer.Sink
    if args.output is not None:
        try:
            sink = producer.FileSink(args.output)
        except OSError as error:
            raise UserError(f"--output {args.output}: {error.strerror}; give a file that can be written") from error
    else:
        failed = measured.dropped.labels("kafka-failed").inc
        sink = producer.KafkaSink(args.kafka.split(","), args.topic, failed)
    settings = server.TapSettings(
        args.host, args.port, args.metrics_port, args.upstream, args.mirror, args.pool, args.pod, args.grace
    )
    records = producer.Producer(sink, measured)
    with StopSignals() as signals:
        try:
            server.serve(settings, measured, records, hasher, tokenizer)
        finally:
            records.close(_END_SECONDS)
    return signals.exit_status


def _check(args: argparse.Namespace) -> None:
    if args.upstream is None and not args.mirror:
        raise UserError("--upstream is missing: give the URL of the vLLM behind the tap, e.g. http://vllm:8000")
    if args.upstream is not None:
        found = urlsplit(args.upstream)
        if found.scheme not in ("http", "https") or not found.netloc or found.path not in ("", "/") or found.query:
            raise UserError(f"--upstream {args.upstream}: give scheme, host and port only, e.g. http://vllm:8000")
    if args.block_tokens < 1:
        raise UserError(f"--block-tokens {args.block_tokens}: give vLLM's block size, 1 or more")
    if args.tokenizer is not None and not args.tokenizer.is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: there is no such file; correct the path")
