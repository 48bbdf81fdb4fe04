"""The batcher: bounded queues in, batches out. Lives in the worker; imported there by Python 3.10.

Rules:
- A request that finds its lane idle runs at once: batches form from what arrives while the batch before runs.
- Under load (the lane's last batch held several requests) a batch that is not full waits up to `max_delay_ns` from
  the arrival of its oldest request.
- A batch holds requests of one lane whose tensors agree in all dimensions but the first, in order of priority, then of
  arrival, up to `max_batch` rows.
- Lanes take turns by the priority, then the age of their first request, so that none waits behind another's backlog
  for longer than its own age.
- A request whose deadline has passed is handed back as expired and never runs.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from millhand.errors import ModelError, OverloadError
from millhand.serving.tensors import Tensors


@dataclass
class Request:
    """One request in a lane. `rows` counts the first dimension; `origin` is the owner's, the batcher ignores it."""

    inputs: Tensors
    rows: int
    deadline_ns: int = 0
    """CLOCK_MONOTONIC; 0 for none."""
    priority: int = 0
    origin: Any = None
    arrival_ns: int = 0
    order: tuple[int, int] = (0, 0)
    kind: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass
class Lane:
    """The queue of one model version."""

    max_batch: int
    max_delay_ns: int
    capacity: int
    owner: Any = None
    queue: list[Request] = field(default_factory=list)
    closed: bool = False
    running: int = 0
    """Requests of the batch under way."""
    busy: bool = False
    """Whether the last batch held several requests."""


@dataclass(frozen=True)
class Batch:
    lane: Lane
    requests: list[Request]
    expired: list[Request]


class Batcher:
    """Thread-safe: any thread submits and cancels, one thread takes and finishes."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._changed = threading.Condition()
        self._lanes: list[Lane] = []
        self._count = 0

    def add(self, lane: Lane) -> None:
        """Open a lane."""
        with self._changed:
            self._lanes.append(lane)

    def remove(self, lane: Lane) -> None:
        """Refuse new requests, wait until the waiting ones have run, and forget the lane."""
        with self._changed:
            lane.closed = True
            while lane.queue or lane.running:
                self._changed.wait()
            if lane in self._lanes:
                self._lanes.remove(lane)

    def submit(self, lane: Lane, request: Request) -> None:
        """Queue a request. Raises OverloadError where the queue is full, ModelError where the lane is closed."""
        request.kind = tuple(sorted((name, array.shape[1:]) for name, array in request.inputs.items()))
        with self._changed:
            if lane.closed:
                raise ModelError("the model version is being unloaded", hint="send the request again", retriable=True)
            if len(lane.queue) >= lane.capacity:
                raise OverloadError(
                    f"{lane.capacity} requests wait already",
                    hint="send fewer at once, or raise [models] queue",
                )
            request.arrival_ns = self._clock_ns()
            self._count += 1
            request.order = (-request.priority, self._count)
            bisect.insort(lane.queue, request, key=_order)
            self._changed.notify_all()

    def cancel(self, lane: Lane, request: Request) -> bool:
        """Take a waiting request out; False where it runs or has run."""
        with self._changed:
            index = bisect.bisect_left(lane.queue, request.order, key=_order)
            if index == len(lane.queue) or lane.queue[index] is not request:
                return False
            del lane.queue[index]
            self._changed.notify_all()
            return True

    def take(self) -> Batch:
        """Wait for the next batch. Each must be given to `finish` before the next is taken."""
        with self._changed:
            while True:
                now_ns = self._clock_ns()
                lane, due_ns = self._next_lane(now_ns)
                if lane is not None and due_ns <= now_ns:
                    return self._cut(lane, now_ns)
                self._changed.wait(None if lane is None else (due_ns - now_ns) / 1e9)

    def finish(self, batch: Batch) -> None:
        """Say that a taken batch has been answered."""
        with self._changed:
            batch.lane.running = 0
            self._changed.notify_all()

    def _next_lane(self, now_ns: int) -> tuple[Lane | None, int]:
        """The lane to serve next: a due one by its first request's order, else the one due soonest."""
        best: tuple[bool, tuple[int, int] | int] | None = None
        found, found_due_ns = None, 0
        for lane in self._lanes:
            if not lane.queue:
                continue
            due_ns = self._due_ns(lane)
            late = due_ns > now_ns
            rank = (late, due_ns if late else lane.queue[0].order)
            if best is None or rank < best:
                best, found, found_due_ns = rank, lane, due_ns
        return found, found_due_ns

    def _due_ns(self, lane: Lane) -> int:
        if not lane.busy or not lane.max_delay_ns or lane.closed:
            return 0
        if sum(request.rows for request in lane.queue) >= lane.max_batch:
            return 0
        return min(request.arrival_ns for request in lane.queue) + lane.max_delay_ns

    def _cut(self, lane: Lane, now_ns: int) -> Batch:
        requests: list[Request] = []
        expired: list[Request] = []
        left: list[Request] = []
        rows, full = 0, False
        for position, request in enumerate(lane.queue):
            if request.deadline_ns and request.deadline_ns <= now_ns:
                expired.append(request)
            elif requests and request.kind != requests[0].kind:
                left.append(request)
            elif rows + request.rows > lane.max_batch and requests:
                full = True
            else:
                requests.append(request)
                rows += request.rows
            if full or rows >= lane.max_batch:
                left.extend(lane.queue[position + (0 if full else 1) :])
                break
        lane.queue = left
        lane.running = len(requests)
        lane.busy = len(requests) > 1
        return Batch(lane, requests, expired)


def _order(request: Request) -> tuple[int, int]:
    return request.order
