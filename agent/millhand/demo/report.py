"""demo.html: one self-contained page about one run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from millhand import __version__
from millhand.pages import render
from millhand.pages.charts import Chart, Mark, Span

if TYPE_CHECKING:
    from millhand.demo.session import Outcome

SIGNALS = (
    ("bearing_temperature", "Bearing temperature", "°C"),
    ("current", "Motor current", "A"),
    ("speed", "Speed", "rpm"),
)
GAP_S = 2.0
"""Where nothing was judged for longer than this, the curves of judged windows break."""
KINDS = {
    "bearing_outer": "Outer-race bearing damage",
    "bearing_inner": "Inner-race bearing damage",
    "imbalance": "Imbalance",
    "misalignment": "Misalignment",
    "looseness": "Looseness",
}


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the page. `outcome` is what `millhand.demo.session.run` returned."""
    path.write_text(render("millhand.demo", "report.html.j2", **_context(outcome)), encoding="utf-8")


def _context(outcome: Outcome) -> dict[str, Any]:
    spectrum = _spectrum(outcome)
    return {
        "title": outcome.fault,
        "version": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": outcome.seed,
        "headline": _headline(outcome),
        "summary": _summary(outcome),
        "reasons": outcome.shortcomings,
        "gap_s": f"{GAP_S:g}",
        "facts": _facts(outcome),
        "charts": _charts(outcome),
        "spectrum": spectrum and {"text": spectrum[0], "chart": spectrum[1]},
        "orders": outcome.orders,
        "spoken": outcome.spoken,
        "telemetry": _telemetry(outcome),
        "hardware": outcome.hardware,
    }


def _headline(outcome: Outcome) -> str:
    if outcome.fault == "none":
        return "A healthy life: nothing to report" if not outcome.alerts else "A healthy life, and false alerts"
    if not outcome.true_alerts:
        return "The machine failed and nobody was warned"
    first = outcome.true_alerts[0]
    return f"{_words(first['kind'])} seen {first['lead_time_s']:.1f} s before the machine failed"


def _summary(outcome: Outcome) -> str:
    life = f"A motor-bearing-pump skid ran for {outcome.life_s:.0f} s of its own time, read over Modbus TCP."
    damage = (
        f" Damage began at {outcome.onset_s:.1f} s and ended in failure at {outcome.failure_s:.1f} s; "
        "no register tells of it."
        if outcome.onset_s is not None
        else " Nothing was wrong with it."
    )
    return life + damage


def _facts(outcome: Outcome) -> list[dict[str, str]]:
    tally = outcome.tally
    lead = outcome.true_alerts[0]["lead_time_s"] if outcome.true_alerts else None
    foreseen = None if outcome.fault == "none" else lead is not None
    p99_ms = outcome.latency_ms["p99"]
    cells: list[tuple[str, str, bool | None]] = [
        ("lead time", "none" if lead is None else f"{lead:.1f} s", foreseen),
        ("false alerts", str(outcome.false_alerts), outcome.false_alerts == 0),
        ("answers lost", str(tally.lost), tally.lost == 0),
        ("answers doubled", str(tally.duplicates), tally.duplicates == 0),
        (
            "reading to prediction, p99 (limit 20 ms)",
            "none" if p99_ms is None else f"{p99_ms:.1f} ms",
            p99_ms is not None and p99_ms <= 20,
        ),
        ("memory of the daemon (limit 80 MB)", f"{outcome.rss_mb['daemon']:.0f} MB", outcome.rss_mb["daemon"] <= 80),
    ]
    styles = {True: "good", False: "bad", None: ""}
    return [{"label": label, "value": value, "style": styles[good]} for label, value, good in cells]


def _charts(outcome: Outcome) -> list[Chart]:
    marks, spans = _marks(outcome)
    idle = [Span(start, end, "", "idle") for start, end in outcome.idle]
    times = [time_s for time_s, _ in outcome.health]
    health = Chart(
        "Probability of a fault",
        times,
        [value for _, value in outcome.health],
        "rig time, s",
        "0 to 1",
        marks,
        [*idle, *spans],
        height=230,
        y_low=0.0,
        y_high=1.0,
        x_low=0.0,
        x_high=outcome.life_s,
        gap=GAP_S,
    )
    charts = [health]
    velocity = [(t, v) for t, v in outcome.velocity if np.isfinite(v)]
    series = [("Vibration velocity", "mm/s", velocity)]
    series += [(title, unit, outcome.signals.get(name, [])) for name, title, unit in SIGNALS]
    for title, unit, points in series:
        if points:
            charts.append(
                Chart(
                    title,
                    [t for t, _ in points],
                    [v for _, v in points],
                    "rig time, s",
                    unit,
                    [Mark(mark.x, "", mark.style) for mark in marks],
                    idle,
                    height=160,
                    x_low=0.0,
                    x_high=outcome.life_s,
                    gap=GAP_S,
                )
            )
    return charts


def _marks(outcome: Outcome) -> tuple[list[Mark], list[Span]]:
    marks, spans = [], []
    if outcome.onset_s is not None and outcome.failure_s is not None:
        marks = [Mark(outcome.onset_s, "damage begins", "onset"), Mark(outcome.failure_s, "failure", "failure")]
    for alert in outcome.alerts:
        marks.append(Mark(alert["rig_time_s"], "alert", "alert"))
    if outcome.true_alerts and outcome.failure_s is not None:
        first = outcome.true_alerts[0]
        spans = [Span(first["rig_time_s"], outcome.failure_s, f"{first['lead_time_s']:.1f} s lead")]
    return marks, spans


def _spectrum(outcome: Outcome) -> tuple[str, Chart] | None:
    """The envelope spectrum (bearing) or the amplitude spectrum (shaft faults) of the snapshot behind the alert."""
    waveform = outcome.waveform
    if waveform is None or not outcome.alerts:
        return None
    from millhand.demo.spectra import spectrum_of

    return spectrum_of(waveform, outcome.alerts[0])


def _telemetry(outcome: Outcome) -> list[tuple[str, str]]:
    tally = outcome.tally
    return [
        ("Running time that was watched", f"{outcome.watched_percent:.0f} %"),
        ("Answers that the rig served", f"{tally.produced:,}"),
        ("of these at the hub", f"{tally.stored:,}"),
        ("lost", f"{tally.lost:,}"),
        ("stored twice", f"{tally.duplicates:,}"),
        ("Rows acknowledged by the hub: readings, predictions, alerts, orders", f"{outcome.acked:,}"),
        ("Broker", outcome.broker),
    ]


def _words(kind: str) -> str:
    return KINDS.get(kind, kind.replace("_", " ").capitalize())
