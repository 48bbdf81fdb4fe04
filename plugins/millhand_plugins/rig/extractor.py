"""From one vibration snapshot to what the fault classifier looks at: levels at orders of the shaft and of the bearing.

Everything is measured at multiples of the shaft's frequency, so that the same machine looks the same at every speed,
and as logarithms, so that the net sees ratios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from millhand.pipeline.features import (
    GRAVITY_M_S2,
    FeatureSet,
    band_pass,
    crest_factor,
    envelope_spectrum,
    integrate,
    kurtosis,
    rms,
    spectrum,
)
from millhand.records import AssetState
from millhand.validation import StrictTable, validate
from millhand_plugins.rig.bearing import BearingGeometry

if TYPE_CHECKING:
    from millhand.pipeline.windows import Window

Array = NDArray[np.float64]

CHANNELS = ("vibration_de", "vibration_axial")
SPEED = "speed"

SHAFT_ORDERS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
MEAN_SLIP = 0.007
"""Real defect frequencies lie about so much below those of rolling without slip ..."""
SLIP_TOLERANCE = 0.012
"""... give or take this share."""
SEVERITY_HZ = (10.0, 1000.0)
"""The band of ISO 20816-3."""

SLOWEST_RPM = 600.0
FEWEST_SAMPLES = 1024
STEADY = 0.06
"""A snapshot over which the speed changed by a larger share is not judged: its lines are smeared."""

FEATURES = 44
"""Length of the tensor `features`."""


class RigContext(StrictTable):
    """What the owner may say of the machine under `[assets.context]`."""

    bearing: BearingGeometry = BearingGeometry()
    resonance_hz: tuple[float, float] = (1500.0, 5000.0)
    """The band in which the structure rings."""

    @model_validator(mode="after")
    def _rising(self) -> RigContext:
        if not 0 < self.resonance_hz[0] < self.resonance_hz[1]:
            raise ValueError("resonance_hz must be [low, high] with 0 < low < high")
        return self


CONTEXT = tuple(RigContext.model_fields)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Acceleration in g of both CHANNELS, [2, n], up to the source time `end_ns`."""

    samples_g: Array
    rate_hz: float
    end_ns: int

    @property
    def length_s(self) -> float:
        return len(self.samples_g[0]) / self.rate_hz


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one snapshot shows. Lines are peak amplitudes; channel 0 is radial, 1 axial."""

    shaft_hz: float
    bearing: BearingGeometry
    lines_mm_s: Array
    """[2, len(SHAFT_ORDERS)]"""
    severity_mm_s: Array
    """[2], RMS"""
    ratios: Array
    """[len(_envelope_orders)]: radial envelope lines over floor_g."""
    floor_g: float
    ringing_g: Array
    """[2], RMS of the band of the resonances."""
    kurtosis: float
    crest: float

    def vector(self) -> NDArray[np.float32]:
        """The classifier's input [FEATURES]; what is added inside a logarithm is the smallest level that counts."""
        parts = (
            np.log10(self.lines_mm_s + 0.02).ravel(),
            np.log10(self.ratios + 0.1),
            np.log10(self.severity_mm_s + 0.02),
            np.log10(self.ringing_g + 1e-3),
            np.log10([self.kurtosis + 0.1, self.crest + 0.1, self.floor_g + 1e-4]),
            [self.shaft_hz / 50],
        )
        return np.concatenate(parts).astype(np.float32)

    def evidence(self) -> dict[str, float]:
        """The facts that a technician checks."""
        radial, axial = (self.lines_mm_s / math.sqrt(2)).tolist()
        half, first, second = (SHAFT_ORDERS.index(order) for order in (0.5, 1.0, 2.0))
        outer, inner = float(self.ratios[_OUTER]), float(self.ratios[_INNER])
        return {
            "velocity_rms_mm_s": float(self.severity_mm_s[0]),
            "velocity_axial_rms_mm_s": float(self.severity_mm_s[1]),
            "velocity_half_x_mm_s": radial[half],
            "velocity_1x_mm_s": radial[first],
            "velocity_2x_mm_s": radial[second],
            "velocity_axial_1x_mm_s": axial[first],
            "velocity_axial_2x_mm_s": axial[second],
            "envelope_bpfo_g": outer * self.floor_g,
            "envelope_bpfo_over_floor": outer,
            "envelope_bpfi_g": inner * self.floor_g,
            "envelope_bpfi_over_floor": inner,
            "acceleration_kurtosis": self.kurtosis,
            "shaft_hz": self.shaft_hz,
            "bpfo_hz": self.bearing.bpfo * self.shaft_hz,
            "bpfi_hz": self.bearing.bpfi * self.shaft_hz,
        }


class RigExtractor:
    """float32 [FEATURES] of the newest snapshot (`vibration_de`, `vibration_axial` in g) and the signal `speed` in rpm.

    In order: log10 velocity (mm/s) at SHAFT_ORDERS, radial then axial; log10 of the envelope's lines over its noise
    floor at 0.5x, 1x, 2x, three BPFO, three BPFI, the two sidebands of BPFI, and 2 BSF; severity and level of the
    resonances of both channels; kurtosis, crest factor and floor of the resonances' band; shaft frequency.

    None while the machine idles or ramps, or where speed or snapshot are missing or unusable. Raises ConfigError where
    the asset's context gives `bearing` or `resonance_hz` wrongly.
    """

    name = "rig"

    def extract(self, window: Window) -> FeatureSet | None:
        found = snapshot(window)
        if found is None:
            return None
        shaft_hz = _shaft_hz(window, found.end_ns, found.length_s)
        if shaft_hz is None or found.samples_g.shape[1] < FEWEST_SAMPLES:
            return None
        context = validate(RigContext, {key: window.context[key] for key in CONTEXT if key in window.context}, "asset")
        measurement = measure(found.samples_g, found.rate_hz, shaft_hz, context.bearing, context.resonance_hz)
        return FeatureSet({"features": measurement.vector()}, measurement.evidence())


def snapshot(window: Window) -> Snapshot | None:
    """The window's snapshot, or None while the machine idles or ramps, or where a channel is missing or unusable."""
    if window.state not in (AssetState.RUNNING, AssetState.UNKNOWN):
        return None
    waves = [window.waveforms[name] for name in CHANNELS if name in window.waveforms]
    if len(waves) != len(CHANNELS) or len({(len(wave.array), wave.sample_rate_hz) for wave in waves}) != 1:
        return None
    found = Snapshot(
        samples_g=np.asarray([wave.array for wave in waves], dtype=np.float64),
        rate_hz=waves[0].sample_rate_hz,
        end_ns=waves[0].clock.source_ns,
    )
    if abs(found.end_ns - waves[1].clock.source_ns) > found.length_s * 0.5e9:
        return None  # the other half of the snapshot is still on its way
    return found if np.isfinite(found.samples_g).all() else None


def measure(
    samples_g: Array, rate_hz: float, shaft_hz: float, bearing: BearingGeometry, band_hz: tuple[float, float]
) -> Measurement:
    """Measure samples [2, n] in g, radial and axial, of a shaft that turns at `shaft_hz`."""
    velocity = integrate(spectrum(samples_g * (GRAVITY_M_S2 * 1000), rate_hz), SEVERITY_HZ[0])
    impacts = envelope_spectrum(samples_g[0], rate_hz, *band_hz)
    floor_g = max(float(impacts.floor(0.3 * shaft_hz, 20 * shaft_hz)), 1e-9)
    centres_hz = shaft_hz * _envelope_orders(bearing)
    ringing = band_pass(samples_g, rate_hz, *band_hz)
    return Measurement(
        shaft_hz=shaft_hz,
        bearing=bearing,
        lines_mm_s=velocity.orders(shaft_hz, SHAFT_ORDERS),
        severity_mm_s=velocity.band_rms(*SEVERITY_HZ),
        ratios=impacts.line(centres_hz, centres_hz * SLIP_TOLERANCE) / floor_g,
        floor_g=floor_g,
        ringing_g=rms(ringing),
        kurtosis=float(kurtosis(ringing[0])),
        crest=float(crest_factor(ringing[0])),
    )


def _envelope_orders(bearing: BearingGeometry) -> Array:
    """Where the envelope is looked at: three of the shaft, three BPFO, three BPFI, two sidebands, the ball."""
    outer, inner = bearing.bpfo * (1 - MEAN_SLIP), bearing.bpfi * (1 - MEAN_SLIP)
    races = [outer, 2 * outer, 3 * outer, inner, 2 * inner, 3 * inner, inner - 1, inner + 1]
    return np.asarray([0.5, 1.0, 2.0, *races, 2 * bearing.bsf * (1 - MEAN_SLIP)])


_OUTER, _INNER = 3, 6
"""Places of BPFO and BPFI in _envelope_orders."""


def _shaft_hz(window: Window, end_ns: int, length_s: float) -> float | None:
    """Mean speed over the snapshot, or None where it is unknown, slow or unsteady."""
    speeds = window.signals.get(SPEED)
    if speeds is None:
        return None
    known = np.isfinite(speeds)
    inside = known & (window.times_ns <= end_ns) & (window.times_ns >= end_ns - int(length_s * 1e9))
    chosen = speeds[inside if inside.sum() >= 2 else known]
    if len(chosen) == 0 or chosen.min() < SLOWEST_RPM or np.ptp(chosen) > STEADY * chosen.mean():
        return None
    return float(chosen.mean()) / 60
