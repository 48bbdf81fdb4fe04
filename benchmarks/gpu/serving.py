"""Serving on an NVIDIA GPU: dynamic batching, the proof of each load, memory that comes back, and loads that must fail.

    python benchmarks/gpu/serving.py [--rounds 5] [--seconds 3] [--keep FOLDER] [--cpu]

A real agent (`millhand run`) serves each net twice on the accelerator: `single` one row at a time, `batched` with
batches of up to 64; `vision` a third time with batch sizes as they come (`fixed_batches = false`). Client processes
keep 64 requests in flight over the worker protocol, then over HTTP with binary tensors. The forms alternate; a ratio is
the median of the rounds' ratios. Every answer is compared with the CPU's. Needs onnxruntime-gpu; runs from a source
tree (PYTHONPATH=agent:plugins:profiles:hub) or where millhand is installed. `--cpu` tries the script without a GPU.
`--keep` leaves ONNX Runtime's profiles and the agent's log there.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from agent import BenchAgent
from card import Card
from clients import Clients, Run, Tallies, write_answers
from figures import Figure, parser, progress, report, versions
from models import CNN, write_model
from nets import ARTIFACTS, INTEGER, VISION, integer
from node import Loaded, config, environment, load, unload
from refusals import PROFILE, python, refusals
from wire import WrongAnswer, request, verify

IN_FLIGHT = 64
CLIENTS, CLIENTS_ON_CPU = 8, 2
HTTP_ROUNDS = 3
ALONE_S = 2.0
BATCHED = "max_delay_us = 500"
FORMS: dict[str, tuple[int, str]] = {
    "single": (1, ""),
    "batched": (64, BATCHED),
    "free": (64, BATCHED + "\n[options]\nfixed_batches = false"),
}
NAMES = {"cnn": ("cnn-single", "cnn-batched"), "vision": ("vision-single", "vision-batched", "vision-free")}
NETS = {net.name: net for net in (CNN, VISION)}


class Bench:
    """Loads, drives and unloads; keeps what it saw."""

    def __init__(self, agent: BenchAgent, card: Card, clients: Clients, folder: Path) -> None:
        self._agent, self._card, self._clients, self._folder = agent, card, clients, folder
        self.loaded: dict[str, Loaded] = {}
        self.runs: dict[str, list[Run]] = {}

    def load(self, names: Sequence[str]) -> None:
        for name in names:
            self.loaded[name] = load(self._agent, self._card, name)

    def drive(self, name: str, in_flight: int, seconds: float, label: str = "", http: Any = None) -> None:
        """One run; `http` is an address, else it goes over the worker's socket."""
        where = {"http": http} if http else {"sockets": self.loaded[name].sockets}
        answers = str(self._folder / "answers" / name.partition("-")[0])
        run = self._clients.run(self._card, in_flight, seconds, model=name, folder=answers, **where)
        label = label or name
        self.runs.setdefault(label, []).append(run)
        progress(f"{label}: {run.requests_per_s:.0f} req/s, p50 {run.p50_ms:.2f} ms, {run.batch_rows:.1f} rows a batch")

    def rounds(self, names: Sequence[str], count: int, seconds: float, suffix: str = "", http: Any = None) -> None:
        for number in range(count):
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                self.drive(name, IN_FLIGHT, seconds, name + suffix, http)

    def drive_all(self, rounds: int, seconds: float, url: str) -> None:
        """One request at a time, then 64 over the worker protocol, then 64 over HTTP."""
        for names in NAMES.values():
            for name in names[:2]:
                self.drive(name, 1, ALONE_S, f"{name} c=1")
            self.rounds(names, rounds, seconds)
        host, _, port = url.rpartition("//")[2].partition(":")
        address = (host, int(port))
        folder = self._folder / "answers" / "vision"
        row, answer = np.load(folder / "rows.npy")[:1], np.load(folder / "answers.npy")[:1]
        try:
            verify(address, request("binary", "vision-batched", row), answer)
        except (WrongAnswer, OSError) as error:
            progress(f"HTTP is left out: {error}")
            return
        self.rounds(NAMES["vision"][:2], min(HTTP_ROUNDS, rounds), seconds, " http", address)

    def median(self, label: str, value: str) -> float | None:
        values = [getattr(run, value) for run in self.runs.get(label, [])]
        return None if not values or None in values else round(statistics.median(values), 3)

    def ratio(self, label: str, other: str) -> float | None:
        pairs = list(zip(self.runs.get(label, []), self.runs.get(other, []), strict=True))
        if not pairs:
            return None
        return round(statistics.median(a.requests_per_s / b.requests_per_s for a, b in pairs), 2)


def raw(folder: Path) -> dict[str, Any]:
    """ONNX Runtime alone, for each way of choosing a convolution's algorithm."""
    found = {}
    for net in ARTIFACTS:
        path = folder / "repository" / f"{net}-single" / "1" / "model.onnx"
        for search in ("heuristic", "exhaustive", "default"):
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("raw.py")), str(path), search],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = done.stdout.strip().splitlines()
            found[f"{net}, {search}"] = json.loads(lines[-1]) if lines and not done.returncode else done.stderr[-400:]
            progress(f"raw {net}, {search}: {found[f'{net}, {search}']}")
    return found


def figures(bench: Bench, tallies: Tallies, memory: dict[str, Any], failed: dict[str, str], gpu: bool) -> list[Figure]:
    made = []
    for net in ARTIFACTS:
        goal = ">= 3" if gpu else ""
        made.append(
            Figure(f"{net}: batching at c=64, ratio", bench.ratio(f"{net}-batched", f"{net}-single"), "x", goal)
        )
        for label in [label for label in bench.runs if label.startswith(net)]:
            made += [
                Figure(f"{label}: requests", bench.median(label, "requests_per_s"), "1/s"),
                Figure(f"{label}: p50", bench.median(label, "p50_ms"), "ms"),
                Figure(f"{label}: p99", bench.median(label, "p99_ms"), "ms"),
                Figure(f"{label}: GPU busy", bench.median(label, "busy_percent"), "%"),
            ]
            if bench.median(label, "batch_rows"):
                made.append(Figure(f"{label}: rows a batch", bench.median(label, "batch_rows"), "1"))
    http = bench.ratio("vision-batched http", "vision-single http")
    made.append(Figure("vision: batching at c=64 over HTTP, ratio", http, "x"))
    made.append(Figure("vision: fixed against free batch sizes", bench.ratio("vision-batched", "vision-free"), "x"))
    for name, loaded in bench.loaded.items():
        proof = loaded.proof
        made.append(Figure(f"{name}: time to load", round(loaded.seconds, 2), "s"))
        if gpu:
            made += [
                Figure(f"{name}: nodes on the GPU", proof.get("gpu_share"), "share", "== 1"),
                Figure(f"{name}: largest difference from the CPU", proof.get("max_difference"), "share", "<= 0.001"),
                Figure(f"{name}: the proof's time", proof.get("proof_ms"), "ms", "<= 1000"),
                Figure(f"{name}: GPU memory", loaded.vram_mib, "MiB"),
            ]
    if gpu:
        made += [
            Figure("GPU memory that unloading left", memory.get("left_mib"), "MiB", "<= 1"),
            Figure("time until unloading had given it back", round(memory.get("seconds", 0.0), 2), "s"),
            Figure("loads that must fail, and were refused", _count(failed), "1", f"== {len(failed) - 1}"),
        ]
    return [
        *made,
        Figure("answers checked", tallies.answers, "1"),
        Figure("wrong answers", tallies.wrong, "1", "== 0"),
        Figure("failed requests", tallies.failed, "1", "== 0"),
    ]


def _count(failed: dict[str, str]) -> int:
    return sum(bool(text) for case, text in failed.items() if not case.startswith("bare"))


def write_nets(folder: Path) -> None:
    """Fill the repository, and write down what each net must answer."""
    for net, names in NAMES.items():
        artifact = ARTIFACTS[net]()
        write_answers(folder / "answers" / net, NETS[net], artifact)
        for name in names:
            max_batch, extra = FORMS[name.partition("-")[2]]
            write_model(folder / "repository", NETS[net], artifact, name=name, max_batch=max_batch, extra=extra)
    write_model(folder / "repository", INTEGER, integer())


def keep_profiles(folder: Path, kept: Path, providers: str) -> None:
    """Profile one run of two nets, as a load does."""
    for name in ("cnn-single", "integer"):
        python(PROFILE, str(folder / "repository" / name / "1" / "model.onnx"), str(kept), providers)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3.0, help="of one run, after a second of warm-up")
    options.add_argument("--keep", type=Path, help="folder for ONNX Runtime's profiles and the agent's log")
    options.add_argument("--cpu", action="store_true", help="try the script on the CPU")
    chosen = options.parse_args()
    gpu, began = not chosen.cpu, time.monotonic()
    card, clients = Card(gpu), Clients(CLIENTS if gpu else CLIENTS_ON_CPU)
    failed: dict[str, str] = {}
    alone: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mhg-") as name:
        folder = Path(name)
        (folder / "repository").mkdir()
        added = environment(folder / "site")
        with BenchAgent(config(folder / "repository"), environment=added) as agent:
            write_nets(folder)
            bench = Bench(agent, card, clients, folder)
            before_mib, state = card.used_mib(), agent.call("state")
            bench.load([name for names in NAMES.values() for name in names])
            progress(f"{time.monotonic() - began:.0f} s: loaded")
            bench.drive_all(chosen.rounds, chosen.seconds, state["http"])
            progress(f"{time.monotonic() - began:.0f} s: driven")
            memory = unload(agent, card, list(bench.loaded), before_mib)
            if gpu:
                failed = refusals(agent, folder, added)
            if chosen.keep:
                chosen.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(agent.log_path, chosen.keep)
        clients.end()
        if gpu:
            alone = raw(folder)
        if chosen.keep:
            keep_profiles(folder, chosen.keep.resolve(), "cuda,cpu" if gpu else "cpu")
    for case, text in failed.items():
        print(f"{case}:\n  " + text.replace("\n", "\n  "))
    if clients.tallies.errors:
        print("errors:", *clients.tallies.errors, sep="\n  ")
    import onnxruntime

    return report(
        "gpu_serving",
        figures(bench, clients.tallies, memory, failed, gpu),
        device=card.facts,
        profile=state["profile"],
        proofs={name: loaded.proof for name, loaded in bench.loaded.items()},
        memory=memory,
        refusals=failed,
        onnxruntime_alone=alone,
        seconds=round(time.monotonic() - began),
        versions={**versions(), "onnxruntime": onnxruntime.__version__},
    )


if __name__ == "__main__":
    sys.exit(main())
