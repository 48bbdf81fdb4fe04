"""Who may begin now: a bound on what runs, a bounded queue before it, and rates of roles."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

import msgspec

from millhand.serving.openai.failure import Failure

WINDOW_S = 60.0
QUEUE_RETRY_S = 2.0


class Admission:
    """At most `running_cap` at once; at most `queue` wait for that, first come first served."""

    def __init__(self, running_cap: int, queue: int, wait_s: float) -> None:
        self._running_cap = running_cap
        self._queue = queue
        self._wait_s = wait_s
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.running = 0
        self.waiting: Counter[str] = Counter()
        """How many wait now, by model."""

    async def enter(self, model: str) -> None:
        """Wait for a place to ask a model. Raises Failure (503) where the queue is full or the wait too long."""
        if self.running < self._running_cap and not self._waiters:
            self.running += 1
            return
        if len(self._waiters) >= self._queue:
            raise _overloaded(f"{self.running} requests are answered and {len(self._waiters)} wait: no more can wait")
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.waiting[model] += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter
        except BaseException as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled():  # the place came in the same moment as the end of the wait
                self.leave()
            if isinstance(error, TimeoutError):
                raise _overloaded(f"no place came free within {self._wait_s:g} s") from error
            raise
        finally:
            self.waiting[model] -= 1

    def leave(self) -> None:
        """Give the place back: to the first who waits."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)  # the place goes on
                return
        self.running -= 1


def _overloaded(message: str) -> Failure:
    return Failure(
        503,
        message,
        hint="send the request again later; [gateway] streams_cap and queue set the limits",
        kind="server_error",
        code="overloaded",
        retry_after_s=QUEUE_RETRY_S,
    )


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one role; keys as in `[gateway.rates.<role>]`, 0 for none."""

    requests_per_minute: float = 0
    tokens_per_minute: float = 0


class Bucket:
    """A budget that fills again evenly, up to one minute's worth. It may be overdrawn by what is known only later."""

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._now = now
        self._left = max(per_minute, 1.0)
        self._filled_s = now()

    def wait_s(self, amount: float) -> float:
        """How long until `amount` is there; 0 where it is now."""
        self._fill()
        missing = amount - self._left
        return max(0.0, missing * WINDOW_S / self._per_minute)

    def take(self, amount: float) -> None:
        """Take `amount` out, there or not."""
        self._fill()
        self._left -= amount

    def _fill(self) -> None:
        now_s = self._now()
        grown = (now_s - self._filled_s) * self._per_minute / WINDOW_S
        self._left = min(max(self._per_minute, 1.0), self._left + grown)
        self._filled_s = now_s


class Rates:
    """The budgets of all roles; `default` stands for a role without an entry of its own."""

    def __init__(self, rates: Mapping[str, Rate], share: float = 1.0) -> None:
        """`share`: the part of the limits that is this process's own."""
        self._requests = {
            role: Bucket(rate.requests_per_minute * share) for role, rate in rates.items() if rate.requests_per_minute
        }
        self._tokens = {
            role: Bucket(rate.tokens_per_minute * share) for role, rate in rates.items() if rate.tokens_per_minute
        }
        self._known = frozenset(rates)

    def begin(self, role: str) -> None:
        """Count a request. Raises Failure (429) where the role has used up its minute."""
        role = self._entry(role)
        for buckets, amount, what in ((self._requests, 1.0, "requests"), (self._tokens, 0.0, "tokens")):
            bucket = buckets.get(role)
            if bucket is not None and (wait_s := bucket.wait_s(amount)) > 0:
                raise Failure(
                    429,
                    f"role '{role}' has used up its {what} for this minute",
                    hint="wait as long as Retry-After says, or ask the node's owner: [gateway.rates]",
                    kind=what,
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
        if role in self._requests:
            self._requests[role].take(1)

    def used(self, role: str, tokens: int) -> None:
        """Count the tokens of an answer."""
        if bucket := self._tokens.get(self._entry(role)):
            bucket.take(tokens)

    def _entry(self, role: str) -> str:
        return role if role in self._known else "default"
