"""The rig's physics: what each fault looks like, what follows what, and that a life depends on nothing but its seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from millhand.pipeline.features import GRAVITY_M_S2, envelope_spectrum, integrate, kurtosis, spectrum
from millhand_plugins.rig.asset import FAULTS, LIFE_MS
from millhand_plugins.rig.bearing import BearingGeometry
from millhand_plugins.rig.operation import END_MS, GRID_MS, IDLE, RUNNING, STARTING, severity_curve
from millhand_plugins.rig.registers import OPEN_CIRCUIT
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator
from millhand_plugins.rig.vibration import SAMPLE_RATE_HZ

SEEDS = (11, 12, 13)


def steady_counters(simulator: Simulator) -> list[int]:
    """Snapshots that were taken while the machine ran at an even speed."""
    found = []
    for counter in range(2, LIFE_MS // SNAPSHOT_MS):
        end = counter * SNAPSHOT_MS // GRID_MS
        part = slice(end - 45, end + 1)
        speed, state = simulator.operation.speed[part], simulator.operation.state[part]
        valid = np.isfinite(simulator.snapshot(counter).g_per_count)
        if (state == RUNNING).all() and np.ptp(speed) < 0.01 and valid:
            found.append(counter)
    return found


def shaft_hz(simulator: Simulator, counter: int) -> float:
    end = counter * SNAPSHOT_MS // GRID_MS
    return float(simulator.operation.speed[end - 40 : end + 1].mean() * simulator.traits.rated_speed_rpm / 60)


def samples_g(simulator: Simulator, counter: int) -> np.ndarray:
    snapshot = simulator.snapshot(counter)
    return snapshot.counts * snapshot.g_per_count


def velocity_mm_s(simulator: Simulator, counter: int, *orders: float) -> np.ndarray:
    """RMS velocity [2, orders] at multiples of the shaft's frequency."""
    lines = integrate(spectrum(samples_g(simulator, counter) * GRAVITY_M_S2 * 1000, SAMPLE_RATE_HZ), 10)
    return lines.orders(shaft_hz(simulator, counter), orders) / np.sqrt(2)


def last_and_first(simulator: Simulator) -> tuple[int, int]:
    counters = steady_counters(simulator)
    return counters[-1], counters[0]


def test_bearing_orders_are_those_published_for_the_6205():
    """Case Western Reserve University states 3.5848, 5.4152, 0.39828 and 4.7135 (twice the ball's spin)."""
    bearing = BearingGeometry()
    assert bearing.bpfo == pytest.approx(3.5848, abs=2e-3)
    assert bearing.bpfi == pytest.approx(5.4152, abs=2e-3)
    assert bearing.ftf == pytest.approx(0.39828, abs=2e-4)
    assert 2 * bearing.bsf == pytest.approx(4.7135, abs=5e-3)
    assert bearing.bpfo + bearing.bpfi == pytest.approx(bearing.balls)


def test_the_same_seed_is_the_same_life_in_any_order():
    first, second = Simulator(11, "bearing_inner"), Simulator(11, "bearing_inner")
    counters = [40, 3, 62, 41, 40]
    forward = {counter: first.snapshot(counter).counts.copy() for counter in range(70)}
    for counter in counters:
        assert (second.snapshot(counter).counts == forward[counter]).all()
    assert all(first.process(ms) == second.process(ms) for ms in range(0, END_MS, 330))


def test_seeds_and_faults_differ():
    assert (Simulator(11, "none").snapshot(20).counts != Simulator(12, "none").snapshot(20).counts).any()
    traits = [Simulator(seed, "none").traits for seed in range(20)]
    assert len({trait.resonances[1].frequency_hz for trait in traits}) == 20
    assert len({trait.vanes for trait in traits}) > 1


def test_the_machine_is_the_same_until_the_fault_begins():
    healthy, faulty = Simulator(11, "none"), Simulator(11, "looseness")
    before = range(0, faulty.traits.onset_ms, 490)
    assert all(healthy.process(ms) == faulty.process(ms) for ms in before)
    assert (healthy.snapshot(10).counts == faulty.snapshot(10).counts).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("race", ["outer", "inner"])
def test_a_defect_shows_in_the_envelope_at_its_predicted_place(seed, race):
    simulator = Simulator(seed, f"bearing_{race}")
    counter = steady_counters(simulator)[-2]
    bearing, hz = BearingGeometry(), shaft_hz(simulator, counter)
    predicted_hz = hz * (bearing.bpfo if race == "outer" else bearing.bpfi)
    found = envelope_spectrum(samples_g(simulator, counter)[0], SAMPLE_RATE_HZ, 1500, 5000)
    low, high = np.searchsorted(found.frequency_hz, [2.5 * hz, 7.5 * hz])
    highest_hz = found.frequency_hz[low + np.argmax(found.amplitude[low:high])]
    assert highest_hz == pytest.approx(predicted_hz, abs=0.015 * predicted_hz + found.resolution_hz)
    assert highest_hz <= predicted_hz + found.resolution_hz  # slip only slows the balls
    assert found.line(highest_hz, 3) > 5 * found.floor(20, 1000)


def test_an_inner_race_turns_through_the_load_zone():
    """So its lines carry side bands at the shaft's frequency; the outer race's do not."""
    ratios = {}
    for race in ("outer", "inner"):
        simulator = Simulator(11, f"bearing_{race}")
        counter = steady_counters(simulator)[-2]
        bearing, hz = BearingGeometry(), shaft_hz(simulator, counter)
        order = (bearing.bpfo if race == "outer" else bearing.bpfi) * (1 - simulator.traits.cage_slip)
        found = envelope_spectrum(samples_g(simulator, counter)[0], SAMPLE_RATE_HZ, 1500, 5000)
        centre, *side = found.orders(hz, [order, order - 1, order + 1], 0.01)
        ratios[race] = np.mean(side) / centre
    assert ratios["inner"] > 0.3 > ratios["outer"] * 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_imbalance_is_1x_and_radial(seed):
    simulator = Simulator(seed, "imbalance")
    last, first = last_and_first(simulator)
    radial, axial = velocity_mm_s(simulator, last, 1, 2)
    assert radial[0] > 4.5 > 2.5 > velocity_mm_s(simulator, first, 1)[0, 0]
    assert radial[0] > 5 * radial[1]
    assert radial[0] > 2 * axial[0]


def test_the_force_of_an_imbalance_grows_with_the_square_of_the_speed():
    simulator = Simulator(11, "imbalance")
    vibration = simulator._vibration
    counter = steady_counters(simulator)[-1]
    levels = []
    for share in (0.5, 1.0):
        moment = vibration._moment(counter * SNAPSHOT_MS)
        slowed = type(moment)(moment.time_s, moment.speed * share, moment.torque, moment.turns)
        levels.append(np.abs(vibration._imbalance(slowed, 1.0)[0]).max())
    assert levels[1] == pytest.approx(4 * levels[0], rel=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_misalignment_is_2x_and_axial(seed):
    simulator = Simulator(seed, "misalignment")
    last, first = last_and_first(simulator)
    radial, axial = velocity_mm_s(simulator, last, 1, 2)
    assert radial[1] > radial[0]
    assert radial[1] > 5 * velocity_mm_s(simulator, first, 2)[0, 0]
    assert axial.min() > 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_looseness_has_half_orders_and_many_harmonics(seed):
    simulator = Simulator(seed, "looseness")
    last, first = last_and_first(simulator)
    orders = (0.5, 1.5, 2, 3)
    assert (velocity_mm_s(simulator, last, *orders)[0] > 2 * velocity_mm_s(simulator, first, *orders)[0]).sum() >= 3
    assert velocity_mm_s(simulator, last, 0.5)[0, 0] > 0.8


def test_a_healthy_machine_stays_healthy():
    simulator = Simulator(11, "none")
    counters = steady_counters(simulator)
    for counter in (counters[0], counters[-1]):
        assert velocity_mm_s(simulator, counter, 1, 2).max() < 2.3
    assert np.median([kurtosis(samples_g(simulator, counter)[0]) for counter in counters]) < 3.5


def test_severity_rises_from_onset_to_failure_only_while_the_machine_turns():
    simulator = Simulator(12, "bearing_outer")
    severity = simulator.operation.severity
    onset = simulator.traits.onset_ms // GRID_MS
    assert severity[onset - 1] == 0
    assert (np.diff(severity) >= 0).all()
    assert severity[LIFE_MS // GRID_MS] == pytest.approx(simulator.traits.strength)
    still = simulator.operation.speed[1:] == 0
    assert (np.diff(severity)[still] == 0).all()
    assert severity_curve(np.array([0.0, 1.0]), 3.0) == pytest.approx([0, 1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_life_starts_idle_breaks_and_ends_tripped(fault):
    state = Simulator(13, fault).operation.state
    assert state[0] == IDLE
    assert state[-1] == IDLE
    runs = np.flatnonzero(np.diff((state == RUNNING).astype(int)) == 1)
    assert 2 <= len(runs) <= 4
    assert all((state[run - 20 : run] == STARTING).any() for run in runs)
    assert (state[(LIFE_MS - 2000) // GRID_MS : LIFE_MS // GRID_MS - 1] == RUNNING).all()


def test_current_flow_and_pressure_follow_speed_and_load():
    simulator = Simulator(12, "none")
    operation = simulator.operation
    running = operation.state == RUNNING
    assert np.corrcoef(operation.torque[running], operation.current_a[running])[0, 1] > 0.99
    idle = operation.speed == 0
    assert operation.current_a[idle].max() == 0
    assert operation.pressure_bar[idle].max() == 0
    head = operation.pressure_bar[running] / simulator.traits.shutoff_pressure_bar
    flow = operation.flow_m3_h[running] / simulator.traits.rated_flow_m3_h
    assert head == pytest.approx(operation.speed[running] ** 2 - 0.25 * flow**2)


def test_the_bearing_warms_with_a_lag_and_a_spall_heats_it():
    healthy, worn = Simulator(12, "none").operation, Simulator(12, "bearing_outer").operation
    rise = healthy.bearing_cel - healthy.ambient_cel
    start = int(np.argmax(healthy.state == RUNNING))
    assert rise[start] < 0.7 * rise[start + 500]  # five seconds later
    stop = start + int(np.argmax(healthy.speed[start:] == 0))
    assert rise[stop + 20] > 0.9 * rise[stop]  # it does not drop with the speed
    failure = LIFE_MS // GRID_MS
    assert worn.bearing_cel[failure] > healthy.bearing_cel[failure] + 5


def test_sensors_drop_out_in_each_way():
    ways = set()
    for seed in range(6):
        simulator = Simulator(seed, "none")
        temperatures = [simulator.process(ms)["bearing_temperature"] for ms in range(0, LIFE_MS, 50)]
        ways |= {"open wire"} if OPEN_CIRCUIT in temperatures else set()
        flows = np.array([simulator.process(ms)["flow"] for ms in range(0, LIFE_MS, GRID_MS)])
        turning = simulator.operation.state[: len(flows)] == RUNNING
        held = np.array([(flows[i : i + 30] == flows[i]).all() and turning[i] for i in range(len(flows) - 30)])
        ways |= {"held value"} if held.any() else set()
        snapshots = [simulator.snapshot(counter) for counter in range(1, 70)]
        ways |= {"no snapshot"} if any(np.isnan(snapshot.g_per_count) for snapshot in snapshots) else set()
        pairs = pairwise(snapshots)
        same = any((a.counts == b.counts).all() and np.isfinite(a.g_per_count + b.g_per_count) for a, b in pairs)
        ways |= {"held snapshot"} if same else set()
    assert ways == {"open wire", "held value", "no snapshot", "held snapshot"}
