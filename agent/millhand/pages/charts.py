"""Line charts as inline SVG: readable on a phone, in light and dark, without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 40, 44
CHARACTER = 9
"""Width of a letter in the largest type that the page uses."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with a label; `style` is a CSS class: alert, failure, onset or peak."""

    x: float
    label: str
    style: str


@dataclass(frozen=True)
class Span:
    """A shaded stretch from `start` to `end` with a label in its middle; `style` is a CSS class: lead or idle."""

    start: float
    end: float
    label: str
    style: str = "lead"


@dataclass(frozen=True)
class Chart:
    """One line over x. `x` and `y` have the same length; the axes carry units in their labels.

    gap: the line breaks where neighbouring points are further apart in x than this.
    """

    title: str
    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    marks: Sequence[Mark] = field(default_factory=tuple)
    spans: Sequence[Span] = field(default_factory=tuple)
    height: int = 200
    y_low: float | None = None
    y_high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    gap: float = math.inf

    def __html__(self) -> str:
        """The chart as one SVG element, scaled by its viewBox; templates take it as it is."""
        frame = _Frame(self)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(self.title)}">',
            *(frame.span(span) for span in self.spans),
            *frame.grid(),
            f'<path class="line" d="{frame.path()}"/>',
            *(frame.span_label(span) for span in self.spans),
            *frame.marks(),
            _text("axis", (LEFT + WIDTH - RIGHT) / 2, self.height - 5, "middle", self.x_label),
            _text("axis", 4, 16, "start", self.y_label),
            "</svg>",
        ]
        return "".join(parts)


class _Frame:
    """Maps a chart's data to the drawing."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        low = -math.inf if chart.x_low is None else chart.x_low
        high = math.inf if chart.x_high is None else chart.x_high
        finite = ((x, y) for x, y in zip(chart.x, chart.y, strict=True) if math.isfinite(x) and math.isfinite(y))
        points = [(x, y) for x, y in finite if low <= x <= high]
        self.points = points or [(0.0, 0.0)]
        xs, ys = zip(*self.points, strict=True)
        self.x_low = min(xs) if chart.x_low is None else chart.x_low
        self.x_high = max(xs) if chart.x_high is None else chart.x_high
        self.y_low = min(ys) if chart.y_low is None else chart.y_low
        self.y_high = max(ys) if chart.y_high is None else chart.y_high
        if self.x_high <= self.x_low:
            self.x_high = self.x_low + 1
        if self.y_high <= self.y_low:
            self.y_high = self.y_low + 1
        self.bottom = chart.height - BOTTOM

    def at_x(self, x: float) -> float:
        return LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(self, y: float) -> float:
        return self.bottom - (y - self.y_low) / (self.y_high - self.y_low) * (self.bottom - TOP)

    def path(self) -> str:
        steps: list[str] = []
        last = -math.inf
        for x, y in self.points:
            steps.append(
                f"{'M' if x - last > self.chart.gap or not steps else 'L'}{self.at_x(x):.1f} {self.at_y(y):.1f}"
            )
            last = x
        return "".join(steps)

    def grid(self) -> list[str]:
        parts = []
        for value in ticks(self.y_low, self.y_high, 4):
            y = self.at_y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text("axis", LEFT - 6, y + 5, "end", f"{value:g}"))
        for value in ticks(self.x_low, self.x_high, 6):
            x = self.at_x(value)
            parts.append(_text("axis", x, self.bottom + 18, "middle", f"{value:g}"))
        return parts

    def span(self, span: Span) -> str:
        start, end = self.at_x(span.start), self.at_x(span.end)
        box = f'x="{start:.1f}" y="{TOP}" width="{max(end - start, 0):.1f}" height="{self.bottom - TOP}"'
        return f'<rect class="span {span.style}" {box}/>'

    def span_label(self, span: Span) -> str:
        middle = (self.at_x(span.start) + self.at_x(span.end)) / 2
        middle = min(middle, WIDTH - RIGHT - len(span.label) * CHARACTER / 2)
        return _text(f"span {span.style}", middle, self.bottom - 8, "middle", span.label) if span.label else ""

    def marks(self) -> list[str]:
        """Labels stand beside their lines; neighbours alternate between two rows, so that none covers another."""
        lines, labels = [], []
        for index, mark in enumerate(sorted(self.chart.marks, key=lambda mark: mark.x)):
            if not self.x_low <= mark.x <= self.x_high:
                continue
            x = self.at_x(mark.x)
            anchor, offset = ("end", -5) if x + len(mark.label) * CHARACTER > WIDTH - RIGHT else ("start", 5)
            y = TOP - 6 if index % 2 else TOP + 14
            lines.append(f'<line class="mark {mark.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{self.bottom}"/>')
            if mark.label:
                labels.append(_text(f"mark {mark.style}", x + offset, y, anchor, mark.label))
        return lines + labels


def _text(style: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between low and high, steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(about, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
