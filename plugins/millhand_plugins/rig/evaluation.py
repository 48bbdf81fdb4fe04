"""What the rig's models are judged by: windows of simulated lives that no training has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError
from millhand.hookspecs import Examples, FeatureExtractor
from millhand_plugins.rig.asset import FAULTS, LIFE_MS, Fault
from millhand_plugins.rig.labels import label_index, share_of_fault
from millhand_plugins.rig.lives import moments
from millhand_plugins.rig.operation import GRID_MS, RUNNING
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator

# Training takes seeds below 200,000; tests, looks at finished models and benchmarks take those of 200,000 to 399,999
# and from 1,000,000 on.
CALIBRATION_SEEDS = range(600_000, 600_006)
HELD_SEEDS = range(700_000, 700_024)
WINDOWS_OF_A_LIFE = 16


class RigEvaluation:
    """Accuracy over windows of simulated lives, as many of each label.

    A window of a faulty life counts once more of its soft label belongs to the fault than not, and from there on all
    are drawn alike: many show damage that is only just visible. Windows of healthy lives count as healthy.
    """

    metric = "accuracy"

    def __init__(self, model: str, extractor: FeatureExtractor) -> None:
        self.model = model
        self._extractor = extractor

    def examples(self, data: Path | None) -> Examples:
        """Raises InputError where `data` is given: the rows come from the simulator alone."""
        if data is not None:
            raise InputError(
                f"model '{self.model}': its rows come from the rig's simulator, not from '{data}'",
                hint="leave the data out",
            )
        calibration, _ = self._rows(CALIBRATION_SEEDS)
        held, truth = self._rows(HELD_SEEDS)
        source = (
            f"the rig's simulator: {len(FAULTS) * len(HELD_SEEDS)} lives of seeds {HELD_SEEDS[0]} to {HELD_SEEDS[-1]}; "
            f"calibration from seeds {CALIBRATION_SEEDS[0]} to {CALIBRATION_SEEDS[-1]}"
        )
        return Examples(calibration, held, truth, source)

    def _rows(self, seeds: Sequence[int]) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
        rows = [row for seed in seeds for fault in FAULTS for row in self._rows_of_a_life(seed, fault)]
        names = rows[0][0]
        tensors = {name: np.stack([tensors[name] for tensors, _ in rows]) for name in names}
        return tensors, np.array([label for _, label in rows], dtype=np.int64)

    def _rows_of_a_life(self, seed: int, fault: Fault) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
        simulator = Simulator(seed, fault)
        for moment in moments(simulator, sorted(chosen(simulator))):
            found = self._extractor.extract(moment.window)
            if found is not None:
                yield dict(found.tensors), label_index(fault)


def chosen(simulator: Simulator) -> list[int]:
    """The snapshots of one life to look at: of those that can be judged, and show its fault, some drawn at random."""
    operation, fault = simulator.operation, simulator.fault
    counters = np.arange(1, LIFE_MS // SNAPSHOT_MS + 1)
    places = counters * (SNAPSHOT_MS // GRID_MS)
    shown = [fault == "none" or share_of_fault(fault, severity) > 0.5 for severity in operation.severity[places]]
    fit = counters[(operation.state[places] == RUNNING) & shown]
    random = np.random.default_rng([simulator.seed, FAULTS.index(fault)])
    drawn: list[int] = random.choice(fit, min(WINDOWS_OF_A_LIFE, len(fit)), replace=False).tolist()
    return drawn
