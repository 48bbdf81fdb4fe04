"""The extractor's arithmetic: regimes, means with holes, short histories, what cannot be judged."""

import numpy as np
import pytest

from millhand.pipeline.windows import Window, WindowBuilder
from millhand.records import Batch, Clock, Reading
from millhand.serving.manifest import read_manifest
from millhand_plugins.turbofan import cmapss, folds
from millhand_plugins.turbofan.extractor import (
    FEATURE_COUNT,
    FIRST_CYCLES,
    TIME_CONSTANTS_CYCLES,
    WINDOW_CYCLES,
    TurbofanExtractor,
    weighted_means,
)
from millhand_plugins.turbofan.fleet import SENSORS, SETTINGS, Fleet

HOUR_NS = 3600 * 10**9


@pytest.fixture(scope="module")
def fleet():
    return Fleet.read()


@pytest.fixture(scope="module")
def extractor():
    return TurbofanExtractor()


def window_of(settings, sensors) -> Window:
    """settings: [n, 3]; sensors: [n, 14]."""
    times = np.arange(1, len(settings) + 1) * HOUR_NS
    table = np.concatenate([settings, sensors], axis=1)
    signals = {name: table[:, place] for place, name in enumerate((*SETTINGS, *SENSORS))}
    return Window("engine", int(times[0]), int(times[-1]), times, signals)


def engine(fleet, deviations, regimes) -> Window:
    """A window whose cycles lie `deviations` [n, 14] sigma from new in `regimes` [n]."""
    return window_of(fleet.centres[regimes], fleet.level[regimes] + deviations * fleet.spread[regimes])


def test_a_new_engine_is_zero_in_every_regime(fleet, extractor):
    features = extractor.extract(engine(fleet, np.zeros((60, 14)), np.arange(60) % 6)).tensors["features"]
    assert features.shape == (FEATURE_COUNT,)
    assert features.dtype == np.float32
    assert np.abs(features[:-2]).max() < 1e-6


def test_the_same_wear_looks_the_same_in_every_regime(fleet, extractor):
    generator = np.random.default_rng(5)
    wear = generator.normal(size=(80, 14)).cumsum(axis=0) / 5
    one = extractor.extract(engine(fleet, wear, np.zeros(80, int))).tensors["features"]
    many = extractor.extract(engine(fleet, wear, generator.integers(0, 6, 80))).tensors["features"]
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_means_equal_their_definition():
    deviations = np.random.default_rng(1).normal(size=(70, 14))
    deviations[3:9, 2] = np.nan
    deviations[:, 5] = np.nan
    means = weighted_means(deviations)
    for row, constant in enumerate(TIME_CONSTANTS_CYCLES):
        for sensor in range(14):
            pairs = [
                (np.exp(-(69 - step) / constant), deviations[step, sensor])
                for step in range(70)
                if not np.isnan(deviations[step, sensor])
            ]
            expected = sum(w * d for w, d in pairs) / sum(w for w, _ in pairs) if pairs else 0.0
            assert means[row, sensor] == pytest.approx(expected)
    assert means[-1, 0] == pytest.approx(deviations[:FIRST_CYCLES, 0].mean())


def test_a_constant_window_gives_its_constant(fleet, extractor):
    for length in (1, 2, 19, WINDOW_CYCLES):
        found = extractor.extract(engine(fleet, np.full((length, 14), 1.5), np.full(length, 3)))
        np.testing.assert_allclose(found.tensors["features"][:-2], 1.5, atol=1e-5)
        assert found.evidence["observed_cycles"] == length


def test_only_the_last_cycles_count(fleet, extractor):
    wear = np.random.default_rng(2).normal(size=(300, 14))
    regimes = np.zeros(300, int)
    long = extractor.extract(engine(fleet, wear, regimes)).tensors["features"]
    last = extractor.extract(engine(fleet, wear[-WINDOW_CYCLES:], regimes[-WINDOW_CYCLES:])).tensors["features"]
    np.testing.assert_array_equal(long, last)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e300])
def test_a_bad_value_counts_as_missing(fleet, extractor, bad):
    wear = np.full((40, 14), 2.0)
    window = engine(fleet, wear, np.zeros(40, int))
    for place in (0, 20, 39):
        window.signals["s11"][place] = bad
    features = extractor.extract(window).tensors["features"]
    np.testing.assert_allclose(features[:-2], 2.0, atol=1e-5)


def test_a_dead_sensor_is_no_reason_to_fall_silent(fleet, extractor):
    window = engine(fleet, np.full((40, 14), 2.0), np.zeros(40, int))
    window.signals["s4"][:] = np.nan
    found = extractor.extract(window)
    assert np.isfinite(found.tensors["features"]).all()
    assert "s4_drift_sigma" not in found.evidence


@pytest.mark.parametrize("setting", [(17.0, 0.5, 100.0), (np.nan, 0.0, 100.0), (0.0, 0.0, 60.0), (1e9, 1e9, 1e9)])
def test_settings_of_no_known_regime_cannot_be_judged(fleet, extractor, setting):
    window = engine(fleet, np.zeros((20, 14)), np.zeros(20, int))
    for name, value in zip(SETTINGS, setting, strict=True):
        window.signals[name][-1] = value
    assert extractor.extract(window) is None


def test_a_cycle_without_any_sensor_cannot_be_judged(fleet, extractor):
    window = engine(fleet, np.zeros((20, 14)), np.zeros(20, int))
    for name in SENSORS:
        window.signals[name][-1] = np.nan
    assert extractor.extract(window) is None


def test_evidence_names_what_drifted_most(fleet, extractor):
    wear = np.zeros((50, 14))
    for name, sigma in (("s4", 4.0), ("s12", -3.0), ("s15", 2.0), ("s2", 1.0)):
        wear[:, SENSORS.index(name)] = sigma
    found = extractor.extract(engine(fleet, wear, np.zeros(50, int)))
    assert found.evidence == {
        "s4_drift_sigma": 4.0, "s12_drift_sigma": -3.0, "s15_drift_sigma": 2.0, "observed_cycles": 50.0,
    }  # fmt: skip


def test_windows_built_cycle_by_cycle_give_what_training_saw(fleet, extractor):
    generator, cycles = np.random.default_rng(8), 300
    table = np.zeros((cycles, len(cmapss.COLUMNS)))
    table[:, 1] = np.arange(1, cycles + 1)
    regimes = generator.integers(0, 6, cycles)
    table[:, 2:5] = fleet.centres[regimes]
    sensors = [cmapss.COLUMNS.index(name) for name in SENSORS]
    table[:, sensors] = fleet.level[regimes] + generator.normal(size=(cycles, 14)) * fleet.spread[regimes]
    engine_seen = cmapss.Engine("FD002", 1, table)
    builder = WindowBuilder("engine", read_manifest(folds.MODEL_FOLDER).window)
    built = []
    for row in table:
        clock = Clock(source_ns=int(row[1]) * HOUR_NS, receive_ns=0, monotonic_ns=0)
        readings = (Reading(name, value, "1", clock) for name, value in zip(cmapss.COLUMNS, row, strict=True))
        built += builder.add(Batch(tuple(readings)))
    assert [window.end_ns for window in built] == [cycle * HOUR_NS for cycle in range(1, cycles + 1)]
    for cycle, window in enumerate(built, start=1):
        trained = extractor.extract(engine_seen.window(cycle, WINDOW_CYCLES)).tensors["features"]
        np.testing.assert_array_equal(extractor.extract(window).tensors["features"], trained)
