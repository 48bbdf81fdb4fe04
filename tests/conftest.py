"""What holds for every test: its report survives a fault of Python 3.11; an error of the run is told at its end."""

from __future__ import annotations

from collections.abc import Generator

import pluggy
import pytest

LINES_TOLD = 60
_told: list[str] = []


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a failure's report again where two threads parsed at once (python/cpython#106905), which ended the run."""
    try:
        return (yield)
    except (SystemError, pluggy.PluggyTeardownRaisedWarning):
        return pytest.TestReport.from_item_and_call(item, call)


def pytest_internalerror(excrepr: object) -> None:
    _told.append(str(excrepr))


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker's error is followed by one of xdist's own, and a log that was cut shows the last one alone."""
    if _told and not hasattr(config, "workerinput"):
        print("The first internal error, as far as its end:", *_told[0].splitlines()[-LINES_TOLD:], sep="\n")
