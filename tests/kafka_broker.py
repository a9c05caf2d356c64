"""A Kafka to test against: Apache Kafka itself, or librdkafka's mock cluster where that cannot be had.

In this order: the broker at `KAVIER_TEST_KAFKA` (host:port), the installation at `KAFKA_HOME`, the jars of Apache Kafka
from Maven Central (once, into the user's cache), the mock cluster of `confluent-kafka`. A broker that was not started
here is never stopped, and has no TLS and SASL listener that a test could know.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KAFKA_VERSION = "4.1.1"  # the last one that runs on Java 17
START_SECONDS = 120.0
USER = "twin"
PLAIN_PASSWORD = "plain-secret"
SCRAM_PASSWORD = "scram-secret"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>test</groupId><artifactId>kafka-for-tests</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
      <version>{KAFKA_VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
"""
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"
_HEAP = ("-Xms128m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_LOGGING = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"


class Broker:
    """A running Kafka. `real` tells Apache Kafka from the mock.

    `client_options` is what kafka-python's clients need beside the address.
    """

    real = True
    last_described = ""  # of the one found last, for the report

    def __init__(self, address: str, described: str) -> None:
        self.address = address
        self.described = Broker.last_described = described
        self.client_options: dict[str, Any] = {}

    def new_topic(self, partitions: int = 3) -> str:
        """The name of a new topic. Needs the extra kafka."""
        from kafka.admin import KafkaAdminClient

        topic = f"requests-{uuid.uuid4().hex[:12]}"
        client = KafkaAdminClient(bootstrap_servers=self.address)
        client.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}})
        client.close()
        return topic

    def suspend(self) -> None:
        """Let it answer nothing, while connections to it stay: what a partitioned network looks like."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, if it was started here."""


class OurBroker(Broker):
    """Apache Kafka as a process of ours: KRaft, one node, plain on one port, TLS with SASL on another."""

    def __init__(self, jars: Path, directory: Path) -> None:
        plain, secure, controller = _free_ports(3)
        super().__init__(f"127.0.0.1:{plain}", f"Apache Kafka from {jars}")
        self.secure_address = f"127.0.0.1:{secure}"
        self.certificate = directory / "broker.pem"
        self.jars = jars
        self._classpath = f"{jars}/*"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._make_certificate()
        self._properties = directory / "server.properties"
        self._properties.write_text(self.properties(plain, secure, controller))
        users = [
            argument
            for hash in ("256", "512")
            for argument in ("--add-scram", f"SCRAM-SHA-{hash}=[name={USER},password={SCRAM_PASSWORD}]")
        ]
        cluster = uuid.uuid4().hex[:22]
        tool = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self._properties), *users]
        self._run(["java", *_HEAP, _LOGGING, "-cp", self._classpath, *tool])
        self.start()

    def properties(self, plain: int, secure: int, controller: int) -> str:
        """The server's settings, listening on these ports of this machine."""
        return _properties(self._directory, plain, secure, controller)

    def start(self) -> None:
        """Start it, with the data it had, and wait until it answers."""
        command = ["java", *_HEAP, _LOGGING, "-cp", self._classpath, "kafka.Kafka", str(self._properties)]
        with (self._directory / "kafka.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not _listens(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Kafka did not start:\n{(self._directory / 'kafka.log').read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self, *, kill: bool = False) -> None:
        """End the process; with `kill` at once and unprepared."""
        if self._process is not None:
            self._process.kill() if kill else self._process.terminate()
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        self.stop(kill=True)

    def _make_certificate(self) -> None:
        store = ["-keystore", str(self._directory / "broker.p12"), "-storepass", "changeit", "-alias", "broker"]
        subject = ["-dname", "CN=127.0.0.1", "-ext", "san=ip:127.0.0.1", "-validity", "3650"]
        key = ["-keyalg", "EC", "-groupname", "secp256r1", "-storetype", "PKCS12"]
        self._run(["keytool", "-genkeypair", *key, *subject, *store])
        self.certificate.write_text(self._run(["keytool", "-exportcert", "-rfc", *store]))

    @staticmethod
    def _run(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {done.stdout}{done.stderr}")
        return done.stdout


class MockBroker(Broker):
    """librdkafka's mock cluster: topics, produce, fetch and offsets; no restart, retention, new partitions or SASL."""

    real = False

    def __init__(self) -> None:
        from confluent_kafka import Producer

        self._cluster = Producer({"bootstrap.servers": "ignored:1", "test.mock.num.brokers": 1})
        found = next(iter(self._cluster.list_topics(timeout=10).brokers.values()))
        super().__init__(f"{found.host}:{found.port}", "librdkafka's mock cluster, as Apache Kafka cannot be had")
        self.client_options = {"api_version": (2, 1)}  # it announces versions of requests that it does not serve


@contextmanager
def kafka_broker() -> Iterator[Broker | None]:
    """The Kafka found on this machine, started if need be; None if there is none."""
    with tempfile.TemporaryDirectory(prefix="kavier-kafka-") as directory:
        broker = _find(Path(directory))
        try:
            yield broker
        finally:
            if broker is not None:
                broker.close()


def _find(directory: Path) -> Broker | None:
    if address := os.environ.get("KAVIER_TEST_KAFKA"):
        return Broker(address, f"the broker at {address} (KAVIER_TEST_KAFKA)")
    if home := os.environ.get("KAFKA_HOME"):
        return OurBroker(Path(home) / "libs", directory)
    if shutil.which("java") and (jars := _jars()):
        return OurBroker(jars, directory)
    try:
        return MockBroker()
    except ImportError:
        return None


def _jars() -> Path | None:
    """Apache Kafka's jars, fetched once; None where they cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kavier-twin"
    jars = cache / f"kafka-{KAFKA_VERSION}"
    if jars.is_dir():
        return jars
    if not shutil.which("mvn"):
        return None
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        (Path(work) / "pom.xml").write_text(_POM)
        command = ["mvn", "-q", "-B", _COPY, "-DincludeScope=runtime", f"-DoutputDirectory={work}/jars"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode != 0:
            print(f"Maven could not fetch Apache Kafka: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            return None
        try:
            (Path(work) / "jars").rename(jars)
        except OSError:
            if not jars.is_dir():  # otherwise another process was faster
                raise
    return jars


def _properties(directory: Path, plain: int, secure: int, controller: int) -> str:
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    return f"""
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={directory}/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl_ssl.plain.sasl.jaas.config={login} user_{USER}="{PLAIN_PASSWORD}";
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config={scram}
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={scram}
ssl.keystore.type=PKCS12
ssl.keystore.location={directory}/broker.p12
ssl.keystore.password=changeit
ssl.key.password=changeit
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
    finally:
        for found in sockets:
            found.close()


def _listens(address: str) -> bool:
    host, port = address.split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False
