"""Geometry and kinematics of a rolling-element bearing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BearingGeometry:
    """A bearing with a still outer ring. The defaults are a deep-groove ball bearing 6205 (25 x 52 x 15 mm).

    The dimensions are those that the Case Western Reserve University bearing data center states for its 6205-2RS
    drive-end bearing (ball 0.3126 in, pitch 1.537 in, 9 balls).
    """

    balls: int = 9
    ball_diameter_mm: float = 7.94
    pitch_diameter_mm: float = 39.04
    contact_angle_deg: float = 0.0

    @classmethod
    def from_context(cls, context: Mapping[str, Any]) -> BearingGeometry:
        """The geometry in the table `bearing` of an asset's context; what it leaves out keeps its default."""
        return cls(**{key: context.get("bearing", {}).get(key, getattr(cls(), key)) for key in cls.__slots__})

    @property
    def _ratio(self) -> float:
        return self.ball_diameter_mm / self.pitch_diameter_mm * math.cos(math.radians(self.contact_angle_deg))

    # Defect frequencies as multiples of the shaft frequency, for rolling without slip: R. B. Randall and J. Antoni,
    # "Rolling element bearing diagnostics - a tutorial", Mech. Syst. Signal Process. 25 (2011), equations 1 to 4.

    @property
    def ftf(self) -> float:
        """Cage (fundamental train) order."""
        return (1 - self._ratio) / 2

    @property
    def bpfo(self) -> float:
        """Order at which balls pass a point of the outer race."""
        return self.balls * (1 - self._ratio) / 2

    @property
    def bpfi(self) -> float:
        """Order at which balls pass a point of the inner race."""
        return self.balls * (1 + self._ratio) / 2

    @property
    def bsf(self) -> float:
        """Ball spin order."""
        return (1 - self._ratio**2) * self.pitch_diameter_mm / (2 * self.ball_diameter_mm)
