"""Waiting awake: the loop asks the kernel again and again only while that pays."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from millhand.serving.busy_poll import SOON_NS, BusyPoll

LIMIT_US = 100_000


class CountingSelector(selectors.DefaultSelector):
    """Counts how often the loop asked for news without being ready to sleep."""

    awake = 0

    def select(self, timeout: float | None = None) -> Any:
        self.awake += timeout is not None and timeout <= 0
        return super().select(timeout)


@pytest.fixture
def looks() -> Callable[[Callable[[BusyPoll], Coroutine[Any, Any, None]], int], int]:
    """Run a life of a BusyPoll and return how often its loop looked for news awake."""

    def run(life: Callable[[BusyPoll], Coroutine[Any, Any, None]], limit_us: int = LIMIT_US) -> int:
        selector = CountingSelector()

        async def main() -> None:
            await life(BusyPoll(asyncio.get_running_loop(), limit_us))

        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(main())
        return selector.awake

    return run


async def ask(poll: BusyPoll, takes_s: float) -> None:
    poll.sent()
    await asyncio.sleep(takes_s)
    poll.answered()


def test_a_request_that_follows_a_quick_answer_is_waited_for_awake(looks: Any) -> None:
    async def life(poll: BusyPoll) -> None:
        await ask(poll, 0.001)
        await ask(poll, 0.02)

    assert looks(life) > 20


def test_requests_that_come_now_and_then_let_the_loop_sleep(looks: Any) -> None:
    async def life(poll: BusyPoll) -> None:
        for _ in range(5):
            await ask(poll, 0.005)
            await asyncio.sleep(3 * SOON_NS / 1e9)

    assert looks(life) < 20


def test_a_slow_model_lets_the_loop_sleep(looks: Any) -> None:
    async def life(poll: BusyPoll) -> None:
        for _ in range(5):
            await ask(poll, 0.01)

    assert looks(life, 5_000) < 500  # the first wait alone, and no longer than its limit
    assert looks(life) > 100


def test_waiting_awake_ends_at_the_limit(looks: Any) -> None:
    async def life(poll: BusyPoll) -> None:
        await ask(poll, 0.0001)
        poll.sent()
        await asyncio.sleep(0.01)
        assert not poll._looking, "an answer that does not come is no longer waited for awake"

    assert looks(life, 2_000) > 0


def test_the_last_answer_ends_it_at_once(looks: Any) -> None:
    async def life(poll: BusyPoll) -> None:
        await ask(poll, 0.001)
        await ask(poll, 0.001)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not poll._looking

    looks(life)
