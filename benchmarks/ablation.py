"""What each part of the serving path buys: the same load on the same server with one part off in turn.

Called by `python benchmarks/serving.py --ablation`; all variants run side by side, each round measures every one. The
variant `as shipped` is the default configuration.
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


@dataclass(frozen=True)
class Variant:
    """`part` is what is off; `tables` is how the configuration says so."""

    part: str
    tables: servers.Tables = field(default_factory=dict)
    max_batch: int = 0


VARIANTS = (
    Variant(BASE),
    Variant("batcher", max_batch=1),
    Variant("two threads", {"models": {"threads": 2}}),
    Variant("pinned", {"models": {"cpus": [0]}}),
)


def run(rounds: int, seconds: float) -> int:
    """Measure every variant; returns 0."""
    forms = [("json", 8), ("binary", 8), ("binary", 1)]
    cnn = models.cnn()
    with tempfile.TemporaryDirectory(prefix="mhb-") as folder, ExitStack() as stack:
        running: dict[str, servers.Server] = {}
        for number, variant in enumerate(VARIANTS):
            repository = Path(folder) / str(number)
            models.write_model(repository, models.CNN, cnn, max_batch=variant.max_batch)
            server = servers.Millhand(repository, variant.tables, variant.part)
            running[variant.part] = stack.enter_context(server)
        bench = Bench(running, rounds, seconds)
        bench.measure([Case(name, form, c) for form, c in forms for name in running], models.CNN, cnn)
    table = bench.table()
    print_table(table)
    figures = []
    for form, connections in forms:
        base = Case(BASE, form, connections)
        for variant in VARIANTS[1:]:
            value = bench.paired(
                base,
                Case(variant.part, form, connections),
                lambda run, other: run.requests_per_s / other.requests_per_s,
            )
            name = f"{form} c={connections}, as shipped to: {variant.part}"
            figures.append(Figure(name, None if value is None else round(value, 2), "x"))
    return report("serving_ablation", figures, table=table, left_out=bench.left_out)
