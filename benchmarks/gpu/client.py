"""One process of the load: keeps a number of requests in flight, over the worker protocol or over HTTP.

Reads jobs as JSON lines on stdin and answers each with a JSON line; benchmarks/gpu/serving.py starts several. All of
them begin at the same moment of CLOCK_MONOTONIC, and what ends before `warm_s` have passed does not count.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from load import Load
from numpy.typing import NDArray
from wire import WrongAnswer, read_answer, request

from millhand.errors import MillhandError
from millhand.serving.client import WorkerClient

TOLERANCE = 1e-3
"""Largest difference from the CPU's answer, as a share of the largest value of all answers."""
SLOT_BYTES = 1 << 20


@dataclass(frozen=True)
class Job:
    """What to send and where: `socket` is a worker's, `http` an address; one of them is empty."""

    model: str
    folder: str
    """Holds rows.npy [n, ...] and answers.npy [n, classes]."""
    in_flight: int
    begin_s: float
    warm_s: float
    seconds: float
    offset: int
    socket: str = ""
    http: tuple[str, int] | None = None
    input: str = "input"
    output: str = "logits"
    rows: int = 1
    """Of one request."""


@dataclass
class Tally:
    """What one process saw."""

    latencies_ms: list[float]
    wrong: int = 0
    failed: int = 0
    batch_rows: int = 0
    error: str = ""


class Answers:
    """The rows to send and what they must give."""

    def __init__(self, folder: Path) -> None:
        self.rows: NDArray[np.float32] = np.load(folder / "rows.npy")
        self._answers: NDArray[np.float32] = np.load(folder / "answers.npy")
        self._limit = TOLERANCE * float(np.abs(self._answers).max())

    def right(self, index: int, found: NDArray[np.float32], count: int = 1) -> bool:
        """Whether `found` answers the `count` rows from `index` on."""
        expected = self._answers[index : index + count].ravel()
        return found.size == expected.size and float(np.abs(found.ravel() - expected).max()) <= self._limit


async def over_socket(job: Job, answers: Answers) -> Tally:
    tally = Tally([])
    client = await WorkerClient.connect(Path(job.socket), "bench", max(job.in_flight, 1), SLOT_BYTES)
    first, end = job.begin_s + job.warm_s, job.begin_s + job.warm_s + job.seconds

    async def ask(index: int) -> None:
        while (sent := time.monotonic()) < end:
            index = (index + job.in_flight) % (len(answers.rows) - job.rows + 1)
            try:
                answer = await client.infer(job.model, {job.input: answers.rows[index : index + job.rows]})
            except MillhandError as error:
                tally.failed += 1
                tally.error = error.message
                await asyncio.sleep(0.01)
                continue
            tally.wrong += not answers.right(index, answer.outputs[job.output], job.rows)
            if first <= (done := time.monotonic()) <= end:
                tally.latencies_ms.append((done - sent) * 1e3)
                tally.batch_rows += answer.rows

    await asyncio.sleep(max(0.0, job.begin_s - time.monotonic()))
    await asyncio.gather(*(ask(job.offset + number) for number in range(job.in_flight)))
    client.close()
    return tally


def over_http(job: Job, answers: Answers) -> Tally:
    assert job.http is not None
    asked = [
        request("binary", job.model, answers.rows[first : first + job.rows], given=job.input, output=job.output)
        for first in range(len(answers.rows) - job.rows + 1)
    ]

    def check(index: int, headers: Any, body: bytes) -> bool:
        try:
            return answers.right(index, read_answer(asked[index], headers, body)[1], job.rows)
        except WrongAnswer:
            return False

    load = Load(tuple(job.http), [one.http1(job.http[0]) for one in asked], check, job.in_flight)
    time.sleep(max(0.0, job.begin_s - time.monotonic()))
    load.closed(job.warm_s)
    result = load.closed(job.seconds)
    failed = result.requests - result.right - result.wrong
    return Tally(list(result.latencies_ms), result.wrong, failed, 0, str(dict(result.statuses)) if failed else "")


def main() -> None:
    for line in sys.stdin:
        job = Job(**json.loads(line))
        answers = Answers(Path(job.folder))
        tally = asyncio.run(over_socket(job, answers)) if job.socket else over_http(job, answers)
        print(json.dumps(vars(tally)), flush=True)


if __name__ == "__main__":
    main()
