"""One build at the lowest priority, no longer than the agent lives: `python -m millhand.workshop.background '<JSON>'`.

It chooses as any build does; the agent itself takes the choice into use. A failure is one JSON line on standard error:
`message` and `hint`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

import msgspec

from millhand.errors import MillhandError, ModelError
from millhand.workshop.listener import Silence
from millhand.workshop.report import BuildReport, read_report

NICE_LAST = 19
PR_SET_PDEATHSIG = 1


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON."""

    agent: int
    """The agent's process."""
    config: str = ""
    """The file that the agent was started with; empty for none."""
    model: str
    version: int
    target: str
    recipe: str


def carry_out(task: Task) -> BuildReport:
    """Build. Raises MillhandError, for a candidate that failed too."""
    from millhand.config import load_config
    from millhand.workshop.boards import target_named
    from millhand.workshop.build import Order, build
    from millhand.workshop.site import open_site

    site = open_site(load_config(Path(task.config) if task.config else None))
    last = _last_build(site.shelf.place(task.model, task.version, task.target), task.model)
    order = Order(
        model=task.model,
        target=target_named(task.target, site.targets, site.profiles),
        version=task.version,
        only=(task.recipe,),
        data=Path(last.data_path) if last and last.data_path else None,
        typical_batch=last.typical_batch if last else 1,  # at the agent's start no traffic has been counted
    )
    report = build(site, order, Silence())
    for outcome in report.outcomes:
        if outcome.name == task.recipe and outcome.state in ("failed", "not tried"):
            raise ModelError(outcome.why, hint=f"millhand model build {task.model}")
    return report


def _last_build(place: Path, model: str) -> BuildReport | None:
    """Which says what the owner's build went by: rows, and the batch of traffic."""
    with contextlib.suppress(ModelError):
        return read_report(place, model)
    return None


def main() -> None:
    """Entry point of the process. What it starts inherits the priority."""
    import psutil

    task = msgspec.json.decode(sys.argv[1], type=Task)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != task.agent:
        sys.exit("the agent is gone")
    os.nice(NICE_LAST)
    with contextlib.suppress(OSError, psutil.Error):  # some containers forbid it
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        carry_out(task)
    except MillhandError as error:
        sys.exit(msgspec.json.encode({"message": error.message, "hint": error.hint}).decode())


if __name__ == "__main__":
    main()
