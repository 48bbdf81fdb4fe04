"""The slow side of the rig's life on a 10 ms grid: duty, speed, torque, hydraulics, heat and the growth of the fault.

Slow processes are compressed so that a life fits into 35 s of the rig's clock: heat, demand and damage run some
thousand times faster than in a plant. Rotation and vibration are not compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.rig.asset import DUTY, LIFE_MS, NOISE, Traits, random_stream

GRID_MS = 10
TAIL_MS = 2_000
"""How long the tripped machine is still observed."""
END_MS = LIFE_MS + TAIL_MS

IDLE, RUNNING, STARTING = 0, 1, 2
"""Values of the machine state register."""

START_PER_S = 1.25
"""Ramp of the drive from standstill, rated speeds a second."""
CHANGE_PER_S = 0.06
"""Ramp of the drive between two set points."""
TRIP_PER_S = 3.0

# How much a fault of severity 1 adds to the torque (of rated) and to the heat of the bearing.
EXTRA_TORQUE = {
    "bearing_outer": 0.04,
    "bearing_inner": 0.04,
    "imbalance": 0.01,
    "misalignment": 0.05,
    "looseness": 0.02,
}
EXTRA_HEAT = {"bearing_outer": 0.9, "bearing_inner": 0.9, "imbalance": 0.2, "misalignment": 0.35, "looseness": 0.12}

NO_LOAD_CURRENT = 0.35
"""Magnetising current of a two-pole induction motor, of the rated current."""
RATED_SLIP = 0.015

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Operation:
    """True values on the grid, each [n] with n = END_MS / GRID_MS + 1; speed and torque are fractions of rated."""

    state: NDArray[np.int64]
    speed: Array
    torque: Array
    revolutions: Array
    """Turns of the shaft since the start of life."""
    severity: Array
    flow_m3_h: Array
    pressure_bar: Array
    current_a: Array
    bearing_cel: Array
    ambient_cel: Array


@dataclass(frozen=True, slots=True)
class Measured:
    """What the transmitters say: the truth with noise, held values and breaks (NaN). Each [n] on the same grid."""

    speed_rpm: Array
    load_percent: Array
    current_a: Array
    bearing_cel: Array
    ambient_cel: Array
    flow_m3_h: Array
    pressure_bar: Array


def operate(traits: Traits) -> Operation:
    """Run one life of the machine."""
    count = END_MS // GRID_MS + 1
    time_s = np.arange(count) * (GRID_MS / 1000)
    random = random_stream(traits.seed, DUTY)
    on = _duty(random, count)
    speed = _drive(on, _steps(random, count, (0.82, 1.0), (3.0, 7.0)))
    valve = _lag(_steps(random, count, (0.55, 1.0), (2.0, 5.0)), 0.4) + _wander(random, count, 0.015)
    hydraulic = speed**2 * (0.45 + 0.55 * valve)
    turning = speed > 0.02
    severity = _severity(traits, speed * turning, hydraulic)
    # Inertia of motor and pump adds torque while the speed rises.
    inertia = 0.4 * np.clip(np.gradient(speed, time_s), 0, None)
    torque = np.where(turning, hydraulic + EXTRA_TORQUE.get(traits.fault, 0.0) * severity * speed + inertia, 0.0)
    shaft = speed * (1 + RATED_SLIP * (1 - torque) + _wander(random, count, 0.0008)) * turning
    # Affinity laws: flow goes with the speed, head with its square; the pump's curve falls with the flow squared.
    flow = shaft * valve
    pressure = np.clip(shaft**2 - 0.25 * flow**2, 0, None)
    current = np.sqrt(NO_LOAD_CURRENT**2 + (1 - NO_LOAD_CURRENT**2) * torque**2) * turning
    drift = 1.5 * np.sin(2 * np.pi * time_s / 31 + traits.phases[0])
    ambient = traits.ambient_cel + drift + _lag(traits.skid_rise_k * torque, 8.0)
    return Operation(
        state=np.where(~turning, IDLE, np.where(_starting(on, speed), STARTING, RUNNING)),
        speed=shaft,
        torque=torque,
        revolutions=np.cumsum(shaft) * (traits.rated_speed_rpm / 60 * GRID_MS / 1000),
        severity=severity,
        flow_m3_h=traits.rated_flow_m3_h * flow,
        pressure_bar=traits.shutoff_pressure_bar * pressure,
        current_a=traits.rated_current_a * current,
        bearing_cel=ambient + _bearing_rise(traits, shaft, torque, severity),
        ambient_cel=ambient,
    )


def measure(traits: Traits, operation: Operation) -> Measured:
    """Give the true values the noise and the weaknesses of real transmitters."""
    random = random_stream(traits.seed, NOISE)
    truth = {
        "speed_rpm": operation.speed * traits.rated_speed_rpm,
        "load_percent": operation.torque * 100,
        "current_a": operation.current_a,
        "bearing_cel": operation.bearing_cel,
        "ambient_cel": operation.ambient_cel,
        "flow_m3_h": operation.flow_m3_h,
        "pressure_bar": operation.pressure_bar,
    }
    spread = {"speed_rpm": 0.5, "bearing_cel": 0.08, "ambient_cel": 0.05}
    values = {}
    for name, true in truth.items():
        noise = random.standard_normal(len(true))
        scale = spread.get(name, 0.0) or 0.005 * np.abs(true)
        moving = operation.speed > 0
        values[name] = true + noise * scale * (moving if name != "ambient_cel" else 1.0)
    for _ in range(int(random.integers(2, 5))):  # a transmitter that repeats itself
        held = values[str(random.choice(list(values)))]
        start, stop = _episode(random, len(held), (0.3, 1.0))
        held[start:stop] = held[start]
    for _ in range(int(random.integers(1, 3))):  # an open thermocouple
        start, stop = _episode(random, len(values["bearing_cel"]), (0.5, 1.5))
        values["bearing_cel"][start:stop] = np.nan
    return Measured(**values)


def severity_curve(progress: Array, growth: float) -> Array:
    """Severity 0..1 over the progress 0..1 from onset to failure.

    Exponential growth of the degradation signal: N. Gebraeel et al., "Residual-life distributions from component
    degradation signals", IIE Transactions 37 (2005).
    """
    return np.asarray(np.expm1(growth * np.clip(progress, 0, 1)) / np.expm1(growth))


def _severity(traits: Traits, speed: Array, torque: Array) -> Array:
    """Damage grows with revolutions and with the cube of the load (Palmgren-Miner rule with ISO 281's exponent)."""
    onset, failure = traits.onset_ms // GRID_MS, LIFE_MS // GRID_MS
    if traits.fault == "none":
        return np.zeros_like(speed)
    rate = speed * (0.7 + 0.3 * torque) ** 3
    rate[:onset] = 0
    damage = np.cumsum(rate)
    return traits.strength * severity_curve(damage / damage[failure], traits.growth)


def _duty(random: np.random.Generator, count: int) -> NDArray[np.bool_]:
    """When the machine is switched on: not at first, not in one to three breaks, not after the end of life."""
    on = np.ones(count, dtype=bool)
    on[: int(random.uniform(0.4, 0.9) * 1000 / GRID_MS)] = False
    breaks = int(random.integers(1, 4))
    edges = np.linspace(4.0, LIFE_MS / 1000 - 4.0, breaks + 1)
    for begin, end in pairwise(edges.tolist()):
        length_s = random.uniform(1.2, 2.4)
        start_s = random.uniform(begin, end - length_s - 1.0)
        on[int(start_s * 1000 / GRID_MS) : int((start_s + length_s) * 1000 / GRID_MS)] = False
    on[LIFE_MS // GRID_MS :] = False
    return on


def _drive(on: NDArray[np.bool_], set_point: Array) -> Array:
    """Speed of a drive whose ramps are limited."""
    speed = np.zeros(len(on))
    step_s = GRID_MS / 1000
    value, started = 0.0, False
    targets = np.where(on, set_point, 0.0).tolist()
    for index, target in enumerate(targets):
        if target == 0.0:
            started = False
            value = max(value - TRIP_PER_S * step_s, 0.0)
        elif not started:
            value = min(value + START_PER_S * step_s, target)
            started = value == target
        else:
            change = CHANGE_PER_S * step_s
            value += min(max(target - value, -change), change)
        speed[index] = value
    return speed


def _starting(on: NDArray[np.bool_], speed: Array) -> NDArray[np.bool_]:
    """While the drive ramps up or coasts down."""
    slope = np.abs(np.gradient(speed)) / (GRID_MS / 1000)
    return np.asarray(~on | (slope > 2 * CHANGE_PER_S))


def _steps(random: np.random.Generator, count: int, level: tuple[float, float], hold_s: tuple[float, float]) -> Array:
    """A set point that jumps to a new level now and then."""
    values = np.empty(count)
    start = 0
    while start < count:
        stop = start + int(random.uniform(*hold_s) * 1000 / GRID_MS)
        values[start:stop] = random.uniform(*level)
        start = stop
    return values


def _lag(values: Array, lag_s: float) -> Array:
    """First-order lag that starts settled on the first value."""
    result = np.empty_like(values)
    weight = 1 - float(np.exp(-GRID_MS / 1000 / lag_s))
    level = float(values[0])
    for index, value in enumerate(values.tolist()):
        level += weight * (value - level)
        result[index] = level
    return result


def _wander(random: np.random.Generator, count: int, spread: float) -> Array:
    """Noise of standard deviation `spread` with a memory of 0.5 s (Ornstein-Uhlenbeck)."""
    white = random.standard_normal(count)
    white[0] = 0.0
    memory_s = 0.5
    return _lag(white, memory_s) * float(spread * np.sqrt(2 * memory_s / (GRID_MS / 1000)))


def _bearing_rise(traits: Traits, speed: Array, torque: Array, severity: Array) -> Array:
    """Rise over ambient: friction heat against cooling, one thermal mass.

    Friction power is speed times a moment with a part that follows the load and a viscous part, as in the SKF bearing
    friction model (Rolling Bearings catalogue); damage adds to it. The still machine cools more slowly.
    """
    heat = EXTRA_HEAT.get(traits.fault, 0.0) * severity
    steady = traits.bearing_rise_k * speed * (0.45 + 0.55 * torque) * (1 + heat)
    result = np.empty_like(steady)
    level = 0.3 * traits.bearing_rise_k
    step_s = GRID_MS / 1000
    lags = np.where(speed > 0, traits.bearing_lag_s, 1.6 * traits.bearing_lag_s)
    for index, (target, lag_s) in enumerate(zip(steady.tolist(), lags.tolist(), strict=True)):
        level += (target - level) * step_s / lag_s
        result[index] = level
    return result


def _episode(random: np.random.Generator, count: int, length_s: tuple[float, float]) -> tuple[int, int]:
    start = int(random.integers(0, count))
    return start, start + int(random.uniform(*length_s) * 1000 / GRID_MS)
