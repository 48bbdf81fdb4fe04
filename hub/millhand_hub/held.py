"""Which rows of one stream the hub holds: everything up to `upto`, and spans beyond it."""

from __future__ import annotations


class Held:
    """A set of row numbers that is contiguous but for what is still on its way."""

    def __init__(self, upto: int = 0, ahead: dict[int, int] | None = None) -> None:
        """ahead: first -> last of spans beyond `upto`, without overlaps."""
        self.upto = upto
        self.ahead = dict(ahead or {})

    def has(self, first: int, last: int) -> bool:
        """Whether every number from first to last is held."""
        if last <= self.upto:
            return True
        first = max(first, self.upto + 1)
        return any(start <= first and last <= end for start, end in self.ahead.items())

    def add(self, first: int, last: int) -> None:
        """Hold first to last, joining spans that touch."""
        if last <= self.upto:
            return
        first = max(first, self.upto + 1)
        for start, end in list(self.ahead.items()):
            if start <= last + 1 and first <= end + 1:
                first, last = min(first, start), max(last, end)
                del self.ahead[start]
        if first == self.upto + 1:
            self.upto = last
        else:
            self.ahead[first] = last
