"""`kavier-twin tap`: request records from OpenAI traffic."""

from __future__ import annotations

import argparse
import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from connectors.kafka.settings import KafkaSettings
from kavier_twin.commands.duration import seconds_of
from kavier_twin.commands.process import StopSignals
from kavier_twin.errors import UserError, dotted, problems_of, set_up_logging
from kavier_twin.tap.hashing import ALGORITHMS

if TYPE_CHECKING:
    from kavier_twin.tap.worker import RecordSettings

_EXAMPLE = """examples:
  kavier-twin tap --upstream http://vllm:8000 --kafka kafka:9092 --topic llm-requests --pool chat
  kavier-twin tap --upstream https://vllm:8443 --upstream-ca ca.pem --kafka kafka:9093 --kafka-security kafka.yaml
  kavier-twin tap --mirror --upstream http://vllm:8000 --output requests.jsonl
  kavier-twin tap --mirror --tokenizer Llama-3.1-8B/tokenizer.json --kafka kafka:9092

kafka.yaml holds tls and sasl as a Kafka source of `kavier-twin run` has them, passwords in the environment or a file:
  tls: {ca: kafka-ca.pem}
  sasl: {mechanism: SCRAM-SHA-512, username: tap, password: {env: KAFKA_PASSWORD}}

exit status: 0 ended by SIGTERM, 1 failed, 2 wrong use, 130 ended by Ctrl-C
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "tap",
        help="record a fleet's OpenAI traffic, as a proxy or from mirrored traffic",
        description="Forward OpenAI traffic to vLLM, or receive a mirror of it, and write request records that "
        "contain no text.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--upstream", metavar="URL", help="vLLM server or router behind the tap; it also tokenises")
    parser.add_argument("--upstream-ca", type=Path, metavar="FILE", help="CA certificates for an https upstream")
    parser.add_argument(
        "--mirror", action="store_true", help="receive mirrored traffic: answer 204 and forward nothing"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=9470, help="port to listen on (default 9470; 0 selects a free one)")
    parser.add_argument(
        "--metrics-port", type=int, default=9471, help="port of /metrics (default 9471; 0 selects a free one)"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--kafka", metavar="HOST:PORT,...", help="Kafka's brokers")
    place.add_argument("--output", type=Path, metavar="FILE.jsonl", help="append records to a file instead")
    parser.add_argument(
        "--kafka-security", type=Path, metavar="FILE.yaml", help="file with tls and sasl settings of Kafka, see below"
    )
    parser.add_argument("--topic", default="llm-requests", help="Kafka topic (default llm-requests)")
    parser.add_argument("--pool", default="default", help="pool named in the records (default: default)")
    parser.add_argument("--pod", help="pod named in the records, if the tap serves a single engine")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="tokenizer.json",
        help="tokenise in the tap with the model's tokenizer file or folder and its chat template, instead of "
        "asking the engine",
    )
    parser.add_argument("--block-tokens", type=int, default=16, help="vLLM's --block-size (default 16)")
    parser.add_argument(
        "--hash-algorithm", choices=ALGORITHMS, default="sha256", help="vLLM's hash algorithm (default sha256)"
    )
    parser.add_argument(
        "--python-hash-seed",
        default=os.environ.get("PYTHONHASHSEED"),
        help="PYTHONHASHSEED of the engines (default: the tap's own)",
    )
    parser.add_argument("--hand-over", type=int, help=argparse.SUPPRESS)  # as the middleware starts it
    parser.add_argument(
        "--grace",
        type=seconds_of,
        default=30.0,
        metavar="TIME",
        help="time to wait for answers at shutdown (default 30s)",
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from kavier_twin.tap import worker

    if args.hand_over is not None:
        worker.main(socket.socket(fileno=args.hand_over), lambda: _records(args))
        return 0
    from kavier_twin.tap import server

    records = _records(args)
    set_up_logging("info")
    upstream = None if args.mirror else args.upstream
    with StopSignals() as signals:
        settings = server.TapSettings(args.host, args.port, upstream, args.upstream_ca, args.grace)
        server.serve(settings, records, lambda: signals.received is not None)
    return signals.exit_status


def _records(args: argparse.Namespace) -> RecordSettings:
    """What the options say of records. Raises UserError, with all that is wrong with the options."""
    problems = _problems(args)
    kafka = _kafka_options(args, problems) if args.kafka else None
    if problems:
        raise UserError("\n  ".join((f"{len(problems)} to fix; nothing was started:", *problems)))
    from kavier_twin.tap import worker

    return worker.RecordSettings(
        pool=args.pool,
        pod=args.pod,
        block_tokens=args.block_tokens,
        hash_algorithm=args.hash_algorithm,
        python_hash_seed=args.python_hash_seed,
        tokenizer=args.tokenizer,
        engine=args.upstream and args.upstream.rstrip("/"),
        engine_ca=args.upstream_ca,
        topic=args.topic,
        output=args.output,
        kafka=kafka,
        host=args.host,
        metrics_port=args.metrics_port,
        shares_ports=args.hand_over is not None,
    )


def _problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options, each as `--option: what and the way out`."""
    found = []
    inside = args.hand_over is not None
    if inside and args.mirror:
        found.append("--mirror: a middleware sees the traffic itself; leave it out")
    if args.upstream is None and not args.mirror and not inside:
        found.append("--upstream is missing: give the URL of the vLLM behind the tap, e.g. http://vllm:8000")
    if args.upstream is None and args.mirror and args.tokenizer is None and not inside:
        found.append("--mirror needs what tokenises: give --upstream, --tokenizer or both")
    if args.upstream is not None and not _is_place(args.upstream):
        found.append("--upstream: give scheme, host and port only, e.g. http://vllm:8000")
    tokenizer = args.tokenizer
    if tokenizer is not None and tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    for option, path in (("--upstream-ca", args.upstream_ca), ("--tokenizer", tokenizer)):
        if path is not None and not path.is_file():
            found.append(f"{option} {path}: there is no such file; correct the path")
    if args.output is not None and not args.output.parent.is_dir():
        found.append(f"--output {args.output}: the directory {args.output.parent} does not exist; create it")
    for option, port in (("--port", args.port), ("--metrics-port", args.metrics_port)):
        if not 0 <= port <= 65_535:
            found.append(f"{option} {port}: give a port, 0 to 65535")
    for option, name in (("--pool", args.pool), ("--pod", args.pod)):
        if name is not None and not 1 <= len(name) <= 512:
            found.append(f"{option}: give a name of 1 to 512 characters")
    if not 1 <= args.block_tokens <= 1_048_576:
        found.append(f"--block-tokens {args.block_tokens}: give vLLM's block size, 1 to 1048576")
    if args.hash_algorithm.startswith("xxhash") and args.python_hash_seed is None:
        found.append(
            f"--hash-algorithm {args.hash_algorithm}: without PYTHONHASHSEED each engine's hashes differ; set one at "
            "the engines and give it as --python-hash-seed"
        )
    if args.kafka_security is not None and not args.kafka:
        found.append("--kafka-security: there is no --kafka; leave it out")
    needed = (
        *(("kafka",) if args.kafka else ()),
        *("aiohttp", "jinja2", "tokenizers"),
        *(() if inside else ("httptools", "uvloop")),
        *(("cbor2",) if args.hash_algorithm.endswith("_cbor") else ()),
        *(("xxhash",) if args.hash_algorithm.startswith("xxhash") else ()),
    )
    if missing := [name for name in needed if find_spec(name) is None]:
        found.append(f"{', '.join(missing)}: not installed; install with: pip install 'kavier-twin[tap,kafka]'")
    return found


def _is_place(url: str) -> bool:
    try:
        place = urlsplit(url)
        return (
            place.scheme in ("http", "https")
            and bool(place.hostname)
            and place.port != 0
            and "@" not in place.netloc
            and place.path in ("", "/")
            and not place.query
            and not place.fragment
            and url.isascii()
        )
    except ValueError:
        return False


def _kafka_options(args: argparse.Namespace, problems: list[str]) -> dict[str, Any] | None:
    """kafka-python's options; what is wrong with them is added to `problems`."""
    security: Any = {}
    if args.kafka_security is not None:
        try:
            security = yaml.safe_load(args.kafka_security.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            problems.append(f"--kafka-security {args.kafka_security}: cannot be read ({error}); correct it")
            return None
        if not isinstance(security, dict) or security.keys() - {"tls", "sasl"}:
            problems.append(f"--kafka-security {args.kafka_security}: give tls, sasl or both, and nothing else")
            return None
    try:
        settings = KafkaSettings.model_validate({"brokers": args.kafka.split(","), "topics": [args.topic], **security})
    except ValidationError as error:
        options = {"brokers": f"--kafka {args.kafka}", "topics": f"--topic {args.topic}"}
        problems += problems_of(
            error,
            lambda place: options.get(str(place[0])) or f"--kafka-security {args.kafka_security}: {dotted(place)}",
        )
        return None
    if args.kafka_security is not None:
        settings = settings.with_paths_from(args.kafka_security.parent)
    found = settings.problems()  # a missing client is told of with the other libraries
    problems += [
        f"--kafka-security {args.kafka_security}: {each}" if "." in each.split(":")[0] else each for each in found
    ]
    if problems:
        return None
    from connectors.kafka.client import connection

    return connection(settings, None)
