"""A fleet of real vLLM servers with everything that tells the twin of them, and the twin."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import urllib3

from kafka_broker import OurBroker
from live.processes import BLOCK_TOKENS, Twin, Vllm
from live.tiny_model import write_model
from prometheus_server import RealPrometheus
from tap.tap_process import TapProcess, tap_process
from waiting import until

POOL = "chat"
SCRAPE_SECONDS = 2


@dataclass
class Replica:
    """An engine and the tap before it."""

    vllm: Vllm
    tap: TapProcess


class Rig:
    """vLLM behind a tap, Apache Kafka, Prometheus, KV events and the twin, on this machine.

    Prometheus learns of a new engine from a file. Records of the taps are in one topic with one partition.
    """

    def __init__(self, directory: Path, kafka: OurBroker, stack: ExitStack) -> None:
        self.directory, self.kafka = directory, kafka
        self.topic = kafka.new_topic(partitions=1)
        self.replicas: list[Replica] = []
        self._stack = stack
        self._model = directory / "model"
        write_model(self._model)
        (directory / "prometheus").mkdir()
        self._targets = directory / "prometheus" / "engines.json"
        self._targets.write_text("[]")
        scrape = {
            "job_name": "vllm",
            "scrape_interval": f"{SCRAPE_SECONDS}s",
            "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": "1s"}],
        }
        self.prometheus = RealPrometheus(directory / "prometheus", [scrape])
        self.prometheus.start()
        stack.callback(self.prometheus.stop)

    def add_replica(self) -> Replica:
        """A further engine with its tap, once both serve and Prometheus knows it."""
        pod = f"vllm-{len(self.replicas)}"
        vllm = Vllm(pod, self._model, self.directory / f"{pod}.log")
        vllm.start()
        self._stack.callback(vllm.kill)
        vllm.wait_until_ready()
        tap = self._stack.enter_context(
            tap_process(
                self.directory / f"tap-{pod}.log",
                *("--upstream", vllm.url, "--kafka", self.kafka.address, "--topic", self.topic),
                *("--pool", POOL, "--pod", pod, "--tokenizer", self._model),
                *("--block-tokens", str(BLOCK_TOKENS), "--python-hash-seed", "0"),
            )
        )
        replica = Replica(vllm, tap)
        self.replicas.append(replica)
        self.scrape(self.replicas)
        return replica

    def scrape(self, replicas: list[Replica]) -> None:
        """Let Prometheus read these engines and no other."""
        targets = [{"targets": [one.vllm.address], "labels": {"pod": one.vllm.pod}} for one in replicas]
        self._targets.write_text(json.dumps(targets))

    def make_twin(self, **settings: Any) -> Twin:
        """A twin of the replicas that there are; not started."""
        events = [
            {
                "type": "kv_events",
                "endpoint": f"tcp://{one.vllm.events}",
                "replay_endpoint": f"tcp://{one.vllm.replay}",
                "pod": one.vllm.pod,
            }
            for one in self.replicas
        ]
        prometheus = {
            "type": "prometheus",
            "url": self.prometheus.url,
            "engines": {"job": "vllm"},
            "gpus": None,
            "interval_seconds": SCRAPE_SECONDS,
        }
        kafka = {
            "type": "kafka",
            "brokers": [self.kafka.address],
            "topics": [self.topic],
            "start": "earliest",
            "group": None,
        }
        twin = Twin(self.directory / "twin", [kafka, prometheus, *events], **settings)
        self._stack.callback(twin.kill)
        return twin

    def records(self) -> Counter[tuple[str, str]]:
        """How often each record is in the topic, by kind and id; one that completes another counts as the same."""
        from kafka import KafkaConsumer, TopicPartition

        consumer = KafkaConsumer(bootstrap_servers=self.kafka.address, group_id=None, auto_offset_reset="earliest")
        place = TopicPartition(self.topic, 0)
        consumer.assign([place])
        end = consumer.end_offsets([place])[place]
        consumer.seek_to_beginning(place)
        found: Counter[tuple[str, str]] = Counter()
        while consumer.position(place) < end:
            for messages in consumer.poll(timeout_ms=500).values():
                values = (json.loads(message.value) for message in messages)
                found.update((value["kind"], value["id"]) for value in values)
        consumer.close()
        return found


@contextmanager
def rig(directory: Path, kafka: OurBroker) -> Iterator[Rig]:
    """A rig with one replica."""
    with ExitStack() as stack:
        made = Rig(directory, kafka, stack)
        made.add_replica()
        yield made


@dataclass(frozen=True)
class Moment:
    """The engines' gauges and the mirror's at one moment, in Unix time; whether the pool was trusted, and why not."""

    time_seconds: float
    waiting: float
    running: float
    mirrored_waiting: float
    mirrored_running: float
    trusted: bool
    reasons: tuple[str, ...]


class Watch:
    """Compares engines and twin once a second, in a thread of its own. A second in which either is away is left out."""

    def __init__(self, rig: Rig, twin: Twin) -> None:
        self.moments: list[Moment] = []
        self._rig, self._twin, self._stop = rig, twin, Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            try:
                self.moments.append(self._look())
            except (OSError, AssertionError, KeyError, urllib3.exceptions.HTTPError):
                continue

    def _look(self) -> Moment:
        loads = [one.vllm.load() for one in self._rig.replicas]
        now = time.time()
        state, fidelity = self._twin.get("/v1/state"), self._twin.get("/v1/fidelity")
        mirrored = {gauge["kpi"]: gauge["mirrored"] for gauge in state["gauges"]}
        return Moment(
            now,
            sum(load[0] for load in loads),
            sum(load[1] for load in loads),
            mirrored["requests_waiting"],
            mirrored["requests_running"],
            fidelity["trusted"],
            tuple(fidelity["untrusted_reasons"]),
        )


def settled(rig: Rig, twin: Twin) -> dict[str, Any]:
    """The pool's state once the twin has read every record of the topic and nothing runs in it any more."""
    wanted = len(rig.records())

    def done() -> dict[str, Any] | None:
        state = twin.get("/v1/state")
        gauges = {gauge["kpi"]: gauge["mirrored"] for gauge in state["gauges"]}
        empty = not gauges["requests_running"] and not gauges["requests_waiting"]
        return state if empty and state["records"]["accepted"] >= wanted else None

    state = until(done, "the twin has read every record", patience_seconds=90.0)
    assert isinstance(state, dict)
    return state
