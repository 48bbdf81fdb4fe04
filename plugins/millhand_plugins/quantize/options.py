"""The keys of `[plugins.quantize]`, as a maker's process reads them: no pydantic there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from millhand.errors import ModelError


class Rounding(msgspec.Struct, frozen=True):
    """What `millhand_plugins.quantize.rounding.Annealing` is told."""

    steps: int
    learning_rate: float
    weight: float
    warm_up: float
    beta_high: float
    beta_low: float


class Options(msgspec.Struct, frozen=True):
    """settings.py says what they mean and what they are by default."""

    calibration: str
    percentile: float
    rows_cap: int
    min_rows: int
    seed: int
    weight_bits: str
    channels: str
    smoothing: bool
    min_weights: int
    block: int
    zero_point: bool
    compute: str
    loss: float
    device: str
    rounding: Rounding

    @classmethod
    def read(cls, keys: Mapping[str, Any]) -> Options:
        """Raises ModelError where the table is not one that settings.py has checked."""
        try:
            return msgspec.convert(keys, cls)
        except msgspec.ValidationError as error:
            raise ModelError(f"[plugins.quantize]: {error}", hint="pass the plugin's whole table") from error
