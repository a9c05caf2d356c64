"""What sends KV-cache events as vLLM does."""

from __future__ import annotations

from threading import Event, Thread

import zmq

END = b"\xff" * 8


class Publisher:
    """vLLM's ZmqEventPublisher: PUB beside a ROUTER for replay, the last `keep` batches kept.

    `lose` are sequence numbers that the PUB socket does not deliver. `before` are batches from before anybody could be
    there to receive them.
    """

    def __init__(
        self,
        *,
        endpoint: str = "",
        replay: str = "",
        keep: int = 10_000,
        topic: bytes = b"",
        lose: tuple[int, ...] = (),
        before: tuple[bytes, ...] = (),
    ) -> None:
        self._sent = list(before)
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.XPUB)  # a PUB that tells when a subscriber is there
        self._router = self._context.socket(zmq.ROUTER)
        self._pub.sndhwm = 100_000  # as vLLM's
        self._pub.linger = self._router.linger = 0
        self._pub.bind(endpoint or "tcp://127.0.0.1:*")
        self._router.bind(replay or "tcp://127.0.0.1:*")
        self.endpoint: str = self._pub.last_endpoint.decode()
        self.replay: str = self._router.last_endpoint.decode()
        self.replays: list[int] = []
        self._keep, self._topic, self._lose = keep, topic, lose
        self._stop = Event()
        self._thread = Thread(target=self._answer, daemon=True)
        self._thread.start()

    def wait_for_subscriber(self) -> None:
        assert self._pub.poll(5_000)
        self._pub.recv()

    def send(self, *batches: bytes) -> None:
        for batch in batches:
            sequence = len(self._sent)
            self._sent.append(batch)
            if sequence not in self._lose:
                self._pub.send_multipart([self._topic, sequence.to_bytes(8, "big"), batch])

    def send_again(self) -> None:
        """What was sent already, as where a replay overtook what lies in a subscriber's queue."""
        for sequence, batch in enumerate(self._sent):
            self._pub.send_multipart([self._topic, sequence.to_bytes(8, "big"), batch])

    def _answer(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            client, empty, start = self._router.recv_multipart()
            assert empty == b""
            self.replays.append(int.from_bytes(start, "big"))
            sent = list(enumerate(self._sent))
            for sequence, batch in sent[-self._keep :]:
                if sequence >= self.replays[-1]:
                    self._router.send_multipart([client, b"", self._topic, sequence.to_bytes(8, "big"), batch])
            self._router.send_multipart([client, b"", b"", END, b""])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)
