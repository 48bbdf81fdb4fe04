"""Unseen lives of the rig through the running pipeline, at full speed on the rig's own clock.

Each life is an asset of a real agent (adapter `rig`, one of the rig's models). The truth (onset, failure, fault) comes
from the simulator and never reaches the agent. The demo proves the Modbus path.

    python benchmarks/eval/rig.py [--model rig-fault] [--seeds 20] [--first-seed 1000000]
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent import BenchAgent
from figures import Figure, parser, progress, report

from millhand_plugins.rig import millhand_evaluations, millhand_models
from millhand_plugins.rig.asset import FAULTS
from millhand_plugins.rig.labels import LABELS
from millhand_plugins.rig.simulator import Simulator

START_NS = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z, the rig adapter's default start
DEADLINE_S = 1200
MODELS = {"rig-fault": "rig", "rig-wave": "rig_wave"}
"""Model -> the name of its results."""

ASSET = """
[[assets]]
name = "{name}"
adapter = "rig"
models = ["{model}"]
options = {{ seed = {seed}, fault = "{fault}", speed = "full" }}
"""


@dataclass(frozen=True)
class Life:
    """One life and what the agent said of it. Times are the rig's milliseconds."""

    fault: str
    seed: int
    onset_ms: int | None
    failure_ms: int | None
    alerts: list[tuple[float, str]]
    windows: int

    @property
    def foreseen(self) -> tuple[float, str] | None:
        """The first alert between onset and failure."""
        if self.onset_ms is None or self.failure_ms is None:
            return None
        hits = [(at, kind) for at, kind in self.alerts if self.onset_ms <= at < self.failure_ms]
        return hits[0] if hits else None

    @property
    def false_alerts(self) -> int:
        return sum(self.onset_ms is None or at < self.onset_ms for at, _ in self.alerts)

    @property
    def used_share(self) -> float | None:
        """How much of the degradation had passed at the alert, 0..1."""
        if self.foreseen is None or self.onset_ms is None or self.failure_ms is None:
            return None
        return (self.foreseen[0] - self.onset_ms) / (self.failure_ms - self.onset_ms)


def run_lives(model: str, fault: str, seeds: range) -> list[Life]:
    names = {seed: f"{fault}-{seed}" for seed in seeds}
    assets = "".join(ASSET.format(name=names[seed], model=model, seed=seed, fault=fault) for seed in seeds)
    with BenchAgent("[http]\nenabled = false\n[plugins.rig]\n" + assets) as agent:
        agent.wait_assets_ended(DEADLINE_S, lambda done, total: progress(f"{fault}: {done} of {total} lives"))
        return [_life(agent, fault, seed, names[seed]) for seed in seeds]


def _life(agent: BenchAgent, fault: str, seed: int, name: str) -> Life:
    truth = Simulator(seed, fault).truth()  # type: ignore[arg-type]
    alerts = sorted(((a["raised_ns"] - START_NS) / 1e6, a["kind"]) for a in agent.call("alert.list", asset=name))
    windows = len(agent.call("prediction.list", asset=name, limit=100_000))
    return Life(fault, seed, truth["onset_ms"], truth["failure_ms"], alerts, windows)


def accuracy(model: str) -> list[Figure]:
    """How often single windows get the right label: those that the workshop judges the model by, all and by label."""
    progress("single windows")
    (judge,) = (found for found in millhand_evaluations(None) if found.model == model)
    (models,) = millhand_models(None)
    examples = judge.examples(None)
    session = onnxruntime.InferenceSession(models / model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], dict(examples.held))
    hits = logits.argmax(axis=1) == examples.truth
    rows = [("single windows", hits)]
    rows += [(f"single windows, {label}", hits[examples.truth == place]) for place, label in enumerate(LABELS)]
    return [Figure(f"{name}: right label", round(100 * float(part.mean()), 1), "%") for name, part in rows]


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="rig-fault", choices=MODELS)
    arguments.add_argument("--seeds", type=int, default=20, help="lives of each kind")
    arguments.add_argument(
        "--first-seed", type=int, default=1_000_000, help="training never uses seeds from 1000000 on"
    )
    options = arguments.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    lives = [life for fault in FAULTS for life in run_lives(options.model, fault, seeds)]
    faulty = [life for life in lives if life.fault != "none"]
    healthy = [life for life in lives if life.fault == "none"]
    seen = [life for life in faulty if life.foreseen]
    print(f"{'fault':<16} {'lives':>5} {'seen':>5} {'right':>5} {'late':>5} {'false':>5}  degradation used (median)")
    for fault in FAULTS:
        print(_row(fault, [life for life in lives if life.fault == fault]))
    shares = [life.used_share for life in seen if life.used_share is not None]
    right = sum(life.foreseen[1] == life.fault for life in seen if life.foreseen)
    figures = [
        Figure("detection", 100 * len(seen) / len(faulty), "%", ">= 99"),
        Figure("right kind", 100 * right / max(len(seen), 1), "%", ">= 95"),
        Figure("latest alert, share of degradation", round(100 * max(shares, default=1.0), 1), "%", "<= 80"),
        Figure("alerts in healthy lives", sum(len(life.alerts) for life in healthy), "alerts", "== 0"),
        Figure("alerts before the damage began", sum(life.false_alerts for life in faulty), "alerts", "== 0"),
        Figure("windows judged", sum(life.windows for life in lives), "windows"),
    ]
    figures += accuracy(options.model)
    about = {"model": options.model, "seeds": [seeds.start, seeds.stop - 1], "lives": len(lives)}
    return report(MODELS[options.model], figures, **about)


def _row(fault: str, lives: list[Life]) -> str:
    seen = [life for life in lives if life.foreseen]
    right = sum(life.foreseen[1] == life.fault for life in seen if life.foreseen)
    shares = sorted(life.used_share for life in seen if life.used_share is not None)
    late = sum(share > 0.8 for share in shares)
    false = sum(life.false_alerts for life in lives)
    middle = f"{100 * shares[len(shares) // 2]:.0f} %" if shares else "-"
    return f"{fault:<16} {len(lives):>5} {len(seen):>5} {right:>5} {late:>5} {false:>5}  {middle}"


if __name__ == "__main__":
    sys.exit(main())
