"""Which label a moment of a life deserves. Damage begins too small to be seen, so labels fade into one another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.rig.asset import Fault

LABELS = ("healthy", "bearing_outer", "bearing_inner", "imbalance", "misalignment", "looseness")
"""In the order of the models' outputs."""

# Severity up to which a window counts as healthy, and from which it counts as the fault alone.
FADE: dict[Fault, tuple[float, float]] = {
    "bearing_outer": (0.015, 0.06),
    "bearing_inner": (0.02, 0.09),
    "imbalance": (0.06, 0.2),
    "misalignment": (0.04, 0.14),
    "looseness": (0.04, 0.14),
}


def share_of_fault(fault: Fault, severity: float) -> float:
    """How much of the label belongs to the fault, 0..1."""
    if fault == "none":
        return 0.0
    low, high = FADE[fault]
    return float(np.clip((severity - low) / (high - low), 0, 1))


def label_index(fault: Fault) -> int:
    """The place of the fault's label in LABELS; a life without a fault is healthy."""
    return 0 if fault == "none" else LABELS.index(fault)


def soft_label(fault: Fault, severity: float) -> NDArray[np.float32]:
    """What a net shall answer, [len(LABELS)], of sum 1: the fault's share, and healthy for the rest."""
    label = np.zeros(len(LABELS), dtype=np.float32)
    share = share_of_fault(fault, severity)
    label[label_index(fault)] = share
    label[0] += 1 - share
    return label
