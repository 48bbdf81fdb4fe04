"""Counts what an adapter meets on its way, and says it sparsely: every one counts, few are written."""

from __future__ import annotations

import logging
from collections import Counter

_FIRST = 10


class Faults:
    """`counts` by kind is for metrics; the log gets the first ten of each kind, then each tenth power."""

    def __init__(self, log: logging.Logger, subject: str) -> None:
        """`subject` begins each line, for example "asset 'pump-1'"."""
        self.counts: Counter[str] = Counter()
        self._log = log
        self._subject = subject

    def note(self, kind: str, text: str) -> None:
        """Count one fault of `kind`; `text` says what and where."""
        self.counts[kind] += 1
        count = self.counts[kind]
        if count <= _FIRST or str(count).strip("0") == "1":
            self._log.warning("%s: %s (%s number %d)", self._subject, text, kind, count)
