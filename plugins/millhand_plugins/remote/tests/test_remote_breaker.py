"""The circuit breaker: its rules as properties over any order of calls, outcomes and time."""

from __future__ import annotations

import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millhand_plugins.remote.breaker import CLOSED, HALF_OPEN, OPEN, Breaker, BreakerRules

RULES = BreakerRules(failures=3, failure_rate=0.5, window=10, retry_ns=100, retry_cap_ns=1000)


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000

    def __call__(self) -> int:
        return self.now_ns


def opened(clock: Clock, rules: BreakerRules = RULES) -> Breaker:
    breaker = Breaker(rules, clock)
    for _ in range(rules.failures):
        ticket = breaker.admit()
        assert ticket is not None
        breaker.settle(ticket, False)
    assert breaker.state == OPEN
    return breaker


class BreakerMachine(RuleBasedStateMachine):
    """Calls overlap as they like; a second, naive account of what happened says what must hold."""

    @initialize(
        failures=st.integers(1, 5),
        rate=st.sampled_from([0.25, 0.5, 1.0]),
        window=st.integers(1, 8),
        cap=st.sampled_from([100, 350, 1000]),
    )
    def begin(self, failures: int, rate: float, window: int, cap: int) -> None:
        self.rules = BreakerRules(failures, rate, window, 100, cap)
        self.clock = Clock()
        self.breaker = Breaker(self.rules, self.clock)
        self.calls: list[tuple[int, str, int]] = []
        """(ticket, the state it was admitted in, how many changes there had been)."""
        self.changes = 0
        self.outcomes: list[bool] = []
        """Whether each call failed that was admitted since the circuit last closed and settled while closed."""
        self.opened_ns = 0
        self.openings = 0
        """In a row, without a success between."""

    @rule()
    def admit(self) -> None:
        before = self.breaker.state
        probing = any(changes == self.changes and state == HALF_OPEN for _, state, changes in self.calls)
        passable = self.breaker.passable
        ticket = self.breaker.admit()
        assert (ticket is not None) == passable
        if before == CLOSED:
            assert ticket is not None
        elif before == OPEN:
            due = self.clock.now_ns >= self.opened_ns + self.pause_ns()
            assert (ticket is not None) == due
        else:
            assert (ticket is not None) == (not probing)
        if ticket is not None:
            if before != CLOSED:
                assert self.breaker.state == HALF_OPEN
                self.changes += 1
            self.calls.append((ticket, self.breaker.state, self.changes))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), ok=st.sampled_from([True, False, False, None]))
    def settle(self, data: st.DataObject, ok: bool | None) -> None:
        ticket, state, changes = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        before = self.breaker.state
        told = self.breaker.settle(ticket, ok)
        after = self.breaker.state
        assert told == ("" if after == before else after)
        if changes != self.changes or ok is None:
            assert after == before, "a call of an earlier state, or one that says nothing, changed the state"
        elif state == HALF_OPEN:
            assert after == (CLOSED if ok else OPEN)
        else:
            self.outcomes.append(not ok)
            assert after == (OPEN if self.worn() else CLOSED)
        if after != before:
            self.changes += 1
            self.outcomes = []
            if after == OPEN:
                self.opened_ns = self.clock.now_ns
                self.openings += 1
            else:
                self.openings = 0

    @rule(step_ns=st.integers(1, 400))
    def wait(self, step_ns: int) -> None:
        self.clock.now_ns += step_ns

    @rule()
    def trip(self) -> None:
        self.breaker.trip()
        self.changes += 1
        self.outcomes = []
        self.opened_ns = self.clock.now_ns
        self.openings += 1

    def worn(self) -> bool:
        streak = self.outcomes[-self.rules.failures :]
        recent = self.outcomes[-self.rules.window :]
        in_a_row = len(streak) == self.rules.failures and all(streak)
        share = len(recent) == self.rules.window and sum(recent) >= self.rules.failure_rate * len(recent)
        return in_a_row or share

    def pause_ns(self) -> int:
        return min(self.rules.retry_ns * 2 ** (self.openings - 1), self.rules.retry_cap_ns)

    @invariant()
    def at_most_one_probe(self) -> None:
        live = [call for call in self.calls if call[1] == HALF_OPEN and call[2] == self.changes]
        assert len(live) <= 1

    @invariant()
    def the_pause_is_told(self) -> None:
        expected = 0
        if self.breaker.state == OPEN:
            expected = max(self.opened_ns + self.pause_ns() - self.clock.now_ns, 0)
        assert self.breaker.retry_in_ns == expected


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_the_pause_doubles_up_to_its_cap_and_a_success_resets_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(6):
        pauses.append(breaker.retry_in_ns)
        clock.now_ns += breaker.retry_in_ns
        ticket = breaker.admit()
        assert ticket is not None
        assert breaker.settle(ticket, False) == OPEN
    assert pauses == [100, 200, 400, 800, 1000, 1000]
    clock.now_ns += 1000
    ticket = breaker.admit()
    assert ticket is not None
    assert breaker.settle(ticket, True) == CLOSED
    assert opened(clock).retry_in_ns == 100


def test_a_slow_answer_from_before_does_not_close_an_open_circuit() -> None:
    clock = Clock()
    breaker = Breaker(RULES, clock)
    slow = breaker.admit()
    assert slow is not None
    for _ in range(3):
        ticket = breaker.admit()
        assert ticket is not None
        breaker.settle(ticket, False)
    assert breaker.settle(slow, True) == ""
    assert breaker.state == OPEN


def test_only_one_thread_gets_the_probe() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now_ns += 100
    barrier = threading.Barrier(8)
    tickets: list[int | None] = []

    def ask() -> None:
        barrier.wait()
        tickets.append(breaker.admit())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([ticket for ticket in tickets if ticket is not None]) == 1
