"""The features against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from millhand.pipeline import features
from millhand.pipeline.asset import AssetPipeline
from millhand.pipeline.settings import AssetSettings
from millhand.pipeline.windows import Window
from millhand.records import Batch, Clock, Reading, Waveform
from millhand.serving.manifest import Manifest

RATE_HZ = 8192.0
TIME_S = np.arange(8192) / RATE_HZ
CLOCK = Clock(0, 0, 0)


def sine(frequency_hz: float, amplitude: float = 1.0) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency_hz * TIME_S)


def window(signals: dict, waveforms: dict | None = None, **context) -> Window:
    steps = len(next(iter(signals.values()))) if signals else 1
    times = np.arange(steps, dtype=np.int64)
    return Window("a", 0, steps, times, signals, waveforms or {}, context=context)


def waveform(samples: np.ndarray) -> Waveform:
    return Waveform("v", samples.astype("<f4").tobytes(), RATE_HZ, "g", CLOCK)


def test_statistics_of_a_sine():
    x = sine(64, 3.0)
    assert features.rms(x) == pytest.approx(3 / np.sqrt(2))
    assert features.peak(x) == pytest.approx(3)
    assert features.crest_factor(x) == pytest.approx(np.sqrt(2))
    assert features.kurtosis(x) == pytest.approx(1.5)
    assert features.skewness(x) == pytest.approx(0, abs=1e-9)


def test_moments_of_a_rare_event():
    """A two-valued signal with share p has skewness (1-2p)/sqrt(pq) and kurtosis (1-3pq)/pq."""
    x = np.zeros(1000)
    x[:10] = 1
    p, q = 0.01, 0.99
    assert features.skewness(x) == pytest.approx((1 - 2 * p) / np.sqrt(p * q))
    assert features.kurtosis(x) == pytest.approx((1 - 3 * p * q) / (p * q))


def test_statistics_are_vectorised_and_survive_a_constant():
    x = np.stack([sine(64), np.full(8192, 5.0)])
    assert features.kurtosis(x) == pytest.approx([1.5, 0])
    assert features.crest_factor(np.zeros(16)) == 0


@pytest.mark.parametrize("frequency_hz", [100.0, 100.25, 100.5, 333.3])
def test_line_amplitude_does_not_depend_on_the_bin(frequency_hz):
    found = features.spectrum(sine(frequency_hz, 2.5), RATE_HZ).line(frequency_hz, 2.0)
    assert found == pytest.approx(2.5, rel=0.01)


def test_orders_find_half_whole_and_broken_orders():
    shaft_hz = 48.0
    x = sine(shaft_hz, 1.0) + sine(0.5 * shaft_hz, 0.3) + sine(3.58 * shaft_hz, 0.1)
    found = features.spectrum(x, RATE_HZ).orders(shaft_hz, [0.5, 1, 2, 3.58])
    assert found == pytest.approx([0.3, 1.0, 0.0, 0.1], abs=0.003)


def test_a_line_beyond_the_spectrum_is_zero():
    assert features.spectrum(sine(64), RATE_HZ).line(9000.0, 10.0) == 0


def test_band_energies_sum_to_the_mean_square():
    x = np.random.default_rng(1).standard_normal(8192)
    spectrum = features.spectrum(x, RATE_HZ)
    assert spectrum.band_energies(32).sum() == pytest.approx(np.mean(x**2), rel=0.05)
    assert spectrum.band_rms(0, RATE_HZ / 2) ** 2 == pytest.approx(spectrum.band_energies(1)[0])


def test_velocity_rms_of_a_sine():
    """A velocity of v mm/s RMS at f needs an acceleration of v/1000 * sqrt(2) * 2 pi f m/s2."""
    acceleration = sine(50, 4.5e-3 * np.sqrt(2) * 2 * np.pi * 50)
    assert features.velocity_rms_mm_s(acceleration, RATE_HZ) == pytest.approx(4.5, rel=1e-3)


def test_velocity_rms_leaves_out_what_the_standard_leaves_out():
    outside = sine(4, 1.0) + sine(2000, 50.0)
    assert features.velocity_rms_mm_s(outside, RATE_HZ) == pytest.approx(0, abs=0.05)


def test_envelope_of_an_amplitude_modulated_carrier():
    """(1 + m sin wt) times a carrier has exactly that factor as its envelope."""
    modulation = 1 + sine(32, 0.5)
    x = modulation * np.cos(2 * np.pi * 2048 * TIME_S)
    assert features.envelope(x, RATE_HZ, 1000, 3000) == pytest.approx(modulation, abs=1e-9)
    spectrum = features.envelope_spectrum(x + sine(50, 10), RATE_HZ, 1000, 3000)
    assert spectrum.line(32.0, 1.0) == pytest.approx(0.5, rel=0.01)


def test_band_pass_keeps_the_band_only():
    x = sine(100) + sine(1500, 0.2)
    assert features.band_pass(x, RATE_HZ, 1000, 2000) == pytest.approx(sine(1500, 0.2), abs=1e-9)


def test_envelope_handles_an_odd_count():
    assert features.envelope(sine(512)[:4095], RATE_HZ, 400, 600).shape == (4095,)


def extractor(name: str):
    return next(item for item in features.builtin_extractors() if item.name == name)


def test_raw_pads_on_the_left_and_fills_gaps():
    signals = {"a": np.array([1.0, np.nan, 3.0]), "b": np.array([np.nan, 5.0, 6.0])}
    found = extractor("raw").extract(window(signals, length=5))
    assert found.tensors["input"].dtype == np.float32
    assert found.tensors["input"].tolist() == [[1, 1, 1, 1, 3], [5, 5, 5, 5, 6]]


def test_raw_names_the_tensor_and_refuses_an_empty_signal():
    assert "x" in extractor("raw").extract(window({"a": np.ones(3)}, tensor="x")).tensors
    assert extractor("raw").extract(window({"a": np.full(3, np.nan)})) is None


def test_statistics_extractor():
    found = extractor("statistics").extract(window({"a": np.array([1.0, 3.0])}, {"v": waveform(sine(64, 2))}))
    table = found.tensors["input"]
    assert table.shape == (2, 7)
    assert table[0, :2] == pytest.approx([2, 1])
    assert table[1, 2] == pytest.approx(np.sqrt(2), rel=1e-5)


def test_spectrum_extractor_puts_a_line_into_its_band():
    found = extractor("spectrum").extract(window({}, {"v": waveform(sine(1000, 2))}, bands=32))
    bands = found.tensors["input"][0]
    assert bands.shape == (32,)
    assert np.argmax(bands) == int(1000 / (RATE_HZ / 2) * 32)
    assert 10 ** bands.max() == pytest.approx(2.0, rel=0.02)
    assert found.evidence["v_rms_g"] == pytest.approx(np.sqrt(2), rel=1e-5)


def test_spectrum_extractor_refuses_what_is_too_short():
    assert extractor("spectrum").extract(window({}, {})) is None
    assert extractor("spectrum").extract(window({}, {"v": waveform(np.ones(8))})) is None


async def test_options_of_model_toml_reach_the_extractor_and_the_owner_overrules_them():
    manifest = Manifest(
        name="m",
        description="",
        licence="Apache-2.0",
        inputs=[{"name": "x", "shape": [-1, 1, 5]}],
        outputs=[{"name": "y", "shape": [-1, 1]}],
        window={"by": "count", "length": 5, "step": 1, "min_length": 2, "signals": ["a"]},
        features={"extractor": "raw", "options": {"length": 5, "tensor": "y"}},
        prediction={"task": "regression", "output": "y"},
    )
    asked = []

    async def infer(model, tensors):
        asked.append(tensors)
        return {"y": np.zeros((1, 1))}, 1

    class Store:
        async def commit(self, step):
            pass

    pipeline = AssetPipeline(
        AssetSettings(name="a", adapter="file", context={"tensor": "x"}),
        models=[(manifest, extractor("raw"))],
        infer=infer,
        store=Store(),
        writer=None,
    )
    for second in (1, 2):
        reading = Reading("a", float(second), "1", Clock(second * 10**9, 0, 0))
        await pipeline.step(Batch((reading,), cursor=b"c"))
    assert [tensors["x"].tolist() for tensors in asked] == [[[[1, 1, 1, 1, 2]]]]
