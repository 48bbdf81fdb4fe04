"""The spectrum behind an alert: what a vibration analyst would look at to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from millhand.pages.charts import Chart, Mark
from millhand.pipeline.features import GRAVITY_M_S2, envelope_spectrum, integrate, spectrum

ENVELOPE_BAND_HZ = (1500.0, 5000.0)
"""Where structures of this size ring; the same band as the classifier's."""
ENVELOPE_SHOWN_HZ = 500.0
VELOCITY_SHOWN_HZ = 320.0
HARMONICS = (1, 2, 3)
SHAFT_LINES: dict[str, tuple[tuple[float, ...], str]] = {
    "imbalance": ((1,), "imbalance shows at the first line (1x)"),
    "misalignment": ((1, 2), "misalignment shows at twice that (2x)"),
    "looseness": ((0.5, 1, 1.5, 2, 2.5, 3), "looseness shows at many multiples of that, and at halves"),
}
"""Kind of fault -> its lines in multiples of the shaft's frequency, and the sentence that says so."""


def spectrum_of(waveform: dict[str, Any], alert: dict[str, Any]) -> tuple[str, Chart]:
    """(text, chart): the envelope spectrum for bearing faults, the velocity spectrum for faults of the shaft."""
    samples = np.asarray(waveform["samples"], np.float64)
    rate_hz = float(waveform["sample_rate_hz"])
    facts = alert["evidence"].get("facts", {})
    if alert["kind"].startswith("bearing"):
        return _envelope(samples, rate_hz, alert["kind"], facts)
    return _velocity(samples, rate_hz, alert["kind"], facts)


def _envelope(samples: Any, rate_hz: float, kind: str, facts: dict[str, float]) -> tuple[str, Chart]:
    found = envelope_spectrum(samples, rate_hz, *ENVELOPE_BAND_HZ)
    race = "bpfi" if kind.endswith("inner") else "bpfo"
    base_hz = facts.get(f"{race}_hz", 0.0)
    marks = _harmonics(base_hz, race.upper(), ENVELOPE_SHOWN_HZ)
    text = (
        f"Envelope spectrum of the snapshot behind the alert, {ENVELOPE_BAND_HZ[0] / 1000:g} to "
        f"{ENVELOPE_BAND_HZ[1] / 1000:g} kHz. Impacts of the damaged race come at {race.upper()} = {base_hz:.1f} Hz, "
        f"as geometry and speed say; rolling slip moves the lines a little."
    )
    return text, _chart("Envelope spectrum", found.frequency_hz, found.amplitude, "g", marks, ENVELOPE_SHOWN_HZ)


def _velocity(samples: Any, rate_hz: float, kind: str, facts: dict[str, float]) -> tuple[str, Chart]:
    found = integrate(spectrum(samples * GRAVITY_M_S2, rate_hz), 5.0)
    shaft_hz = facts.get("shaft_hz", 0.0)
    lines, sentence = SHAFT_LINES.get(kind, (HARMONICS, "faults of the shaft show at its multiples"))
    marks = _harmonics(shaft_hz, "x", VELOCITY_SHOWN_HZ, lines)
    text = f"Velocity spectrum of the snapshot behind the alert. The shaft turns at {shaft_hz:.1f} Hz; {sentence}."
    return text, _chart(
        "Velocity spectrum", found.frequency_hz, found.amplitude * 1000, "mm/s", marks, VELOCITY_SHOWN_HZ
    )


def _harmonics(base_hz: float, name: str, shown_hz: float, lines: Sequence[float] = HARMONICS) -> list[Mark]:
    if base_hz <= 0:
        return []
    return [Mark(base_hz * n, f"{n:g}{name}", "peak") for n in lines if base_hz * n < shown_hz]


def _chart(title: str, frequencies_hz: Any, amplitudes: Any, unit: str, marks: list[Mark], shown_hz: float) -> Chart:
    shown = (frequencies_hz > 2.0) & (frequencies_hz <= shown_hz)
    return Chart(
        title,
        frequencies_hz[shown].tolist(),
        amplitudes[shown].tolist(),
        "Hz",
        unit,
        marks,
        height=220,
        y_low=0.0,
        x_low=0.0,
        x_high=shown_hz,
    )
