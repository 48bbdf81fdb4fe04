"""Whoever is told of a build as it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from millhand.workshop.report import Outcome


class Listener(Protocol):
    """Whoever shows a build as it goes on."""

    def planned(self, names: Sequence[str]) -> None:
        """What is tried, in order."""

    def progress(self, name: str, share: float, step: str) -> None:
        """How far one of them is, 0 to 1; before the plan `name` is the model's."""

    def outcome(self, outcome: Outcome) -> None:
        """What became of one."""


class Silence:
    """`Listener` that shows nothing: for programs, which read the report, and for builds that nobody looks at."""

    def planned(self, names: Sequence[str]) -> None:
        return

    def progress(self, name: str, share: float, step: str) -> None:
        return

    def outcome(self, outcome: Outcome) -> None:
        return
