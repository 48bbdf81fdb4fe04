"""A few gRPC callers beside a load over HTTP: each asks one request at a time, every answer is checked."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc  # type: ignore[import-untyped]
from load import Check, Result
from wire import GRPC_PATH, Request

PAUSE_S = 0.02
STATUSES = {grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.DEADLINE_EXCEEDED: 504}
"""gRPC's codes as the HTTP statuses that mean the same; another code counts as 500."""


class GrpcCallers:
    """Threads that ask from `start` to `stop`, on one channel."""

    def __init__(
        self, address: tuple[str, int], requests: Sequence[Request], check: Check, callers: int, deadline_s: float
    ) -> None:
        self.result = Result()
        self._address = f"{address[0]}:{address[1]}"
        self._messages = [request.body[5:] for request in requests]
        self._check = check
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(callers)]

    def start(self) -> None:
        self._begin_s = time.monotonic()
        self._channel = grpc.insecure_channel(self._address)
        self._call = self._channel.unary_unary(GRPC_PATH)
        for thread in self._threads:
            thread.start()

    def stop(self) -> Result:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()
        self.result.seconds = time.monotonic() - self._begin_s
        return self.result

    def _run(self) -> None:
        while not self._ended.wait(PAUSE_S):
            index = next(self._turn) % len(self._messages)
            sent_s = time.monotonic()
            status, body = self._ask(self._messages[index])
            with self._lock:
                self.result.take(index, status, {}, body, time.monotonic() - sent_s, self._check)

    def _ask(self, message: bytes) -> tuple[int, bytes]:
        try:
            answer: bytes = self._call(message, timeout=self._deadline_s)
        except grpc.RpcError as error:
            failure: Any = error
            return STATUSES.get(failure.code(), 500), str(failure.details()).encode()
        return 200, answer
