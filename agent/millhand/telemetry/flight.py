"""The rows on their way: per stream how far they were sent, how far the hub has them, and when to send them again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from millhand.store.rows import STREAMS, Row, Stream

ACK_TIMEOUT_GROWTH_CAP = 16
RATE_SPAN_S = 10.0


class Rate:
    """Rows a second over the last RATE_SPAN_S."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, rows: int) -> None:
        self._forget()
        self._recent.append((time.monotonic(), rows))

    @property
    def rows_per_s(self) -> float:
        self._forget()
        return sum(rows for _, rows in self._recent) / RATE_SPAN_S

    def _forget(self) -> None:
        oldest_s = time.monotonic() - RATE_SPAN_S
        while self._recent and self._recent[0][0] < oldest_s:
            self._recent.popleft()


class Flight:
    """Counters of the living epoch. What lies between `acked` and `sent` is in flight."""

    def __init__(self, rows_cap: int, bytes_cap: int, ack_timeout_s: float) -> None:
        """rows_cap, bytes_cap: how far a stream may run ahead of its acknowledgement; one row always may."""
        self.epoch = ""
        self.sent: dict[Stream, int] = dict.fromkeys(STREAMS, 0)
        self.acked: dict[Stream, int] = dict.fromkeys(STREAMS, 0)
        self._rows_cap, self._bytes_cap = rows_cap, bytes_cap
        self._sizes: dict[Stream, deque[tuple[int, int]]] = {stream: deque() for stream in STREAMS}
        """(seq, bytes) of the rows in flight."""
        self._bytes: dict[Stream, int] = dict.fromkeys(STREAMS, 0)
        self._told: dict[Stream, int] = dict.fromkeys(STREAMS, 0)
        """Rows up to here were there before the birth, or were sent before: they are historical."""
        self._first_timeout_s = self._timeout_s = ack_timeout_s
        self._due_s = 0.0
        self._silent_since_s: float | None = None

    def begin(self, epoch: str, acked: Mapping[Stream, int], last: Mapping[Stream, int]) -> None:
        """A birth: go on behind what the hub has; what is there already is historical."""
        self.epoch = epoch
        self.acked, self.sent, self._told = dict(acked), dict(acked), dict(last)
        for stream in STREAMS:
            self._drop_sizes(stream, everything=True)
        self._silent_since_s = None
        self._restart_clock()

    def room(self, stream: Stream) -> int:
        """How many more rows may be sent now."""
        if self._bytes[stream] >= self._bytes_cap:
            return 0
        return self.acked[stream] + self._rows_cap - self.sent[stream]

    def is_historical(self, row: Row) -> bool:
        return row.seq <= self._told[row.stream]  # type: ignore[index]

    def send(self, stream: Stream, seq: int, row_bytes: int) -> None:
        """The row `seq` of `row_bytes` is sent, and with it everything up to it."""
        if not self.is_awaiting:
            self._restart_clock()
        if self._silent_since_s is None:
            self._silent_since_s = time.monotonic()
        self.sent[stream] = seq
        self._sizes[stream].append((seq, row_bytes))
        self._bytes[stream] += row_bytes

    def acknowledge(self, stream: Stream, upto: int) -> None:
        """The hub has everything up to `upto`."""
        self.acked[stream] = upto
        self.sent[stream] = max(self.sent[stream], upto)
        self._drop_sizes(stream)
        self._timeout_s = self._first_timeout_s
        self._silent_since_s = time.monotonic() if self.is_awaiting else None
        self._restart_clock()

    def rewind(self) -> int:
        """Go back to what the hub has; what was sent since is historical. Returns how many rows will go again."""
        again = sum(self.sent[stream] - self.acked[stream] for stream in STREAMS)
        for stream in STREAMS:
            self._told[stream] = max(self._told[stream], self.sent[stream])
            self.sent[stream] = self.acked[stream]
            self._drop_sizes(stream, everything=True)
        self._restart_clock()
        return again

    def _drop_sizes(self, stream: Stream, *, everything: bool = False) -> None:
        sizes = self._sizes[stream]
        while sizes and (everything or sizes[0][0] <= self.acked[stream]):
            self._bytes[stream] -= sizes.popleft()[1]

    # ---- the clock of the acknowledgement ---------------------------------------------------------------------------

    @property
    def is_awaiting(self) -> bool:
        return any(self.sent[stream] > self.acked[stream] for stream in STREAMS)

    @property
    def silent_s(self) -> float | None:
        """How long nothing that was sent has been acknowledged, repeats included; None when nothing is awaited."""
        return None if self._silent_since_s is None else time.monotonic() - self._silent_since_s

    @property
    def patience_s(self) -> float | None:
        """How long an acknowledgement may still stay away; None when none is awaited."""
        return self._due_s - time.monotonic() if self.is_awaiting else None

    @property
    def is_overdue(self) -> bool:
        patience_s = self.patience_s
        return patience_s is not None and patience_s <= 0

    def grow_patience(self) -> None:
        """The hub is deaf: wait twice as long the next time, so that it costs little."""
        self._timeout_s = min(self._timeout_s * 2, self._first_timeout_s * ACK_TIMEOUT_GROWTH_CAP)

    def reset_patience(self) -> None:
        """The hub is back."""
        self._timeout_s = self._first_timeout_s

    def _restart_clock(self) -> None:
        self._due_s = time.monotonic() + self._timeout_s
