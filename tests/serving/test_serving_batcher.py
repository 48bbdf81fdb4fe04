"""The batcher's rules, and that no request is lost, answered twice or given another's answer."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import ModelError, OverloadError
from millhand.serving.batcher import Batcher, Lane, Request


def request(mark=0.0, rows=1, columns=2, **options):
    return Request({"x": np.full((rows, columns), mark, dtype=np.float32)}, rows, **options)


def lane(batcher, max_batch=8, max_delay_ns=0, capacity=1000):
    made = Lane(max_batch, max_delay_ns, capacity)
    batcher.add(made)
    return made


class Clock:
    ns = 1

    def __call__(self):
        return self.ns


@settings(deadline=None, max_examples=60)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(0, 2),  # lane
            st.integers(1, 5),  # rows
            st.integers(1, 2),  # columns: requests that do not fit together
            st.integers(-1, 2),  # priority
            st.sampled_from(["stay", "cancel", "late"]),
        ),
        min_size=1,
        max_size=60,
    ),
    threads=st.integers(1, 4),
    max_delay_us=st.sampled_from([0, 500]),
)
def test_every_request_has_exactly_one_end_and_its_own_answer(jobs, threads, max_delay_us):
    """Submitted from several threads while a runner takes batches: a real race, with real threads."""
    batcher = Batcher()
    lanes = [lane(batcher, max_batch, max_delay_us * 1000) for max_batch in (1, 4, 8)]
    ends: dict[int, list[str]] = {number: [] for number in range(len(jobs))}
    left = threading.Semaphore(0)

    def end(number, how):
        ends[number].append(how)
        left.release()

    def run():
        while True:
            batch = batcher.take()
            if batch.requests and batch.requests[0].origin == -1:
                batcher.finish(batch)
                return
            if len(batch.requests) > 1:
                assert sum(r.rows for r in batch.requests) <= batch.lane.max_batch
            joined = np.concatenate([r.inputs["x"] for r in batch.requests]) * 2 if batch.requests else None
            start = 0
            for r in batch.requests:
                own = joined[start : start + r.rows]
                start += r.rows
                end(r.origin, "answer" if (own == r.origin * 2).all() else "another's answer")
            for r in batch.expired:
                end(r.origin, "expired")
            batcher.finish(batch)

    def submit(part):
        for number in part:
            where, rows, columns, priority, fate = jobs[number]
            deadline = 1 if fate == "late" else 0
            made = request(float(number), rows, columns, priority=priority, deadline_ns=deadline, origin=number)
            batcher.submit(lanes[where], made)
            if fate == "cancel" and batcher.cancel(lanes[where], made):
                end(number, "cancelled")

    runner = threading.Thread(target=run)
    runner.start()
    senders = [threading.Thread(target=submit, args=(range(i, len(jobs), threads),)) for i in range(threads)]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join(10)
    for _ in jobs:
        assert left.acquire(timeout=10), "a request was lost"
    last = lane(batcher)
    batcher.submit(last, request(origin=-1))
    runner.join(10)
    for number, how in ends.items():
        assert len(how) == 1, "a request ended twice"
        allowed = {"stay": {"answer"}, "late": {"expired"}, "cancel": {"answer", "cancelled"}}[jobs[number][4]]
        assert how[0] in allowed


def test_a_lone_request_never_waits():
    clock = Clock()
    batcher = Batcher(clock)
    slow = lane(batcher, max_delay_ns=10**9)
    batcher.submit(slow, request())
    batch = batcher.take()  # would block if it waited: the clock stands still
    assert len(batch.requests) == 1
    batcher.finish(batch)
    batcher.submit(slow, request())
    assert len(batcher.take().requests) == 1


def test_under_load_a_batch_waits_for_company_but_not_longer_than_the_delay():
    batcher = Batcher()
    busy = lane(batcher, max_batch=3, max_delay_ns=100_000_000)
    for _ in range(2):
        batcher.submit(busy, request())
    batcher.finish(batcher.take())  # two at once: load
    started = time.monotonic()
    batcher.submit(busy, request())
    batch = batcher.take()
    waited = time.monotonic() - started
    assert len(batch.requests) == 1 and 0.1 <= waited < 1
    batcher.finish(batch)


def test_a_full_batch_does_not_wait():
    clock = Clock()
    batcher = Batcher(clock)
    busy = lane(batcher, max_batch=2, max_delay_ns=10**12)
    busy.busy = True
    for _ in range(3):
        batcher.submit(busy, request())
    assert len(batcher.take().requests) == 2


def test_priority_goes_first_then_arrival():
    batcher = Batcher()
    only = lane(batcher, max_batch=1)
    for number, priority in enumerate([0, 5, 0, 5]):
        batcher.submit(only, request(priority=priority, origin=number))
    order = []
    for _ in range(4):
        batch = batcher.take()
        order.append(batch.requests[0].origin)
        batcher.finish(batch)
    assert order == [1, 3, 0, 2]


def test_a_flood_in_one_lane_does_not_hold_back_another():
    batcher = Batcher()
    flood, quiet = lane(batcher, max_batch=4), lane(batcher)
    for _ in range(8):
        batcher.submit(flood, request())
    batcher.submit(quiet, request(origin="quiet"))
    for _ in range(100):
        batcher.submit(flood, request())
    served = []
    for _ in range(3):
        batch = batcher.take()
        served += [r.origin for r in batch.requests]
        batcher.finish(batch)
    assert "quiet" in served


def test_requests_of_different_shapes_do_not_share_a_batch():
    batcher = Batcher()
    only = lane(batcher)
    for columns in (2, 3, 2, 3):
        batcher.submit(only, request(columns=columns, origin=columns))
    first, second = batcher.take(), batcher.take()
    assert [r.origin for r in first.requests] == [2, 2]
    assert [r.origin for r in second.requests] == [3, 3]


def test_the_queue_is_bounded_and_a_closed_lane_refuses():
    batcher = Batcher()
    small = lane(batcher, capacity=2)
    batcher.submit(small, request())
    batcher.submit(small, request())
    with pytest.raises(OverloadError, match="2 requests wait already"):
        batcher.submit(small, request())
    remover = threading.Thread(target=batcher.remove, args=(small,))
    remover.start()
    batcher.finish(batcher.take())  # the removal waits for what waits
    remover.join(5)
    assert not remover.is_alive()
    with pytest.raises(ModelError) as caught:
        batcher.submit(small, request())
    assert caught.value.retriable
