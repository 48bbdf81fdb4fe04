"""Bar charts as inline SVG: one bar a row, its label above it, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from millhand.pages.charts import WIDTH

ROW = 46
"""Height of a row: a line of the largest type that the page uses, and the bar."""
BAR = 14
LINE_CHARACTERS = 50
"""Of the largest type that the page uses: label and value together."""
EDGE = 4
DECADES_CAP = 8


@dataclass(frozen=True)
class Bar:
    """A row. `style` is a CSS class: before, after, good or bad."""

    label: str
    value: float
    text: str
    """The value with its unit, at the end of the label's line."""
    style: str = "after"
    reach: float | None = None
    """A thin line goes on from the bar to here, such as to a p99."""


@dataclass(frozen=True)
class Bars:
    """Bars from 0, or with `log` from the decade below the smallest value that is above 0."""

    title: str
    rows: Sequence[Bar]
    log: bool = False

    def __html__(self) -> str:
        """The chart as one SVG element, scaled by its viewBox; templates take it as it is."""
        height = ROW * len(self.rows) + EDGE
        parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(self.title)}">']
        for index, row in enumerate(self.rows):
            top = ROW * index
            middle = top + 24 + BAR / 2
            length = self._length(row.value)
            parts += [
                f'<text class="row" x="{EDGE}" y="{top + 18}">{escape(_cut(row))}</text>',
                f'<text class="value" x="{WIDTH - EDGE}" y="{top + 18}" text-anchor="end">{escape(row.text)}</text>',
                f'<rect class="rail" x="{EDGE}" y="{top + 24}" width="{WIDTH - 2 * EDGE}" height="{BAR}"/>',
                f'<rect class="{row.style}" x="{EDGE}" y="{top + 24}" width="{length:.1f}" height="{BAR}"/>',
            ]
            if row.reach is not None:
                ends = EDGE + length, EDGE + self._length(row.reach)
                parts.append(
                    f'<path class="reach {row.style}" d="M{ends[0]:.1f} {middle}H{ends[1]:.1f}'
                    f'M{ends[1]:.1f} {middle - 5}V{middle + 5}"/>'
                )
        return "".join([*parts, "</svg>"])

    def _length(self, value: float) -> float:
        low, high = self.scale
        if self.log:
            share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        else:
            share = value / high if high > 0 else 0.0
        return min(max(share, 0.0), 1.0) * (WIDTH - 2 * EDGE)

    @property
    def scale(self) -> tuple[float, float]:
        """What the bars' ends stand for: values, or with `log` powers of ten."""
        values = [value for row in self.rows for value in (row.value, row.reach or 0.0) if value > 0]
        if not self.log:
            return 0.0, max(values, default=1.0)
        high = math.ceil(math.log10(max(values, default=1.0)))
        low = math.floor(math.log10(min(values, default=0.1)))
        return max(min(low, high - 1), high - DECADES_CAP), high


def _cut(row: Bar) -> str:
    """A label that fits its line beside the value; of a long path the end says most."""
    room = max(LINE_CHARACTERS - len(row.text), 4)
    return row.label if len(row.label) <= room else f"…{row.label[1 - room :]}"
