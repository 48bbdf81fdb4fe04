"""One rig among many: the traits that differ from machine to machine, all drawn from the seed.

A model that is trained on some seeds meets other resonances, noise, gains and duties on the next ones, so that it has
to learn the physics and cannot learn a machine by heart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Fault = Literal["none", "bearing_outer", "bearing_inner", "imbalance", "misalignment", "looseness"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

LIFE_MS = 35_000
"""From a healthy machine to its failure, on the rig's clock."""

# Purposes of random streams: each part of the rig draws from its own, so that none disturbs another.
TRAITS, DUTY, NOISE, SNAPSHOT = range(4)


def random_stream(seed: int, *purpose: int) -> np.random.Generator:
    """An independent generator for `purpose`; the same arguments always give the same numbers."""
    return np.random.default_rng([seed, *purpose])


@dataclass(frozen=True, slots=True)
class Resonance:
    """One structural mode that impacts excite."""

    frequency_hz: float
    damping: float
    """Ratio to critical damping."""
    gains: tuple[float, float]
    """Transfer to the radial and to the axial sensor."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What makes one rig differ from the next. Velocities are RMS at rated speed.

    Levels follow the evaluation zones of ISO 20816-3 for medium machines on a flexible base: a new machine stays below
    2.3 mm/s, and above 7.1 mm/s damage must be expected; each fault ends its life beyond that line or with impacts of
    several g.
    """

    seed: int
    fault: Fault
    onset_ms: int
    growth: float
    """Exponent of the degradation curve; see `operation.severity`."""
    strength: float
    """Severity's scale at failure, 1 on average."""

    rated_speed_rpm: float
    rated_current_a: float
    rated_flow_m3_h: float
    shutoff_pressure_bar: float
    ambient_cel: float
    bearing_rise_k: float
    """Steady rise of the healthy bearing's temperature at rated speed and load."""
    bearing_lag_s: float
    skid_rise_k: float
    """How much the running motor warms the air around the skid."""

    resonances: tuple[Resonance, ...]
    noise_g: tuple[float, float]
    sensor_gains: tuple[float, float]
    cage_slip: float
    """Mean shortfall of the defect frequencies, as a fraction."""
    impact_jitter: float
    """Standard deviation of the time between two impacts, as a fraction."""
    residual_imbalance_mm_s: float
    residual_misalignment_mm_s: float
    residual_looseness_mm_s: float
    vanes: int
    vane_pass_mm_s: float
    shock_rate: float
    """Chance of a stray knock (a valve, a passing truck) in one snapshot."""
    axial_share: float
    """How much of a misalignment is angular (axial), the rest being parallel (radial)."""
    phases: NDArray[np.float64]
    """[16] mounting phases in radians."""


def draw_traits(seed: int, fault: Fault) -> Traits:
    """Draw the rig number `seed`. The machine itself is the same whatever its fault."""
    random = random_stream(seed, TRAITS)
    uniform = random.uniform
    resonances = tuple(
        Resonance(uniform(low, high), uniform(0.02, 0.05), (uniform(0.6, 1.3) * weight, uniform(0.3, 0.8) * weight))
        for low, high, weight in ((1900, 2700, 0.6), (2700, 3700, 1.0), (3700, 4600, 0.5))
    )
    noise = uniform(0.05, 0.13)
    return Traits(
        seed=seed,
        fault=fault,
        onset_ms=int(uniform(0.25, 0.55) * LIFE_MS),
        growth=uniform(2.0, 3.0),
        strength=uniform(0.85, 1.3),
        rated_speed_rpm=uniform(2900, 2975),
        rated_current_a=uniform(18, 32),
        rated_flow_m3_h=uniform(45, 110),
        shutoff_pressure_bar=uniform(4, 9),
        ambient_cel=uniform(16, 34),
        bearing_rise_k=uniform(22, 34),
        bearing_lag_s=uniform(3.0, 5.0),
        skid_rise_k=uniform(2.0, 5.0),
        resonances=resonances,
        noise_g=(noise, noise * uniform(0.5, 0.9)),
        sensor_gains=(uniform(0.85, 1.18), uniform(0.85, 1.18)),
        cage_slip=uniform(0.002, 0.012),
        impact_jitter=uniform(0.01, 0.02),
        residual_imbalance_mm_s=uniform(0.3, 1.1),
        residual_misalignment_mm_s=uniform(0.1, 0.45),
        residual_looseness_mm_s=uniform(0.0, 0.15),
        vanes=int(random.integers(5, 8)),
        vane_pass_mm_s=uniform(0.2, 0.8),
        shock_rate=uniform(0.0, 0.15),
        axial_share=uniform(0.3, 0.7),
        phases=uniform(0, 2 * np.pi, 16),
    )
