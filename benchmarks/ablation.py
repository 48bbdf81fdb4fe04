"""What each part of the serving path buys: the same load on the same server with one part changed in turn.

Called by `python benchmarks/serving.py --ablation`; all variants run side by side, each round measures every one. The
variant `as shipped` is the default configuration. What a default chooses by itself differs between machines, so one of
`one ...` and `two ...` is mostly the default again, and shows the noise.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import models
import servers
from figures import Figure, report
from serving import Bench, Case, print_table

BASE = "as shipped"
FORMS = (("json", 8), ("binary", 8), ("binary", 1))


@dataclass(frozen=True)
class Variant:
    """`part` is what is changed; `tables` is how the configuration says so."""

    part: str
    tables: servers.Tables = field(default_factory=dict)
    max_batch: int = 0


VARIANTS = (
    Variant(BASE),
    Variant("one accept process", {"http": {"processes": 1}}),
    Variant("two accept processes", {"http": {"processes": 2}}),
    Variant("no batcher", max_batch=1),
    Variant("one runner", {"models": {"runners": 1}}),
    Variant("two runners", {"models": {"runners": 2}}),
    Variant("one thread", {"models": {"threads": 1}}),
    Variant("two threads", {"models": {"threads": 2}}),
    Variant("no busy polling", {"http": {"busy_poll_us": 0}}),
    Variant("pinned", {"models": {"cpus": [0]}}),
)
FRONTS = ("uvicorn", "granian")
"""HTTP servers that stand before the workers of `as shipped` in place of the built-in one."""


def run(rounds: int, seconds: float, peers_dir: Path) -> int:
    """Measure every variant; returns 0. `peers_dir` holds the venv of the other HTTP servers."""
    versions = servers.prepare(peers_dir, ["bare"])
    cnn = models.cnn()
    with tempfile.TemporaryDirectory(prefix="mhb-") as folder, ExitStack() as stack:
        running: dict[str, servers.Server] = {}
        for number, variant in enumerate(VARIANTS):
            repository = Path(folder) / str(number)
            models.write_model(repository, models.CNN, cnn, max_batch=variant.max_batch)
            server = stack.enter_context(servers.Millhand(repository, variant.tables, variant.part))
            running[variant.part] = server
            if variant.part == BASE:
                fronts = [servers.Front(name, server, peers_dir) for name in FRONTS]
                running.update({front.name: stack.enter_context(front) for front in fronts})
        decided = {name: one.chosen("cnn") for name, one in running.items() if isinstance(one, servers.Millhand)}
        bench = Bench(running, rounds, seconds)
        bench.measure([Case(name, form, c) for form, c in FORMS for name in running], models.CNN, cnn)
    table = bench.table()
    print_table(table)
    figures = [
        Figure(f"{form} c={connections}, {name}: requests/s to {BASE}", _share(bench, name, form, connections), "x")
        for form, connections in FORMS
        for name in running
        if name != BASE
    ]
    return report(
        "serving_ablation", figures, table=table, left_out=bench.left_out, decided=decided, peer_versions=versions
    )


def _share(bench: Bench, name: str, form: str, connections: int) -> float | None:
    shipped, changed = Case(BASE, form, connections), Case(name, form, connections)
    share = bench.paired(changed, shipped, lambda run, base: run.requests_per_s / base.requests_per_s)
    return None if share is None else round(share, 2)
