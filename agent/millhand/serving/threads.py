"""How many threads one inference gets: measured where the model is loaded. Imported by workers: Python 3.10.

More threads answer one request sooner, and cost CPU time that other requests would have had. So twice the threads must
take at least a fifth off the latency, and all threads together at most a seventh more CPU time than one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from millhand.serving.tensors import Tensors

if TYPE_CHECKING:
    from millhand.hookspecs import Session

AUTO = "auto"
BUDGET_S = 1.0
"""For all trials of one load together, the loads for them included."""
TINY_S = 100e-6
"""Below this, waking a thread costs about what it saves."""
LATENCY_SHARE_CAP = 0.8
CPU_SHARE_CAP = 1.15
IDLE_SHARE_CAP = 0.1
"""A run that computes for less of its time waits for something else: its CPU time is noise, and costs nobody."""
WARMUP_RUNS = 2
RUNS = 10
RUNS_S = 0.1
"""A trial ends after RUNS, or after the first that ends beyond this."""


class Trial(msgspec.Struct, frozen=True):
    """One number of threads; the shortest run, and the mean CPU time of one."""

    threads: int
    run_ms: float
    cpu_ms: float


class Choice(msgspec.Struct, frozen=True):
    """The number of threads that a session has, and what was measured to choose it; no trials where it was told."""

    threads: int
    trials: list[Trial] = []


def choose_threads(
    load: Callable[[int], Session], inputs: Callable[[Session], Tensors], cpus: int
) -> tuple[Session, Choice]:
    """Load with 1, 2, 4 ... threads up to `cpus` as long as that pays; return the best session and what was measured.

    `inputs` makes the request to measure with.

    Raises what `load` and the session's `run` raise; then no session is left open.
    """
    started_s = time.monotonic()
    session = load(1)
    load_s = time.monotonic() - started_s
    threads = 1
    try:
        trials = [_try(session, 1, inputs(session))]
        while trials[0].run_ms >= TINY_S * 1e3 and 2 * threads <= cpus:
            if time.monotonic() - started_s + load_s + trials[-1].run_ms / 1e3 * WARMUP_RUNS > BUDGET_S:
                break
            candidate = load(2 * threads)
            try:
                trials.append(_try(candidate, 2 * threads, inputs(candidate)))
            except BaseException:
                candidate.close()
                raise
            if not _pays(trials[0], trials[-2], trials[-1]):
                candidate.close()
                break
            session.close()
            session, threads = candidate, 2 * threads
    except BaseException:
        session.close()
        raise
    return session, Choice(threads, trials)


def _pays(alone: Trial, before: Trial, trial: Trial) -> bool:
    cheap = trial.cpu_ms <= max(CPU_SHARE_CAP * alone.cpu_ms, IDLE_SHARE_CAP * trial.run_ms)
    return trial.run_ms <= LATENCY_SHARE_CAP * before.run_ms and cheap


def _try(session: Session, threads: int, inputs: Tensors) -> Trial:
    for _ in range(WARMUP_RUNS):
        session.run(inputs)
    begin_s, cpu_s, shortest_s, runs = time.perf_counter(), time.process_time(), float("inf"), 0
    while runs < RUNS and (not runs or time.perf_counter() - begin_s < RUNS_S):
        started_s = time.perf_counter()
        session.run(inputs)
        shortest_s = min(shortest_s, time.perf_counter() - started_s)
        runs += 1
    return Trial(threads, shortest_s * 1e3, (time.process_time() - cpu_s) / runs * 1e3)
