"""The batcher: bounded queues in, batches out. Lives in the worker; imported there by Python 3.10.

Rules:
- A request that finds its lane idle runs at once: batches form from what arrives while the batch before runs.
- Under load (the lane's last batch held several requests) a batch that is not full waits up to `max_delay_ns` from
  the arrival of its oldest request.
- A batch holds requests of one lane whose tensors agree in all dimensions but the first, in order of priority, then of
  arrival, up to `max_batch` rows. Nothing is padded.
- Lanes take turns by the priority, then the age of their first request, so that none waits behind another's backlog
  for longer than its own age.
- At most `runners` batches run at once, and at most `lane.concurrency` of one lane. While more could run, a lane's
  waiting rows are shared out, so that no runner takes what another could begin at once.
- A request whose deadline has passed is handed back as expired and never runs.

The batcher owns no thread. A thread that has submitted calls `take` until it gives nothing, and runs what it gives.
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


class Request:
    """One request in a lane. `rows` counts the first dimension; `origin` is the owner's, the batcher ignores it."""

    __slots__ = ("arrival_ns", "deadline_ns", "inputs", "kind", "order", "origin", "priority", "rows")

    def __init__(
        self,
        inputs: Tensors,
        rows: int,
        deadline_ns: int = 0,
        priority: int = 0,
        origin: Any = None,
        kind: tuple[Any, ...] = (),
    ) -> None:
        """`deadline_ns`: CLOCK_MONOTONIC, 0 for none. `kind`: what must be equal within a batch."""
        self.inputs = inputs
        self.rows = rows
        self.deadline_ns = deadline_ns
        self.priority = priority
        self.origin = origin
        self.kind = kind
        self.arrival_ns = 0
        self.order = (0, 0)


@dataclass
class Lane:
    """The queue of one model version."""

    max_batch: int
    max_delay_ns: int
    capacity: int
    owner: Any = None
    concurrency: int = 1
    """Batches of this lane that may run at once."""
    queue: list[Request] = field(default_factory=list)
    closed: bool = False
    running: int = 0
    """Batches under way."""
    busy: bool = False
    """Whether the last batch held several requests."""


@dataclass(frozen=True)
class Batch:
    lane: Lane
    requests: list[Request]
    expired: list[Request]
    runner: int = 0
    """Which of the `runners` runs it; no other batch under way has this number."""


class Batcher:
    """Thread-safe."""

    def __init__(
        self,
        runners: int = 1,
        wake: Callable[[], None] = lambda: None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`wake` is called when there is work that an idle thread should `take`: never with the lock held."""
        self._clock_ns = clock_ns
        self._wake = wake
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._lanes: list[Lane] = []
        self._count = 0
        self._waiting = 0
        """Requests in all queues. Read without the lock where a moment too late does no harm: whoever submits takes."""
        self._idle = list(range(runners - 1, -1, -1))

    def add(self, lane: Lane) -> None:
        """Open a lane."""
        with self._lock:
            self._lanes.append(lane)

    def remove(self, lane: Lane) -> None:
        """Refuse new requests, wait until the waiting ones have run, and forget the lane."""
        with self._lock:
            lane.closed = True
        self._wake()  # a waiting batch is due now
        with self._changed:
            while lane.queue or lane.running:
                self._changed.wait()
            if lane in self._lanes:
                self._lanes.remove(lane)

    def submit(self, lane: Lane, request: Request) -> None:
        """Queue a request. Raises OverloadError where the queue is full, ModelError where the lane is closed."""
        with self._lock:
            if lane.closed:
                raise ModelError("the model version is being unloaded", hint="send the request again", retriable=True)
            queue = lane.queue
            if len(queue) >= lane.capacity:
                raise OverloadError(
                    f"{lane.capacity} requests wait already",
                    hint="send fewer at once, or raise [models] queue",
                )
            request.arrival_ns = self._clock_ns()
            self._count += 1
            request.order = (-request.priority, self._count)
            if not queue or queue[-1].order < request.order:
                queue.append(request)
            else:
                bisect.insort(queue, request, key=_order)
            self._waiting += 1

    def cancel(self, lane: Lane, request: Request) -> bool:
        """Take a waiting request out; False where it runs or has run."""
        with self._lock:
            index = bisect.bisect_left(lane.queue, request.order, key=_order)
            if index == len(lane.queue) or lane.queue[index] is not request:
                return False
            del lane.queue[index]
            self._waiting -= 1
            if lane.closed:
                self._changed.notify_all()
            return True

    def take(self) -> Batch | None:
        """The next batch that is due, if a runner is free for it; it must be given to `finish`."""
        if not self._waiting:
            return None
        more = False
        with self._lock:
            if not self._idle:
                return None
            now_ns = self._clock_ns()
            lane, due_ns = self._next_lane(now_ns)
            if lane is None or due_ns > now_ns:
                return None
            batch = self._cut(lane, now_ns, self._idle.pop())
            if self._idle and self._waiting:  # another thread may have to start, or to wait for, what is left
                more = self._next_lane(now_ns)[0] is not None
        if more:
            self._wake()
        return batch

    def finish(self, batch: Batch) -> None:
        """Say that a taken batch has been answered."""
        with self._lock:
            batch.lane.running -= 1
            self._idle.append(batch.runner)
            if batch.lane.closed:
                self._changed.notify_all()

    def wait_s(self) -> float | None:
        """Seconds until `take` may give something that it does not give now; None: not before the next event."""
        if not self._waiting:
            return None
        with self._lock:
            if not self._idle:
                return None
            now_ns = self._clock_ns()
            lane, due_ns = self._next_lane(now_ns)
            return None if lane is None else max(due_ns - now_ns, 0) / 1e9

    def _next_lane(self, now_ns: int) -> tuple[Lane | None, int]:
        """The lane to serve next: a due one by its first request's order, else the one due soonest."""
        found: Lane | None = None
        found_due_ns = 0
        for lane in self._lanes:
            if not lane.queue or lane.running >= lane.concurrency:
                continue
            due_ns = self._due_ns(lane)
            if found is None or _sooner(lane, due_ns, found, found_due_ns, now_ns):
                found, found_due_ns = lane, due_ns
        return found, found_due_ns

    def _due_ns(self, lane: Lane) -> int:
        if not lane.busy or not lane.max_delay_ns or lane.closed:
            return 0
        if sum(request.rows for request in lane.queue) >= lane.max_batch:
            return 0
        return min(request.arrival_ns for request in lane.queue) + lane.max_delay_ns

    def _cut(self, lane: Lane, now_ns: int, runner: int) -> Batch:
        if len(lane.queue) == 1 and not 0 < lane.queue[0].deadline_ns <= now_ns:
            requests, lane.queue = lane.queue, []
            expired: list[Request] = []
        else:
            requests, expired = self._fill(lane, now_ns)
        self._waiting -= len(requests) + len(expired)
        lane.running += 1
        lane.busy = len(requests) > 1
        return Batch(lane, requests, expired, runner)

    def _fill(self, lane: Lane, now_ns: int) -> tuple[list[Request], list[Request]]:
        requests: list[Request] = []
        expired: list[Request] = []
        left: list[Request] = []
        rows, full, limit = 0, False, self._share(lane)
        for position, request in enumerate(lane.queue):
            if request.deadline_ns and request.deadline_ns <= now_ns:
                expired.append(request)
            elif requests and request.kind != requests[0].kind:
                left.append(request)
            elif rows + request.rows > limit and requests:
                full = True
            else:
                requests.append(request)
                rows += request.rows
            if full or rows >= limit:
                left.extend(lane.queue[position + (0 if full else 1) :])
                break
        lane.queue = left
        return requests, expired

    def _share(self, lane: Lane) -> int:
        """Rows that this batch may take: a fair part, where other runners could take the rest at once."""
        free = min(len(self._idle), lane.concurrency - lane.running - 1)
        if free <= 0:
            return lane.max_batch
        waiting = sum(request.rows for request in lane.queue)
        return min(lane.max_batch, -(-waiting // (free + 1)))


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _sooner(lane: Lane, due_ns: int, other: Lane, other_due_ns: int, now_ns: int) -> bool:
    if due_ns <= now_ns and other_due_ns <= now_ns:
        return lane.queue[0].order < other.queue[0].order
    return due_ns < other_due_ns
