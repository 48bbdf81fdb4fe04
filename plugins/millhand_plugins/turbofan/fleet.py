"""What the fleet looks like when it is new: the operating regimes, and each sensor's level and spread in each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SETTINGS = ("setting_1", "setting_2", "setting_3")
"""Altitude in 1000 ft, Mach number, throttle resolver angle in degrees."""
SENSORS = ("s2", "s3", "s4", "s7", "s8", "s9", "s11", "s12", "s13", "s14", "s15", "s17", "s20", "s21")
"""The sensors that move as an engine wears; the other seven follow the settings alone."""
SETTING_SCALES = np.array([2.0, 0.1, 10.0])
"""A regime reaches this far from its centre, per setting; regimes lie at least 2.5 such steps apart."""
OUTLIER_SIGMA = 50.0
"""Engines at the very end of their life show up to 22 sigma; what is beyond this limit was not measured right."""
FLEET_FILE = Path(__file__).parent / "fleet.json"


@dataclass(frozen=True, slots=True)
class Fleet:
    """centres: [regime, setting]; level and spread: [regime, sensor] in the sensors' own units; all float64."""

    centres: NDArray[np.float64]
    level: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def read(cls, path: Path = FLEET_FILE) -> Fleet:
        """Read what `write` wrote."""
        tables = json.loads(path.read_text())
        return cls(*(np.array(tables[key]) for key in ("centres", "level", "spread")))

    def write(self, path: Path) -> None:
        """Write as JSON with seven significant digits."""
        columns = {"settings": list(SETTINGS), "sensors": list(SENSORS)}
        tables = {
            key: [[float(f"{cell:.7g}") for cell in row] for row in getattr(self, key)]
            for key in ("centres", "level", "spread")
        }
        lines = [f'"{key}": {json.dumps(value)}' for key, value in (columns | tables).items()]
        path.write_text("{\n" + ",\n".join(lines).replace("], [", "],\n  [") + "\n}\n")

    def deviations(self, settings: NDArray[np.float64], sensors: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far each sensor is from a new engine's level in the same regime, in sigma.

        settings: [step, 3]; sensors: [step, 14]; returns [step, 14] float64, NaN where a sensor was not measured,
        is absurd, or the step's settings belong to no known regime.
        """
        distance = np.abs((settings[:, None, :] - self.centres) / SETTING_SCALES).max(axis=2)
        distance = np.where(np.isnan(distance), np.inf, distance)
        regime = distance.argmin(axis=1)
        deviation = (sensors - self.level[regime]) / self.spread[regime]
        known = (distance.min(axis=1) <= 1.0)[:, None] & (np.abs(deviation) <= OUTLIER_SIGMA)
        return np.where(known, deviation, np.nan)
