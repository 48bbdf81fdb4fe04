"""A window of flight cycles -> the model's input: how far and how fast the engine has moved away from a new one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from millhand.pipeline.features import FeatureSet
from millhand.pipeline.windows import Window
from millhand_plugins.turbofan.fleet import SENSORS, SETTINGS, Fleet

WINDOW_CYCLES = 256
TIME_CONSTANTS_CYCLES = (2.0, 5.0, 12.0, 30.0, 80.0)
"""Exponential means: short ones follow the wear of today, the differences between them tell its speed."""
FIRST_CYCLES = 30
"""The mean over the oldest cycles tells the wear that this engine began with."""
FEATURE_COUNT = (len(TIME_CONSTANTS_CYCLES) + 1) * len(SENSORS) + 2
EVIDENCE_MEAN = TIME_CONSTANTS_CYCLES.index(12.0)
EVIDENCE_SENSORS = 3


class TurbofanExtractor:
    """Extractor `turbofan`: exponential means of regime-wise deviations, and the cycles observed so far."""

    name = "turbofan"

    def __init__(self, fleet: Fleet | None = None) -> None:
        self._fleet = fleet or Fleet.read()

    def extract(self, window: Window) -> FeatureSet | None:
        """Return {"features": [86] float32} for up to 256 cycles, the window's last.

        None where the newest cycle has no usable sensor at all (every value missing, or settings of no known regime):
        the engine cannot be judged from it.
        """
        columns = [np.asarray(window.signals[name], np.float64)[-WINDOW_CYCLES:] for name in (*SETTINGS, *SENSORS)]
        table = np.stack(columns, axis=1)
        deviations = self._fleet.deviations(table[:, : len(SETTINGS)], table[:, len(SETTINGS) :])
        if np.isnan(deviations[-1]).all():
            return None
        means = weighted_means(deviations)
        return FeatureSet(tensors={"features": flatten(means, len(table))}, evidence=evidence(means, len(table)))


def weighted_means(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """[step, sensor] with NaN -> [mean, sensor]: one exponential mean per time constant, then the oldest cycles' mean.

    A missing value has no weight, so every mean is over what was measured; a sensor never measured counts as new (0).
    """
    ages = np.arange(len(deviations) - 1, -1, -1)
    weights = np.exp(-ages / np.array(TIME_CONSTANTS_CYCLES)[:, None])
    weights = np.vstack([weights, np.arange(len(deviations)) < FIRST_CYCLES])
    measured = ~np.isnan(deviations)
    total = weights @ measured
    sums = weights @ np.where(measured, deviations, 0.0)
    means: NDArray[np.float64] = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    return means


def flatten(means: NDArray[np.float64], cycles: int) -> NDArray[np.float32]:
    """The model's input, [86]: the means one after the other, then the observed cycles, linear and logarithmic."""
    observed = [cycles / WINDOW_CYCLES, np.log(cycles / WINDOW_CYCLES)]
    return np.concatenate([means.ravel(), observed]).astype(np.float32)


def evidence(means: NDArray[np.float64], cycles: int) -> dict[str, float]:
    """The sensors that drifted most (mean over about 12 cycles, sigma from a new engine) and the cycles observed."""
    drift = means[EVIDENCE_MEAN]
    most = np.argsort(-np.abs(drift), kind="stable")[:EVIDENCE_SENSORS]
    facts = {f"{SENSORS[place]}_drift_sigma": round(float(drift[place]), 2) for place in most}
    return facts | {"observed_cycles": float(cycles)}
