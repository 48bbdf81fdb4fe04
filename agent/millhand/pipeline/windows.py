"""Windows: the part of an asset's recent past that one model looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.records import AssetState, Waveform


@dataclass(frozen=True, slots=True)
class Window:
    """What a feature extractor sees.

    times_ns: [n] int64, source time of each step, rising.
    signals: name -> [n] float64; NaN where a step has no GOOD value.
    waveforms: the newest GOOD snapshot of each name inside the window.
    complete: False while the asset's history is shorter than the window's length (but at least `min_length`).
    """

    asset: str
    start_ns: int
    end_ns: int
    times_ns: NDArray[np.int64]
    signals: Mapping[str, NDArray[np.float64]]
    waveforms: Mapping[str, Waveform] = field(default_factory=dict)
    state: AssetState = AssetState.UNKNOWN
    complete: bool = True
    context: Mapping[str, Any] = field(default_factory=dict)
    """Owner's constants for this asset from `[assets.context]`: bearing geometry, rated speed, ..."""
