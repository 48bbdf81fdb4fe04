"""A C-MAPSS test set through the running agent; figures from its stored prediction rows.

Each test engine is an asset of a real agent (adapter `file`, model `turbofan-rul`), replayed at full speed. The answer
for an engine is its last stored prediction; every unit of RUL_<subset>.txt must have one, or the run fails.
FD003's test part is not public everywhere: where it is missing, FD003 is judged by 5 folds over the training engines,
each engine by the one net that never saw it, cut once at random as the test sets are cut.

    python benchmarks/eval/cmapss.py --subset FD001 --data DIR [--seed 1]

DIR holds train_/test_/RUL_ files, plain or .gz. RMSE is given against the true and against the 125-capped RUL: the
two differ by 1 to 12 cycles, so a figure without that word says little.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent import BenchAgent
from figures import Figure, parser, progress, report

from millhand_plugins.turbofan import cmapss, folds

CAP = 125
DEADLINE_S = 900
GOALS = {"FD001": 11.5, "FD002": 12.5, "FD003": 11.5, "FD004": 12.5}
MODEL = "turbofan-rul"

ASSET = """
[[assets]]
name = "{name}"
adapter = "file"
models = ["{model}"]
[assets.options]
path = "{path}"
delimiter = "space"
header = [{header}]
time_column = "cycle"
time_format = "index"
time_unit_s = 3600
"""


@dataclass(frozen=True)
class Cut:
    """One engine as the agent sees it: its rows up to the cut, and what is true there."""

    name: str
    table: np.ndarray
    true_rul: float


@dataclass(frozen=True)
class Judged:
    cut: Cut
    predicted: float | None
    first_alert_cycle: float | None
    predictions: int

    @property
    def lead_time(self) -> float | None:
        """True RUL, in cycles, at the first alert."""
        if self.first_alert_cycle is None:
            return None
        return self.cut.true_rul + float(self.cut.table[-1, 1]) - self.first_alert_cycle


def test_cuts(folder: Path, subset: str) -> list[Cut]:
    """The official test set: one engine for each line of RUL_<subset>.txt."""
    engines = cmapss.read_engines(folder, "test", subset)
    true = cmapss.read_table(folder, f"RUL_{subset}.txt")[:, 0]
    if len(engines) != len(true):
        raise SystemExit(f"test_{subset} has {len(engines)} engines, RUL_{subset} has {len(true)} lines")
    return [Cut(f"engine-{e.unit}", e.table, float(rul)) for e, rul in zip(engines, true, strict=True)]


def random_cuts(folder: Path, subset: str, units: list[int], generator: np.random.Generator) -> list[Cut]:
    """Training engines, each cut once: as long before failure as test engines are, with a history as short."""
    cuts = []
    for engine in cmapss.read_engines(folder, "train", subset):
        if engine.unit in units:
            length = len(engine.table)
            longest = min(cmapss.LONGEST_RUL_CYCLES[subset], length - cmapss.SHORTEST_HISTORY_CYCLES)
            rul = int(generator.integers(cmapss.SHORTEST_RUL_CYCLES, longest + 1))
            cuts.append(Cut(f"engine-{engine.unit}", engine.table[: length - rul], float(rul)))
    return cuts


def judge(cuts: list[Cut], models: Path | None = None) -> list[Judged]:
    """Replay the engines through one agent and read back what it stored."""
    folder = Path(tempfile.mkdtemp(prefix="cmapss-"))
    header = ", ".join(f'"{name}"' for name in cmapss.COLUMNS)
    assets = ""
    for cut in cuts:
        path = folder / f"{cut.name}.txt"
        np.savetxt(path, cut.table, fmt="%.10g")
        assets += ASSET.format(name=cut.name, model=MODEL, path=path, header=header)
    own = f'[models]\npaths = ["{models}"]\n' if models else ""
    config = f"[http]\nenabled = false\n{own}[plugins.turbofan]\n{assets}"
    try:
        with BenchAgent(config) as agent:
            agent.wait_assets_ended(DEADLINE_S, lambda done, total: progress(f"{done} of {total} engines replayed"))
            return [_read_back(agent, cut) for cut in cuts]
    finally:
        shutil.rmtree(folder)


def _read_back(agent: BenchAgent, cut: Cut) -> Judged:
    stored: list[dict[str, Any]] = agent.call("prediction.list", asset=cut.name, model=MODEL, limit=100_000)
    alerts = agent.call("alert.list", asset=cut.name, limit=1000)
    last_cycle = float(cut.table[-1, 1])
    start_ns = _time_of_last_row(stored) - last_cycle * cmapss.CYCLE_NS if stored else 0.0
    first = min((alert["raised_ns"] for alert in alerts), default=None)
    return Judged(
        cut,
        stored[-1]["values"]["rul"] if stored else None,
        None if first is None else round((first - start_ns) / cmapss.CYCLE_NS),
        len(stored),
    )


def _time_of_last_row(stored: list[dict[str, Any]]) -> float:
    return float(stored[-1]["window_end_ns"])


def judge_folds(folder: Path, subset: str, seed: int) -> list[Judged]:
    """Each engine by the net that never saw it."""
    generator = np.random.default_rng(seed)
    judged: list[Judged] = []
    for fold in range(folds.FOLDS):
        progress(f"fold {fold + 1} of {folds.FOLDS}")
        cuts = random_cuts(folder, subset, folds.held_out(subset, fold), generator)
        with tempfile.TemporaryDirectory() as models:
            target = Path(models) / MODEL
            (target / "1").mkdir(parents=True)
            shutil.copy(folds.MODEL_FOLDER / "model.toml", target)
            folds.cut_net(fold, target / "1" / "model.onnx")
            judged += judge(cuts, Path(models))
    return judged


def figures_of(judged: list[Judged], subset: str) -> list[Figure]:
    missing = [item.cut.name for item in judged if item.predicted is None]
    if missing:
        raise SystemExit(f"{len(missing)} engines have no stored prediction: {', '.join(missing[:5])}")
    predicted = np.array([item.predicted for item in judged], float)
    true = np.array([item.cut.true_rul for item in judged])
    capped = np.minimum(true, CAP)
    leads = [item.lead_time for item in judged if item.lead_time is not None]
    return [
        Figure("RMSE, RUL capped at 125", round(_rmse(predicted, capped), 2), "cycles", f"<= {GOALS[subset]}"),
        Figure("score, RUL capped at 125", round(cmapss.score(predicted, capped)), ""),
        Figure("RMSE, true RUL", round(_rmse(predicted, true), 2), "cycles"),
        Figure("score, true RUL", round(cmapss.score(predicted, true)), ""),
        Figure("engines judged", len(judged), "engines"),
        Figure("shortest history answered", min(len(item.cut.table) for item in judged), "cycles"),
        Figure("engines with an alert", len(leads), "engines"),
        Figure("lead time at first alert, median", float(np.median(leads)) if leads else None, "cycles"),
        Figure("lead time at first alert, least", float(np.min(leads)) if leads else None, "cycles"),
        Figure("predictions stored", sum(item.predictions for item in judged), "predictions"),
    ]


def _rmse(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.sqrt(np.mean((predicted - true) ** 2)))


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--subset", required=True, choices=cmapss.SUBSETS)
    arguments.add_argument("--data", required=True, type=Path)
    arguments.add_argument("--seed", type=int, default=1, help="of the random cuts, where folds are used")
    options = arguments.parse_args()
    names = (f"RUL_{options.subset}.txt", f"RUL_{options.subset}.txt.gz")
    official = any((options.data / name).exists() for name in names)
    if official:
        judged = judge(test_cuts(options.data, options.subset))
        how = "official test set"
    else:
        judged = judge_folds(options.data, options.subset, options.seed)
        how = f"5 folds by engine over train_{options.subset}, one random cut each, seed {options.seed}"
    print(f"{options.subset}: {how}")
    name = f"cmapss_{options.subset.lower()}"
    return report(name, figures_of(judged, options.subset), method=how)


if __name__ == "__main__":
    sys.exit(main())
