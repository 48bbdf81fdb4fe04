"""The shipped models on one NVIDIA GPU: millhand's CUDA session beside ONNX Runtime alone and the CPU, and its memory.

    python benchmarks/gpu/engines.py [--cpu]

For each model a process of its own measures batches of 1 and 256 rows (sessions.py): millhand's session, and ONNX
Runtime alone with IO binding, of which the faster way counts; and 256 rows on the CPU, of which the best number of
threads counts. Then a real agent serves both models; three times their workers are killed (SIGKILL) and come back. The
card's memory, by NVML, must be what it was before the first load whenever they are gone, and after the unload; how much
more the new workers take than the first ones did is shown, since each measures anew how it runs a model. Needs
onnxruntime-gpu; runs from a source tree (PYTHONPATH=agent:plugins:profiles:hub) or where millhand is installed. `--cpu`
tries the script without a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent import BenchAgent
from card import SAMPLE_EVERY_S, Card
from figures import Figure, parser, progress, report, versions
from node import config, environment, load, unload
from shipped import LIFE, Shipped, classifier, shipped

LARGEST = "256"
RATIO_GOAL = "<= 1.1"
CPU_GOAL = ">= 5"
TURNS = 3
BACK_S = 60.0
NOISE_MIB = 1.0


def measure(model: Shipped, gpu: bool) -> dict[str, Any]:
    """What sessions.py found."""
    command = [sys.executable, str(Path(__file__).with_name("sessions.py")), model.name, *([] if gpu else ["--cpu"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise SystemExit(f"{model.name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    for size, entry in found["sizes"].items():
        progress(f"{model.name}, {size} rows: {entry['us']}, {entry['ratio']} of raw ONNX Runtime")
    return found


class Restarts:
    """Kills the workers of served models, and looks at the card's memory."""

    def __init__(self, agent: BenchAgent, card: Card) -> None:
        self._agent = agent
        self._card = card

    def workers(self) -> dict[str, int]:
        """Worker -> process id, of those that live."""
        stats = self._agent.call("model.stats")
        return {worker["name"]: worker["pid"] for worker in stats["workers"] if worker["pid"]}

    def run(self, names: list[str]) -> dict[str, Any]:
        before_mib = self._card.used_mib()
        for name in names:
            load(self._agent, self._card, name)
        served_mib = self._card.used_mib()
        turns = [self._turn(names, before_mib, served_mib) for _ in range(TURNS)]
        gone = unload(self._agent, self._card, names, before_mib)
        return {
            "before_mib": before_mib,
            "served_mib": served_mib,
            "turns": turns,
            "left_mib": gone.get("left_mib"),
        }

    def _turn(self, names: list[str], before_mib: float | None, served_mib: float | None) -> dict[str, Any]:
        """All workers killed, and back: the card's memory when they were gone and when they served again."""
        first = self.workers()
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        freed_mib = self._settle(before_mib) if before_mib is not None else None
        began = time.monotonic()
        self._agent.wait(lambda: self._back(names, first), "the workers' restart", BACK_S)
        seconds = time.monotonic() - began
        again_mib = self._settle(served_mib) if served_mib is not None else None
        return {"gone_mib": freed_mib, "served_again_mib": again_mib, "restart_s": round(seconds, 2)}

    def _back(self, names: list[str], first: dict[str, int]) -> bool:
        now = self.workers()
        models = {model["name"]: model["state"] for model in self._agent.call("model.list")}
        return set(now) == set(first) and not set(now.values()) & set(first.values()) and all(
            models[name] == "ready" for name in names
        )  # fmt: skip

    def _settle(self, wanted_mib: float) -> float:
        """The reading that is nearest to what is wanted, within some seconds."""
        nearest, end = self._card.used_mib() or 0.0, time.monotonic() + 3.0
        while abs(nearest - wanted_mib) > NOISE_MIB and time.monotonic() < end:
            time.sleep(SAMPLE_EVERY_S)
            nearest = min(nearest, self._card.used_mib() or 0.0, key=lambda mib: abs(mib - wanted_mib))
        return nearest


def figures(found: dict[str, dict[str, Any]], memory: dict[str, Any], gpu: bool) -> list[Figure]:
    made = []
    for name, entry in found.items():
        for size, one in entry["sizes"].items():
            us, label = one["us"], f"{name}, {size} rows"
            made += [
                Figure(f"{label}: millhand's session", us["millhand"], "us"),
                Figure(f"{label}: ONNX Runtime with IO binding", us[one["raw"]], "us"),
                Figure(f"{label}: ONNX Runtime without", us["run"], "us"),
                Figure(f"{label}: millhand to IO binding, ratio", one["ratio"], "x", RATIO_GOAL if gpu else ""),
            ]
        cpu = min(entry["cpu_us"].values())
        ratio = round(cpu / entry["sizes"][LARGEST]["us"]["millhand"], 2)
        one_thread = round(entry["cpu_us"]["1"] / entry["sizes"][LARGEST]["us"]["millhand"], 2)
        made += [
            Figure(f"{name}, {LARGEST} rows: the CPU at its best", cpu, "us"),
            Figure(f"{name}, {LARGEST} rows: faster than the CPU at its best", ratio, "x", CPU_GOAL if gpu else ""),
            Figure(f"{name}, {LARGEST} rows: faster than one thread", one_thread, "x"),
        ]
    turns = memory["turns"]
    if gpu:
        kept = max(turn["gone_mib"] for turn in turns) - memory["before_mib"]
        grown = max(turn["served_again_mib"] for turn in turns) - memory["served_mib"]
        made += [
            Figure("memory with both models served", memory["served_mib"] - memory["before_mib"], "MiB"),
            Figure("memory left by killed workers", round(kept, 1), "MiB", f"<= {NOISE_MIB:g}"),
            Figure("memory with both models served again, more than at first", round(grown, 1), "MiB"),
            Figure("memory left by the unload", round(memory["left_mib"], 1), "MiB", f"<= {NOISE_MIB:g}"),
        ]
    slowest = max(turn["restart_s"] for turn in turns)
    return [*made, Figure("workers killed until all is served again, slowest", slowest, "s")]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--cpu", action="store_true", help="try the script on the CPU")
    gpu, began = not options.parse_args().cpu, time.monotonic()
    card, models = Card(gpu), [shipped(LIFE), classifier()]
    found = {model.name: measure(model, gpu) for model in models}
    with tempfile.TemporaryDirectory(prefix="mhg-") as name:
        repository = Path(name) / "repository"
        repository.mkdir()
        with BenchAgent(config(repository), environment=environment(Path(name) / "site")) as agent:
            state = agent.call("state")
            for model in models:  # they come when the agent runs, so that the first reading is of an empty card
                model.copy(repository, model.name, "max_batch = 64")
            memory = Restarts(agent, card).run([model.name for model in models])
    progress(f"memory: {memory}")
    import onnxruntime

    return report(
        "gpu_engines",
        figures(found, memory, gpu),
        device=card.facts,
        profile=state["profile"],
        models=found,
        memory=memory,
        seconds=round(time.monotonic() - began),
        versions={**versions(), "onnxruntime": onnxruntime.__version__},
    )


if __name__ == "__main__":
    sys.exit(main())
