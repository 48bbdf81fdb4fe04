"""Minutes of load on a server whose worker is killed and whose model is replaced again and again.

    python benchmarks/soak_serving.py [--minutes 10] [--kill-every-s 20] [--reload-every-s 30]

First the peak is measured; then requests come at 80 % of it, JSON and binary in turn, and a few callers speak gRPC
beside them. Versions have two sets of weights
in turn, and every answer is compared with the right one of the version that says it answered. Counted: wrong answers,
requests without an answer past their deadline, failures without a retriable error, growth of memory and descriptors,
and what is left on the machine when the agent has stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, parser, progress, report
from load import Load, Result
from load_grpc import GrpcCallers
from models import CNN, cnn, expected, write_model, write_version
from processes import Process, holders
from servers import Millhand
from wire import Array, Headers, Request, WrongAnswer, is_right, read_answer, request, verify

from millhand.errors import MillhandError

PEAK_S = 5.0
SHARE = 0.8
CONNECTIONS = 16
ROWS = 16
DEADLINE_MS = 1000
GRACE_S = 1.0
GRPC_CALLERS = 2
RETRIABLE = (503, 504)
SAMPLE_S = 2.0
WINDOW = 0.1
"""Memory is compared between the second and the last tenth of the time: medians over kills and reloads."""
KILL_SHADOW_S = 3.0
RELOAD_LIMIT_S = 30.0
CHECKED_CAP = 20_000
TABLES = {"models": {"deaths_cap": 1000, "deaths_period_s": 1, "restart_delay_cap_ms": 1000}}
"""The kills are not the model's fault: it must neither be taken back for them nor wait long for its restart."""


class Judge:
    """Knows the right answer of every request for each version."""

    def __init__(self, requests: list[Request], rights: tuple[Array, Array]) -> None:
        """`rights`: [rows, classes] of even and of odd versions; `requests` take the rows in turn."""
        self._requests = requests
        self._rights = rights
        self._checked: set[tuple[int, bytes]] = set()
        self.versions: set[str] = set()
        """Those that answered."""

    def __call__(self, index: int, headers: Headers, body: bytes) -> bool:
        if (index, body) in self._checked:
            return True
        try:
            version, found = read_answer(self._requests[index], headers, body)
            right = is_right(found, self._rights[int(version) % 2][index % ROWS])
        except (WrongAnswer, ValueError):
            return False
        if right:
            self.versions.add(version)
            if len(self._checked) > CHECKED_CAP:
                self._checked.clear()
            self._checked.add((index, body))
        return right


class Periodic(threading.Thread):
    """Calls something every so many seconds until `stop`; a failure is kept in `error`."""

    def __init__(self, every_s: float, action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._every_s = every_s
        self._action = action
        self._ended = threading.Event()
        self.error = ""

    def run(self) -> None:
        due = time.monotonic() + self._every_s
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            due += self._every_s
            try:
                self._action()
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"

    def stop(self) -> None:
        self._ended.set()
        self.join()


class Trouble:
    """What is done to the server: kills of its worker, reloads of its model."""

    def __init__(self, server: Millhand, folder: Path, artifacts: tuple[bytes, bytes]) -> None:
        self._server = server
        self._folder = folder
        self._artifacts = artifacts
        self._version = 1
        self.kills_s: list[float] = []
        self.reloads = 0
        self.reloads_again = 0
        """Loads that a kill broke, and that were asked for again."""

    def kill(self) -> None:
        pid = None
        while pid is None:
            (worker,) = self._server.agent.call("model.stats")["workers"]
            pid = worker["pid"]
        os.kill(pid, signal.SIGKILL)
        self.kills_s.append(time.monotonic())

    def reload(self) -> None:
        self._version += 1
        write_version(self._folder, self._version, self._artifacts[self._version % 2])
        end = time.monotonic() + RELOAD_LIMIT_S
        while True:
            try:
                self._server.agent.call("model.load", model="cnn")
                break
            except MillhandError:
                if time.monotonic() > end:
                    raise
                self.reloads_again += 1
                time.sleep(0.1)
        self.reloads += 1
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder / str(self._version - 2))


@dataclass(frozen=True)
class Sample:
    at_s: float
    processes: list[Process]

    @property
    def rss_bytes(self) -> int:
        return sum(process.rss_bytes for process in self.processes)

    @property
    def memfds(self) -> int:
        return len(frozenset[str]().union(*(process.memfds for process in self.processes)))

    @property
    def sockets(self) -> int:
        return sum(process.sockets for process in self.processes)


class Watch:
    """Samples the server's processes; only moments with as many as at the start count."""

    def __init__(self, server: Millhand) -> None:
        self._family = server.family
        self.whole = len(self._family.processes())
        self.samples: list[Sample] = []
        self.memfds: set[str] = set()

    def sample(self) -> None:
        now, processes = time.monotonic(), self._family.processes()
        for process in processes:
            self.memfds |= process.memfds
        if len(processes) == self.whole:
            self.samples.append(Sample(now, processes))

    def medians(self, begin_s: float, end_s: float, value: Callable[[Sample], float]) -> tuple[float, float]:
        """The median in the second and in the last tenth."""
        length = (end_s - begin_s) * WINDOW
        spans = ((begin_s + length, begin_s + 2 * length), (end_s - length, end_s))
        found = [[value(one) for one in self.samples if low <= one.at_s <= high] for low, high in spans]
        return statistics.median(found[0] or [0.0]), statistics.median(found[1] or [0.0])


def left_over(server: Millhand, memfds: set[str]) -> dict[str, list[str]]:
    """What is still there of a server that has stopped: processes, memory files, sockets."""
    end = time.monotonic() + GRACE_S
    while server.family.processes() and time.monotonic() < end:
        time.sleep(0.05)
    folder = str(server.agent.folder)
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if folder in line]
    sockets += [str(path) for path in server.agent.folder.rglob("*.sock")]
    assert server.http is not None
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and int(words[1].partition(":")[2], 16) == server.http[1]:
            sockets.append(f"port {server.http[1]} is listened on")
    return {
        "processes": [f"pid {process.pid}, {process.role}" for process in server.family.processes()],
        "memfds": holders(memfds),
        "sockets": sockets,
    }


def requests_of(server: Millhand, rows: Array, rights: Array) -> list[Request]:
    """Every row in every protocol that the server takes; each form is proved once."""
    assert server.http is not None
    found: list[Request] = []
    for protocol in ("json", "binary"):
        made = [request(protocol, "cnn", row[np.newaxis], parameters={"deadline_ms": DEADLINE_MS}) for row in rows]
        try:
            verify(server.http, made[0], rights[:1])
        except WrongAnswer as error:
            progress(f"left out: {protocol}: {error}")
            continue
        found += made
    return found


def grpc_callers(server: Millhand, rows: Array, rights: tuple[Array, Array]) -> GrpcCallers | None:
    """None where the server does not speak gRPC."""
    if server.grpc is None:
        return None
    requests = [request("grpc", "cnn", row[np.newaxis]) for row in rows]
    verify(server.grpc, requests[0], rights[1][:1])
    return GrpcCallers(server.grpc, requests, Judge(requests, rights), GRPC_CALLERS, DEADLINE_MS / 1e3)


def soak(server: Millhand, folder: Path, minutes: float, kill_every_s: float, reload_every_s: float) -> int:
    artifacts = (cnn(1), cnn(0))  # of even and of odd versions
    rows = CNN.rows(ROWS)
    rights = (expected(artifacts[0], rows), expected(artifacts[1], rows))
    _check_distinct(np.concatenate(rights))
    with server:
        assert server.http is not None
        requests = requests_of(server, rows, rights[1])
        judge = Judge(requests, rights)
        texts = [one.http1(server.http[0]) for one in requests]
        load = Load(server.http, texts, judge, CONNECTIONS, DEADLINE_MS / 1e3 + GRACE_S)
        load.closed(PEAK_S / 2)
        peak = load.closed(PEAK_S)
        rate = SHARE * peak.requests_per_s
        progress(f"peak {peak.requests_per_s:.0f}/s; {minutes:g} minutes at {rate:.0f}/s")
        trouble, watch = Trouble(server, folder, artifacts), Watch(server)
        threads = [
            Periodic(kill_every_s, trouble.kill),
            Periodic(reload_every_s, trouble.reload),
            Periodic(min(SAMPLE_S, minutes), watch.sample),
        ]
        for thread in threads:
            thread.start()
        callers = grpc_callers(server, rows, rights)
        begin_s = time.monotonic()
        if callers is not None:
            callers.start()
        results = {"http": load.open(60 * minutes, rate)}
        if callers is not None:
            results["grpc"] = callers.stop()
        end_s = time.monotonic()
        for thread in threads:
            thread.stop()
        watch.sample()
        server.agent.end(signal.SIGTERM)
        left = left_over(server, watch.memfds)
    errors = [thread.error for thread in threads if thread.error]
    figures = _figures(results, rate, trouble, left, errors)
    grown, rss = _growth(watch, begin_s, end_s)
    return report(
        "soak_serving",
        figures + grown,
        load={name: result.to_dict() for name, result in results.items()},
        peak=peak.to_dict(),
        protocols=sorted({one.protocol for one in requests} | {"grpc"} & results.keys()),
        rate_per_s=round(rate, 1),
        minutes=minutes,
        reloads_again=trouble.reloads_again,
        versions_answering=sorted(judge.versions, key=int),
        rss_mb=rss,
        left_over=left,
        errors=errors,
    )


def _check_distinct(rights: Array) -> None:
    """No two right answers may pass for each other, or a mix-up would go unseen."""
    for index, right in enumerate(rights):
        if any(is_right(other, right) for other in rights[index + 1 :]):
            raise SystemExit("two rows of the load have answers that cannot be told apart")


def _figures(
    results: dict[str, Result], rate: float, trouble: Trouble, left: dict[str, list[str]], errors: list[str]
) -> list[Figure]:
    requests = sum(result.requests for result in results.values())
    failed = requests - sum(result.statuses[200] for result in results.values())
    hung = sum(result.hung for result in results.values())
    retriable = sum(result.statuses[status] for result in results.values() for status in RETRIABLE)
    right = sum(result.right for result in results.values())
    failures = [at for result in results.values() for at in result.failures_s]
    after = [[at - kill for at in failures if 0 <= at - kill <= KILL_SHADOW_S] for kill in trouble.kills_s]
    p50, p99 = results["http"].percentile_ms(50), results["http"].percentile_ms(99)
    return [
        Figure("requests", requests, ""),
        Figure("rate asked for, 80 % of the peak", round(rate, 1), "1/s"),
        Figure("workers killed", len(trouble.kills_s), ""),
        Figure("reloads", trouble.reloads, ""),
        Figure("kills and reloads that went wrong", len(errors), "", "== 0"),
        Figure("wrong answers", sum(result.wrong for result in results.values()), "", "== 0"),
        Figure("hangs past the deadline", hung, "", "== 0"),
        Figure("failed requests without a retriable error", failed - retriable - hung, "", "== 0"),
        Figure("failed requests, all", failed, ""),
        Figure(f"failed more than {KILL_SHADOW_S:g} s after a kill", len(failures) - sum(map(len, after)), ""),
        Figure("failures last after a kill, median", _median([max(times, default=0.0) for times in after]), "s"),
        Figure("sent late, all connections taken", results["http"].late, ""),
        Figure("answered right", round(100 * right / max(1, requests), 3), "%"),
        Figure("p50", None if p50 is None else round(p50, 2), "ms"),
        Figure("p99", None if p99 is None else round(p99, 2), "ms"),
        *(Figure(f"{what} left over", len(found), "", "== 0") for what, found in left.items()),
    ]


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def _growth(watch: Watch, begin_s: float, end_s: float) -> tuple[list[Figure], dict[str, Any]]:
    first, last = watch.medians(begin_s, end_s, lambda sample: sample.rss_bytes)
    memfds = watch.medians(begin_s, end_s, lambda sample: sample.memfds)
    sockets = watch.medians(begin_s, end_s, lambda sample: sample.sockets)
    rss = {
        role: [
            round(value / 1e6, 2)
            for value in watch.medians(
                begin_s,
                end_s,
                lambda sample, role=role: sum(one.rss_bytes for one in sample.processes if one.role == role),
            )
        ]
        for role in ("daemon", "front", "worker")
    }
    figures = [
        Figure("RSS of all processes at first", round(first / 1e6, 1), "MB"),
        Figure("growth of RSS", round(100 * (last / first - 1), 2) if first and last else None, "%", "<= 2"),
        Figure("memory files more than at first", round(memfds[1] - memfds[0]), "", "<= 0"),
        Figure("sockets more than at first", round(sockets[1] - sockets[0]), "", "<= 0"),
    ]
    return figures, rss


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--kill-every-s", type=float, default=20.0)
    options.add_argument("--reload-every-s", type=float, default=30.0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="mhb-") as repository:
        folder = write_model(Path(repository), CNN, cnn(0))
        server = Millhand(Path(repository), TABLES)
        return soak(server, folder, chosen.minutes, chosen.kill_every_s, chosen.reload_every_s)


if __name__ == "__main__":
    sys.exit(main())
