"""What became of the choices among what was made of models, as the daemon's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from millhand.metrics import DAEMON, Counter, Gauge

if TYPE_CHECKING:
    from millhand.serving.candidates import Candidates
    from millhand.serving.served import Served

SERVES = Gauge(
    DAEMON,
    "millhand_candidate_serves",
    "1 for a candidate that was chosen and serves, 0 for one that does not.",
    ["model", "version", "target", "candidate"],
)
REBUILDS = Counter(
    DAEMON, "millhand_rebuilds_total", "Stale candidates made anew, by outcome: built or failed.", ["model", "outcome"]
)
REBUILD_STATE = Gauge(
    DAEMON, "millhand_rebuilds", "Stale candidates that wait, build, are done or were given up (failed).", ["state"]
)


def export_candidates(models: Iterable[Served], candidates: Candidates) -> None:
    """Set the families above."""
    for family in (SERVES, REBUILDS, REBUILD_STATE):
        family.clear()
    for served in models:
        for one in candidates.standings(served.name):
            if one.candidate and one.model == served.name and one.version in served.wanted:
                labels = {"model": one.model, "version": one.version, "target": one.target}
                SERVES.set(int(not one.reason), candidate=one.candidate, **labels)
    rebuilder = candidates.rebuilder
    if rebuilder is not None:
        for (model, outcome), count in rebuilder.counts.items():
            REBUILDS.set_total(count, model=model, outcome=outcome)
        for state, count in rebuilder.states().items():
            REBUILD_STATE.set(count, state=state)
