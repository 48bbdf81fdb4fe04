"""The batcher's rules, and that no request is lost, answered twice or given another's answer."""

from __future__ import annotations

import contextlib
import queue
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import ModelError, OverloadError
from millhand.serving.batcher import Batcher, Lane, Request


def request(mark=0.0, rows=1, columns=2, **options):
    return Request({"x": np.full((rows, columns), mark, dtype=np.float32)}, rows, kind=(columns,), **options)


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
    runners=st.integers(1, 3),
    max_delay_us=st.sampled_from([0, 500]),
)
def test_every_request_has_exactly_one_end_and_its_own_answer(jobs, threads, runners, max_delay_us):
    """Threads that submit, cancel and run, as a worker's do: a real race."""
    wakes = queue.SimpleQueue()
    batcher = Batcher(runners, lambda: wakes.put(True))
    lanes = [lane(batcher, max_batch, max_delay_us * 1000) for max_batch in (1, 4, 8)]
    lanes[2].concurrency = 2
    ends: dict[int, list[str]] = {number: [] for number in range(len(jobs))}
    left = threading.Semaphore(0)
    under_way: list[tuple[int, int]] = []
    broken: list[str] = []

    def end(number, how):
        ends[number].append(how)
        left.release()

    def run(batch):
        mine = (lanes.index(batch.lane), batch.runner)
        if any(runner == batch.runner for _, runner in list(under_way)):
            broken.append("a runner runs two batches")
        under_way.append(mine)
        if len(batch.requests) > 1 and sum(r.rows for r in batch.requests) > batch.lane.max_batch:
            broken.append("a batch is too large")
        if batch.lane.running > batch.lane.concurrency:
            broken.append("a lane runs too many batches")
        joined = np.concatenate([r.inputs["x"] for r in batch.requests]) * 2 if batch.requests else None
        start = 0
        for r in batch.requests:
            own = joined[start : start + r.rows]
            start += r.rows
            end(r.origin, "answer" if (own == r.origin * 2).all() else "another's answer")
        for r in batch.expired:
            end(r.origin, "expired")
        under_way.remove(mine)
        batcher.finish(batch)

    def run_what_is_due():
        while (batch := batcher.take()) is not None:
            run(batch)

    def wait():
        go_on = True
        while go_on:
            with contextlib.suppress(queue.Empty):
                go_on = wakes.get(timeout=batcher.wait_s())
            run_what_is_due()

    def submit(part):
        for number in part:
            where, rows, columns, priority, fate = jobs[number]
            deadline = 1 if fate == "late" else 0
            made = request(float(number), rows, columns, priority=priority, deadline_ns=deadline, origin=number)
            batcher.submit(lanes[where], made)
            if fate == "cancel" and batcher.cancel(lanes[where], made):
                end(number, "cancelled")
            run_what_is_due()
        wakes.put(True)  # a worker's thread goes back to wait, with the time until the next batch is due

    waiters = [threading.Thread(target=wait) for _ in range(runners + 1)]
    senders = [threading.Thread(target=submit, args=(range(i, len(jobs), threads),)) for i in range(threads)]
    for thread in waiters + senders:
        thread.start()
    for thread in senders:
        thread.join(30)
    lost = sum(not left.acquire(timeout=30) for _ in jobs)
    for _ in waiters:
        wakes.put(False)
    for thread in waiters:
        thread.join(30)
    assert not lost
    assert not broken
    for number, how in ends.items():
        assert len(how) == 1, "a request ended twice"
        allowed = {"stay": {"answer"}, "late": {"expired"}, "cancel": {"answer", "cancelled"}}[jobs[number][4]]
        assert how[0] in allowed


def test_a_lone_request_never_waits():
    clock = Clock()
    batcher = Batcher(clock_ns=clock)
    slow = lane(batcher, max_delay_ns=10**9)
    batcher.submit(slow, request())
    batch = batcher.take()
    assert len(batch.requests) == 1
    batcher.finish(batch)
    batcher.submit(slow, request())
    assert len(batcher.take().requests) == 1


def test_under_load_a_batch_waits_for_company_but_not_longer_than_the_delay():
    clock = Clock()
    batcher = Batcher(clock_ns=clock)
    busy = lane(batcher, max_batch=3, max_delay_ns=1000)
    for _ in range(2):
        batcher.submit(busy, request())
    batcher.finish(batcher.take())  # two at once: load
    batcher.submit(busy, request())
    assert batcher.take() is None
    assert batcher.wait_s() == 1000 / 1e9
    clock.ns += 1000
    assert batcher.wait_s() == 0
    assert len(batcher.take().requests) == 1


def test_while_runners_are_free_what_waits_is_shared_out():
    wakes = []
    batcher = Batcher(runners=2, wake=lambda: wakes.append(1))
    both = lane(batcher)
    both.concurrency = 2
    for number in range(5):
        batcher.submit(both, request(origin=number))
    first = batcher.take()
    assert wakes, "the other runner's thread must be told"
    second = batcher.take()
    assert [[r.origin for r in batch.requests] for batch in (first, second)] == [[0, 1, 2], [3, 4]]
    assert {first.runner, second.runner} == {0, 1}
    batcher.submit(both, request())
    assert batcher.take() is None and batcher.wait_s() is None
    batcher.finish(first)
    assert len(batcher.take().requests) == 1


def test_a_lane_that_may_not_run_twice_at_once_waits_for_its_own_batch():
    batcher = Batcher(runners=2)
    one, other = lane(batcher), lane(batcher)
    batcher.submit(one, request())
    under_way = batcher.take()
    batcher.submit(one, request())
    assert batcher.take() is None
    batcher.submit(other, request(origin="other"))
    assert batcher.take().requests[0].origin == "other"
    batcher.finish(under_way)
    assert len(batcher.take().requests) == 1


def test_a_full_batch_does_not_wait():
    clock = Clock()
    batcher = Batcher(clock_ns=clock)
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
    first = batcher.take()
    batcher.finish(first)
    second = batcher.take()
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
    remover.join(30)
    assert not remover.is_alive()
    with pytest.raises(ModelError) as caught:
        batcher.submit(small, request())
    assert caught.value.retriable
