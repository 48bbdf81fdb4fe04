"""The inference server beside its peers: requests/s, latency and CPU time a request, JSON, binary and gRPC.

    python benchmarks/serving.py [--peers] [--quick] [--only json binary grpc batching] [--ablation]

Paired runs: in every round each server runs once in each form, one after the other on the same cores as the load; a
ratio is the median of the rounds' ratios. Before each form's first run, its answer is compared with the model's.
`front`, `worker` and `daemon` are millhand's processes; CPU time a request says what is saved even where the machine is
busy. `raw` is ONNX Runtime in process. The peers' code is in benchmarks/peers/. The load comes from wrk and, for gRPC,
h2load (Debian: wrk, nghttp2-client); without wrk from load.py, without h2load gRPC is left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import servers
from drive import LoadFailed, drive, generators
from figures import Figure, parser, progress, report
from wire import Request, WrongAnswer, request, verify

PROTOCOLS = ("json", "binary", "grpc")
NAMES = (*PROTOCOLS, "batching")
ROUNDS, SECONDS = 5, 5.0
QUICK_ROUNDS, QUICK_SECONDS = 3, 1.0
ABLATION_SECONDS = 3.0
THREADED = "bare, threads"
PEERS_OF = {
    "json": ("bare", THREADED, "mlserver", "pytriton"),
    "binary": ("bare", THREADED, "pytriton"),
    "grpc": ("pytriton",),
}
LABELS = {"json": "JSON", "binary": "binary", "grpc": "gRPC"}


@dataclass(frozen=True)
class Case:
    """One server under one load."""

    server: str
    protocol: str
    """What it is compared under: json, binary or grpc; `raw` for the session in process."""
    connections: int
    model: str = "cnn"

    @property
    def form(self) -> str:
        """What is sent: the bare endpoints take a binary request as nothing but its tensor."""
        return "bytes" if self.protocol == "binary" and self.server.startswith("bare") else self.protocol


RAW = Case("raw", "raw", 1)
BATCHED = Case("millhand", "json", 32, "mlp")
UNBATCHED = Case("millhand", "json", 32, "mlp-single")


@dataclass(frozen=True)
class Run:
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]
    """CPU microseconds a request by role."""


class Bench:
    """Runs cases in rounds and keeps what each run gave."""

    def __init__(self, running: dict[str, servers.Server], rounds: int, seconds: float) -> None:
        self._running = running
        self._rounds = rounds
        self._seconds = seconds
        self._asked: dict[Case, tuple[servers.Address, Request, int]] = {}
        self.runs: dict[Case, list[Run]] = {}
        self.left_out: list[str] = []

    def measure(self, cases: Sequence[Case], net: models.Net, artifact: bytes) -> None:
        row = net.rows(1)
        answer = models.expected(artifact, row)
        ready = [case for case in cases if self._prepare(case, row, answer)]
        for number in range(self._rounds):
            progress(f"round {number + 1} of {self._rounds}, {net.name}")
            turn = number % max(1, len(ready))
            for case in (*ready[turn:], *ready[:turn]):  # nobody always runs after the same neighbour
                self.runs.setdefault(case, []).append(self._run(case))

    def _prepare(self, case: Case, row: Any, answer: Any) -> bool:
        if case.server == "raw":
            return True
        path = "/bytes" if case.form == "bytes" else ""
        asked = request(case.form, case.model, row, path=path)
        address = self._running[case.server].address(case.form)
        try:
            if address is None:
                raise LoadFailed("it does not listen for it")
            size = verify(address, asked, answer)
            drive(address, asked, case.connections, 1.0, size)
        except (LoadFailed, WrongAnswer, OSError) as error:
            self.left_out.append(f"{case.server} {case.form} c={case.connections}: {str(error)[:300]}")
            progress(f"left out: {self.left_out[-1]}")
            return False
        self._asked[case] = (address, asked, size)
        return True

    def _run(self, case: Case) -> Run:
        if case.server == "raw":
            return _run_raw(Path(os.environ["MODEL_FILE"]), self._seconds)
        address, asked, size = self._asked[case]
        server = self._running[case.server]
        before = server.cpu_s()
        done = drive(address, asked, case.connections, self._seconds, size)
        after = server.cpu_s()
        spent = {role: (seconds - before.get(role, 0.0)) / done.requests * 1e6 for role, seconds in after.items()}
        return Run(done.requests_per_s, done.p50_ms, done.p99_ms, spent)

    # ---- what the runs say ------------------------------------------------------------------------------------------

    def median(self, case: Case, value: Callable[[Run], float]) -> float | None:
        runs = self.runs.get(case)
        return statistics.median(value(run) for run in runs) if runs else None

    def paired(self, case: Case, other: Case, compare: Callable[[Run, Run], float]) -> float | None:
        """The median over the rounds of a comparison; None where one of the two did not run."""
        if case not in self.runs or other not in self.runs:
            return None
        return statistics.median(map(compare, self.runs[case], self.runs[other]))

    def table(self) -> list[dict[str, Any]]:
        rows = []
        for case, runs in self.runs.items():
            roles = runs[0].cpu_us
            rows.append({
                "server": case.server,
                "protocol": case.form,
                "model": case.model,
                "connections": case.connections,
                "requests_per_s": _rounded(self.median(case, lambda run: run.requests_per_s), 1),
                "p50_ms": _rounded(self.median(case, lambda run: run.p50_ms), 3),
                "p99_ms": _rounded(self.median(case, lambda run: run.p99_ms), 3),
                "cpu_us_per_request": {
                    role: _rounded(self.median(case, lambda run, role=role: run.cpu_us.get(role, 0.0)), 1)
                    for role in roles
                },
                "runs_requests_per_s": [round(run.requests_per_s, 1) for run in runs],
            })  # fmt: skip
        return rows


def _run_raw(model: Path, seconds: float) -> Run:
    done = subprocess.run(
        [sys.executable, servers.PEERS / "raw.py", model, str(seconds)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **servers.ONE_THREAD},
    )
    found = json.loads(done.stdout)
    count = found["requests"]
    return Run(count / found["seconds"], found["p50_ms"], found["p99_ms"], {"server": found["cpu_s"] / count * 1e6})


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'server':<22}{'protocol':<10}{'c':>4}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}   CPU us a request")
    for row in rows:
        name = row["server"] if row["model"] == "cnn" else f"{row['server']}, {row['model']}"
        spent = ", ".join(f"{role} {value:.0f}" for role, value in row["cpu_us_per_request"].items())
        print(
            f"{name:<22}{row['protocol']:<10}{row['connections']:>4}{row['requests_per_s']:>9.0f}"
            f"{row['p50_ms']:>9.3f}{row['p99_ms']:>9.3f}   {spent}"
        )


# ---- the figures -----------------------------------------------------------------------------------------------------


def cases(wanted: Sequence[str], peers: bool) -> list[Case]:
    """Every form of the CNN that is wanted; those that are compared stand side by side."""
    found = [
        Case(server, protocol, connections)
        for protocol in PROTOCOLS
        for connections in (1, 8)
        for server in ("millhand", *(PEERS_OF[protocol] if peers else ()))
        if protocol in wanted
    ]
    return [*found, RAW] if "binary" in wanted else found


def figures(bench: Bench, wanted: Sequence[str], peers: bool) -> list[Figure]:
    """The rows with a goal are what serving must reach; the others are there to understand them."""

    def times(name: str, case: Case, other: Case, goal: str = "") -> Figure:
        value = bench.paired(case, other, lambda run, peer: run.requests_per_s / peer.requests_per_s)
        return Figure(name, _rounded(value, 2), "x", goal, other.server)

    def times_at_8(protocol: str, peer: str, whose: str, goal: str = "") -> Figure:
        name = f"{LABELS[protocol]} c=8, requests/s to {whose}"
        return times(name, Case("millhand", protocol, 8), Case(peer, protocol, 8), goal)

    found: list[Figure] = []
    if "json" in wanted and peers:
        found += [
            times_at_8("json", "mlserver", "MLServer's", ">= 2"),
            times_at_8("json", "bare", "the bare endpoint's", ">= 1.2"),
            times_at_8("json", THREADED, "the bare endpoint's with threads"),
        ]
    if "binary" in wanted and peers:
        found += [
            times_at_8("binary", "bare", "the bare endpoint's", ">= 1.5"),
            times_at_8("binary", THREADED, "the bare endpoint's with threads"),
        ]
    if "binary" in wanted:
        above = bench.paired(Case("millhand", "binary", 1), RAW, lambda run, raw: run.p50_ms - raw.p50_ms)
        found.append(Figure("binary c=1, p50 above the raw session's", _rounded(above, 3), "ms", "<= 0.2", "raw"))
    if "grpc" in wanted and peers:
        found.append(times_at_8("grpc", "pytriton", "PyTriton's", ">= 2"))
    for protocol in PROTOCOLS:
        if protocol in wanted:
            spread = bench.median(Case("millhand", protocol, 8), lambda run: run.p99_ms / run.p50_ms)
            found.append(Figure(f"{LABELS[protocol]} c=8, p99 to p50", _rounded(spread, 2), "x", "<= 3"))
    if "batching" in wanted:
        found.append(times("batching c=32, requests/s to max_batch 1", BATCHED, UNBATCHED, ">= 1.35"))
    for protocol in PROTOCOLS:
        if protocol in wanted:
            found += _cost(bench, Case("millhand", protocol, 8))
    return found


def _cost(bench: Bench, case: Case) -> list[Figure]:
    label = f"{LABELS[case.protocol]} c={case.connections}"
    rate = bench.median(case, lambda run: run.requests_per_s)
    found = [Figure(f"{label}, requests/s", _rounded(rate, 0), "1/s")]
    for role in ("front", "worker"):
        spent = bench.median(case, lambda run, role=role: run.cpu_us.get(role, 0.0))
        found.append(Figure(f"{label}, CPU of the {role} a request", _rounded(spent, 0), "us"))
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--peers", action="store_true", help="measure the peers too, each in a venv of its own")
    options.add_argument("--peers-dir", type=Path, default=servers.PEERS_DIR, help="where those venvs are kept")
    options.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of {QUICK_SECONDS:g} s")
    options.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    options.add_argument("--ablation", action="store_true", help="switch each part off in turn instead")
    chosen = options.parse_args()
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if chosen.quick else (ROUNDS, SECONDS)
    if chosen.ablation:
        from ablation import run

        return run(rounds, min(seconds, ABLATION_SECONDS), chosen.peers_dir)
    peer_versions = servers.prepare(chosen.peers_dir) if chosen.peers else {}
    with tempfile.TemporaryDirectory(prefix="mhb-") as folder, ExitStack() as stack:
        repository = Path(folder)
        cnn, mlp = models.cnn(), models.mlp()
        models.write_model(repository, models.CNN, cnn)
        model = repository / "cnn" / "1" / "model.onnx"
        os.environ["MODEL_FILE"] = str(model)
        if "batching" in chosen.only:
            models.write_model(repository, models.MLP, mlp)
            models.write_model(repository, models.MLP, mlp, name=UNBATCHED.model, max_batch=1)
        product = servers.Millhand(repository)
        started: list[servers.Server] = [product]
        if chosen.peers:
            started += [make(model, chosen.peers_dir) for make in servers.PEER_MAKERS]
        running = {server.name: stack.enter_context(server) for server in started}
        decided = product.chosen("cnn")
        bench = Bench(running, rounds, seconds)
        bench.measure(cases(chosen.only, chosen.peers), models.CNN, cnn)
        if "batching" in chosen.only:
            bench.measure([BATCHED, UNBATCHED], models.MLP, mlp)
    table = bench.table()
    print_table(table)
    return report(
        "serving",
        figures(bench, chosen.only, chosen.peers),
        table=table,
        left_out=bench.left_out,
        decided=decided,
        peer_versions=peer_versions,
        load={"rounds": rounds, "seconds": seconds, **generators()},
    )


if __name__ == "__main__":
    sys.exit(main())
