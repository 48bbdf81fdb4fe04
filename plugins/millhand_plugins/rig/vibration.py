"""The fast side: acceleration of the drive-end bearing housing, radial and axial, synthesised from the mechanics.

Sources: R. B. Randall, "Vibration-based Condition Monitoring" (Wiley, 2011), chapters 2 and 3, for what imbalance,
misalignment and looseness look like; J. Antoni and R. B. Randall, "A stochastic model for simulation and diagnostics
of rolling element bearings with localized faults", J. Vib. Acoust. 125 (2003), for impacts with random slip;
T. A. Harris, "Rolling Bearing Analysis" (Stribeck's load distribution) for the load zone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.rig.asset import SNAPSHOT, Traits, random_stream
from millhand_plugins.rig.bearing import BearingGeometry
from millhand_plugins.rig.operation import END_MS, GRID_MS, RATED_SLIP, Operation

SAMPLES = 4096
SAMPLE_RATE_HZ = 10_240.0
GRAVITY_M_S2 = 9.80665

IMBALANCE_MM_S = 11.0
"""Velocity (RMS, rated speed) of the shaft's frequency at severity 1."""
MISALIGNMENT_MM_S = 7.5
LOOSENESS_MM_S = 14.0
BEARING_G = 4.0
"""Strength of one impact of a defect of severity 1 under full load, before the resonances' gains."""
LANDING_G = 0.7
"""Strength of the knock of a loose foot of severity 1."""

_RING = 256
"""Samples after which an impact has died away."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Moment:
    """One snapshot's time axis. All arrays are [samples + _RING]; the first _RING are the time before it."""

    time_s: Array
    speed: Array
    torque: Array
    turns: Array

    @property
    def angle(self) -> Array:
        return 2 * np.pi * self.turns


class Vibration:
    """Makes the acceleration of any stretch of one life. Each call stands alone: no state, any order."""

    def __init__(self, traits: Traits, operation: Operation, geometry: BearingGeometry) -> None:
        self._traits = traits
        self._operation = operation
        self._geometry = geometry

    def acceleration_g(self, end_ms: int, number: int) -> Array:
        """Acceleration [2, SAMPLES] in g, radial and axial, up to `end_ms`; `number` seeds the noise."""
        random = random_stream(self._traits.seed, SNAPSHOT, number)
        moment = self._moment(end_ms)
        severity = float(self._operation.severity[min(end_ms, END_MS) // GRID_MS])
        fault = self._traits.fault
        turning = bool(moment.speed[-1] > 0.02 or moment.speed[0] > 0.02)
        signal = self._noise(random, moment, severity if fault.startswith("bearing") else 0.0)
        if turning:
            signal += self._imbalance(moment, severity * (fault == "imbalance"))
            signal += self._misalignment(moment, severity * (fault == "misalignment"))
            signal += self._looseness(random, moment, severity * (fault == "looseness"))
            signal += self._pump_and_motor(moment)
            if fault.startswith("bearing"):
                signal += self._bearing(random, moment, severity)
        if random.random() < self._traits.shock_rate:
            signal += self._ring(moment, random.choice(moment.time_s, 2), random.uniform(0.2, 2.0, 2))
        gains = np.asarray(self._traits.sensor_gains, dtype=np.float64)
        return np.asarray(signal[:, _RING:] * gains[:, None])

    def _moment(self, end_ms: int) -> _Moment:
        time_s = end_ms / 1000 - np.arange(SAMPLES + _RING - 1, -1, -1) / SAMPLE_RATE_HZ
        speed, torque, turns = (
            np.interp(time_s, self._grid_s, values)
            for values in (self._operation.speed, self._operation.torque, self._operation.revolutions)
        )
        return _Moment(time_s, speed, torque, turns)

    @cached_property
    def _grid_s(self) -> Array:
        return np.arange(END_MS // GRID_MS + 1, dtype=np.float64) * (GRID_MS / 1000)

    def _line(self, moment: _Moment, order: float, phase: float, radial_mm_s: Array, axial_mm_s: Array) -> Array:
        """A spectral line of the given RMS velocities at `order` times the shaft's frequency, as acceleration in g."""
        omega = 2 * np.pi * order * moment.speed * self._traits.rated_speed_rpm / 60
        wave: Array = math.sqrt(2) * omega * np.cos(order * moment.angle + phase) / (1000 * GRAVITY_M_S2)
        return np.array([radial_mm_s * wave, axial_mm_s * wave], dtype=np.float64)

    def _imbalance(self, moment: _Moment, severity: float) -> Array:
        """A heavy spot: the force, and so the acceleration, grows with the speed squared; the velocity with speed."""
        phases = self._traits.phases
        residual = self._traits.residual_imbalance_mm_s * moment.speed
        grown = IMBALANCE_MM_S * severity * moment.speed
        return self._line(moment, 1, phases[1], residual, 0.25 * residual) + self._line(
            moment, 1, phases[2], grown, 0.25 * grown
        )

    def _misalignment(self, moment: _Moment, severity: float) -> Array:
        """Two bends a turn: parallel offset shows as 2x radial, an angle as 1x and 2x axial; the torque drives both."""
        traits, phases = self._traits, self._traits.phases
        level = (traits.residual_misalignment_mm_s + MISALIGNMENT_MM_S * severity) * (0.5 + 0.5 * moment.torque)
        angular, parallel = traits.axial_share, 1 - traits.axial_share
        return (
            self._line(moment, 1, phases[3], 0.25 * level, (0.4 + 0.8 * angular) * level)
            + self._line(moment, 2, phases[4], (0.6 + 0.8 * parallel) * level, (0.4 + 0.6 * angular) * level)
            + self._line(moment, 3, phases[5], 0.25 * level, 0.2 * level)
        )

    def _looseness(self, random: np.random.Generator, moment: _Moment, severity: float) -> Array:
        """A foot that lifts and lands: the motion is cut off (many harmonics), bounces each other turn, knocks."""
        traits, phases = self._traits, self._traits.phases
        turns = np.arange(np.floor(moment.turns[0]) - 1, np.ceil(moment.turns[-1]) + 2)
        strength = np.interp(moment.turns, turns, 1 + 0.15 * random.standard_normal(len(turns)))
        motion = np.cos(moment.angle + phases[6]) + 0.65 * np.cos(0.5 * moment.angle + phases[7])
        level_mm_s = (traits.residual_looseness_mm_s + LOOSENESS_MM_S * severity) * moment.speed
        velocity_m_s = level_mm_s * strength * np.clip(motion, -0.7, 0.25) / 1000
        wave = np.gradient(velocity_m_s, 1 / SAMPLE_RATE_HZ) / GRAVITY_M_S2
        signal = np.stack([wave, 0.45 * wave])
        if severity > 0:
            landings_s = _crossings(moment, 0.5 * moment.turns + phases[7] / (2 * np.pi), np.ones(len(turns)))
            knocks = LANDING_G * severity * random.uniform(0.4, 1.6, len(landings_s))
            signal += self._ring(moment, landings_s, knocks)
        return signal

    def _pump_and_motor(self, moment: _Moment) -> Array:
        """Vane pass and its double, stronger off the best flow; the motor's pull at twice the supply frequency."""
        traits, phases = self._traits, self._traits.phases
        off_design = 1 + np.abs(moment.torque - 0.85 * moment.speed**2)
        vane = traits.vane_pass_mm_s * moment.speed * off_design
        magnetic = 0.15 * moment.torque
        return (
            self._line(moment, traits.vanes, phases[8], vane, 0.6 * vane)
            + self._line(moment, 2 * traits.vanes, phases[9], 0.25 * vane, 0.15 * vane)
            + self._line(moment, 2 * (1 + RATED_SLIP), phases[10], magnetic, 0.1 * magnetic)
        )

    def _bearing(self, random: np.random.Generator, moment: _Moment, severity: float) -> Array:
        """Impacts of balls on a spall, each with its own small slip; an inner race turns through the load zone."""
        traits = self._traits
        inner = traits.fault == "bearing_inner"
        order = (self._geometry.bpfi if inner else self._geometry.bpfo) * (1 - traits.cage_slip)
        passes = order * moment.turns
        intervals = 1 + traits.impact_jitter * random.standard_normal(int(passes[-1] - passes[0]) + 8)
        intervals[0] = random.random()
        times_s = _crossings(moment, passes, intervals)
        if len(times_s) == 0:
            return np.zeros((2, len(moment.time_s)))
        speed, torque, turns = (
            np.interp(times_s, moment.time_s, values) for values in (moment.speed, moment.torque, moment.turns)
        )
        strength = BEARING_G * severity * speed**1.5 * (0.55 + 0.45 * torque)
        strength *= np.clip(1 + 0.12 * random.standard_normal(len(times_s)), 0.2, None)
        if inner:
            strength *= 0.06 + 0.94 * _load_zone(2 * np.pi * turns + traits.phases[11])
        return self._ring(moment, times_s, strength)

    def _noise(self, random: np.random.Generator, moment: _Moment, roughness: float) -> Array:
        """Flow noise: white, partly through the resonances, and slow turbulence; a rough bearing adds to it."""
        count = len(moment.time_s)
        level = 0.3 + 0.7 * float(moment.speed.mean()) ** 2 * (1 + 0.4 * roughness)
        white = random.standard_normal((3, count))
        spectrum = np.fft.rfft(white)
        frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE_HZ)
        turbulence = np.fft.irfft(spectrum[2] / (1 + (frequency / 150) ** 4), count) * 0.08
        signal = np.empty((2, count))
        for channel, noise_g in enumerate(self._traits.noise_g):
            response = 0.7 + sum(
                0.25 * mode.gains[channel] / np.abs(1 - (ratio := frequency / mode.frequency_hz) ** 2 + 0.2j * ratio)
                for mode in self._traits.resonances
            )
            coloured = np.fft.irfft(spectrum[channel] * response, count)
            signal[channel] = level * noise_g * (0.6 * coloured + turbulence)
        return signal

    def _ring(self, moment: _Moment, times_s: Array, strength_g: Array) -> Array:
        """The structure's answer to knocks at `times_s`: every mode rings and dies away.

        A mode's answer is the imaginary part of exp(pole * t). One that begins between two samples is one that begins
        on the next sample times a constant, so that all of them are one convolution.
        """
        count = len(moment.time_s)
        position = (times_s - moment.time_s[0]) * SAMPLE_RATE_HZ
        first = np.ceil(position).astype(int)
        delay_s = (first - position) / SAMPLE_RATE_HZ
        after_s = np.arange(_RING) / SAMPLE_RATE_HZ
        signal = np.zeros((2, count))
        for mode in self._traits.resonances:
            omega = 2 * np.pi * mode.frequency_hz
            pole = complex(-mode.damping * omega, omega * math.sqrt(1 - mode.damping**2))
            knocks = np.zeros(count + _RING, dtype=np.complex128)
            np.add.at(knocks, first, strength_g * np.exp(pole * delay_s))
            ringing = np.fft.fft(np.exp(pole * after_s), len(knocks))
            signal += np.outer(mode.gains, np.fft.ifft(np.fft.fft(knocks) * ringing).imag[:count])
        return signal


def _crossings(moment: _Moment, cycles: Array, intervals: Array) -> Array:
    """When the rising `cycles` pass floor(cycles[0]) plus the running sum of `intervals`."""
    marks = np.floor(cycles[0]) + np.cumsum(intervals)
    marks = marks[(marks > cycles[0]) & (marks < cycles[-1])]
    return np.asarray(np.interp(marks, cycles, moment.time_s))


def _load_zone(angle: Array) -> Array:
    """Stribeck's distribution of the radial load over a ball bearing without clearance, 0..1 (exponent 3/2)."""
    return np.asarray(np.clip(np.cos(angle), 0, None) ** 1.5)
