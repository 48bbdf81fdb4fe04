"""The client processes of a load, and the answers that they check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from card import Card, Watch
from figures import percentile
from models import Net, expected

ROWS = 128
WARM_S = 1.0
BEGIN_S = 0.7
"""From handing out a job to its begin: every process must have read it by then."""


@dataclass(frozen=True)
class Run:
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    batch_rows: float
    """Mean over requests of the rows of the batch that they ran in."""
    busy_percent: float | None


@dataclass
class Tallies:
    """What may not happen, over the whole benchmark."""

    answers: int = 0
    wrong: int = 0
    failed: int = 0
    errors: set[str] = field(default_factory=set)


class Clients:
    """The client processes."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("client.py"))]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
            )
            for _ in range(count)
        ]
        self.tallies = Tallies()

    def run(self, card: Card, in_flight: int, seconds: float, sockets: Sequence[str] = (), **job: Any) -> Run:
        """Keep `in_flight` requests going, spread over the processes, and those over the workers' `sockets`."""
        share, used = divmod(in_flight, len(self._processes))
        counts = [share + (number < used) for number in range(len(self._processes))]
        busy = [(process, count) for process, count in zip(self._processes, counts, strict=True) if count]
        times = {"begin_s": time.monotonic() + BEGIN_S, "warm_s": WARM_S, "seconds": seconds}
        for number, (process, count) in enumerate(busy):
            assert process.stdin is not None
            wanted = {**job, **times, "in_flight": count, "offset": number * ROWS // len(busy)}
            if sockets:
                wanted["socket"] = sockets[number % len(sockets)]
            process.stdin.write(json.dumps(wanted) + "\n")
            process.stdin.flush()
        with Watch(card) as watch:
            found = [self._read(process) for process, _ in busy]
        latencies = [value for tally in found for value in tally["latencies_ms"]]
        if not latencies:
            raise SystemExit(f"{job['model']}: no answer at all: {self.tallies.errors}")
        rows = sum(tally["batch_rows"] for tally in found) / len(latencies)
        p50, p99 = percentile(latencies, 50), percentile(latencies, 99)
        return Run(len(latencies) / seconds, p50 or 0.0, p99 or 0.0, rows, watch.mean_percent)

    def _read(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a client process ended with {process.wait()}")
        tally: dict[str, Any] = json.loads(line)
        self.tallies.answers += len(tally["latencies_ms"])
        self.tallies.wrong += tally["wrong"]
        self.tallies.failed += tally["failed"]
        if tally["error"]:
            self.tallies.errors.add(tally["error"])
        return tally

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(10)


def write_answers(folder: Path, net: Net, artifact: bytes) -> None:
    """Rows and the CPU's answers, which must be far enough apart that a mix-up of two requests would be seen."""
    rows = net.rows(ROWS)
    answers = expected(artifact, rows)
    apart = np.abs(answers[:, None] - answers[None]).max(axis=2) + np.eye(ROWS) * 1e9
    if apart.min() < 5e-3 * np.abs(answers).max():
        raise SystemExit(f"{net.name}: two answers are only {apart.min():g} apart, which hides a mix-up")
    folder.mkdir(parents=True)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "answers.npy", answers)
