"""What holds for every test: an error of the test run itself is told once more at the very end."""

from __future__ import annotations

import pytest

LINES_TOLD = 60
_told: list[str] = []


def pytest_internalerror(excrepr: object) -> None:
    _told.append(str(excrepr))


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker's error is followed by one of xdist's own, and a log that was cut shows the last one alone."""
    if _told and not hasattr(config, "workerinput"):
        print("The first internal error, as far as its end:", *_told[0].splitlines()[-LINES_TOLD:], sep="\n")
