"""The KV-cache events of vLLM engines, every batch once and in order, as far as ZeroMQ and the replay socket allow."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from connectors.background import BackgroundSource
from connectors.kv_events.wire import Batch, WireError, decode_batch
from kavier_twin.telemetry import KvEventBatch, TelemetryRecord

_POLL_MILLISECONDS: Final = 200
_RETRY_SECONDS: Final = 1.0
_HEARTBEAT_MILLISECONDS: Final = 5_000  # a connection silent for twice as long is taken for broken
_RECEIVE_MESSAGES: Final = 100_000  # that ZeroMQ keeps for us: as many as vLLM keeps for a subscriber
_MAX_MESSAGE_BYTES: Final = 64 * 2**20
_SEQUENCE_BYTES: Final = 8
_END_OF_REPLAY: Final = b"\xff" * _SEQUENCE_BYTES


@dataclass
class _Publisher:
    """How far the batches of one engine have come."""

    sequence: int
    time_seconds: float


class KvEventsSource(BackgroundSource):
    """Subscribes to one engine, or with `bind` to all that connect to the endpoint.

    A batch that is missing, or may be (after a reconnect), is asked for at `replay_endpoint`; at the first connection
    that is all the engine still has, so a twin that starts late learns the cache. What cannot be had is counted as
    rejected "missed-batch" and the next record says that it does not continue.

    An engine whose cache does not change sends nothing: silence is no trouble, a lost connection is. Publishers are
    told apart by topic and data-parallel rank. The pod is `pod`, or what a topic `kv@<pod>@<model>` says; of engines
    that connect the topic's word comes first, unless it is an address (llm-d's `kv@<address>:<port>@<model>`).
    """

    def __init__(
        self,
        endpoint: str,
        *,
        replay_endpoint: str | None = None,
        topic: str = "",
        pod: str = "",
        bind: bool = False,
        name: str = "kv-events",
        pool: str = "default",
        replay_timeout_seconds: float = 5.0,
    ) -> None:
        super().__init__(name)
        self._endpoint, self._replay_endpoint = endpoint, replay_endpoint
        self._topic, self._pod, self._pool, self._bind = topic, pod, pool, bind
        self._replay_timeout = replay_timeout_seconds
        self._publishers: dict[tuple[bytes, int], _Publisher] = {}
        self._handed_out: dict[str, _Publisher] = {}  # by rank
        self._in_doubt = False  # whether the next batch may not follow although its number says so
        if not bind:
            self.trouble = f"not connected to {endpoint}"

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        records = super().poll(max_records)
        for record in records:
            if isinstance(record, KvEventBatch):
                self._handed_out[record.engine] = _Publisher(record.sequence, record.time_seconds)
        return records

    def positions(self) -> dict[str, Any]:
        """By rank, number and time of the last batch handed out.

        Empty for a source that engines connect to: what it missed it cannot ask for.
        """
        if self._bind:
            return {}
        return {rank: [newest.sequence, newest.time_seconds] for rank, newest in self._handed_out.items()}

    def seek(self, positions: dict[str, Any]) -> None:
        """Go on after these batches; the engine is asked for those since, and whether it is still the same."""
        self._handed_out = {rank: _Publisher(*newest) for rank, newest in positions.items()}
        self._publishers = {(b"", int(rank)): newest for rank, newest in self._handed_out.items()}
        self._in_doubt = bool(positions)

    def _fetch(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.maxmsgsize = _MAX_MESSAGE_BYTES
            socket.rcvhwm = _RECEIVE_MESSAGES
            socket.heartbeat_ivl = _HEARTBEAT_MILLISECONDS
            socket.subscribe(self._topic)
            events = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
            with socket.get_monitor_socket(events) as monitor:
                self._attach(socket)
                self._listen(context, socket, monitor)
                socket.disable_monitor()

    def _attach(self, socket: zmq.Socket[bytes]) -> None:
        while not self._closing:
            try:
                if self._bind:
                    socket.bind(self._endpoint)
                else:
                    socket.connect(self._endpoint)
            except zmq.ZMQError as error:
                self._set_trouble(f"{self._endpoint}: {error.strerror}")
                self._pause(_RETRY_SECONDS)
            else:
                if self._bind:
                    self._set_trouble("")
                return

    def _listen(self, context: zmq.Context[Any], socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(_POLL_MILLISECONDS))
            while monitor in ready and monitor.poll(
                0
            ):  # all of it: a message of a new connection comes after its event
                self._connection_changed(context, parse_monitor_message(monitor.recv_multipart())["event"])
            if socket in ready:
                self._receive(context, socket.recv_multipart())

    def _connection_changed(self, context: zmq.Context[Any], event: int) -> None:
        if self._bind:
            return
        if event == zmq.Event.DISCONNECTED:
            self._set_trouble(f"the connection to {self._endpoint} was lost")
            self._in_doubt = bool(self._publishers)
        else:
            self._set_trouble("")
            self._replay(context)

    def _receive(self, context: zmq.Context[Any], frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != _SEQUENCE_BYTES:
            self._reject("bad-message")
            return
        topic, sequence = frames[0], int.from_bytes(frames[1], "big")
        batch = self._decoded(frames[2])
        if batch is None:
            return  # its number will be missing
        publisher = self._publishers.get(self._key(topic, batch))
        if publisher and sequence <= publisher.sequence and batch.time_seconds <= publisher.time_seconds:
            return  # a replay has brought it already; to ask once more for each would take long, and could be in vain
        if self._in_doubt or sequence != (publisher.sequence + 1 if publisher else 0):
            self._replay(context)
        self._take(topic, sequence, batch)

    def _take(self, topic: bytes, sequence: int, batch: Batch) -> None:
        """Hand a batch on, unless it was."""
        key = self._key(topic, batch)
        publisher = self._publishers.get(key)
        expected = publisher.sequence + 1 if publisher else 0
        if publisher and sequence < expected:
            if batch.time_seconds <= publisher.time_seconds:
                return
            expected = 0  # a publisher that began anew
        self._reject_missed(sequence - expected)
        continues = publisher is not None and sequence == publisher.sequence + 1 and not self._in_doubt
        self._in_doubt = False
        self._publishers[key] = _Publisher(sequence, batch.time_seconds)
        self._offer(
            KvEventBatch(
                time_seconds=batch.time_seconds,
                pool=self._pool,
                pod=self._pod_of(topic),
                engine=str(batch.rank),
                sequence=sequence,
                continues=continues,
                events=batch.events,
            )
        )

    def _pod_of(self, topic: bytes) -> str:
        named = _pod_named(topic)
        if self._bind and named and not _is_address(named):
            return named
        return self._pod or named

    def _key(self, topic: bytes, batch: Batch) -> tuple[bytes, int]:
        """Replay sockets of older engines leave the topic out; it is needed only where several engines connect."""
        return (topic if self._bind else b"", batch.rank)

    def _replay(self, context: zmq.Context[Any]) -> None:
        """Take in what the engine still has from the newest batch we have.

        That one is asked for as well: if the engine's is not ours, the engine began anew, and all it has is news.
        """
        if self._replay_endpoint is None:
            return
        newest = next(iter(self._publishers.values()), None)  # of the one engine
        try:
            replayed = self._replayed(context, newest.sequence if newest else 0)
            if newest is not None:
                ours = (newest.sequence, newest.time_seconds) in [(at, batch.time_seconds) for _, at, batch in replayed]
                self._in_doubt = not ours
                if not ours:
                    replayed = self._replayed(context, 0)
        except zmq.Again:
            self._reject("replay-not-answered")
            return
        for topic, sequence, batch in replayed:
            self._take(topic, sequence, batch)

    def _replayed(self, context: zmq.Context[Any], start: int) -> list[tuple[bytes, int, Batch]]:
        """What the engine has from a sequence number on. Raises zmq.Again where it does not answer in time.

        Its ROUTER drops what is sent faster than it goes out, so what is missing in between is asked for once more.
        """
        found = self._answered(context, start)
        while gap := _gap(found):
            more = [one for one in self._answered(context, gap) if one[1] >= gap]
            if not more or more[0][1] != gap:
                break  # it cannot be had
            found = [one for one in found if one[1] < gap] + more
        return found

    def _answered(self, context: zmq.Context[Any], start: int) -> list[tuple[bytes, int, Batch]]:
        """What the replay socket has from a sequence number on. Raises zmq.Again where it does not answer in time.

        The answer is a message [empty, topic, sequence, payload] for each batch, without topic from older engines.
        """
        assert self._replay_endpoint is not None
        found: list[tuple[bytes, int, Batch]] = []
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.maxmsgsize = _MAX_MESSAGE_BYTES
            socket.rcvhwm = _RECEIVE_MESSAGES  # an engine's ROUTER drops what we are too slow for
            socket.rcvtimeo = round(1e3 * self._replay_timeout)
            socket.connect(self._replay_endpoint)
            socket.send_multipart([b"", start.to_bytes(_SEQUENCE_BYTES, "big")])
            while not self._closing:
                frames = socket.recv_multipart()
                if len(frames) < 3 or len(frames[-2]) != _SEQUENCE_BYTES:
                    self._reject("bad-message")
                    continue
                if frames[-2] == _END_OF_REPLAY:
                    break
                batch = self._decoded(frames[-1])
                if batch is not None:
                    topic = frames[1] if len(frames) > 3 else self._topic.encode()
                    found.append((topic, int.from_bytes(frames[-2], "big"), batch))
        return found

    def _decoded(self, payload: bytes) -> Batch | None:
        try:
            batch = decode_batch(payload)
        except WireError:
            self._reject("bad-event")
            return None
        if batch.unknown:
            self._reject("unknown-event", batch.unknown)
        return batch

    def _reject_missed(self, batches: int) -> None:
        if batches > 0:
            self._reject("missed-batch", batches)


def _gap(replayed: list[tuple[bytes, int, Batch]]) -> int | None:
    """The first sequence number that is missing in between."""
    numbers = [number for _, number, _ in replayed]
    return next((before + 1 for before, number in pairwise(numbers) if number > before + 1), None)


def _pod_named(topic: bytes) -> str:
    """llm-d's convention `kv@<pod>@<model>`; the pod may have its namespace before it."""
    parts = topic.decode(errors="replace").split("@")
    return parts[1].rpartition("/")[2] if len(parts) >= 3 and parts[0] == "kv" else ""


def _is_address(pod: str) -> bool:
    """Whether a name is an IP address, with a port or without."""
    host = pod.rpartition(":")[0] if pod.count(":") == 1 or pod.startswith("[") else pod
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
