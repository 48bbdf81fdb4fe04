"""Features of a window, NumPy only: statistics, spectrum and envelope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Model inputs (without the batch dimension) and the measured facts that explain them."""

    tensors: Mapping[str, NDArray[np.float32]]
    evidence: Mapping[str, float] = field(default_factory=dict)
