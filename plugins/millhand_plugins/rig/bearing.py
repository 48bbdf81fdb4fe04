"""Geometry and kinematics of a rolling-element bearing."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from millhand.validation import StrictTable


class BearingGeometry(StrictTable):
    """A bearing with a still outer ring. The defaults are a deep-groove ball bearing 6205 (25 x 52 x 15 mm).

    The dimensions are those that the Case Western Reserve University bearing data center states for its 6205-2RS
    drive-end bearing (ball 0.3126 in, pitch 1.537 in, 9 balls).
    """

    balls: int = Field(default=9, ge=2)
    """Rolling elements."""
    ball_diameter_mm: float = Field(default=7.94, gt=0)
    pitch_diameter_mm: float = Field(default=39.04, gt=0)
    """Of the circle through the centres of the rolling elements."""
    contact_angle_deg: float = Field(default=0.0, ge=0, lt=90)

    @model_validator(mode="after")
    def _fits(self) -> BearingGeometry:
        if self.ball_diameter_mm >= self.pitch_diameter_mm:
            raise ValueError("ball_diameter_mm must be smaller than pitch_diameter_mm")
        return self

    @property
    def _ratio(self) -> float:
        return self.ball_diameter_mm / self.pitch_diameter_mm * math.cos(math.radians(self.contact_angle_deg))

    # Defect frequencies as multiples of the shaft frequency, for rolling without slip: R. B. Randall and J. Antoni,
    # "Rolling element bearing diagnostics - a tutorial", Mech. Syst. Signal Process. 25 (2011), section 2.

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
