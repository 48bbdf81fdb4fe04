"""Features of a window, NumPy only: statistics, spectrum, envelope, orders, and the extractors that ship with the core.

Functions work on the last axis of real arrays [..., n] and are vectorised over the others. Frequencies are in Hz; a
line's amplitude is its peak, not its RMS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from millhand.hookspecs import FeatureExtractor
    from millhand.pipeline.windows import Window

Array = NDArray[np.float64]

GRAVITY_M_S2 = 9.80665
"""Standard gravity (ISO 80000-3): accelerations in g times this are in m/s2."""
_TINY = 1e-12
"""What a square or a logarithm is kept above: signals in SI units never get near it."""


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Model inputs (without the batch dimension) and the measured facts that explain them."""

    tensors: Mapping[str, NDArray[np.float32]]
    evidence: Mapping[str, float] = field(default_factory=dict)


# ---- statistics -----------------------------------------------------------------------------------------------------


def rms(samples: ArrayLike) -> Array:
    """Root of the mean square, [...], in the samples' unit."""
    return np.asarray(np.sqrt(np.mean(np.square(_real(samples)), axis=-1)))


def peak(samples: ArrayLike) -> Array:
    """Largest magnitude, [...], in the samples' unit."""
    return np.asarray(np.max(np.abs(_real(samples)), axis=-1))


def crest_factor(samples: ArrayLike) -> Array:
    """Peak over RMS, [...]: 1.41 for a sine, about 3 to 4 for noise, more for impacts. 0 for a signal of zeros."""
    return np.asarray(peak(samples) / np.maximum(rms(samples), _TINY))


def skewness(samples: ArrayLike) -> Array:
    """Third standardised moment (biased estimate), [...]: 0 for a symmetric signal and for a constant one."""
    return _standardised_moment(samples, 3)


def kurtosis(samples: ArrayLike) -> Array:
    """Fourth standardised moment (biased, not reduced by 3), [...]: 1.5 for a sine, 3 for Gaussian noise."""
    return _standardised_moment(samples, 4)


def _standardised_moment(samples: ArrayLike, order: int) -> Array:
    values = _real(samples)
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True))
    return np.asarray(np.mean((centred / np.maximum(spread, _TINY)) ** order, axis=-1))


# ---- spectrum -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One-sided amplitude spectrum under a Hann window.

    frequency_hz: [bins], from 0 to half the sample rate. amplitude: [..., bins]; a sine of amplitude A on a bin's
    centre shows as A there.
    """

    frequency_hz: Array
    amplitude: Array

    HANN_NOISE_BANDWIDTH = 1.5
    """Equivalent noise bandwidth of the Hann window in bins (F. J. Harris, Proc. IEEE 66 (1978), table 1)."""

    @property
    def resolution_hz(self) -> float:
        return float(self.frequency_hz[1])

    def band_rms(self, low_hz: float, high_hz: float) -> Array:
        """RMS of what lies in low_hz..high_hz, [...], by Parseval's theorem."""
        inside = (self.frequency_hz >= low_hz) & (self.frequency_hz <= high_hz)
        power = np.sum(np.square(self.amplitude[..., inside]), axis=-1)
        return np.asarray(np.sqrt(power / (2 * self.HANN_NOISE_BANDWIDTH)))

    def band_energies(self, bands: int) -> Array:
        """Mean square in each of `bands` equal bands from 0 to half the sample rate, [..., bands].

        Raises ValueError for more bands than bins.
        """
        bins = self.amplitude.shape[-1]
        if not 1 <= bands <= bins:
            raise ValueError(f"bands = {bands}: the spectrum has {bins} bins")
        edges = np.linspace(0, bins, bands + 1).astype(int)[:-1]
        power = np.add.reduceat(np.square(self.amplitude), edges, axis=-1)
        return np.asarray(power / (2 * self.HANN_NOISE_BANDWIDTH))

    def line(self, frequency_hz: ArrayLike, tolerance_hz: ArrayLike) -> Array:
        """Amplitude of the lines at `frequency_hz` [k], each give or take `tolerance_hz` (one or [k]): [..., k].

        It is taken from all the energy within the tolerance, so it neither falls between two bins nor shrinks when a
        changing speed smears the line. A line beyond the spectrum is 0.
        """
        centres = np.atleast_1d(np.asarray(frequency_hz, dtype=np.float64))
        reach = np.maximum(np.asarray(tolerance_hz, dtype=np.float64), 1.5 * self.resolution_hz)
        first = np.ceil((centres - reach) / self.resolution_hz).astype(int)
        last = np.floor((centres + reach) / self.resolution_hz).astype(int)
        bins = self.amplitude.shape[-1]
        sums = np.concatenate(
            [np.zeros((*self.amplitude.shape[:-1], 1)), np.cumsum(np.square(self.amplitude), axis=-1)], axis=-1
        )
        power = sums[..., np.clip(last + 1, 0, bins)] - sums[..., np.clip(first, 0, bins)]
        return np.asarray(np.sqrt(np.clip(power, 0, None) / self.HANN_NOISE_BANDWIDTH))

    def orders(self, shaft_hz: float, orders: ArrayLike, tolerance: float = 0.02) -> Array:
        """Amplitudes at multiples of the shaft's frequency, [..., k]; `orders` [k], `tolerance` a share of each order.

        The multiples may be whole (1x, 2x), halves, or the defect orders of a bearing.
        """
        centres = shaft_hz * np.atleast_1d(np.asarray(orders, dtype=np.float64))
        return self.line(centres, centres * tolerance)

    def floor(self, low_hz: float, high_hz: float) -> Array:
        """Median amplitude of the bins in low_hz..high_hz, [...]: the noise between the lines."""
        inside = (self.frequency_hz >= low_hz) & (self.frequency_hz <= high_hz)
        return np.asarray(np.median(self.amplitude[..., inside], axis=-1))


def spectrum(samples: ArrayLike, sample_rate_hz: float) -> Spectrum:
    """Amplitude spectrum of samples [..., n] without their mean, under a Hann window."""
    values = _real(samples)
    count = values.shape[-1]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(count) / count)
    lines = np.fft.rfft((values - values.mean(axis=-1, keepdims=True)) * window)
    frequency = np.fft.rfftfreq(count, 1 / sample_rate_hz).astype(np.float64)
    return Spectrum(frequency, np.abs(lines) * (2 / float(window.sum())))


def integrate(acceleration: Spectrum, low_hz: float) -> Spectrum:
    """Velocity spectrum (m/s from m/s2) of an acceleration spectrum; below low_hz it is 0, as drift would swamp it."""
    frequency = acceleration.frequency_hz
    weight = np.where(frequency >= low_hz, 1 / (2 * np.pi * np.maximum(frequency, _TINY)), 0.0)
    return Spectrum(frequency, np.asarray(acceleration.amplitude * weight))


def velocity_rms_mm_s(
    acceleration_m_s2: ArrayLike, sample_rate_hz: float, low_hz: float = 10.0, high_hz: float = 1000.0
) -> Array:
    """Vibration severity: RMS velocity in mm/s of acceleration [..., n] in 10..1000 Hz, as ISO 20816-3 measures it.

    (For machines slower than 600 r/min the standard starts at 2 Hz: pass `low_hz`.)
    """
    velocity = integrate(spectrum(acceleration_m_s2, sample_rate_hz), low_hz)
    return velocity.band_rms(low_hz, high_hz) * 1000


# ---- envelope -------------------------------------------------------------------------------------------------------


def band_pass(samples: ArrayLike, sample_rate_hz: float, low_hz: float, high_hz: float) -> Array:
    """What of samples [..., n] lies in low_hz..high_hz; a filter without delay, by FFT."""
    values = _real(samples)
    count = values.shape[-1]
    return np.asarray(np.fft.irfft(_cut(values, sample_rate_hz, low_hz, high_hz), count))


def envelope(samples: ArrayLike, sample_rate_hz: float, low_hz: float, high_hz: float) -> Array:
    """Envelope [..., n] of the band low_hz..high_hz: magnitude of the analytic signal (Hilbert transform by FFT).

    The band should hold a resonance that impacts excite; see R. B. Randall and J. Antoni, Mech. Syst. Signal Process.
    25 (2011), section 6.
    """
    values = _real(samples)
    lines = _cut(values, sample_rate_hz, low_hz, high_hz)
    full = np.zeros((*lines.shape[:-1], values.shape[-1]), dtype=np.complex128)
    full[..., : lines.shape[-1]] = 2 * lines
    return np.asarray(np.abs(np.fft.ifft(full)))


def envelope_spectrum(samples: ArrayLike, sample_rate_hz: float, low_hz: float, high_hz: float) -> Spectrum:
    """Spectrum of the envelope: shows how often impacts come, not what rings."""
    return spectrum(envelope(samples, sample_rate_hz, low_hz, high_hz), sample_rate_hz)


def _cut(values: Array, sample_rate_hz: float, low_hz: float, high_hz: float) -> NDArray[np.complex128]:
    frequency = np.fft.rfftfreq(values.shape[-1], 1 / sample_rate_hz)
    # The mean and the Nyquist bin have no partner of negative frequency: they belong to no envelope.
    keep = (frequency >= low_hz) & (frequency <= high_hz) & (frequency > 0) & (frequency < sample_rate_hz / 2)
    return np.asarray(np.fft.rfft(values) * keep)


def _real(samples: ArrayLike) -> Array:
    return np.asarray(samples, dtype=np.float64)


# ---- extractors -----------------------------------------------------------------------------------------------------
# Options come from [features.options] in model.toml by way of window.context. All extractors take `tensor`, the name
# of the model's input (default "input").


class RawExtractor:
    """The window's signals as they are: float32 [channels, length], in the order of `[window] signals`.

    A step without a value repeats the one before it. Option `length`: a shorter history is padded on the left with
    its first step. None where a signal has no value at all.
    """

    name = "raw"

    def extract(self, window: Window) -> FeatureSet | None:
        values = _filled(window)
        if values is None:
            return None
        missing = int(window.context.get("length", 0)) - values.shape[-1]
        if missing > 0:
            values = np.pad(values, ((0, 0), (missing, 0)), mode="edge")
        return _feature_set(window, values)


class StatisticsExtractor:
    """Statistics of every signal and then of every waveform: float32 [channels, 7].

    In order: mean, standard deviation, RMS, peak, crest factor, skewness, kurtosis. None where one has no value.
    """

    name = "statistics"

    def extract(self, window: Window) -> FeatureSet | None:
        signals = _filled(window)
        if signals is None or any(len(waveform.array) == 0 for waveform in window.waveforms.values()):
            return None
        channels = [*signals, *(waveform.array for waveform in window.waveforms.values())]
        if not channels:
            return None
        rows = [
            [np.mean(row), np.std(row), rms(row), peak(row), crest_factor(row), skewness(row), kurtosis(row)]
            for row in map(_real, channels)
        ]
        return _feature_set(window, np.asarray(rows))


class SpectrumExtractor:
    """Logarithm (base 10) of the mean square in equal bands of every waveform: float32 [waveforms, bands].

    Option `bands` (default 64). Evidence: each waveform's RMS. None without waveforms or where one is too short.
    """

    name = "spectrum"

    def extract(self, window: Window) -> FeatureSet | None:
        bands = int(window.context.get("bands", 64))
        waveforms = window.waveforms
        if not waveforms or any(len(waveform.array) < 2 * bands for waveform in waveforms.values()):
            return None
        energies = [spectrum(wave.array, wave.sample_rate_hz).band_energies(bands) for wave in waveforms.values()]
        evidence = {f"{name}_rms_{wave.unit}": float(rms(wave.array)) for name, wave in waveforms.items()}
        return _feature_set(window, np.log10(np.maximum(energies, _TINY)), evidence)


def builtin_extractors() -> Sequence[FeatureExtractor]:
    """The extractors of the core: `raw`, `statistics`, `spectrum`."""
    return (RawExtractor(), StatisticsExtractor(), SpectrumExtractor())


def _feature_set(window: Window, values: NDArray[Any], evidence: Mapping[str, float] | None = None) -> FeatureSet:
    name = str(window.context.get("tensor", "input"))
    return FeatureSet({name: np.ascontiguousarray(values, dtype=np.float32)}, evidence or {})


def _filled(window: Window) -> Array | None:
    """The signals [channels, n] with gaps filled from the left (the first value also to its left), or None."""
    rows = []
    for signal in window.signals.values():
        good = np.isfinite(signal)
        if not good.any():
            return None
        newest = np.maximum.accumulate(np.where(good, np.arange(len(signal)), -1))
        rows.append(signal[np.where(newest < 0, np.argmax(good), newest)])
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), len(window.times_ns))
